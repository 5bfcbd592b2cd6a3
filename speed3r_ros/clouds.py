"""From an estimate to valid depth and point clouds. No ROS.

A cloud is one array of rows (N, 4) float32 as PointCloud2 messages carry them: x, y, z, and 0x00RRGGBB in the bits of a
float, as RViz, PCL and the navigation stacks read it.
"""

from __future__ import annotations

import cv2
import numpy as np

from speed3r_ros.config import Config
from speed3r_ros.model.types import Estimate


def pack_colors(colors: np.ndarray) -> np.ndarray:
    """Colours (N, 3) uint8 RGB -> (N,) float32 with the bits 0x00RRGGBB."""
    if not len(colors):
        return np.zeros(0, "<f4")
    bgra = cv2.cvtColor(np.ascontiguousarray(colors)[:, None], cv2.COLOR_RGB2BGRA)
    bgra[..., 3] = 0
    return bgra.view("<f4").reshape(-1)


def make_rows(points: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Points (N, 3) and colours (N, 3) uint8 RGB -> rows (N, 4)."""
    rows = np.empty((len(points), 4), "<f4")
    rows[:, :3], rows[:, 3] = points, pack_colors(colors)
    return rows


def split_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, 4) -> points (N, 3) float32 and colours (N, 3) uint8 RGB."""
    rows = np.ascontiguousarray(rows, "<f4")
    return rows[:, :3], rows.view(np.uint8)[:, 14:11:-1]


def valid_depth(estimate: Estimate, config: Config) -> np.ndarray:
    """Depth (h, w) float32 with NaN where confidence or range rule it out (REP-118)."""
    good = (estimate.confidence >= config.depth.min_confidence) & (estimate.depth <= config.depth.max)
    return np.where(good, estimate.depth, np.float32(np.nan))


def cloud(
    estimate: Estimate, depth: np.ndarray, most: int = 0, min_confidence: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, 4), in the camera's optical frame, of the pixels whose depth (h, w) is not NaN, and which pixels: (N,) int,
    row-major. With more than `most` > 0 of them, an even subset.
    """
    K, (height, width) = estimate.K, depth.shape
    index = np.flatnonzero(np.isfinite(depth) & (estimate.confidence >= min_confidence))
    if most and len(index) > most:
        index = index[(np.arange(most) * (len(index) / most)).astype(np.intp)]
    rows = np.empty((height, width, 4), "<f4")
    np.multiply(depth, ((np.arange(width) - K[0, 2]) / K[0, 0]).astype(np.float32), out=rows[..., 0])
    np.multiply(depth, ((np.arange(height) - K[1, 2]) / K[1, 1]).astype(np.float32)[:, None], out=rows[..., 1])
    rows[..., 2] = depth
    rows[..., 3] = pack_colors(estimate.image.reshape(-1, 3)).reshape(height, width)
    return rows.reshape(-1, 4).take(index, axis=0), index


def to_world(T_world_cam: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (N, 3) of the camera's frame -> (N, 3) float64 of the world, column by column in memory as the map takes them."""
    return (T_world_cam[:3, :3] @ points.T.astype(np.float64, order="C") + T_world_cam[:3, 3:]).T
