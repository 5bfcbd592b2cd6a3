"""Other sequences made of one: as a mirror shows it, backwards in time, or both. No ROS.

Results on one short sequence hang on chance; its variants are as hard, and the truth of each follows exactly. Letters in a
mirror are as new to a network as others; objects in mid-fall are not, so that backwards is for scenes that stand still.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from speed3r_ros.camera import FISHEYE, Camera
from speed3r_ros.mapping.trajectory import NANO, Trajectory
from speed3r_ros.sources import Item, Source

MIRROR = np.diag([-1.0, 1, 1, 1])
UNEVEN = 3, 8, 9, 13  # coefficients of OpenCV's model whose shifts along x do not change sign with x: p2, s1, s2, tau_y
MARGIN_NS = 3600 * NANO  # keeps stamps of frames after the last true pose positive
MOST_FRAMES = 2000  # that are held in memory to be read backwards


def mirrored_camera(camera: Camera) -> Camera:
    """The camera whose images are the mirror images, left and right exchanged, of this one's."""
    K, D = np.array(camera.K, dtype=np.float64), np.array(camera.D, dtype=np.float64)
    K[0, 2] = camera.width - 1 - K[0, 2]
    if camera.model not in FISHEYE:
        uneven = [i for i in UNEVEN if i < len(D)]
        D[uneven] = -D[uneven]
    return replace(camera, K=K, D=D, _maps=[])


class Variant(Source):
    """The first `count` frames of a source mirrored, backwards, or both; its truth, depth and camera are turned with them.

    Backwards, stamps count down from twice the last true one and an hour. Raises ValueError for a source without ground truth,
    and when more frames are to be read backwards than can be held in memory.
    """

    def __init__(self, source: Source, mirrored: bool, backwards: bool, count: int) -> None:
        if source.truth is None:
            raise ValueError(f"{source.name}: no ground truth, of which variants could have theirs")
        self.source, self.mirrored, self.backwards, self.count = source, mirrored, backwards, count
        self.path = source.path
        self.name = "-".join([source.name, *["mirrored"] * mirrored, *["backwards"] * backwards])
        self._pivot = 2 * int(max(source.truth.stamps_ns, default=0)) + MARGIN_NS
        poses = MIRROR @ source.truth.poses @ MIRROR if mirrored else source.truth.poses
        pairs = list(zip(source.truth.stamps_ns.tolist(), poses))
        self.truth = Trajectory()
        for stamp, pose in reversed(pairs) if backwards else pairs:
            self.truth.append(self._turned(stamp), pose)

    def _turned(self, stamp_ns: int) -> int:
        """The variant's stamp of one of the source's, and the other way round."""
        return self._pivot - stamp_ns if self.backwards else stamp_ns

    def __len__(self) -> int:
        return self.count

    @property
    def duration_s(self) -> float:
        return self.source.duration_s

    def __iter__(self) -> Iterator[Item]:
        if self.backwards and len(self) > MOST_FRAMES:
            raise ValueError(
                f"{self.name}: has {len(self)} frames; to be read backwards, at most {MOST_FRAMES}: use fewer with --frames"
            )
        frames = islice(self.source, self.count)
        last = turned = None  # cameras; kept as long as they are the same, for their maps
        for stamp, image, camera in reversed(list(frames)) if self.backwards else frames:
            if self.mirrored:
                image = np.ascontiguousarray(image[:, ::-1])
                if camera is not None:
                    last, turned = camera, turned if camera is last else mirrored_camera(camera)
                    camera = turned
            yield self._turned(stamp), image, camera

    def true_depth(self, stamp_ns: int) -> np.ndarray | None:
        depth = self.source.true_depth(self._turned(stamp_ns))
        return depth[:, ::-1].copy() if self.mirrored and depth is not None else depth


def with_variants(source: Source, stride: int = 1, limit: int | None = None) -> list[Source]:
    """The source, and it mirrored, backwards, and both, up to the last frame that is used: backwards, every `stride`th
    frame, of which at most `limit` are used, is one that is used forwards, too. ValueError: see `Variant`."""
    used = range(0, len(source), stride)[:limit]
    count = used[-1] + 1 if used else 0
    return [source, *(Variant(source, *how, count) for how in ((True, False), (False, True), (True, True)))]
