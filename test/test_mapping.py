"""Transforms, trajectories, their files and errors, and the map of points, against closed forms and other libraries."""

import os
import threading
from decimal import Decimal

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from speed3r_ros.clouds import to_world
from speed3r_ros.mapping import geometry
from speed3r_ros.mapping.files import folder_written_whole
from speed3r_ros.mapping.point_map import PointMap
from speed3r_ros.mapping.trajectory import (
    Trajectory,
    absolute_trajectory_error,
    align,
    associate,
    decimal_stamp,
    parse_stamp,
    read_tum,
)


@pytest.fixture
def rng():
    return np.random.default_rng()


def random_transforms(rng, count):
    T = np.tile(np.eye(4), (count, 1, 1))
    T[:, :3, :3] = Rotation.random(count, random_state=int(rng.integers(2**31))).as_matrix()
    T[:, :3, 3] = rng.normal(size=(count, 3)) * 3
    return T


def walk(rng, count, start_ns=1_700_000_000_123_456_789, step_ns=100_000_000):
    """A trajectory of many small random motions."""
    trajectory, T = Trajectory(), np.eye(4)
    for index in range(count):
        step = np.eye(4)
        step[:3, :3] = Rotation.from_rotvec(rng.normal(size=3) * 0.1).as_matrix()
        step[:3, 3] = rng.normal(size=3) * 0.1 + [0, 0, 0.2]
        T = T @ step
        trajectory.append(start_ns + index * step_ns, T)
    return trajectory


def transformed(trajectory, scale, T_new_old):
    """The same trajectory seen from another world, in another unit."""
    out = Trajectory()
    for stamp, T in zip(trajectory.stamps_ns, trajectory.poses):
        T[:3, 3] *= scale
        out.append(stamp, T_new_old @ T)
    return out


# geometry


def rotations(rng):
    """Random ones, half turns, where one formula after another degenerates, and tiny ones."""
    random = Rotation.random(40, random_state=int(rng.integers(2**31))).as_rotvec()
    half = np.pi * np.vstack([np.eye(3), random[:5] / np.linalg.norm(random[:5], axis=1, keepdims=True)])
    return Rotation.from_rotvec(np.vstack([random, half, np.zeros((1, 3)), 1e-9 * random[:6]]))


def test_quaternions_equal_those_of_scipy(rng):
    reference = rotations(rng)
    q, expected = geometry.quaternion_from_matrix(reference.as_matrix()), reference.as_quat()
    same_sign = np.sign((q * expected).sum(1, keepdims=True))
    np.testing.assert_allclose(q * same_sign, expected, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(q, axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(geometry.matrix_from_quaternion(5 * q), reference.as_matrix(), atol=1e-12)


def test_leading_axes_are_kept(rng):
    R = random_transforms(rng, 12)[:, :3, :3].reshape(3, 4, 3, 3)
    q = geometry.quaternion_from_matrix(R)
    assert q.shape == (3, 4, 4) and geometry.quaternion_from_matrix(R[0, 0]).shape == (4,)
    np.testing.assert_allclose(geometry.matrix_from_quaternion(q), R, atol=1e-12)
    assert geometry.matrix_from_quaternion(q[0, 0]).shape == (3, 3)
    assert geometry.quaternion_from_matrix(R[:0]).shape == (0, 4, 4)


def test_rotation_angles_equal_those_of_scipy(rng):
    reference = rotations(rng)
    np.testing.assert_allclose(
        geometry.rotation_angle(reference.as_matrix()), reference.magnitude(), rtol=1e-6, atol=1e-15
    )


def test_inverse_equals_the_matrix_inverse(rng):
    T = random_transforms(rng, 6).reshape(2, 3, 4, 4)
    np.testing.assert_allclose(geometry.inverse(T), np.linalg.inv(T), atol=1e-12)


def test_optical_frame_follows_rep_103():
    q = geometry.quaternion_from_matrix(geometry.T_link_optical[:3, :3])
    np.testing.assert_allclose(q * np.sign(q[3]), [-0.5, 0.5, -0.5, 0.5], atol=1e-12)
    np.testing.assert_array_equal(geometry.T_link_optical @ [0, 0, 1, 1], [1, 0, 0, 1])  # optical z is forward


# trajectory


@pytest.mark.parametrize("limit", [0, 1, 7, 64, 100, 200])
def test_bounded_trajectory_keeps_the_newest_poses(rng, limit):
    count = int(rng.integers(300, 400))
    trajectory, poses = Trajectory(max_length=limit), random_transforms(rng, count)
    for stamp, T in enumerate(poses):
        trajectory.append(stamp, T)
        if rng.random() < 0.1 or stamp == count - 1:
            kept = np.arange(max(0, stamp + 1 - limit) if limit else 0, stamp + 1)
            chosen = rng.permutation(len(kept))[:5]
            assert len(trajectory) == len(kept)
            for part, stamps in (
                (trajectory, kept),
                (trajectory.copy(), kept),
                (trajectory.select(chosen), kept[chosen]),
            ):
                np.testing.assert_array_equal(part.stamps_ns, stamps)
                np.testing.assert_array_equal(part.poses, poses[stamps])
    copy = trajectory.copy()
    trajectory.clear()
    trajectory.append(5, poses[0])
    copy.append(6, poses[1])
    np.testing.assert_array_equal(trajectory.stamps_ns, [5])
    np.testing.assert_array_equal(copy.stamps_ns, [*kept, 6])


def test_a_trajectory_keeps_its_own_copy(rng):
    trajectory, T = Trajectory(), np.eye(4)
    trajectory.append(1, T)
    T[:3, 3] = 5
    trajectory.poses[0][:], trajectory.stamps_ns[:] = 7, 7  # nor does it give its own away
    np.testing.assert_array_equal(trajectory.poses[0], np.eye(4))
    assert trajectory.stamps_ns[0] == 1


def test_tum_file_round_trip_keeps_every_nanosecond(rng, tmp_path):
    trajectory = walk(rng, 20, start_ns=int(rng.integers(1, 2**61)), step_ns=33_333_333)
    trajectory.write_tum(tmp_path / "t.tum")
    again = read_tum(tmp_path / "t.tum")
    np.testing.assert_array_equal(again.stamps_ns, trajectory.stamps_ns)
    np.testing.assert_allclose(again.poses, trajectory.poses, atol=1e-8)
    rows = np.loadtxt(tmp_path / "t.tum")  # an independent reader
    np.testing.assert_allclose(rows[:, 1:4], trajectory.poses[:, :3, 3], atol=1e-8)
    np.testing.assert_allclose(Rotation.from_quat(rows[:, 4:]).as_matrix(), trajectory.poses[:, :3, :3], atol=1e-8)
    assert [path.name for path in tmp_path.iterdir()] == ["t.tum"]


def test_an_empty_trajectory_is_a_valid_file(tmp_path):
    Trajectory().write_tum(tmp_path / "t.tum")
    assert len(read_tum(tmp_path / "t.tum")) == 0


def test_a_failed_write_leaves_the_old_file(rng, tmp_path, monkeypatch):
    walk(rng, 3).write_tum(tmp_path / "t.tum")
    before = (tmp_path / "t.tum").read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        walk(rng, 5).write_tum(tmp_path / "t.tum")
    assert [path.name for path in tmp_path.iterdir()] == ["t.tum"]
    assert (tmp_path / "t.tum").read_bytes() == before


def test_stamps_are_exact_decimals(rng):
    for stamp in [0, 1, -1, 999_999_999, 10**9, -1_500_000_000, *rng.integers(-(2**62), 2**62, 50).tolist()]:
        assert Decimal(decimal_stamp(stamp)) == Decimal(stamp) / 10**9
        assert parse_stamp(decimal_stamp(stamp)) == stamp
        for form in ("%.18e", "%.20E"):  # %.18e is numpy.savetxt's, with which evo writes trajectories
            assert parse_stamp(form % Decimal(stamp).scaleb(-9)) == pytest.approx(stamp, abs=600)
        assert parse_stamp(f"{Decimal(stamp % 10**9):e}") == stamp % 10**9 * 10**9
    assert parse_stamp("12.5") == 12_500_000_000 and parse_stamp("7") == 7_000_000_000


@pytest.mark.parametrize("text", ["", "now", "inf", "-inf", "nan", "1.2.3", "1/3", "1e10", "-1e999999999"])
def test_what_is_no_stamp_is_named(text):
    with pytest.raises(ValueError):
        parse_stamp(text)


def test_trajectories_of_numpy_and_evo_keep_their_stamps(rng, tmp_path):
    trajectory = walk(rng, 9, start_ns=int(rng.integers(10**18, 2 * 10**18)))
    rows = np.column_stack(
        [
            trajectory.stamps_ns / 1e9,
            trajectory.poses[:, :3, 3],
            geometry.quaternion_from_matrix(trajectory.poses[:, :3, :3]),
        ]
    )
    np.savetxt(tmp_path / "t.tum", rows)  # in scientific notation
    np.testing.assert_allclose(read_tum(tmp_path / "t.tum").stamps_ns, trajectory.stamps_ns, rtol=0, atol=300)


@pytest.mark.parametrize(
    "line", ["1.0 0 0 0 0 0 1", "1.0 0 0 0 0 0 0 0", "1.0 nan 0 0 0 0 0 1", "now 0 0 0 0 0 0 1", "inf 0 0 0 0 0 0 1"]
)
def test_a_bad_tum_line_is_named(tmp_path, line):
    (tmp_path / "t.tum").write_text(f"# comment\n0.0 0 0 0 0 0 0 1\n{line}\n")
    with pytest.raises(ValueError, match="line 3: expected `timestamp tx ty tz qx qy qz qw`"):
        read_tum(tmp_path / "t.tum")


# folders


def entries(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_appears_whole(tmp_path):
    with folder_written_whole(tmp_path / "a" / "out") as folder:
        assert folder.name == "out" and not (tmp_path / "a" / "out").exists()
        (folder / "x").write_text("1")
    assert entries(tmp_path / "a" / "out") == {"x": "1"} and os.listdir(tmp_path / "a") == ["out"]


def test_an_existing_folder_keeps_what_is_not_replaced_or_owned(tmp_path):
    for name in ("mine", "x", "stale"):
        (tmp_path / name).write_text("old")
    with folder_written_whole(tmp_path, owned={"x", "stale", "never"}) as folder:
        (folder / "x").write_text("new")
        assert (tmp_path / "x").read_text() == "old"
    assert entries(tmp_path) == {"mine": "old", "x": "new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_a_failure_leaves_the_old_folder_or_nothing(tmp_path, error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("old")
    for name in ("out", "fresh"):
        with pytest.raises(error), folder_written_whole(tmp_path / name, owned={"x"}) as folder:
            (folder / "x").write_text("new")
            raise error
    assert os.listdir(tmp_path) == ["out"] and entries(tmp_path / "out") == {"x": "old"}


# association, alignment, errors


def test_association_is_one_to_one_nearest_and_within_tolerance(rng):
    truth = np.sort(rng.choice(10_000, 60, replace=False)).astype(np.int64)
    estimate = rng.permutation(truth[rng.choice(60, 40, replace=False)] + rng.integers(-30, 31, 40))
    i, j = associate(estimate, truth, tolerance_ns=25)
    gap = np.abs(estimate[:, None] - truth[None])
    assert len(set(i)) == len(i) and len(set(j)) == len(j)
    assert (gap[i, j] <= 25).all()
    for row in set(range(40)) - set(i):  # an unmatched stamp has no free partner among its neighbours
        nearest = gap[row].argmin()
        assert gap[row, nearest] > 25 or (nearest in j and gap[i[list(j).index(nearest)], nearest] <= gap[row, nearest])
    for row, column in zip(i, j):  # a pair that is not the nearest lost it to a closer one
        nearest = gap[row].argmin()
        assert gap[row, nearest] == gap[row, column] or gap[i[list(j).index(nearest)], nearest] <= gap[row, nearest]


def test_association_of_nothing_is_empty():
    i, j = associate(np.zeros(0, np.int64), np.arange(3), 10)
    assert len(i) == len(j) == 0


def test_alignment_recovers_a_random_similarity(rng):
    source, scale = rng.normal(size=(30, 3)), rng.uniform(0.1, 10)
    R, t = Rotation.random(random_state=int(rng.integers(2**31))).as_matrix(), rng.normal(size=3) * 5
    s, R_found, t_found = align(source, scale * source @ R.T + t)
    np.testing.assert_allclose(s, scale, rtol=1e-10)
    np.testing.assert_allclose(R_found, R, atol=1e-10)
    np.testing.assert_allclose(t_found, t, atol=1e-9)


def test_alignment_of_a_mirror_image_is_still_a_rotation(rng):
    source = rng.normal(size=(20, 3))
    _, R, _ = align(source, source * [1, 1, -1])
    assert np.linalg.det(R) == pytest.approx(1)


@pytest.mark.parametrize("with_scale", [True, False])
def test_alignment_reaches_the_least_squares_optimum(rng, with_scale):
    source, target = rng.normal(size=(15, 3)), rng.normal(size=(15, 3))

    def cost(x):
        R = Rotation.from_rotvec(x[:3]).as_matrix()
        return ((target - ((np.exp(x[6]) if with_scale else 1) * source @ R.T + x[3:6])) ** 2).sum()

    s, R, t = align(source, target, with_scale)
    best = min(
        minimize(cost, [*Rotation.random(random_state=k).as_rotvec(), *np.zeros(4)], tol=1e-12).fun for k in range(6)
    )
    found = cost([*Rotation.from_matrix(R).as_rotvec(), *t, np.log(s)])
    assert found == pytest.approx(best, rel=1e-5)


def test_ate_of_a_moved_and_scaled_trajectory_is_zero_and_its_scale_recovered(rng):
    truth, scale = walk(rng, 40), rng.uniform(0.2, 5)
    estimate = transformed(truth, 1 / scale, random_transforms(rng, 1)[0])
    result = absolute_trajectory_error(estimate, truth)
    assert result.rmse < 1e-9 and result.scale == pytest.approx(scale) and result.coverage == 1
    metric = absolute_trajectory_error(estimate, truth, with_scale=False)
    assert metric.scale == 1 and metric.rmse > 0.01


def test_ate_counts_only_matched_poses_and_says_how_many(rng):
    truth, estimate = walk(rng, 50), Trajectory()
    for index in range(0, 50, 2):
        estimate.append(truth.stamps_ns[index] + 1_000_000, truth.poses[index])
    result = absolute_trajectory_error(estimate, truth, tolerance_ns=2_000_000)
    assert result.matched == 25 and result.coverage == 0.5 and result.rmse < 1e-9
    with pytest.raises(ValueError, match="0 of 50 true poses match"):
        absolute_trajectory_error(estimate, truth, tolerance_ns=500_000)


# the map of points


@pytest.mark.parametrize("count", [0, 1, 300])
def test_points_go_to_the_world_by_the_homogeneous_product(rng, count):
    T, rows = random_transforms(rng, 1)[0], rng.normal(size=(count, 4)).astype(np.float32)
    expected = np.c_[rows[:, :3], np.ones(count)] @ T.T
    np.testing.assert_allclose(to_world(T, rows[:, :3]), expected[:, :3], atol=1e-12)


class PlainMap:
    """The same fusion and the same choice of what makes room, voxel by voxel, in float64 and from the points themselves."""

    def __init__(self, voxel, max_points):
        self.voxel, self.ways = voxel, min(16, max_points)
        self.buckets = [[] for _ in range(max_points // self.ways)]
        self.rng = np.random.default_rng(0)
        self.evicted = 0

    def insert(self, points, colors, confidence):
        new = {}
        for row in zip(points.astype(float), colors.astype(float), confidence.astype(float)):
            if np.isfinite(row[0]).all() and row[2] > 0:
                new.setdefault(tuple(int(x) for x in np.floor(row[0] / self.voxel)), []).append(row)
        queues = {}
        for cell in sorted(new):
            x, y, z = (i + 2**20 for i in cell)
            mixed = (x << 42 | y << 21 | z) * 0x9E3779B97F4A7C15 % 2**64 >> 32
            number = mixed % len(self.buckets)
            fused = [seen for other, seen in self.buckets[number] if other == cell]
            if fused:
                fused[0].extend(new[cell])
            else:
                queues.setdefault(number, []).append(cell)
        for _ in range(self.ways):  # each bucket takes its last one; in the order of cells
            chosen = sorted((queue.pop(), number) for number, queue in queues.items() if queue)
            for (cell, number), first in zip(chosen, self.rng.integers(self.ways, size=len(chosen))):
                bucket = self.buckets[number]
                if len(bucket) < self.ways:
                    bucket.append((cell, new[cell]))
                else:
                    ways = [(first + k) % self.ways for k in range(min(4, self.ways))]
                    bucket[min(ways, key=lambda way: np.mean([row[2] for row in bucket[way][1]]))] = (cell, new[cell])
                    self.evicted += 1

    def snapshot(self):
        seen = [seen for bucket in self.buckets for _, seen in bucket]
        means = (
            [np.average([row[k] for row in rows], axis=0, weights=[row[2] for row in rows]) for rows in seen]
            for k in (0, 1)
        )
        return *map(np.array, means), np.array([np.mean([row[2] for row in rows]) for rows in seen])


def batch(rng, count, extent=1.0):
    return (
        rng.uniform(-extent, extent, (count, 3)).astype(np.float32),
        rng.integers(0, 256, (count, 3), dtype=np.uint8),
        rng.uniform(0.05, 1, count).astype(np.float32),
    )


@pytest.mark.parametrize("budget", [20_000, 700, 40, 3])
def test_the_map_is_that_of_a_plain_implementation(rng, budget):
    """A walk, whose neighbours share voxels as those of an image do, and scattered points, some without a position or
    confidence. Slots must be the same ones, also where voxels had to make room."""
    voxel = 0.05
    point_map, plain = PointMap(voxel, budget), PlainMap(voxel, budget)
    for _ in range(6):
        points, colors, confidence = batch(rng, 400)
        points[:200] = rng.uniform(-0.5, 0.5, 3) + np.cumsum(rng.normal(0, 0.01, (200, 3)), axis=0)
        points[rng.integers(400, size=5), 1] = rng.choice([np.nan, np.inf, -np.inf], 5)
        # sixty-fourths sum exactly, so that the least confident voxel does not hang on rounding
        confidence = np.ceil(confidence * 64) / 64 * (rng.random(400) > 0.02)
        for each in (point_map, plain):
            each.insert(points, colors, confidence)
    points, colors, confidence = point_map.snapshot()
    expected = plain.snapshot()
    assert (plain.evicted > 0) == (budget < 20_000)
    assert len(point_map) == len(points) == len(expected[0])
    np.testing.assert_allclose(points, expected[0], atol=1e-6)
    np.testing.assert_allclose(colors, expected[1], atol=0.501)
    np.testing.assert_allclose(confidence, expected[2], rtol=1e-6)


@pytest.mark.parametrize("budget", [1, 10, 100, 3_000])
def test_the_budget_is_hard_and_the_storage_never_grows(rng, budget):
    point_map = PointMap(0.01, budget)
    storage = [id(value) for value in vars(point_map).values() if isinstance(value, np.ndarray)]
    for _ in range(12):
        point_map.insert(*batch(rng, 2_000))
        assert len(point_map) <= budget
    assert len(point_map) >= 0.9 * budget
    assert storage == [id(value) for value in vars(point_map).values() if isinstance(value, np.ndarray)]


def test_a_full_map_keeps_old_and_new_places(rng):
    """Ten places, each enough to fill the map: all of them keep a share, the newest the largest."""
    point_map = PointMap(0.01, 4_000)
    for place in range(10):
        points, colors, confidence = batch(rng, 2_000)
        point_map.insert(points + [10 * place, 0, 0], colors, confidence)
    share = np.bincount(np.rint(point_map.points[:, 0] / 10).astype(int), minlength=10) / 4_000
    assert (share > 0.005).all() and share[9] > 0.15


def test_a_full_map_drops_unsure_points_first(rng):
    point_map = PointMap(0.01, 2_000)
    points, colors, _ = batch(rng, 2_000)
    sure = np.where(np.arange(2_000) % 2, 0.9, 0.1).astype(np.float32)
    point_map.insert(points, colors, sure)
    point_map.insert(*batch(rng, 1_500)[:2], np.full(1_500, 0.5, np.float32))
    confidence = point_map.confidence
    kept = [(np.isclose(confidence, value, atol=1e-3)).sum() for value in (0.9, 0.1)]
    assert kept[0] > 2 * kept[1]


def test_points_without_position_or_confidence_are_left_out(rng):
    points, colors, confidence = batch(rng, 6)
    points[0, 1], points[1, 2], points[2] = np.nan, np.inf, 1e9
    confidence[3], confidence[4] = 0, np.nan
    point_map = PointMap(1e-4, 100)
    point_map.insert(points, colors, confidence)
    np.testing.assert_allclose(point_map.points, points[5:], rtol=1e-6)
    point_map.insert(*(part[:0] for part in (points, colors, confidence)))
    assert len(point_map) == 1
    point_map.clear()
    assert len(point_map) == 0


def test_bad_arguments_are_named(rng):
    for arguments, message in (
        ((0.0, 5), "voxel = 0.0"),
        ((float("nan"), 5), "voxel = nan"),
        ((1.0, 0), "max_points = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PointMap(*arguments)
    points, colors, confidence = batch(rng, 5)
    with pytest.raises(ValueError, match=r"expected \(N, 3\), \(N, 3\), \(N,\)"):
        PointMap(1.0, 5).insert(points, colors, confidence[:4])


def test_ply_is_read_back_by_an_independent_reader(rng, tmp_path):
    point_map = PointMap(1e-3, 5_000)
    point_map.insert(*batch(rng, 1_000))
    point_map.write_ply(tmp_path / "map.ply")
    assert [path.name for path in tmp_path.iterdir()] == ["map.ply"]
    plyfile = pytest.importorskip("plyfile", reason="waits for `pip install plyfile`")
    ply = plyfile.PlyData.read(tmp_path / "map.ply")
    vertex = ply["vertex"]
    assert not ply.text and ply.byte_order == "<"
    points, colors, confidence = point_map.snapshot()
    np.testing.assert_array_equal(np.stack([vertex[axis] for axis in "xyz"], 1), points)
    np.testing.assert_array_equal(np.stack([vertex[c] for c in ("red", "green", "blue")], 1), colors)
    np.testing.assert_array_equal(vertex["confidence"], confidence)


def test_reading_while_inserting_gives_whole_snapshots(rng):
    """Every inserted point has red = 100 x its x; a torn snapshot would mix rows."""
    point_map, stop = PointMap(0.01, 3_000), threading.Event()

    def insert():
        mine = np.random.default_rng()
        while not stop.is_set():
            points, colors, confidence = batch(mine, 500)
            points = np.abs(points).round(2) + np.float32(0.005)
            colors[:, 0] = np.floor(points[:, 0] * 100)
            point_map.insert(points, colors, confidence)

    thread = threading.Thread(target=insert)
    thread.start()
    try:
        for _ in range(30):
            points, colors, confidence = point_map.snapshot()
            assert len(points) == len(colors) == len(confidence) <= 3_000
            np.testing.assert_array_equal(np.floor(points[:, 0] * 100), colors[:, 0])
    finally:
        stop.set()
        thread.join()
