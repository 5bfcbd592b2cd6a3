"""The types that cross the engine's boundary: `Frame` goes in, `Estimate` comes out. No ROS, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np


@dataclass(frozen=True)
class Frame:
    """One rectified camera image.

    image: (H, W, 3) uint8, RGB, without lens distortion.
    stamp_ns: acquisition time in integer nanoseconds (never a float: float64 seconds lose ~240 ns).
    K: (3, 3) float64 intrinsics of `image` in pixels (pixel centres at integers), or None when unknown.
    """

    image: np.ndarray
    stamp_ns: int
    K: np.ndarray | None = None


def resize_intrinsics(K: np.ndarray, size: tuple[int, int], new_size: tuple[int, int]) -> np.ndarray:
    """Intrinsics of an image (h, w) after resizing it to (h', w'); pixel centres at integers."""
    sy, sx = new_size[0] / size[0], new_size[1] / size[1]
    A = np.array([[sx, 0, (sx - 1) / 2], [0, sy, (sy - 1) / 2], [0, 0, 1]])
    return A @ K


class Tracking(Enum):
    """What the engine knows about its pose after a frame."""

    STARTING = "starting"  # first frames: the gauge exists, the geometry is still monocular
    TRACKING = "tracking"
    WEAK = "weak"  # no image features confirm the pose: it is the network's motion alone, and may jump
    LOST = "lost"  # the frame was unusable (black, saturated, constant, blurred); no pose is given


@dataclass(frozen=True)
class Estimate:
    """What the engine says about one frame, at the network's resolution (h, w).

    stamp_ns: the frame's stamp, unchanged.
    tracking: see `Tracking`. When LOST every array below is None; of a frame that the network has not seen, for want of
        time, all but T_world_cam and pose_sigma.
    T_world_cam: (4, 4) float64, camera-to-world, OpenCV optical axes (x right, y down, z forward). World is the
        optical frame of the first tracked frame since reset. Translation is in the model's scale times `scale` of
        the engine, i.e. metres only when that scale is known.
    depth: (h, w) float32, distance along the optical z axis, same unit; NaN where invalid (REP-118).
    confidence: (h, w) float32 in [0, 1]: predicted probability that the local point's error is small.
    K: (3, 3) float64, intrinsics at the network's resolution: the given ones rescaled, or those solved from the points.
    image: (h, w, 3) uint8 RGB, the input resized, pixel-aligned with `depth`.
    is_keyframe: this frame entered the memory's anchors / coarse bank.
    pose_sigma: (2,) float64, one-sigma of translation (same unit as depth) and of rotation (rad), from the model's
        own confidence; grows after LOST and WEAK frames.
    lost_reason: one line for the user when LOST, else "".
    """

    stamp_ns: int
    tracking: Tracking
    T_world_cam: np.ndarray | None = None
    depth: np.ndarray | None = None
    confidence: np.ndarray | None = None
    K: np.ndarray | None = None
    image: np.ndarray | None = None
    is_keyframe: bool = False
    pose_sigma: np.ndarray | None = None
    lost_reason: str = ""
