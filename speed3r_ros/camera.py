"""Calibrated cameras and the rectification of their images. No ROS."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

FISHEYE = ("equidistant", "fisheye")
MODELS = ("plumb_bob", "rational_polynomial", *FISHEYE)
# Numbers of coefficients that OpenCV takes; of a fisheye lens it takes four, and drivers pad them with zeros.
COEFFICIENTS = (4, 5, 8, 12, 14)


@dataclass(frozen=True, eq=False)
class Camera:
    """Intrinsics of one image size.

    K: (3, 3) pixels. D: distortion coefficients in OpenCV's order, empty for none. model: as in sensor_msgs/CameraInfo.
    Raises ValueError, naming the value, for intrinsics that no camera can have.
    """

    K: np.ndarray
    D: np.ndarray
    model: str
    width: int
    height: int
    _maps: list = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        K, D = np.asarray(self.K, dtype=np.float64), np.asarray(self.D, dtype=np.float64)
        if not np.isfinite(K).all() or K[0, 0] <= 0 or K[1, 1] <= 0 or K[2, 2] != 1:
            raise ValueError(
                f"camera_info K = {K.reshape(-1).tolist()}: focal lengths must be positive and finite, and the last value 1; "
                "calibrate the camera"
            )
        if not np.isfinite(D).all():
            raise ValueError(f"camera_info D = {D.tolist()}: must be finite; calibrate the camera")
        if np.any(D):  # a lens without distortion needs no model
            if self.model not in MODELS:
                raise ValueError(f"distortion model {self.model!r}: choose one of {', '.join(MODELS)}")
            fisheye = self.model in FISHEYE
            if len(D) < 4 or np.any(D[4:]) if fisheye else len(D) not in COEFFICIENTS:
                takes = "4" if fisheye else ", ".join(map(str, COEFFICIENTS))
                raise ValueError(
                    f"camera_info D = {D.tolist()}: {self.model} takes {takes} coefficients, not {len(D)}; fill up with zeros, "
                    "or calibrate the camera"
                )
        if self.width <= 0 or self.height <= 0:
            raise ValueError(f"camera_info is for {self.width} x {self.height} pixels: set width and height")

    def fits(self, image: np.ndarray) -> bool:
        """Whether an image (H, W, ...) has this camera's resolution."""
        return image.shape[:2] == (self.height, self.width)

    def rectify(self, image: np.ndarray, interpolation: int = cv2.INTER_LINEAR) -> tuple[np.ndarray, np.ndarray]:
        """Undistorted image of the same size and its K (3, 3); cv2.INTER_NEAREST for depth. Zero outside the image.

        K is kept, so that depth and points stay aligned with `image_rect` of image_proc, which keeps it too for a
        monocular camera (P = [K | 0]). Raises ValueError for an image of another resolution.
        """
        if not self.fits(image):
            raise ValueError(
                f"camera_info is for {self.width} x {self.height} pixels, the image has {image.shape[1]} x {image.shape[0]}: "
                "publish the info of this resolution"
            )
        K = np.asarray(self.K, dtype=np.float64)
        if not np.any(self.D):
            return image, K
        if not self._maps:
            size = self.width, self.height
            if self.model in FISHEYE:
                maps = cv2.fisheye.initUndistortRectifyMap(
                    K, np.asarray(self.D, float)[:4], np.eye(3), K, size, cv2.CV_16SC2
                )
            else:
                maps = cv2.initUndistortRectifyMap(K, np.asarray(self.D, float), None, K, size, cv2.CV_16SC2)
            self._maps.extend(maps)
        return cv2.remap(image, *self._maps, interpolation), K
