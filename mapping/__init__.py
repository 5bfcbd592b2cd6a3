"""Trajectory, map of points and trajectory metrics. numpy only: no ROS."""
