"""Refinement by tracked features, on rendered sequences with exact truth and a network that is wrong on purpose."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from speed3r_ros.mapping.geometry import inverse, rotation_angle
from speed3r_ros.mapping.odometry import CELL, EDGES, Odometry, View, edge_pixels, solve_pose
from speed3r_ros.mapping.trajectory import Trajectory, absolute_trajectory_error
from speed3r_ros.model.types import Estimate, Tracking
from speed3r_ros.training.render import SceneDataset

FRAMES, SIZE = 16, (168, 224)


@pytest.fixture(scope="module")
def sequence():
    """Images (T, H, W, 3), poses, depth and K of a fresh orbit that starts at the origin."""
    dataset = SceneDataset("cpu", int(torch.randint(2**31, ())), *SIZE, samples=1, textures_per_family=1)
    # until features can be tracked, the path moves, and the lens, without distortion, is wide: it tells turns from shifts
    while True:
        batch = dataset.batch(1, FRAMES, "orbit")
        images = (batch["img"][0].permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
        T = np.tile(np.eye(4), (FRAMES, 1, 1))
        U, _, Vt = np.linalg.svd(batch["R"][0].double().numpy())
        T[:, :3, :3], T[:, :3, 3] = U @ Vt, batch["t"][0].double().numpy()
        T = inverse(T[0]) @ T
        steps = np.linalg.norm(np.diff(T[:, :3, 3], axis=0), axis=1)
        fx, fy, cx, cy, k1 = batch["K"][0].double().numpy()
        depth, K = batch["depth"][0].numpy(), np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
        if k1 == 0 and 0.01 < steps.mean() < 0.1 and fx < 0.75 * SIZE[1] and trackable(images, T, depth, K) >= 60:
            return images, T, depth, K


def trackable(images, T_world_cam, depth, K):
    """How many corners a tracker finds in the next image within a pixel of their true place, in the worst of the images:
    dark, noisy and repetitive renderings have many corners, and few such."""
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images]
    counts = []
    for i in range(len(images) - 1):
        corners = cv2.goodFeaturesToTrack(grey[i], 300, 0.003, 10)
        if corners is None:
            return 0
        corners = corners[:, 0]
        tracked, found, _ = cv2.calcOpticalFlowPyrLK(grey[i], grey[i + 1], corners, None)
        x, y = corners.astype(int).T
        points = np.concatenate([corners, np.ones((len(corners), 1))], 1) @ np.linalg.inv(K).T * depth[i, y, x, None]
        motion = inverse(T_world_cam[i + 1]) @ T_world_cam[i]
        true = cv2.projectPoints(points, cv2.Rodrigues(motion[:3, :3])[0], motion[:3, 3], K, None)[0][:, 0]
        counts.append(((found[:, 0] > 0) & (np.linalg.norm(tracked - true, axis=1) < 1)).sum())
    return min(counts)


def network(sequence, rng, noise=0.04, factor=1.0):
    """Estimates with drifting poses, noisy depth in a unit that wavers from frame to frame, and a wrong focal length."""
    images, T_true, depth, K = sequence
    K = K * np.array([[factor, 1, 1], [1, factor, 1], [1, 1, 1]])
    T, estimates = np.eye(4), []
    for i in range(FRAMES):
        if i:
            step = inverse(T_true[i - 1]) @ T_true[i]
            step[:3, 3] += noise * rng.normal(size=3)
            T = T @ step
        blotches = np.exp(0.1 * rng.normal(size=(3, 4))).repeat(56, 0).repeat(56, 1)
        z = (depth[i] * blotches * np.exp(0.05 * rng.normal() * (i > 0))).astype(np.float32)
        confidence = np.ones(SIZE, np.float32)
        estimates.append(
            Estimate(i, Tracking.TRACKING, T.copy(), z, confidence, K, images[i], pose_sigma=np.array([0.1, 0.1]))
        )
    return estimates


def error(estimates, T_true):
    trajectories = Trajectory(), Trajectory()
    for i, T in enumerate(T_true):
        trajectories[0].append(i, estimates[i].T_world_cam)
        trajectories[1].append(i, T)
    return absolute_trajectory_error(*trajectories).rmse


def refined(sequence, estimates, calibrated=True):
    odometry = Odometry()
    return [odometry.refine(image, estimate, calibrated) for image, estimate in zip(sequence[0], estimates)]


def test_better_than_the_network(sequence):
    T_true = sequence[1]
    ratios, angles = [], []
    for _ in range(3):  # one draw of the network's errors in a hundred cannot be mended
        estimates = network(sequence, np.random.default_rng())
        got = refined(sequence, estimates)
        ratios.append(error(got, T_true) / error(estimates, T_true))
        angles.append(rotation_angle(got[-1].T_world_cam[:3, :3].T @ T_true[-1, :3, :3]))
    assert np.median(ratios) < 0.7 and np.median(angles) < np.radians(5)
    again = refined(sequence, estimates)
    assert all((a.T_world_cam == b.T_world_cam).all() for a, b in zip(got, again))


def test_frames_between_the_networks_are_followed(sequence):
    """With the network at every fourth or third frame only, the frames between get poses as good, and new landmarks with
    depth; steady motion may call for these at just the one's frames, not at both's."""
    images, T_true, depth, K = sequence
    estimates = network(sequence, np.random.default_rng())
    between = False
    for period in (4, 3):
        odometry, poses = Odometry(), []
        for i, (image, estimate) in enumerate(zip(images, estimates)):
            now = i % period == 0
            poses.append(odometry.refine(image, estimate, True).T_world_cam if now else odometry.follow(image, K))
            between |= odometry._keyframes[-1].number % period > 0
        got = [replace(estimate, T_world_cam=T) for estimate, T in zip(estimates, poses)]
        assert error(got, T_true) < 0.7 * error(estimates, T_true)
    assert between


def test_a_camera_that_stands_still_does_not_drift(sequence):
    """For 60 frames, every second one of them without the network, in noise and with a network that thinks it moves; then it
    moves on and is followed as well as one that never stood."""
    images, T_true, depth, K = sequence
    rng = np.random.default_rng()
    estimates, odometry = network(sequence, rng), Odometry()
    T_wrong = np.eye(4)
    for i in range(60):
        image = np.clip(images[0] + rng.normal(0, 3, images[0].shape), 0, 255).astype(np.uint8)
        T_wrong[:3, 3] += 0.02 * rng.normal(size=3) * (i > 0)
        estimate = replace(estimates[0], T_world_cam=T_wrong.copy(), depth=estimates[0].depth)
        T = odometry.refine(image, estimate, True).T_world_cam if i % 2 == 0 else odometry.follow(image, K)
        assert T is not None and np.linalg.norm(T[:3, 3]) < 0.01 * depth[0].mean()
        assert rotation_angle(T[:3, :3]) < np.radians(0.3)
    moved = inverse(T_wrong)
    moving = [replace(x, T_world_cam=inverse(moved) @ x.T_world_cam) for x in estimates[1:]]
    got = [estimates[0]] + [odometry.refine(image, x, True) for image, x in zip(images[1:], moving)]
    assert error(got, T_true) < 0.7 * error(estimates, T_true)


def test_steps_of_the_exposure_do_not_lose_features(sequence):
    """As a camera's automatic exposure makes them: every frame brighter or darker than the last one by up to a half."""
    images, T_true, depth, K = sequence
    rng = np.random.default_rng()
    gains = rng.uniform(0.6, 0.95, FRAMES)
    stepped = [(gain * image).round().astype(np.uint8) for gain, image in zip(gains, images)]
    counts = []
    for shown in (images, stepped):
        odometry, estimates = Odometry(), network(sequence, np.random.default_rng(1))
        counts.append([])
        for image, estimate in zip(shown, estimates):
            odometry.refine(image, estimate, True)
            counts[-1].append(odometry.tracked)
    assert sum(counts[1]) > 0.8 * sum(counts[0])


def test_near_things_that_move_slowly_before_a_far_wall_are_no_standing_still():
    """A camera that slides by 1 cm per frame; two thirds of what it sees are 50 m away, the rest 2 m."""
    rng = np.random.default_rng()
    far, near = (cv2.GaussianBlur(rng.uniform(0, 255, (240, 900)), (0, 0), 1.5) for _ in range(2))
    far, near = (np.clip((x - 127) * 4 + 127, 0, 255).astype(np.uint8) for x in (far, near))
    K = np.array([[200.0, 0, 160], [0, 200, 120], [0, 0, 1]])
    depth = np.full((240, 320), 50, np.float32)
    depth[:80] = 2
    odometry, off = Odometry(), []
    for i in range(40):
        moved, x = np.float32([[1, 0, -i], [0, 1, 0]]), 0.01 * i  # 200 pixels * 1 cm / 2 m
        image = cv2.warpAffine(far, np.float32([[1, 0, -i / 25], [0, 1, 0]]), (320, 240))
        image[:80] = cv2.warpAffine(near, moved, (320, 240))[:80]
        T = np.eye(4)
        T[:3, 3] = (i > 0) * 0.02 * rng.normal(size=3) + [x, 0, 0]
        image = np.repeat(image[..., None], 3, 2)
        sigma = np.array([0.1, 0.1])
        estimate = Estimate(i, Tracking.TRACKING, T, depth, np.ones_like(depth), K, image, pose_sigma=sigma)
        off.append(abs(odometry.refine(image, estimate, True).T_world_cam[0, 3] - x))
    assert max(off) < 0.08


def test_a_slow_turn_is_no_standing_still(sequence):
    """A tenth of a pixel per frame, under what noise hides from one frame to the next."""
    images, _, _, K = sequence
    estimate, odometry = network(sequence, np.random.default_rng())[0], Odometry()
    steps = np.arange(50) / 10
    for step in steps:
        shifted = cv2.warpAffine(images[0], np.float32([[1, 0, -step], [0, 1, 0]]), SIZE[::-1], flags=cv2.INTER_CUBIC)
        T = odometry.refine(shifted, estimate, True).T_world_cam
    points = odometry._points_of(odometry._last.ids)
    columns = [K[0, 0] * camera[:, 0] / camera[:, 2] for camera in (points, (points - T[:3, 3]) @ T[:3, :3])]
    assert len(points) >= 20
    assert 0.9 * steps[-1] < np.median(columns[0] - columns[1]) < 1.1 * steps[-1]


def test_following_needs_landmarks_of_the_same_camera(sequence):
    images, _, _, K = sequence
    estimates = network(sequence, np.random.default_rng())
    odometry = Odometry()
    assert odometry.follow(images[0], K) is None  # nothing is known yet
    for image, estimate in zip(images[:2], estimates):
        odometry.refine(image, estimate, True)
    assert odometry.tracked
    plain = np.full((*SIZE, 3), 90, np.uint8)
    for image, K_now in ((images[2][::2], K), (images[2], None), (plain, K), (images[2], K * np.nan)):
        before = odometry._last, odometry._number, odometry.tracked, len(odometry._keyframes), odometry._points.copy()
        assert odometry.follow(image, K_now) is None
        after = odometry._last, odometry._number, odometry.tracked, len(odometry._keyframes)
        assert after == before[:4] and (odometry._points == before[4]).all()
    assert odometry.follow(images[2], K) is not None


def test_carried_depth_is_what_the_other_view_would_see(sequence):
    images, T_true, depth, K = sequence
    source, here = (
        View(
            i,
            cv2.cvtColor(images[i], cv2.COLOR_RGB2GRAY),
            True,
            K,
            T_true[i],
            0.5,
            T_true[i],
            2 * depth[i],
            np.ones(SIZE),
        )
        for i in (3, 6)
    )
    here.depth = None
    here.carry_depth(source)
    h, w = here.depth.shape
    true = cv2.resize(depth[6], (w, h), interpolation=cv2.INTER_AREA)
    seen = np.isfinite(here.depth)
    off = np.abs(np.log(here.scale * here.depth[seen] / true[seen]))
    assert seen.mean() > 0.5 and np.median(off) < 0.05 and (off < 0.3).mean() > 0.8
    assert (here.confidence[seen] == 1).all() and (here.confidence[~seen] == 0).all()


def test_depth_follows_the_scale_of_the_past(sequence):
    images, T_true, depth, _ = sequence
    estimates = network(sequence, np.random.default_rng(), noise=0.0)
    half = [e if i < 8 else replace(e, depth=e.depth * np.float32(0.5)) for i, e in enumerate(estimates)]
    got = refined(sequence, half)
    ratio = [float(np.median(e.depth / z)) for e, z in zip(got, depth)]
    assert ratio[8] / ratio[7] == pytest.approx(1, abs=0.25)  # at once
    assert ratio[-1] / ratio[0] == pytest.approx(1, abs=0.25)


def test_focal_length(sequence):
    """Drawn towards usual lenses when uncalibrated, with the network's aspect; untouched when calibrated."""
    K = sequence[3]
    usual = SIZE[1] / 2 / np.tan(np.radians(65 / 2))
    for factor in (0.6, 1.0, 1.5):
        estimates = network(sequence, np.random.default_rng(), factor=factor * usual / K[0, 0])
        first = Odometry().refine(sequence[0][0], estimates[0], False)
        low, high = sorted((factor, 1.0))
        assert low - 1e-9 <= first.K[0, 0] / usual <= high + 1e-9
        assert first.K[0, 0] / first.K[1, 1] == pytest.approx(K[0, 0] / K[1, 1])
    known = refined(sequence, network(sequence, np.random.default_rng()))
    assert (known[-1].K == K).all()


def test_network_alone_where_there_are_no_features(sequence):
    rng = np.random.default_rng()
    estimates = network(sequence, rng)
    plain = [np.full((*SIZE, 3), 90 + i, np.uint8) for i in range(FRAMES)]
    odometry = Odometry()
    for image, estimate in zip(plain, estimates):
        got = odometry.refine(image, estimate, True)
        assert np.allclose(got.T_world_cam, estimate.T_world_cam, atol=1e-9)
        assert (got.depth == estimate.depth).all() and odometry.tracked == 0


def bare_box(rng, turn, wild):
    """Two images of a dark rectangle in front of a bright wall, without corners to track, the camera turned by `turn` and shifted in
    between, and estimates of both; the second one's turn is off by `wild` about some axis. Also the second true pose."""
    K, depth = np.array([[260.0, 0, 160], [0, 260, 120], [0, 0, 1]]), np.full((120, 160), 2.0, np.float32)
    T_true, axis = np.eye(4), rng.normal(size=3)
    T_true[:3, :3] = cv2.Rodrigues(turn * rng.uniform(-1, 1, 3) / 3**0.5)[0]
    T_true[:3, 3] = rng.uniform(-0.04, 0.04, 3)
    wall = cv2.GaussianBlur(np.pad(np.full((110, 130), 60.0), ((60, 70), (85, 105)), constant_values=200), (0, 0), 4)
    T = np.linalg.inv(T_true)
    H = K @ (T[:3, :3] + np.outer(T[:3, 3], [0, 0, 0.5])) @ np.linalg.inv(K)  # of the plane z = 2
    images = [wall, cv2.warpPerspective(wall, H, (320, 240), borderValue=200)]
    T_network = T_true.copy()
    T_network[:3, :3] = T_network[:3, :3] @ cv2.Rodrigues(wild * axis / np.linalg.norm(axis))[0]
    images = [np.repeat(x.round().astype(np.uint8)[..., None], 3, 2) for x in images]
    estimates = [
        Estimate(i, Tracking.TRACKING, T, depth, np.ones_like(depth), K, image, pose_sigma=np.full(2, 0.1))
        for i, (T, image) in enumerate(zip((np.eye(4), T_network), images))
    ]
    return images, estimates, T_true


@pytest.mark.parametrize("wild", [0.03, 0.5, 2.5])
def test_dense_flow_contradicts_a_wild_turn_of_the_network(wild):
    """A small error of the network stays as it is: the flow's pose is the coarser one."""
    images, estimates, T_true = bare_box(np.random.default_rng(), 0.05, wild)
    odometry = Odometry()
    _, got = (odometry.refine(image, estimate, True) for image, estimate in zip(images, estimates))
    assert odometry.tracked == 0 and got.tracking is Tracking.WEAK
    if wild < 0.1:
        assert np.allclose(got.T_world_cam, estimates[1].T_world_cam, atol=1e-9)
    else:
        off = rotation_angle(got.T_world_cam[:3, :3].T @ T_true[:3, :3])
        assert off < 0.15 and np.abs(got.T_world_cam[:3, 3] - T_true[:3, 3]).max() < 0.25  # 300 draws: 0.09, 0.16


def test_edges_are_the_strongest_of_their_cells_and_bounded():
    rng = np.random.default_rng()
    grey = cv2.GaussianBlur(rng.integers(0, 256, (400, 500)).astype(np.uint8), (0, 0), 1.5)
    grey[:, :100] = 128
    x, y = edge_pixels(grey).T
    assert len(x) == EDGES and x.min() >= 90 and len(set(zip(x // CELL, y // CELL))) == EDGES
    assert len(edge_pixels(np.full((32, 33), 90, np.uint8))) == 0


def test_poses_without_features_are_weak_and_leave_doubt(sequence):
    estimates = network(sequence, np.random.default_rng())
    odometry, blank = Odometry(), np.full((*SIZE, 3), 90, np.uint8)
    got = [odometry.refine(blank if i in (5, 6) else sequence[0][i], e, True) for i, e in enumerate(estimates)]
    assert [e.tracking is Tracking.WEAK for e in got[:7]] == [False] * 5 + [True] * 2
    growth = (
        np.stack([e.pose_sigma for e in got])[:, 1] / np.stack([e.pose_sigma for e in estimates])[:, 1]
    )  # of rotation
    assert np.allclose(growth[:5], 1) and growth[5] == pytest.approx(2**0.5) and growth[6] == pytest.approx(3**0.5)
    assert (growth[7:] >= growth[6] - 1e-9).all()
    odometry.reset()
    assert np.allclose(odometry.refine(sequence[0][0], estimates[0], True).pose_sigma, estimates[0].pose_sigma)


def test_survives_a_cut_and_a_change_of_size(sequence):
    """Unrelated images, another resolution, and intrinsics that appear: the network's motion bridges them."""
    rng = np.random.default_rng()
    images = sequence[0]
    estimates = network(sequence, rng)
    odometry, last = Odometry(), estimates[0]
    for i, estimate in enumerate(estimates):
        image = images[i]
        if i == 6:
            image = rng.integers(0, 255, image.shape, dtype=np.uint8)
        if i >= 10:
            image = image[::2, ::2]
        got = odometry.refine(image, estimate, calibrated=i >= 13)
        assert np.isfinite(got.T_world_cam).all() and (got.depth > 0).all()
        R = got.T_world_cam[:3, :3]
        assert np.allclose(R @ R.T, np.eye(3), atol=1e-9)
        assert odometry._keyframes[-1].number < odometry._number  # else no keyframe would be due by its age
        assert 0.7 < got.K[0, 0] / estimate.K[0, 0] < 1.4 and got.K[0, 2] == pytest.approx(estimate.K[0, 2], abs=1)
        if i == 10:
            step = inverse(last.T_world_cam) @ got.T_world_cam
            assert np.allclose(step[:3, :3], (inverse(estimates[9].T_world_cam) @ estimate.T_world_cam)[:3, :3])
            assert got.tracking is Tracking.WEAK and got.pose_sigma[1] > last.pose_sigma[1]
        last = got


def test_after_a_gap_that_no_landmarks_bridge_the_depth_gives_the_unit():
    """Of the window's eight keyframes the last three share landmarks among themselves alone. All fits the pixels, but the last
    ones' points and steps are too large or too small for their depth: images leave that open, and with it their place."""
    rng = np.random.default_rng()
    K, size = np.array([[300.0, 0, 159.5], [0, 300, 119.5], [0, 0, 1]]), (240, 320)
    T_true = np.tile(np.eye(4), (8, 1, 1))
    for i, T in enumerate(T_true):
        T[:3, :3] = cv2.Rodrigues(rng.normal(0, 0.03, 3))[0]
        T[:3, 3] = [0.1 * i, *rng.normal(0, 0.02, 2)]
    points = rng.uniform([-0.5, -0.7, 3], [1.2, 0.7, 5], (160, 3))
    odometry = Odometry()
    for i, T in enumerate(T_true):
        ids = np.arange(80) + 80 * (i >= 5)
        camera = (points[ids] - T[:3, 3]) @ T[:3, :3]
        pixels = camera[:, :2] / camera[:, 2:] * 300 + K[:2, 2]
        depth = np.full(size, np.nan, np.float32)
        x, y = pixels.round().astype(int).T
        seen = (x >= 0) & (x < size[1]) & (y >= 0) & (y < size[0])
        depth[y[seen], x[seen]] = camera[seen, 2]
        view = View(i, np.zeros(size, np.uint8), True, K, T.copy(), 1.0, T, depth, np.ones(size))
        view.observe(ids[seen], (pixels[seen] + rng.normal(0, 0.02, (seen.sum(), 2))).astype(np.float32))
        odometry._keyframes.append(view)
    factor, origin = np.exp(rng.choice([-1, 1]) * rng.uniform(0.3, 0.6)), T_true[5, :3, 3]
    wrong = points.copy()
    wrong[80:] = origin + factor * (points[80:] - origin)
    for view in odometry._keyframes[6:]:
        view.T_world_cam[:3, 3] = origin + factor * (view.T_world_cam[:3, 3] - origin)
    odometry._ids, odometry._points, odometry._keyframe_count = np.arange(160), wrong, 20
    odometry._adjust(calibrated=True)
    got = np.stack([k.T_world_cam for k in odometry._keyframes])
    assert np.allclose(got[:6], T_true[:6], atol=1e-9)  # those before the gap, and the first one after it
    off = (got[6:, :3, 3] - T_true[6:, :3, 3]) / np.linalg.norm(T_true[7, :3, 3] - origin)
    assert np.abs(off).max() < 0.1
    assert abs(np.median(np.log((odometry._points[80:, 2] - origin[2]) / (points[80:, 2] - origin[2])))) < 0.03


@pytest.mark.parametrize("value", [np.inf, np.nan, 0.0])
def test_depth_that_is_no_number_leaves_the_scale_alone(sequence, value):
    estimates = network(sequence, np.random.default_rng())
    bad = np.full(SIZE, value, np.float32)
    odometry = Odometry()
    for i in range(8):
        estimate = estimates[i] if i < 4 else replace(estimates[i], depth=bad)
        got = odometry.refine(sequence[0][i], estimate, True)
        assert np.isfinite(got.T_world_cam).all() and 0.3 < odometry._scale < 3


def test_lost_frames_pass_through(sequence):
    odometry = Odometry()
    lost = Estimate(0, Tracking.LOST, lost_reason="black frame")
    assert odometry.refine(sequence[0][0], lost, True) is lost


def test_memory_is_bounded(sequence):
    odometry = Odometry(features=100, window=4)
    estimates = network(sequence, np.random.default_rng())
    there_and_back = [*range(FRAMES), *range(FRAMES - 2, 0, -1)]
    sizes = []
    for _ in range(6):
        for i in there_and_back:
            odometry.refine(sequence[0][i], estimates[i], True)
        sizes.append((len(odometry._ids), len(odometry._keyframes)))
    assert max(keyframes for _, keyframes in sizes) <= 4 and max(ids for ids, _ in sizes) <= 100 * 5


def test_a_pose_is_found_before_a_plane():
    """A wall or a floor, of which a third of the matches is wrong; the camera has rolled and moved."""
    rng = np.random.default_rng()
    K = np.array([[400.0, 0, 239.5], [0, 400, 179.5], [0, 0, 1]])
    for _ in range(100):
        ray = np.column_stack([(rng.uniform(0, (480, 360), (300, 2)) - K[:2, 2]) / 400, np.ones(300)])
        normal = np.array([*rng.normal(0, 0.3, 2), 1.0])
        points = ray * (2 / (ray @ normal))[:, None]
        T_cam_world = np.eye(4)
        T_cam_world[:3, :3] = cv2.Rodrigues(np.array([0, 0, rng.uniform(-0.9, 0.9)]))[0]
        T_cam_world[:3, 3] = rng.normal(0, 0.05, 3)
        camera = points @ T_cam_world[:3, :3].T + T_cam_world[:3, 3]
        pixels = camera[:, :2] / camera[:, 2:] * 400 + K[:2, 2] + rng.normal(0, 0.1, (300, 2))
        pixels[:100] = rng.uniform(0, (480, 360), (100, 2))
        T_world_cam, agree = solve_pose(points, pixels, K, np.full(300, 3.0))
        assert agree[100:].all() and agree[:100].sum() < 10
        assert rotation_angle(T_cam_world[:3, :3] @ T_world_cam[:3, :3]) < 1e-3
        assert np.linalg.norm(T_world_cam[:3, 3] - inverse(T_cam_world)[:3, 3]) < 5e-3


def test_keypoints_outvote_the_few_features_that_are_tracked():
    """The camera rolls too far for the tracker, but for a fifth of the image that moves along with it, like a robot's arm: what
    is tracked agrees on a wrong pose, what is recognised is more."""
    height, width, roll = 360, 480, float(np.random.default_rng().uniform(30, 50))
    rng = np.random.default_rng()
    texture = cv2.GaussianBlur(rng.uniform(0, 255, (height, width, 3)).astype(np.float32), (0, 0), 2.0)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    arm = np.s_[:, width * 4 // 5 :]
    centre = ((width - 1) / 2, (height - 1) / 2)
    before = texture.copy()
    after = cv2.warpAffine(
        texture, cv2.getRotationMatrix2D(centre, roll, 1.0), (width, height), borderMode=cv2.BORDER_WRAP
    )
    after[arm] = np.roll(texture, 6, axis=0)[arm]
    K = np.array([[400.0, 0, centre[0]], [0, 400.0, centre[1]], [0, 0, 1]])
    flat, sure = np.full((height // 2, width // 2), 2.0, np.float32), np.ones((height // 2, width // 2), np.float32)
    K_network = K * np.array([[0.5], [0.5], [1]])
    odometry = Odometry()
    for stamp, image in enumerate((before, after)):
        estimate = Estimate(stamp, Tracking.TRACKING, np.eye(4), flat, sure, K_network, image, pose_sigma=np.ones(2))
        got = odometry.refine(image, estimate, True)
    turned = cv2.Rodrigues(got.T_world_cam[:3, :3])[0][:, 0]
    assert np.abs(np.degrees(turned) - [0, 0, roll]).max() < 1.0
    assert got.tracking is Tracking.TRACKING
