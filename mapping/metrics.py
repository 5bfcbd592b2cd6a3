"""Errors of trajectories, pairs of poses, depth and confidence against ground truth. NumPy only.

The definitions are the field's: ATE and RPE of the TUM RGB-D benchmark (Sturm et al., IROS 2012; the numbers are those
of `evo_ape -as` and `evo_rpe --all_pairs --pairs_from_reference`), area under the accuracy curve of pairs of poses
(VGGT, CVPR 2025, section 4.1; Pi3, 2025), AbsRel and delta of depth (Eigen et al., NeurIPS 2014), sparsification of errors by
confidence (Ilg et al., ECCV 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from speed3r_ros.mapping.geometry import inverse, rotation_angle
from speed3r_ros.mapping.trajectory import NANO, Trajectory, absolute_trajectory_error

TOLERANCE_NS = 20_000_000  # between the stamps of a frame and of its true pose
WINDOW = 10  # frames whose pairs are compared: VGGT draws ten from a sequence
STEADY = 0.1  # a pair's direction counts from this share of the longest true baseline of all pairs
APART = 0.1  # relative tolerance of pairs that are to be a distance apart, as in evo


@dataclass(frozen=True)
class TrajectoryErrors:
    """Errors over the matched poses. Lengths are in the truth's unit, angles in degrees; NaN = no such pairs.

    matched, coverage: true poses that have an estimate, and their share. path: length of the true path over them.
    scale: that brings the estimate to the truth. ate, ate_metric: RMSE of positions after Sim(3) and SE(3) alignment.
    rpe_*: RMSE of the motion between consecutive poses, over one second, and over one unit of the path, at that scale.
    rotation, direction: median angles between estimated and true relative rotations and directions of translation, over
    all pairs within WINDOW poses. *_auc*: areas under their accuracy curves; pose_auc*: of the larger of the two.
    """

    matched: int
    coverage: float
    path: float
    scale: float
    ate: float
    ate_metric: float
    rpe_frame: float
    rpe_frame_rotation: float
    rpe_second: float
    rpe_second_rotation: float
    rpe_unit: float
    rpe_unit_rotation: float
    rotation: float
    rotation_auc5: float
    rotation_auc10: float
    rotation_auc30: float
    direction: float
    direction_auc5: float
    direction_auc10: float
    direction_auc30: float
    pose_auc5: float
    pose_auc10: float
    pose_auc30: float


@dataclass(frozen=True)
class Accuracy:
    """Errors of an estimate, and those of trivial ones over the same poses.

    line: the straight line at constant speed that fits the truth best. still: the centroid of the truth. Both keep the
    truth's mean rotation, so that their relative rotation is the identity.
    """

    estimate: TrajectoryErrors
    line: TrajectoryErrors
    still: TrajectoryErrors


def accuracy(estimate: Trajectory, truth: Trajectory, tolerance_ns: int = TOLERANCE_NS) -> Accuracy:
    """Errors of a trajectory and of the baselines. Raises ValueError with fewer than 3 matched poses."""
    matched = absolute_trajectory_error(estimate, truth, tolerance_ns=tolerance_ns).truth_index
    stamps, poses = truth.stamps_ns[matched], truth.poses[matched]
    time = (stamps - stamps[0]) / NANO
    line = np.stack([np.polyval(np.polyfit(time, x, 1), time) for x in poses[:, :3, 3].T], 1)
    still = np.repeat(poses[:, :3, 3].mean(0)[None], len(poses), 0)
    U, _, Vt = np.linalg.svd(poses[:, :3, :3].mean(0))
    baselines = []
    for positions in (line, still):
        baseline = Trajectory()
        for stamp, position in zip(stamps.tolist(), positions):
            T = np.eye(4)
            T[:3, :3] = U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt
            T[:3, 3] = position
            baseline.append(stamp, T)
        baselines.append(trajectory_errors(baseline, truth, tolerance_ns))
    return Accuracy(trajectory_errors(estimate, truth, tolerance_ns), *baselines)


def trajectory_errors(estimate: Trajectory, truth: Trajectory, tolerance_ns: int = TOLERANCE_NS) -> TrajectoryErrors:
    """Errors of a trajectory. Raises ValueError with fewer than 3 matched poses."""
    similar = absolute_trajectory_error(estimate, truth, True, tolerance_ns)
    rigid = absolute_trajectory_error(estimate, truth, False, tolerance_ns)
    T, T_true = estimate.poses[similar.estimate_index], truth.poses[similar.truth_index]
    stamps = truth.stamps_ns[similar.truth_index]
    travelled = np.append(0, np.cumsum(np.linalg.norm(np.diff(T_true[:, :3, 3], axis=0), axis=1)))
    relative: dict[str, float] = {}
    for name, (i, j) in {
        "frame": (np.arange(len(T) - 1), np.arange(1, len(T))),
        "second": pairs_apart((stamps - stamps[0]) / NANO, 1.0),
        "unit": pairs_apart(travelled, 1.0),
    }.items():
        translation, rotation = relative_errors(T, T_true, i, j, similar.scale)
        relative |= {f"rpe_{name}": rms(translation), f"rpe_{name}_rotation": rms(rotation)}
    return TrajectoryErrors(
        matched=similar.matched,
        coverage=similar.coverage,
        path=similar.path,
        scale=similar.scale,
        ate=similar.rmse,
        ate_metric=rigid.rmse,
        **relative,
        **angle_summary(*pair_angles(T, T_true, *pairs_within(len(T), WINDOW))),
    )


def pairs_within(count: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices i < j (M,) of all pairs of `count` poses that lie within `window` consecutive ones."""
    i, j = np.triu_indices(count, 1)
    near = j - i < window
    return i[near], j[near]


def pairs_apart(x: np.ndarray, distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices i < j (M,): for each i the j with x[j] nearest to x[i] + distance, if within APART of it.

    x: (N,) ascending times or path lengths.
    """
    i = np.arange(len(x) - 1)
    after = np.searchsorted(x, x[:-1] + distance).clip(i + 1, len(x) - 1)
    before = np.maximum(after - 1, i + 1)
    gap = np.abs(x[np.stack([before, after])] - x[:-1] - distance)
    j = np.where(gap[0] <= gap[1], before, after)
    near = gap.min(0) <= APART * distance
    return i[near], j[near]


def relative_errors(
    estimate: np.ndarray, truth: np.ndarray, i: np.ndarray, j: np.ndarray, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the motion from poses i to j: translation (M,) in the truth's unit and rotation (M,) in degrees.

    estimate, truth: (N, 4, 4) camera-to-world. `scale` multiplies the estimate's translations first.
    """
    moved = np.array(estimate)
    moved[:, :3, 3] *= scale
    error = inverse(inverse(truth[i]) @ truth[j]) @ (inverse(moved[i]) @ moved[j])
    return np.linalg.norm(error[:, :3, 3], axis=1), np.rad2deg(rotation_angle(error[:, :3, :3]))


def pair_angles(estimate: np.ndarray, truth: np.ndarray, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Angles in degrees between estimated and true relative rotations (M,) and directions of translation (M,).

    estimate, truth: (N, 4, 4) camera-to-world. A direction is NaN where the true baseline is short (STEADY), and 90
    where the estimate stands still. Other than VGGT's, it has a sign: a camera that goes backwards is 180 degrees wrong.
    """
    A, B = inverse(estimate[i]) @ estimate[j], inverse(truth[i]) @ truth[j]
    a, b = A[:, :3, 3], B[:, :3, 3]
    across, along = np.linalg.norm(np.cross(a, b), axis=1), (a * b).sum(1)
    stands = np.linalg.norm(a, axis=1) <= 1e-9 * np.abs(estimate[:, :3, 3]).max()
    direction = np.where(stands, 90.0, np.rad2deg(np.arctan2(across, along)))
    baseline = np.linalg.norm(b, axis=1)
    direction[baseline <= STEADY * baseline.max(initial=0)] = np.nan
    return np.rad2deg(rotation_angle(inverse(B)[:, :3, :3] @ A[:, :3, :3])), direction


def angle_summary(rotation: np.ndarray, direction: np.ndarray) -> dict[str, float]:
    """Medians and areas under the accuracy curves up to 5, 10 and 30 degrees of pairs' angles (M,), NaN left out."""
    known = np.isfinite(direction)
    errors = {
        "rotation": rotation,
        "direction": direction[known],
        "pose": np.maximum(rotation, direction)[known],
    }
    areas = {f"{k}_auc{t}": area_under_curve(v, t) for k, v in errors.items() for t in (5, 10, 30)}
    return areas | {k: float(np.median(errors[k])) if len(errors[k]) else np.nan for k in ("rotation", "direction")}


def area_under_curve(error: np.ndarray, threshold: float) -> float:
    """Area under the accuracy curve of errors (M,) up to the threshold, in [0, 1]; NaN without any.

    Exact: the mean of 1 - error / threshold, clipped. VGGT and Pi3 sum it in bins of one degree.
    """
    return float(np.clip(1 - error / threshold, 0, None).mean()) if len(error) else float("nan")


def depth_errors(depth: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """AbsRel, the mean of |depth - truth| / truth, and the share within a factor of 1.25. Both (M,) positive."""
    ratio = depth / truth
    return float(np.abs(ratio - 1).mean()), float((np.maximum(ratio, 1 / ratio) < 1.25).mean())


@dataclass(frozen=True)
class Sparsification:
    """How well confidence sorts errors. Means of the remaining errors over the mean of all, (N,), while pixels go.

    curve: the least confident go first. oracle: the largest errors go first. worst_fifth: share of the sum of errors
    that the fifth with the least confidence holds; 0.2 if confidence says nothing.
    """

    curve: np.ndarray
    oracle: np.ndarray
    worst_fifth: float
    worst_fifth_oracle: float

    @property
    def ause(self) -> float:
        """Area under the sparsification error: 0 is perfect."""
        return float((self.curve - self.oracle).mean())

    @property
    def ause_random(self) -> float:
        """The same of a confidence that says nothing."""
        return float((1 - self.oracle).mean())


def sparsification(error: np.ndarray, confidence: np.ndarray) -> Sparsification:
    """Of errors (N,) by confidences (N,); N >= 1, not all errors zero."""

    def remaining(order: np.ndarray) -> tuple[np.ndarray, float]:
        gone = np.append(0, np.cumsum(error[order], dtype=np.float64))
        left = (gone[-1] - gone[:-1]) / np.arange(len(error), 0, -1)
        return left / left[0], float(gone[len(error) // 5] / gone[-1])

    curve, worst = remaining(np.argsort(confidence, kind="stable"))
    oracle, most = remaining(np.argsort(-error, kind="stable"))
    return Sparsification(curve, oracle, worst, most)


def rms(values: np.ndarray) -> float:
    """Root of the mean square (M,), NaN of nothing."""
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else float("nan")
