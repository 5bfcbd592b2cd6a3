"""Variants of a sequence: OpenCV's projections, and points of a scene seen from the turned poses, say what each must show."""

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from speed3r_ros import variants
from speed3r_ros.camera import COEFFICIENTS, Camera
from speed3r_ros.mapping.trajectory import NANO, Trajectory
from speed3r_ros.sources import Source
from speed3r_ros.variants import mirrored_camera, with_variants

WIDTH, HEIGHT = 64, 48


@pytest.fixture
def rng():
    return np.random.default_rng()


def lens(rng, count, model="plumb_bob"):
    K = np.array(
        [[rng.uniform(50, 70), 0, rng.uniform(25, 38)], [0, rng.uniform(50, 70), rng.uniform(20, 28)], [0, 0, 1]]
    )
    return Camera(K, rng.uniform(-0.03, 0.03, count), model, WIDTH, HEIGHT)


@pytest.mark.parametrize("count", [0, *COEFFICIENTS])
def test_the_mirrored_camera_projects_mirrored_points_to_mirrored_pixels(rng, count):
    camera = lens(rng, count)
    points = rng.uniform((-1, -0.8, 2), (1, 0.8, 4), (50, 3))
    nothing = np.zeros(3)
    pixels = cv2.projectPoints(points, nothing, nothing, camera.K, camera.D)[0][:, 0]
    mirror = mirrored_camera(camera)
    found = cv2.projectPoints(points * [-1, 1, 1], nothing, nothing, mirror.K, mirror.D)[0][:, 0]
    np.testing.assert_allclose(found, [WIDTH - 1, 0] + pixels * [-1, 1], atol=1e-9)


def test_the_mirrored_fisheye_projects_mirrored_points_to_mirrored_pixels(rng):
    camera, points, nothing = lens(rng, 4, "equidistant"), rng.uniform((-3, -2, 1), (3, 2, 2), (1, 50, 3)), np.zeros(3)
    pixels = cv2.fisheye.projectPoints(points, nothing, nothing, camera.K, camera.D)[0][0]
    mirror = mirrored_camera(camera)
    found = cv2.fisheye.projectPoints(points * [-1, 1, 1], nothing, nothing, mirror.K, mirror.D)[0][0]
    np.testing.assert_allclose(found, [WIDTH - 1, 0] + pixels * [-1, 1], atol=1e-9)


class Recorded(Source):
    """Frames of one scene point: a white pixel where it is, and its depth there. The camera has no distortion."""

    def __init__(self, rng, count=5):
        self.name, self.path, self.camera = "recorded", None, lens(rng, 0)
        self.truth, self.items, self.point = Trajectory(), [], rng.uniform(-0.1, 0.1, 3)
        stamps = np.sort(rng.choice(100, count, False)) * NANO // 10
        for stamp in stamps.tolist():
            T = np.eye(4)
            T[:3, :3] = Rotation.from_rotvec(rng.uniform(-0.05, 0.05, 3)).as_matrix()
            T[:3, 3] = [*rng.uniform(-0.3, 0.3, 2), rng.uniform(-4, -3)]
            u, v, z = project(self.camera.K, T, self.point)
            image, depth = np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.zeros((HEIGHT, WIDTH), np.float32)
            image[v, u], depth[v, u] = 255, z
            self.truth.append(stamp, T)
            self.items.append((stamp, image, depth))

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return ((stamp, image, self.camera) for stamp, image, _ in self.items)

    @property
    def duration_s(self):
        return (self.items[-1][0] - self.items[0][0]) / NANO

    def true_depth(self, stamp_ns):
        return {stamp: depth for stamp, _, depth in self.items}[stamp_ns]


def project(K, T, point):
    """Column, row and depth of a point of the world."""
    x, y, z = T[:3, :3].T @ (point - T[:3, 3])
    return round(K[0, 0] * x / z + K[0, 2]), round(K[1, 1] * y / z + K[1, 2]), z


def test_variants_show_the_scene_from_their_true_poses(rng):
    source = Recorded(rng)
    found = with_variants(source)
    names = ["recorded", "recorded-mirrored", "recorded-backwards", "recorded-mirrored-backwards"]
    assert [variant.name for variant in found] == names
    before = [stamp for stamp, _, _ in source]
    for variant in found:
        frames = list(variant)
        stamps = [stamp for stamp, _, _ in frames]
        assert (
            stamps == variant.truth.stamps_ns.tolist() and min(stamps) >= 0 and variant.duration_s == source.duration_s
        )
        steps = np.diff(before)[::-1] if "backwards" in variant.name else np.diff(before)
        np.testing.assert_array_equal(np.diff(stamps), steps)
        point = source.point * ([-1, 1, 1] if "mirrored" in variant.name else 1)
        for (stamp, image, camera), T in zip(frames, variant.truth.poses):
            assert np.linalg.det(T[:3, :3]) == pytest.approx(1)
            u, v, z = project(camera.K, T, point)
            nearby = image[v - 1 : v + 2, u - 1 : u + 2]  # halves round to even, and that is not symmetric
            assert nearby.max() == 255
            assert variant.true_depth(stamp)[image[..., 0] == 255] == pytest.approx(z, rel=1e-5)


def test_backwards_uses_the_frames_that_are_used_forwards(rng):
    count, stride, limit = rng.integers(2, 15), int(rng.integers(1, 5)), rng.choice([None, 1, 3, 20])
    source, forwards, *turned = with_variants(Recorded(rng, count), stride, limit)

    def used(variant):  # as `evaluate` takes them
        frames = list(variant)
        assert variant is source or len(variant) == len(frames)
        return [image for _, image, _ in frames[::stride][:limit]]

    seen = used(source)
    np.testing.assert_array_equal(used(forwards), [image[:, ::-1] for image in seen])
    for variant, flip in zip(turned, (1, -1)):
        np.testing.assert_array_equal(used(variant), [image[:, ::flip] for image in seen[::-1]])


def test_a_source_without_truth_or_too_long_is_refused(rng, monkeypatch):
    source = Recorded(rng)
    monkeypatch.setattr(variants, "MOST_FRAMES", 4)
    with pytest.raises(ValueError, match="recorded-backwards: has 5 frames; to be read backwards, at most 4"):
        list(with_variants(source)[2])
    assert len(list(with_variants(source, limit=4)[2])) == 4
    source.truth = None
    with pytest.raises(ValueError, match="recorded: no ground truth"):
        with_variants(source)
