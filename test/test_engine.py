"""The engine: composition of poses over segments in closed form, keyframes, intrinsics, and every kind of bad frame."""

import numpy as np
import pytest
import torch

from speed3r_ros.model.config import EngineConfig, check
from speed3r_ros.model.engine import Engine, View, share_in_view, solve_intrinsics
from speed3r_ros.model.memory import Memory
from speed3r_ros.model.network import Network, NetworkConfig, Prediction
from speed3r_ros.model.types import Frame, Tracking, resize_intrinsics

SIZE = NetworkConfig(
    height=56, width=112, channels=32, head_width=16, encoder_blocks=1, alternating_blocks=1, stem=4, decoder=2
)
K_TRUE = np.array([[90.0, 0, 60.0], [0, 110.0, 25.0], [0, 0, 1]])


def random_rotation(rng) -> np.ndarray:
    Q, R = np.linalg.qr(rng.standard_normal((3, 3)))
    Q = Q * np.sign(np.diag(R))
    return Q if np.linalg.det(Q) > 0 else -Q


class OracleNetwork(torch.nn.Module):
    """Knows the truth, and tells it in a fresh random gauge and unit for every segment, as a real network would."""

    def __init__(self, poses: np.ndarray, depth: float, rng, K: np.ndarray = K_TRUE) -> None:
        super().__init__()
        self.K = K
        self.input_size, self.poses, self.depth, self.rng = (SIZE.height, SIZE.width), poses, depth, rng
        self.frame = -1
        self.gauges = {}

    def precision(self, dtype):
        return self

    def new_memory(self, window, anchors, bank, attention):
        return Memory(1, 1, 1, 0, 1, window, anchors, bank)

    def step(self, image, memory, rays, attention, top_k, known):
        self.frame = round(float(image[0, 0, 0]) * 255)
        if bool(memory.first):
            self.gauges[id(memory)] = random_rotation(self.rng), self.rng.standard_normal(3), self.rng.uniform(0.2, 5)
        R, t, unit = self.gauges[id(memory)]
        pose = self.poses[self.frame]
        u, v = np.meshgrid(np.arange(SIZE.width), np.arange(SIZE.height))
        z = np.full(u.shape, self.depth / unit)
        K = self.K
        points = np.stack([(u - K[0, 2]) / K[0, 0] * z, (v - K[1, 2]) / K[1, 1] * z, z])
        as_batch = lambda x: torch.as_tensor(x, dtype=torch.float64)[None, None]  # noqa: E731
        return Prediction(
            as_batch(points),
            as_batch(np.zeros(u.shape)),
            as_batch(R @ pose[:3, :3]),
            as_batch((R @ pose[:3, 3]) / unit + t),
            as_batch([-3.0, -4.0]),
        )


def numbered_frame(i: int, K=None) -> Frame:
    image = np.random.default_rng(i).integers(0, 255, (SIZE.height, SIZE.width, 3), dtype=np.uint8)
    image[0, 0] = i
    return Frame(image, 1_700_000_000_000_000_001 + i, K)


@pytest.mark.parametrize("refresh", [0, 6, 9])
def test_world_poses_survive_segment_changes(refresh):
    rng = np.random.default_rng()
    poses = np.tile(np.eye(4), (120, 1, 1))
    for i in range(1, 120):  # steps large enough for many keyframes
        angle = 0.1 * rng.standard_normal(3)
        skew = np.cross(np.eye(3), angle)
        U, _, Vt = np.linalg.svd(np.eye(3) + skew)
        poses[i, :3, :3] = poses[i - 1, :3, :3] @ U @ Vt
        poses[i, :3, 3] = poses[i - 1, :3, 3] + 0.3 * rng.standard_normal(3)
    network = OracleNetwork(poses, 2.0, rng)
    engine = Engine(EngineConfig(refresh=refresh, device="cpu", precision="fp32"), network)
    estimates = [engine.push(numbered_frame(i)) for i in range(120)]
    got = np.stack([e.T_world_cam for e in estimates])
    unit = estimates[0].depth[0, 0] / 2.0
    expected = np.linalg.inv(poses[0]) @ poses
    expected[:, :3, 3] *= unit
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose([e.depth.mean() for e in estimates], 2.0 * unit, rtol=1e-5)
    assert sum(e.is_keyframe for e in estimates) > 20
    assert (len(network.gauges) > 1) == (refresh > 0)
    assert [e.stamp_ns for e in estimates] == [1_700_000_000_000_000_001 + i for i in range(120)]


def test_standing_still_makes_no_keyframes_and_known_intrinsics_are_passed_on():
    network = OracleNetwork(np.tile(np.eye(4), (30, 1, 1)), 2.0, np.random.default_rng())
    engine = Engine(EngineConfig(device="cpu", precision="fp32"), network)
    K = np.array([[100.0, 0, 55.0], [0, 100, 27.0], [0, 0, 1]])
    estimates = [engine.push(numbered_frame(i, K)) for i in range(30)]
    assert [e.is_keyframe for e in estimates] == [True] + [False] * 29
    np.testing.assert_allclose(estimates[-1].K, K)
    unknown = Engine(EngineConfig(device="cpu", precision="fp32"), network).push(numbered_frame(0))
    np.testing.assert_allclose(unknown.K, K_TRUE, rtol=1e-5)


def test_standing_still_makes_no_keyframes_with_the_principal_point_far_from_the_middle():
    rng = np.random.default_rng()
    K = np.array([[90.0, 0, rng.uniform(15, 35)], [0, 110.0, rng.uniform(5, 50)], [0, 0, 1]])
    network = OracleNetwork(np.tile(np.eye(4), (9, 1, 1)), 2.0, rng, K)
    for known in (K, None):
        engine = Engine(EngineConfig(device="cpu", precision="fp32"), network)
        assert [engine.push(numbered_frame(i, known)).is_keyframe for i in range(9)] == [True] + [False] * 8


def test_overlap_is_counted_in_the_image_wherever_the_principal_point_is():
    """As of cropped images: a camera that slides before a wall sees what of it has not left the image."""
    rng = np.random.default_rng()
    for _ in range(20):
        K = np.array([[90.0, 0, rng.uniform(10, 100)], [0, 110.0, rng.uniform(5, 50)], [0, 0, 1]])
        u, v = np.meshgrid(np.arange(7, SIZE.width, 14.0), np.arange(7, SIZE.height, 14.0))
        points = 2.0 * np.stack([(u - K[0, 2]) / 90, (v - K[1, 2]) / 110, np.ones_like(u)], -1).reshape(-1, 3)
        right, down = 14 * rng.integers(-6, 7), 14 * rng.integers(-3, 4)  # pixels by which the camera slides
        T = np.eye(4)
        T[:2, 3] = 2.0 * right / 90, 2.0 * down / 110
        before, after = View(np.eye(4), K, points), View(T, K, points)
        inside = ((u - right >= 0) & (u - right < SIZE.width) & (v - down >= 0) & (v - down < SIZE.height)).mean()
        assert share_in_view(before, after, (SIZE.height, SIZE.width)) == pytest.approx(inside)


def test_intrinsics_follow_the_resize_in_closed_form():
    rng = np.random.default_rng()
    K = np.array([[rng.uniform(200, 900), 0, 310.0], [0, rng.uniform(200, 900), 250.0], [0, 0, 1]])
    small = resize_intrinsics(K, (480, 640), (168, 224))
    point = rng.uniform(-1, 1, 3) + [0, 0, 3]
    u, v = (K @ point / point[2])[:2]
    expected = (u + 0.5) * 224 / 640 - 0.5, (v + 0.5) * 168 / 480 - 0.5  # edges map to edges
    np.testing.assert_allclose((small @ point / point[2])[:2], expected)


def test_solved_intrinsics_recover_a_pinhole():
    rng = np.random.default_rng()
    u, v = np.meshgrid(np.arange(64), np.arange(48))
    z = rng.uniform(0.5, 5, u.shape)
    K = np.array([[rng.uniform(40, 90), 0, 30.0], [0, rng.uniform(40, 90), 25.0], [0, 0, 1]])
    points = np.stack([(u - K[0, 2]) / K[0, 0] * z, (v - K[1, 2]) / K[1, 1] * z, z])
    np.testing.assert_allclose(solve_intrinsics(points), K, rtol=1e-6)


@pytest.fixture(scope="module")
def engine():
    return Engine(EngineConfig(device="cpu", precision="fp32"), Network(SIZE))


BAD_IMAGES = {
    "black": np.zeros((60, 80, 3), np.uint8),
    "saturated": np.full((60, 80, 3), 255, np.uint8),
    "constant": np.full((60, 80, 3), 120, np.uint8),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_frames_without_geometry_are_lost_and_change_nothing(engine, kind):
    engine.reset()
    good = [numbered_frame(i) for i in range(4)]
    plain = [engine.push(f).T_world_cam for f in good]
    engine.reset()
    disturbed = []
    for frame in good:
        disturbed.append(engine.push(frame).T_world_cam)
        lost = engine.push(Frame(BAD_IMAGES[kind], frame.stamp_ns + 1))
        assert lost.tracking is Tracking.LOST and lost.T_world_cam is None and lost.depth is None
        assert "\n" not in lost.lost_reason and lost.lost_reason
    np.testing.assert_array_equal(disturbed, plain)


def test_uncertainty_grows_while_lost(engine):
    engine.reset()
    engine.push(numbered_frame(0))
    before = engine.push(numbered_frame(1)).pose_sigma
    for _ in range(5):
        engine.push(Frame(BAD_IMAGES["black"], 0))
    assert (engine.push(numbered_frame(1)).pose_sigma > 2 * before).all()


GOOD = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "image, K, says",
    [
        (GOOD[..., :1], None, r"\(60, 80, 1\)"),
        (GOOD.astype(np.float32), None, "float32"),
        (GOOD[:0], None, "80 x 0"),
        (GOOD[:20, :20], None, "20 x 20"),
        ("image.png", None, "str"),
        (GOOD, np.full((3, 3), np.nan), "nan"),
        (GOOD, np.diag([0.0, 0, 1]), "focal"),
        (GOOD, np.eye(4), "3 x 3"),
        (GOOD, np.diag([1e-3, 1e-3, 1]), "pixels: a field of view of 180 x 180 degrees"),  # metres
        (GOOD, np.diag([100.0, 1e5, 1]), "degrees; give focal lengths in pixels"),
    ],
)
def test_malformed_frames_are_refused_in_one_line_and_change_nothing(engine, image, K, says):
    engine.reset()
    first = engine.push(numbered_frame(0))
    with pytest.raises(ValueError, match=says) as error:
        engine.push(Frame(image, 0, K))
    assert "\n" not in str(error.value)
    second = engine.push(numbered_frame(1)).T_world_cam
    engine.reset()
    np.testing.assert_array_equal(engine.push(numbered_frame(0)).T_world_cam, first.T_world_cam)
    np.testing.assert_array_equal(engine.push(numbered_frame(1)).T_world_cam, second)


def test_image_size_may_change_mid_stream(engine):
    engine.reset()
    for size in ((60, 80), (480, 640), (33, 500)):
        image = np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8)
        estimate = engine.push(Frame(image, 0, np.array([[50.0, 0, 40], [0, 50, 30], [0, 0, 1]])))
        assert estimate.depth.shape == engine.input_size == (56, 112)
        assert np.isfinite(estimate.depth).all() and (estimate.depth > 0).all()
        assert estimate.image.shape == (56, 112, 3) and ((estimate.confidence >= 0) & (estimate.confidence <= 1)).all()


@pytest.mark.parametrize(
    "setting, says",
    [
        ({"window": 0}, "window"),
        ({"attention": "flash"}, "speed3r, dense"),
        ({"top_k": 1.5}, "expected int"),
        ({"keyframe_overlap": float("nan")}, "keyframe_overlap"),
        ({"keyframe_overlap": 2}, "keyframe_overlap"),
        ({"device": "tpu"}, "auto, cpu, cuda"),
    ],
)
def test_settings_are_checked(setting, says):
    with pytest.raises(ValueError, match=says) as error:
        check(EngineConfig(**setting), "engine.")
    assert str(error.value).startswith("engine.") and "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_said_in_one_line():
    with pytest.raises(ValueError, match="no CUDA GPU"):
        Engine(EngineConfig(device="cuda"), Network(SIZE))
