"""Errors of trajectories, pairs, depth and confidence: against closed forms, brute force in float64, and evo."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from speed3r_ros.mapping import metrics
from speed3r_ros.mapping.trajectory import Trajectory

COUNT, STEP_NS = 60, 70_000_000
ANGLES = [f"{kind}_auc{t}" for kind in ("rotation", "direction", "pose") for t in (5, 10, 30)]


@pytest.fixture
def rng():
    return np.random.default_rng()


def random_rotations(rng, count, degrees=None):
    """Uniform ones, or about random axes by given degrees."""
    if degrees is None:
        return Rotation.random(count, random_state=int(rng.integers(2**31))).as_matrix()
    axis = rng.normal(size=(count, 3))
    return Rotation.from_rotvec(np.deg2rad(degrees) * axis / np.linalg.norm(axis, axis=1)[:, None]).as_matrix()


def walk(rng, count=COUNT):
    """Camera-to-world poses (N, 4, 4) of a random walk of steps of about 0.25."""
    poses, T = [], np.eye(4)
    for _ in range(count):
        step = np.eye(4)
        step[:3, :3] = Rotation.from_rotvec(rng.normal(size=3) * 0.1).as_matrix()
        step[:3, 3] = rng.normal(size=3) * 0.1 + [0, 0, 0.2]
        T = T @ step
        poses.append(T)
    return np.array(poses)


def trajectory(poses):
    out = Trajectory()
    for index, T in enumerate(poses):
        out.append(1_700_000_000_000_000_123 + index * STEP_NS, T)
    return out


def moved(rng, poses, scale):
    """The same poses in another world and another unit."""
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = random_rotations(rng, 1)[0], rng.normal(size=3) * 5
    shrunk = poses.copy()
    shrunk[:, :3, 3] *= scale
    return T @ shrunk


def disturbed(rng, poses):
    out = poses.copy()
    out[:, :3, 3] += rng.normal(size=(len(poses), 3)) * 0.03
    out[:, :3, :3] = out[:, :3, :3] @ random_rotations(rng, len(poses), rng.uniform(0, 3, (len(poses), 1)))
    return out


def test_a_similarity_costs_nothing_but_metric_error(rng):
    truth, scale = walk(rng), rng.uniform(0.2, 5)
    found = metrics.trajectory_errors(trajectory(moved(rng, truth, 1 / scale)), trajectory(truth))
    assert found.scale == pytest.approx(scale) and found.matched == COUNT and found.coverage == 1
    for name in ("ate", "rpe_frame", "rpe_second", "rpe_unit", "rpe_unit_rotation", "rotation", "direction"):
        assert getattr(found, name) == pytest.approx(0, abs=1e-5), name
    for name in ANGLES:
        assert getattr(found, name) == pytest.approx(1, abs=1e-5), name
    positions = truth[:, :3, 3]  # a rigid alignment cannot but leave a share of the spread
    assert found.ate_metric == pytest.approx(abs(1 - 1 / scale) * np.sqrt(positions.var(0).sum()))


def test_errors_agree_with_evo(rng):
    evo_trajectory = pytest.importorskip("evo.core.trajectory", reason="waits for `pip install evo`")
    evo_metrics = pytest.importorskip("evo.core.metrics")
    truth = walk(rng)
    estimate = disturbed(rng, moved(rng, truth, 0.3))
    found = metrics.trajectory_errors(trajectory(estimate), trajectory(truth))
    stamps = trajectory(truth).stamps_ns / 1e9
    reference = evo_trajectory.PoseTrajectory3D(poses_se3=list(truth), timestamps=stamps)

    def rmse(metric, correct_scale):
        aligned = evo_trajectory.PoseTrajectory3D(poses_se3=list(estimate), timestamps=stamps)
        aligned.align(reference, correct_scale=correct_scale)
        metric.process_data((reference, aligned))
        return metric.get_statistic(evo_metrics.StatisticsType.rmse)

    relation, unit = evo_metrics.PoseRelation, evo_metrics.Unit
    assert found.ate == pytest.approx(rmse(evo_metrics.APE(relation.translation_part), True), rel=1e-9)
    assert found.ate_metric == pytest.approx(rmse(evo_metrics.APE(relation.translation_part), False), rel=1e-9)
    for name, delta_unit in (("rpe_frame", unit.frames), ("rpe_unit", unit.meters)):
        for suffix, part in (("", relation.translation_part), ("_rotation", relation.rotation_angle_deg)):
            metric = evo_metrics.RPE(
                part, 1, delta_unit, rel_delta_tol=metrics.APART, all_pairs=True, pairs_from_reference=True
            )
            assert getattr(found, name + suffix) == pytest.approx(rmse(metric, True), rel=1e-6), name + suffix


def test_error_over_a_second(rng):
    truth, estimate = walk(rng), walk(rng)
    found = metrics.trajectory_errors(trajectory(estimate), trajectory(truth))
    errors = []
    for i, j in [(k, k + 14) for k in range(COUNT - 14)] + [(COUNT - 14, COUNT - 1)]:  # 0.98 s, and once 0.91 s
        a, b = np.linalg.inv(truth[i]) @ truth[j], np.linalg.inv(estimate[i]) @ estimate[j]
        b[:3, 3] *= found.scale
        errors.append(np.linalg.norm((np.linalg.inv(a) @ b)[:3, 3]))
    assert found.rpe_second == pytest.approx(np.sqrt(np.mean(np.square(errors))))


def test_what_cannot_be_measured_is_not_a_number(rng):
    truth = walk(rng, 4)  # a fifth of a second, most of a unit
    truth[:, :3, 3] *= 0.5
    found = metrics.trajectory_errors(trajectory(truth), trajectory(truth))
    assert np.isnan([found.rpe_second, found.rpe_second_rotation, found.rpe_unit, found.rpe_unit_rotation]).all()
    with pytest.raises(ValueError, match="2 of 4 true poses match"):
        metrics.trajectory_errors(trajectory(truth[:2]), trajectory(truth))


def test_baselines_are_what_they_say(rng):
    truth = walk(rng)
    found = metrics.accuracy(trajectory(disturbed(rng, truth)), trajectory(truth))
    positions, time = truth[:, :3, 3], np.arange(COUNT)
    residual = positions - np.stack([np.polyval(np.polyfit(time, x, 1), time) for x in positions.T], 1)
    assert found.line.ate == pytest.approx(np.sqrt((residual**2).sum(1).mean()), rel=1e-6)
    assert found.still.ate == pytest.approx(np.sqrt(positions.var(0).sum()))
    steps = np.linalg.inv(truth[:-1]) @ truth[1:]
    assert found.still.rpe_frame == pytest.approx(np.sqrt((steps[:, :3, 3] ** 2).sum(1).mean()))
    turns = np.rad2deg(Rotation.from_matrix(steps[:, :3, :3]).magnitude())
    for baseline in (found.line, found.still):
        assert baseline.rpe_frame_rotation == pytest.approx(np.sqrt((turns**2).mean()))
    assert found.still.direction == 90 and found.still.direction_auc30 == 0
    assert found.estimate.ate < found.line.ate < found.still.ate


def test_angles_between_pairs(rng):
    truth, estimate = walk(rng), walk(rng)
    i, j = metrics.pairs_within(COUNT, 10)
    rotation, direction = metrics.pair_angles(estimate, truth, i, j)
    longest = max(np.linalg.norm(truth[a, :3, 3] - truth[b, :3, 3]) for a, b in zip(i, j))
    for k in rng.choice(len(i), 50, replace=False):
        A, B = (np.linalg.inv(x[i[k]]) @ x[j[k]] for x in (estimate, truth))
        angle = np.arccos(np.clip((np.trace(A[:3, :3].T @ B[:3, :3]) - 1) / 2, -1, 1))
        assert rotation[k] == pytest.approx(np.rad2deg(angle), abs=1e-5)
        a, b = A[:3, 3], B[:3, 3]
        if np.linalg.norm(b) <= metrics.STEADY * longest:
            assert np.isnan(direction[k])
        else:
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert direction[k] == pytest.approx(np.rad2deg(np.arccos(np.clip(cosine, -1, 1))), abs=1e-5)


def test_going_backwards_is_wrong_and_a_known_turn_has_its_angle(rng):
    truth, degrees = walk(rng), rng.uniform(1, 60)
    backwards = truth.copy()
    backwards[:, :3, 3] *= -1
    i, j = metrics.pairs_within(COUNT, 4)
    rotation, direction = metrics.pair_angles(backwards, truth, i, j)
    np.testing.assert_allclose(rotation, 0, atol=1e-5)
    np.testing.assert_allclose(direction[np.isfinite(direction)], 180, atol=1e-5)
    turned = truth.copy()
    turned[1::2, :3, :3] = turned[1::2, :3, :3] @ random_rotations(rng, COUNT // 2, degrees)
    rotation, _ = metrics.pair_angles(turned, truth, np.arange(COUNT - 1), np.arange(1, COUNT))
    np.testing.assert_allclose(rotation, degrees, atol=1e-5)


@pytest.mark.parametrize("threshold", [5, 10, 30])
def test_area_is_that_under_the_accuracy_curve(rng, threshold):
    error = rng.exponential(8, 300)
    at = (np.arange(20_000) + 0.5) / 20_000 * threshold
    assert metrics.area_under_curve(error, threshold) == pytest.approx(
        np.mean([(error < t).mean() for t in at]), abs=1e-3
    )
    assert np.isnan(metrics.area_under_curve(error[:0], threshold))


def test_pairs(rng):
    count, window, distance = int(rng.integers(12, 30)), int(rng.integers(2, 12)), 1.0
    expected = [(i, j) for i in range(count) for j in range(count) if 0 < j - i < window]
    assert list(zip(*metrics.pairs_within(count, window))) == expected
    x = np.cumsum(rng.uniform(0, 0.4, count))
    expected = []
    for i in range(count - 1):
        j = min(range(i + 1, count), key=lambda j: abs(x[j] - x[i] - distance))
        expected += [(i, j)] if abs(x[j] - x[i] - distance) <= 0.1 * distance else []
    assert list(zip(*metrics.pairs_apart(x, distance))) == expected


def test_depth_errors(rng):
    depth, truth = rng.uniform(0.5, 9, (2, 500))
    absrel, share = metrics.depth_errors(depth, truth)
    assert absrel == pytest.approx(np.mean(np.abs(depth - truth) / truth))
    assert share == np.mean([max(a / b, b / a) < 1.25 for a, b in zip(depth, truth)])
    assert metrics.depth_errors(truth * 1.2, truth) == (pytest.approx(0.2), 1)


def test_sparsification_by_hand(rng):
    error, confidence = rng.exponential(size=(2, 83))
    found = metrics.sparsification(error, confidence)
    left = lambda order: [error[order[k:]].mean() / error.mean() for k in range(len(error))]  # noqa: E731
    np.testing.assert_allclose(found.curve, left(np.argsort(confidence)))
    np.testing.assert_allclose(found.oracle, left(np.argsort(error)[::-1]))
    assert found.ause == pytest.approx(np.mean(found.curve - found.oracle))
    assert found.worst_fifth == pytest.approx(error[np.argsort(confidence)[:16]].sum() / error.sum())


def test_sparsification_of_perfect_useless_and_inverted_confidence(rng):
    error = rng.permutation(
        np.arange(1, 20_001) / 20_000
    )  # uniform: the oracle's curve falls as 1 - f, its area is 1/2
    perfect, inverted = metrics.sparsification(error, -error), metrics.sparsification(error, error)
    useless = metrics.sparsification(error, rng.uniform(size=len(error)))
    assert perfect.ause == 0 and perfect.worst_fifth == perfect.worst_fifth_oracle == pytest.approx(0.36, abs=1e-3)
    assert perfect.ause_random == pytest.approx(0.5, abs=1e-3) and useless.ause == pytest.approx(0.5, abs=0.05)
    assert inverted.ause == pytest.approx(1, abs=1e-3) and inverted.worst_fifth == pytest.approx(0.04, abs=1e-3)
    assert useless.worst_fifth == pytest.approx(0.2, abs=0.02)
