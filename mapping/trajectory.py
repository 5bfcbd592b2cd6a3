"""Timed camera poses: storage, the TUM file format, association by time, alignment and error against ground truth.

Poses are camera-to-world (4 x 4, OpenCV optical axes); stamps are integer nanoseconds, never floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np

from speed3r_ros.mapping.files import written_whole
from speed3r_ros.mapping.geometry import quaternion_from_matrix, transform

NANO = 1_000_000_000


class Trajectory:
    """Poses in order of arrival; with max_length > 0 only the newest ones are kept. 104 bytes each, in arrays that double."""

    def __init__(self, max_length: int = 0) -> None:
        self._most = max_length or np.iinfo(np.int64).max
        self.clear()

    def __len__(self) -> int:
        return self._count

    def append(self, stamp_ns: int, T_world_cam: np.ndarray) -> None:
        """Add the pose (4, 4) of one frame."""
        capacity = len(self._stamps)
        if self._count == capacity < self._most:
            order, more = self._order(), min(max(capacity, 64), self._most - capacity)
            self._stamps = np.concatenate([self._stamps[order], np.zeros(more, np.int64)])
            self._rows = np.concatenate([self._rows[order], np.zeros((more, 3, 4))])
            self._first, capacity = 0, capacity + more
        at = (self._first + self._count) % capacity  # when it is full, where the oldest is
        self._stamps[at], self._rows[at] = stamp_ns, T_world_cam[:3]
        if self._count < capacity:
            self._count += 1
        else:
            self._first = (self._first + 1) % capacity

    def clear(self) -> None:
        """Forget all poses."""
        self._stamps, self._rows = np.zeros(0, np.int64), np.zeros((0, 3, 4))
        self._first = self._count = 0

    def copy(self) -> Trajectory:
        """One of its own, with no limit."""
        return self.select(np.arange(self._count))

    def select(self, indices: np.ndarray) -> Trajectory:
        """A trajectory of some of the poses, by their indices (M,)."""
        chosen, at = Trajectory(), self._order()[np.asarray(indices, dtype=np.int64)]
        chosen._stamps, chosen._rows, chosen._count = self._stamps[at], self._rows[at], len(at)
        return chosen

    def _order(self) -> np.ndarray:
        """Where the poses are in the arrays (N,), the oldest first."""
        return (self._first + np.arange(self._count)) % max(len(self._stamps), 1)

    @property
    def stamps_ns(self) -> np.ndarray:
        """(N,) int64."""
        return self._stamps[self._order()]

    @property
    def poses(self) -> np.ndarray:
        """(N, 4, 4) float64."""
        out = np.tile(np.eye(4), (self._count, 1, 1))
        out[:, :3] = self._rows[self._order()]
        return out

    def write_tum(self, path: str | Path) -> None:
        """Write `timestamp tx ty tz qx qy qz qw` lines; the file appears whole or not at all. Raises OSError."""
        poses = self.poses
        q = quaternion_from_matrix(poses[:, :3, :3])
        lines = ["# timestamp tx ty tz qx qy qz qw (camera-to-world, OpenCV optical axes)"]
        for stamp, T, (x, y, z, w) in zip(self.stamps_ns.tolist(), poses, q):
            tx, ty, tz = T[:3, 3]
            lines.append(f"{decimal_stamp(stamp)} {tx:.9f} {ty:.9f} {tz:.9f} {x:.9f} {y:.9f} {z:.9f} {w:.9f}")
        with written_whole(path) as partial:
            partial.write_text("\n".join(lines) + "\n")


def decimal_stamp(stamp_ns: int) -> str:
    """Nanoseconds as exact decimal seconds."""
    sign, stamp_ns = ("-", -stamp_ns) if stamp_ns < 0 else ("", stamp_ns)
    return f"{sign}{stamp_ns // NANO}.{stamp_ns % NANO:09d}"


def parse_stamp(text: str) -> int:
    """Decimal seconds, also in scientific notation as numpy and evo write them, to the nearest nanosecond, without passing
    through a float. Raises ValueError for other text."""
    try:
        value = Decimal(text.strip()) * NANO
        if abs(value) < 2**63:  # an integer of a larger one, say of 1e999999999, may not fit into memory
            return round(value)
    except ArithmeticError:  # no number
        pass
    raise ValueError(f"{text.strip()!r}: expected seconds as a decimal number")


def read_tum(path: str | Path) -> Trajectory:
    """Read a TUM trajectory. Raises ValueError naming the first line that is not eight numbers with a valid quaternion."""
    trajectory = Trajectory()
    stamps, rows = [], []
    try:
        text = Path(path).read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error})") from error
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.replace(",", " ").split()
        if not fields or fields[0].startswith("#"):
            continue
        try:
            stamps.append(parse_stamp(fields[0]))
            rows.append([float(field) for field in fields[1:8]])
        except ValueError:
            rows.append([])
        if len(rows[-1]) != 7 or not np.isfinite(rows[-1]).all() or not any(rows[-1][3:]):
            raise ValueError(
                f"{path}, line {number}: expected `timestamp tx ty tz qx qy qz qw`, found {line.strip()!r}"
            )
    values = np.array(rows).reshape(-1, 7)
    for stamp, T in zip(stamps, transform(values[:, :3], values[:, 3:])):
        trajectory.append(stamp, T)
    return trajectory


def associate(stamps_a: np.ndarray, stamps_b: np.ndarray, tolerance_ns: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of indices of nearest stamps within the tolerance, one to one, the closest pairs first served.

    Returns index arrays into a and b, in the order of a.
    """
    a, b = np.asarray(stamps_a, dtype=np.int64), np.asarray(stamps_b, dtype=np.int64)
    if not len(a) or not len(b):
        return np.zeros(0, int), np.zeros(0, int)
    order = np.argsort(b, kind="stable")
    after = np.searchsorted(b[order], a).clip(0, len(b) - 1)
    candidates = [
        (abs(int(a[i] - b[order[j]])), i, int(order[j]))
        for i in range(len(a))
        for j in {max(after[i] - 1, 0), after[i]}
    ]
    used_a, used_b, pairs = set(), set(), []
    for gap, i, j in sorted(candidates):
        if gap <= tolerance_ns and i not in used_a and j not in used_b:
            used_a.add(i)
            used_b.add(j)
            pairs.append((i, j))
    pairs = np.array(sorted(pairs), dtype=int).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def align(source: np.ndarray, target: np.ndarray, with_scale: bool = True) -> tuple[float, np.ndarray, np.ndarray]:
    """Similarity (s, R, t) minimising |target - (s R source + t)|^2 for points (N, 3) (Umeyama, PAMI 1991).

    s is 1 without scale, and 0 when the source is a single place.
    """
    mean_x, mean_y = source.mean(0), target.mean(0)
    x, y = source - mean_x, target - mean_y
    U, S, Vt = np.linalg.svd(y.T @ x)
    D = np.array([1.0, 1.0, np.sign(np.linalg.det(U @ Vt)) or 1.0])
    R = U @ np.diag(D) @ Vt
    variance = (x**2).sum()
    scale = 1.0 if not with_scale else float((S * D).sum() / variance) if variance > 1e-20 else 0.0
    return scale, R, mean_y - scale * R @ mean_x


@dataclass(frozen=True)
class AteResult:
    """Absolute trajectory error after alignment.

    rmse, median, maximum: of positions, in the truth's unit. scale: that brings the estimate to the truth. matched:
    pairs. coverage: matched share of the true poses. path: length of the true path over the matched poses. R, t: of the
    alignment. estimate_index, truth_index: matched poses.
    """

    rmse: float
    median: float
    maximum: float
    scale: float
    matched: int
    coverage: float
    path: float
    R: np.ndarray
    t: np.ndarray
    estimate_index: np.ndarray
    truth_index: np.ndarray


def absolute_trajectory_error(
    estimate: Trajectory, truth: Trajectory, with_scale: bool = True, tolerance_ns: int = 20_000_000
) -> AteResult:
    """ATE (Sturm et al., IROS 2012) after Sim(3), or SE(3), alignment. Raises ValueError with fewer than 3 matched poses."""
    i, j = associate(estimate.stamps_ns, truth.stamps_ns, tolerance_ns)
    if len(i) < 3:
        raise ValueError(
            f"{len(i)} of {len(truth)} true poses match an estimate within {tolerance_ns / 1e6:g} ms: need 3"
        )
    x, y = estimate.poses[i, :3, 3], truth.poses[j, :3, 3]
    scale, R, t = align(x, y, with_scale)
    error = np.linalg.norm(scale * x @ R.T + t - y, axis=1)
    path = float(np.linalg.norm(np.diff(y, axis=0), axis=1).sum())
    return AteResult(
        float(np.sqrt((error**2).mean())),
        float(np.median(error)),
        float(error.max()),
        scale,
        len(i),
        len(i) / len(truth),
        path,
        R,
        t,
        i,
        j,
    )
