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
WEIGHT, SEEN = 6, 7  # columns of what a voxel fused: the sum of confidences, the number of points


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
        self._fused = np.empty((slots, 8), dtype=np.float32)  # mean x y z red green blue, then WEIGHT and SEEN
        self._used = np.empty(self._buckets, dtype=np.int64)  # of each bucket, how many slots
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
        columns = np.ascontiguousarray(points.T, np.float64)  # numpy is much faster along columns than along rows
        cell = np.floor(columns / self.voxel)
        inside = ((cell > -half) & (cell < half)).all(0)  # NaN compares false
        valid = inside & (confidence > 0) & np.isfinite(confidence)
        if not valid.all():
            columns, cell, colors, confidence = columns[:, valid], cell[:, valid], colors[valid], confidence[valid]
        x, y, z = (cell + half).astype(np.int64)
        key, voxel_of = _distinct((x << 2 * BITS) | (y << BITS) | z)
        weight = confidence.astype(np.float64)
        total = np.bincount(voxel_of, weight)
        mean = [np.bincount(voxel_of, column * weight) / total for column in (*columns, *colors.T)]
        fused = np.stack([*mean, total, np.bincount(voxel_of)])
        bucket = self._bucket(key)
        with self._lock:
            match = self._key.reshape(-1, self._ways).take(bucket, axis=0) == key[:, None]
            known, way = np.divmod(np.flatnonzero(match), self._ways)
            slot = bucket[known] * self._ways + way
            old = self._fused.take(slot, axis=0).T.astype(np.float64, order="C")
            more = fused.take(known, axis=1)
            share = more[WEIGHT] / (old[WEIGHT] + more[WEIGHT])
            old[:WEIGHT] += share * (more[:WEIGHT] - old[:WEIGHT])
            old[WEIGHT:] += more[WEIGHT:]
            self._write(slot, old)
            new = np.delete(np.arange(len(key)), known)
            self._place(bucket[new], key[new], fused.take(new, axis=1))

    def _write(self, slot: np.ndarray, fused: np.ndarray) -> None:
        """Set slots (N,) to what they fused, (8, N). A row is put as one item of 32 bytes: much faster than _fused[slot] = ..."""
        np.put(self._fused.view("V32"), slot, fused.T.astype(np.float32, order="C").view("V32"))

    def _bucket(self, key: np.ndarray) -> np.ndarray:
        mixed = (key.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
        return (mixed % np.uint64(self._buckets)).astype(np.int64)

    def _place(self, bucket: np.ndarray, key: np.ndarray, fused: np.ndarray) -> None:
        """Put new voxels into their buckets, one per bucket and round; more than a bucket holds are left out."""
        pending = np.arange(len(key))
        for _ in range(self._ways):
            if not len(pending):
                return
            self._claim[bucket[pending]] = pending
            winner = self._claim[bucket[pending]] == pending
            new, pending = pending[winner], pending[~winner]
            home, first = bucket[new], self._random.integers(self._ways, size=len(new))
            way = self._used[home]  # slots fill in order and never empty
            self._used[home] = np.minimum(way + 1, self._ways)
            full = np.flatnonzero(way == self._ways)
            way[full] = self._least_confident(home[full], first[full])
            slot = home * self._ways + way
            self._key[slot] = key[new]
            self._write(slot, fused.take(new, axis=1))

    def _least_confident(self, bucket: np.ndarray, first: np.ndarray) -> np.ndarray:
        """In each full bucket, the least confident of a few neighbouring slots that start at a random one, the first."""
        way = (first + np.arange(min(CANDIDATES, self._ways))[:, None]) % self._ways
        slot = bucket * self._ways + way
        lowest = (self._fused[slot, WEIGHT] / self._fused[slot, SEEN]).argmin(0)
        return (first + lowest) % self._ways

    def snapshot(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies of points (N, 3) float32, colours (N, 3) uint8 and mean confidences (N,) float32, in no spatial order."""
        with self._lock:
            fused = self._fused.take(np.flatnonzero(self._key != EMPTY), axis=0)
        return fused[:, :3], np.rint(fused[:, 3:WEIGHT]).astype(np.uint8), fused[:, WEIGHT] / fused[:, SEEN]

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
    changed = np.ones(len(key), dtype=bool)
    np.not_equal(key[1:], key[:-1], out=changed[1:])
    first = np.flatnonzero(changed)
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
