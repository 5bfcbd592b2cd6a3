"""Rendered and recorded scenes, losses, and the training recipes: `python -m speed3r_ros.training --help`."""
