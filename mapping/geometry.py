"""Rigid transforms as 4 x 4 matrices and quaternions in x, y, z, w order (ROS), float64, over any leading axes."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

T_link_optical = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""Optical frame (x right, y down, z forward) in the camera link (x forward, y left, z up): REP-103."""


def quaternion_from_matrix(R: np.ndarray) -> np.ndarray:
    """Rotations (..., 3, 3) -> unit quaternions (..., 4) in x, y, z, w order."""
    return Rotation.from_matrix(np.asarray(R).reshape(-1, 3, 3)).as_quat().reshape(*R.shape[:-2], 4)


def rotation_vector(R: np.ndarray) -> np.ndarray:
    """Rotations (..., 3, 3) -> axis times angle in radians (..., 3)."""
    return Rotation.from_matrix(R.reshape(-1, 3, 3)).as_rotvec().reshape(*R.shape[:-2], 3)


def matrix_from_quaternion(q: np.ndarray) -> np.ndarray:
    """Quaternions (..., 4) in x, y, z, w order, of any non-zero norm -> rotations (..., 3, 3)."""
    q = np.asarray(q, dtype=np.float64)
    return Rotation.from_quat(q.reshape(-1, 4)).as_matrix().reshape(*q.shape[:-1], 3, 3)


def transform(translation: np.ndarray, quaternion: np.ndarray) -> np.ndarray:
    """Translations (..., 3) and quaternions (..., 4) -> transforms (..., 4, 4)."""
    translation = np.asarray(translation, dtype=np.float64)
    T = np.broadcast_to(np.eye(4), (*translation.shape[:-1], 4, 4)).copy()
    T[..., :3, :3] = matrix_from_quaternion(quaternion)
    T[..., :3, 3] = translation
    return T


def inverse(T: np.ndarray) -> np.ndarray:
    """Inverse of rigid transforms (..., 4, 4)."""
    R_t = np.swapaxes(T[..., :3, :3], -1, -2)
    out = np.zeros_like(T)
    out[..., :3, :3] = R_t
    out[..., :3, 3] = -(R_t @ T[..., :3, 3:])[..., 0]
    out[..., 3, 3] = 1
    return out
