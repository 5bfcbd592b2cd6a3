"""A coloured point map of bounded size: voxels in a set-associative table, each the weighted mean of what it saw."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np

from speed3r_ros.mapping.files import written_whole

WAYS = 16  # slots per bucket: a voxel may live in any of them
CANDIDATES = 4  # slots drawn at random in a full bucket; the least confident one makes room
BITS = 21  # of a voxel coordinate in its 63-bit key
EMPTY = -1


class PointMap:
    """Confidence-weighted voxel fusion of points in the world frame. Safe to read while another thread inserts.

    Every voxel hashes to one bucket of a table that is allocated once. In a full bucket the least confident of a few
    random slots is replaced, so a full map thins out evenly instead of losing its beginning or refusing new places,
    and an insertion costs the same at any time. Buckets fill unevenly: the table settles slightly below its budget.
    """

    def __init__(self, voxel: float, max_points: int) -> None:
        """Edge length of a voxel, in the unit of the points, and the most points ever held. Raises ValueError."""
        if not (math.isfinite(voxel) and voxel > 0):
            raise ValueError(f"voxel = {voxel!r}: must be a positive length")
        if max_points < 1:
            raise ValueError(f"max_points = {max_points!r}: must be at least 1")
        self.voxel, self.max_points = float(voxel), int(max_points)
        self._ways = min(WAYS, self.max_points)
        self._buckets = self.max_points // self._ways
        slots = self._buckets * self._ways
        self._key = np.empty(slots, dtype=np.int64)
        self._mean = np.empty((6, slots), dtype=np.float32)  # x y z red green blue
        self._weight = np.zeros(slots, dtype=np.float32)  # sum of confidences
        self._seen = np.ones(slots, dtype=np.float32)  # number of points fused
        self._used = np.empty(self._buckets, dtype=np.int64)  # slots, of each bucket
        self._claim = np.zeros(self._buckets, dtype=np.int64)
        self._lock = threading.Lock()
        self.clear()

    def __len__(self) -> int:
        with self._lock:
            return int(self._used.sum())

    def clear(self) -> None:
        """Forget all points."""
        with self._lock:
            self._key.fill(EMPTY)
            self._used.fill(0)
            self._random = np.random.default_rng(0)

    def insert(self, points: np.ndarray, colors: np.ndarray, confidence: np.ndarray) -> None:
        """Fuse points (N, 3) in the world with colours (N, 3) uint8 and confidences (N,) in (0, 1].

        Points that are not finite, have no confidence, or lie beyond a million voxels from the origin are left out.
        Raises ValueError when the shapes disagree.
        """
        if points.shape != (len(points), 3) or colors.shape != points.shape or confidence.shape != points.shape[:1]:
            raise ValueError(
                f"points {points.shape}, colors {colors.shape}, confidence {confidence.shape}: expected (N, 3), (N, 3), (N,)"
            )
        half = 1 << (BITS - 1)
        columns = np.ascontiguousarray(points.T, np.float64)  # numpy is several times faster along columns than along rows
        cell = np.floor(columns / self.voxel)
        valid = (np.abs(cell) < half).all(0) & (confidence > 0) & np.isfinite(confidence)  # NaN compares false
        if not valid.all():
            columns, cell, colors, confidence = columns[:, valid], cell[:, valid], colors[valid], confidence[valid]
        x, y, z = (cell + half).astype(np.int64)
        key, voxel_of = _distinct((x << 2 * BITS) | (y << BITS) | z)
        weight = confidence.astype(np.float64)
        total, count = np.bincount(voxel_of, weight), np.bincount(voxel_of)
        mean = np.stack([np.bincount(voxel_of, column * weight) for column in (*columns, *colors.T)]) / total
        bucket = self._bucket(key)
        with self._lock:
            match = self._key.reshape(-1, self._ways).take(bucket, axis=0) == key[:, None]
            known, way = np.divmod(np.flatnonzero(match), self._ways)
            slot = bucket[known] * self._ways + way
            share = total[known] / (self._weight[slot] + total[known])
            old = self._mean.take(slot, axis=1)
            self._set_mean(slot, old + share * (mean.take(known, axis=1) - old))
            self._weight[slot] += total[known]
            self._seen[slot] += count[known]
            new = np.delete(np.arange(len(key)), known)
            self._place(bucket[new], key[new], mean.take(new, axis=1), total[new], count[new])

    def _set_mean(self, slot: np.ndarray, mean: np.ndarray) -> None:
        for row, values in zip(self._mean, mean):  # one by one is several times faster than self._mean[:, slot]
            row[slot] = values

    def _bucket(self, key: np.ndarray) -> np.ndarray:
        mixed = (key.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
        return (mixed % np.uint64(self._buckets)).astype(np.int64)

    def _place(
        self, bucket: np.ndarray, key: np.ndarray, mean: np.ndarray, total: np.ndarray, count: np.ndarray
    ) -> None:
        """Put new voxels into their buckets, one per bucket and round; more than a bucket holds are left out."""
        pending = np.arange(len(key))
        for _ in range(self._ways):
            if not len(pending):
                return
            self._claim[bucket[pending]] = pending
            winner = self._claim[bucket[pending]] == pending
            new, pending = pending[winner], pending[~winner]
            way = self._used[bucket[new]]  # slots fill in order and never empty
            full = np.flatnonzero(way == self._ways)
            first = self._random.integers(self._ways, size=len(new))
            self._used[bucket[new]] = np.minimum(way + 1, self._ways)
            way[full] = self._least_confident(bucket[new[full]], first[full])
            slot = bucket[new] * self._ways + way
            self._key[slot], self._weight[slot], self._seen[slot] = key[new], total[new], count[new]
            self._set_mean(slot, mean.take(new, axis=1))

    def _least_confident(self, bucket: np.ndarray, first: np.ndarray) -> np.ndarray:
        """In each full bucket, the least confident of a few neighbouring slots that start at the first."""
        way = (first + np.arange(min(CANDIDATES, self._ways))[:, None]) % self._ways
        slot = bucket * self._ways + way
        lowest = (self._weight.take(slot) / self._seen.take(slot)).argmin(0)
        return (first + lowest) % self._ways

    def snapshot(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies of points (N, 3) float32, colours (N, 3) uint8 and mean confidences (N,) float32, in no spatial order."""
        with self._lock:
            used = self._key != EMPTY
            mean, confidence = self._mean[:, used].T, self._weight[used] / self._seen[used]
        return mean[:, :3], np.rint(mean[:, 3:]).astype(np.uint8), confidence

    @property
    def points(self) -> np.ndarray:
        """(N, 3) float32, a copy."""
        return self.snapshot()[0]

    @property
    def colors(self) -> np.ndarray:
        """(N, 3) uint8 RGB, a copy."""
        return self.snapshot()[1]

    @property
    def confidence(self) -> np.ndarray:
        """(N,) float32, a copy: mean confidence of what each voxel saw."""
        return self.snapshot()[2]

    def write_ply(self, path: str | Path) -> None:
        """Write a binary PLY of x y z red green blue confidence. Raises OSError."""
        write_ply(path, *self.snapshot())


def _distinct(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ones (V,) of keys (N,), ascending, and which of them each key is, (N,) int.

    Neighbours in an image mostly lie in one voxel, so only the first key of each run of equal ones is sorted.
    """
    first = np.flatnonzero(np.diff(key, prepend=EMPTY))
    distinct, run = np.unique(key[first], return_inverse=True)
    return distinct, np.repeat(run, np.diff(first, append=len(key)))


def write_ply(path: str | Path, points: np.ndarray, colors: np.ndarray, confidence: np.ndarray | None = None) -> None:
    """Write a binary little-endian PLY of points (N, 3), colours (N, 3) uint8 and confidences (N,). Raises OSError."""
    values = {axis: ("float", "<f4", points[:, k]) for k, axis in enumerate("xyz")}
    values |= {name: ("uchar", "u1", colors[:, k]) for k, name in enumerate(("red", "green", "blue"))}
    if confidence is not None:
        values["confidence"] = ("float", "<f4", confidence)
    vertices = np.empty(len(points), dtype=[(name, kind) for name, (_, kind, _) in values.items()])
    for name, (_, _, column) in values.items():
        vertices[name] = column
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    header += [f"property {kind} {name}" for name, (kind, _, _) in values.items()] + ["end_header"]
    with written_whole(path) as partial, open(partial, "wb") as file:
        file.write(("\n".join(header) + "\n").encode())
        file.write(vertices.tobytes())
