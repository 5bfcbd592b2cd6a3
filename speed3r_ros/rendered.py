"""Held-out rendered sequences as a source: exact poses and depth, textures and photographs never trained on. No ROS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from speed3r_ros.camera import Camera
from speed3r_ros.mapping.trajectory import NANO, Trajectory
from speed3r_ros.sources import FOLDER_RATE, Item, Source
from speed3r_ros.training.render import SPLITS, SceneDataset

SEED = 987654  # of the held-out scenes; training counts from small numbers


def inverse_distortion(k: float, corner: float) -> np.ndarray:
    """OpenCV's coefficients (5,) for scenes' lenses, which map distorted radii s to straight ones by s (1 + k s^2).

    OpenCV wants the inverse: fitted to all radii of an image, from its centre to s = corner. Its series about the centre is
    wrong by 0.3 pixels in the corners of wide lenses.
    """
    distorted = np.linspace(0, corner, 101)[1:]
    straight = distorted * (1 + k * distorted**2)
    k1, k2, k3 = np.linalg.lstsq(straight[:, None] ** (2, 4, 6), distorted / straight - 1)[0]
    return np.array([k1, k2, 0, 0, k3])


class RenderedSource(Source):
    """One sequence of `SceneDataset.batch(1, N)`. Lengths are in units of its mean depth.

    Images carry the scene's slight lens distortion, which the camera describes.
    """

    def __init__(self, name: str, batch: dict[str, torch.Tensor]) -> None:
        self.path, self.name = Path(name), name
        self._images = (batch["img"][0].permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
        self._depths = batch["depth"][0].float().cpu().numpy()
        self._stamps = [i * NANO // FOLDER_RATE for i in range(len(self._images))]
        self.truth = Trajectory()
        for stamp, R, t in zip(
            self._stamps, batch["R"][0].double().cpu().numpy(), batch["t"][0].double().cpu().numpy()
        ):
            T = np.eye(4)
            T[:3, :3], T[:3, 3] = R, t
            self.truth.append(stamp, T)
        fx, fy, cx, cy, k = batch["K"][0].double().cpu().tolist()
        height, width = self._images.shape[1:3]
        corner = np.hypot(max(cx, width - 1 - cx) / fx, max(cy, height - 1 - cy) / fy)
        D = inverse_distortion(k, corner)
        self._camera = Camera(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), D, "plumb_bob", width, height)

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Item]:
        for stamp, image in zip(self._stamps, self._images):
            yield stamp, image, self._camera

    @property
    def duration_s(self) -> float:
        return (self._stamps[-1] - self._stamps[0]) / NANO

    def true_depth(self, stamp_ns: int) -> np.ndarray | None:
        return self._depths[self._stamps.index(stamp_ns)]


def rendered_sources(
    count: int, frames: int, size: tuple[int, int], device: str = "auto", split: str = "rooms"
) -> Iterator[RenderedSource]:
    """`count` sequences of `frames` images of a size (h, w), the same ones for the same arguments on the same device.

    device: as engine.device. split: see `training.evaluate.evaluate_rendered`.
    """
    cuda = torch.cuda.is_available() and device != "cpu"
    dataset = SceneDataset(
        "cuda" if cuda else "cpu",
        SEED,
        *size,
        held_out=True,
        textures_per_family=8 if cuda else 1,
        samples=4 if cuda else 1,
        world=SPLITS[split],
    )
    for number in range(count):
        yield RenderedSource(f"rendered_{number:03d}", dataset.batch(1, frames))
