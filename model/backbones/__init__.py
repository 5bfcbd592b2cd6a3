"""Official backbones, loaded key for key into this repository's own modules."""
