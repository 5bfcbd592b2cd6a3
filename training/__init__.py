"""Synthetic scenes, losses and the trainer of the compact model."""
