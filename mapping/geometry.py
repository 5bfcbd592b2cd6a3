"""Rigid transforms as 4 x 4 matrices and quaternions in x, y, z, w order (ROS), float64, over any leading axes."""

from __future__ import annotations

import numpy as np

T_link_optical = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""Optical frame (x right, y down, z forward) in the camera link (x forward, y left, z up): REP-103."""


def _outer_from_matrix() -> np.ndarray:
    xx, xy, xz, yx, yy, yz, zx, zy, zz = np.eye(9)
    outer = [
        [xx - yy - zz, xy + yx, xz + zx, zy - yz],
        [xy + yx, -xx + yy - zz, yz + zy, xz - zx],
        [xz + zx, yz + zy, -xx - yy + zz, yx - xy],
        [zy - yz, xz - zx, yx - xy, xx + yy + zz],
    ]
    return np.array(outer).reshape(16, 9).T


OUTER_FROM_MATRIX = _outer_from_matrix()
"""(9, 16): 4 q q^T of a unit quaternion q in x, y, z, w order is the identity plus this linear map of its rotation matrix."""


def quaternion_from_matrix(R: np.ndarray) -> np.ndarray:
    """Rotations (..., 3, 3) -> unit quaternions (..., 4) in x, y, z, w order (Shepperd, 1978)."""
    R = np.asarray(R, dtype=np.float64)
    outer = R.reshape(-1, 9) @ OUTER_FROM_MATRIX
    outer[:, ::5] += 1
    best = outer[:, ::5].argmax(1)  # the row with the largest diagonal is the best conditioned
    q = outer.reshape(-1, 4, 4)[np.arange(len(outer)), best]
    return (q / np.sqrt(np.einsum("ij,ij->i", q, q))[:, None]).reshape(*R.shape[:-2], 4)


def matrix_from_quaternion(q: np.ndarray) -> np.ndarray:
    """Quaternions (..., 4) in x, y, z, w order, of any non-zero norm -> rotations (..., 3, 3)."""
    q = np.asarray(q, dtype=np.float64)
    x, y, z, w = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    R = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(R), (0, 1), (-2, -1))


def rotation_angle(R: np.ndarray) -> np.ndarray:
    """Angles in radians, in [0, pi], of rotations (..., 3, 3); accurate near zero, where the arc cosine is not."""
    q = quaternion_from_matrix(R)
    return 2 * np.arctan2(np.linalg.norm(q[..., :3], axis=-1), np.abs(q[..., 3]))


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
