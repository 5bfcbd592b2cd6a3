"""Frames that outputs are given in, and the camera's place on the robot. No ROS."""

from __future__ import annotations

import numpy as np

from speed3r_ros.mapping.geometry import T_link_optical, inverse, transform

CAMERA_FRAME = "camera_optical_frame"  # where the images name none, as recorded inputs do


def parse_pose(text: str) -> np.ndarray:
    """`x y z qx qy qz qw` -> (4, 4). Raises ValueError naming the value."""
    try:
        values = np.array([float(item) for item in text.replace(",", " ").split()])
    except ValueError:
        values = np.zeros(0)
    if len(values) != 7 or not np.isfinite(values).all() or np.linalg.norm(values[3:]) < 1e-6:
        raise ValueError(f"frames.base_to_camera = {text!r}: expected `x y z qx qy qz qw` with a non-zero quaternion")
    return transform(values[:3], values[3:])


def twist_between(T_before: np.ndarray, T_now: np.ndarray, seconds: float) -> np.ndarray:
    """Mean velocity (6,) in the moving frame over an interval: linear, then angular (axis-angle rate)."""
    if seconds <= 0:
        return np.zeros(6)
    step = inverse(T_before) @ T_now
    R = step[:3, :3]
    axis = np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]]) / 2
    sine = np.linalg.norm(axis)
    angle = np.arctan2(sine, (np.trace(R) - 1) / 2)
    return np.concatenate([step[:3, 3], axis * (angle / sine if sine > 1e-12 else 1.0)]) / seconds


class WorldFrame:
    """From the engine's world (the first camera's optical axes) to z-up frames (REP-103, REP-105).

    T_odom_base(t) = T_base_camera T_world_camera(t) T_base_camera^-1: the identity at first, and a camera that moves
    along its optical axis moves the base forward. When the base is the camera itself, the map is levelled by the
    optical convention.
    """

    def __init__(self, T_base_cam: np.ndarray) -> None:
        self.T_base_cam = T_base_cam
        self.T_map_world = T_link_optical if np.allclose(T_base_cam, np.eye(4)) else T_base_cam

    def base(self, T_world_cam: np.ndarray) -> np.ndarray:
        """Pose of the base in odom (4, 4)."""
        return self.T_map_world @ T_world_cam @ inverse(self.T_base_cam)

    def points(self, points: np.ndarray) -> np.ndarray:
        """World points (N, 3) in the map."""
        return points @ self.T_map_world[:3, :3].T + self.T_map_world[:3, 3]
