"""Streaming monocular 3D reconstruction for ROS 2: camera frames in; poses, depth and point clouds out."""

__version__ = "0.1.0"
