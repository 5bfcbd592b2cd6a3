"""Bundle adjustment against scenes whose answer is known."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from speed3r_ros.mapping import bundle
from speed3r_ros.mapping.bundle import Observations, Scene, adjust, focal_information
from speed3r_ros.mapping.geometry import inverse


@pytest.fixture
def rng():
    return np.random.default_rng()


def small_motion(rng, turn, shift):
    T = np.eye(4)
    T[:3, :3] = cv2.Rodrigues(turn * rng.normal(size=3))[0]
    T[:3, 3] = shift * rng.normal(size=3)
    return T


def true_scene(rng, views=6, points=200):
    """Cameras along a path before a cloud of points; every view sees every point and measures its depth."""
    K = np.array([[500.0, 0, 320], [0, 510, 240], [0, 0, 1]])
    T = np.stack([small_motion(rng, 0.1, 0.05) for _ in range(views)])
    T[:, 0, 3] += 0.2 * np.arange(views)
    X = np.concatenate([rng.uniform(-2, 2, (points, 2)), rng.uniform(2, 6, (points, 1))], 1)
    view, point = (x.ravel() for x in np.meshgrid(np.arange(views), np.arange(points), indexing="ij"))
    camera = np.einsum("oij,oj->oi", T[view, :3, :3], X[point]) + T[view, :3, 3]
    pixel = cv2_project(camera, K)
    return Scene(T, X, K), Observations(view, point, pixel, camera[:, 2])


def cv2_project(camera, K):
    return cv2.projectPoints(camera, np.zeros(3), np.zeros(3), K, None)[0][:, 0]


def disturbed(scene, rng, fixed):
    T = scene.T_cam_world.copy()
    for view in range(fixed, len(T)):
        T[view] = small_motion(rng, 0.01, 0.03) @ T[view]
    return replace(scene, T_cam_world=T, points=scene.points * rng.uniform(0.9, 1.1, (len(scene.points), 1)))


def test_finds_the_truth(rng):
    scene, seen = true_scene(rng)
    found, error = adjust(disturbed(scene, rng, 2), seen, 2, 1.0, iterations=30)
    assert error.max() < 1e-2
    assert np.abs(found.T_cam_world - scene.T_cam_world).max() < 1e-3
    assert np.abs(found.points - scene.points).max() < 2e-2
    assert (found.T_cam_world[:2] == scene.T_cam_world[:2]).all() and (found.K == scene.K).all()


def test_depth_sets_the_unit(rng):
    """With one fixed pose, images alone leave the unit open: it is the measured depths', some of which may be missing."""
    scene, seen = true_scene(rng)
    depth = 1.5 * seen.depth * np.exp(0.1 * rng.normal(size=len(seen.depth)))
    depth[rng.random(len(depth)) < 0.2] = np.nan
    found, error = adjust(disturbed(scene, rng, 1), replace(seen, depth=depth), 1, 4.0, iterations=30)
    assert np.median(error) < 0.05
    first = found.T_cam_world[0]
    assert np.allclose(first, scene.T_cam_world[0], atol=1e-9)
    z, z_true = (x @ first[2, :3] + first[2, 3] for x in (found.points, scene.points))
    assert np.median(z / z_true) == pytest.approx(1.5, rel=0.03)
    baselines = [
        np.linalg.norm(inverse(s.T_cam_world)[:, :3, 3] - inverse(first)[:3, 3], axis=1) for s in (found, scene)
    ]
    assert np.allclose(baselines[0], 1.5 * baselines[1], rtol=0.03)
    unmeasured = replace(seen, depth=np.full(len(depth), np.nan))
    found, error = adjust(disturbed(scene, rng, 1), unmeasured, 1, 4.0, iterations=30)
    assert np.median(error) < 0.05 and np.isfinite(found.points).all()


def test_finds_the_focal_length(rng):
    scene, seen = true_scene(rng)
    wrong = scene.K * np.array([[1.25, 1, 1], [1, 1.25, 1], [1, 1, 1]])
    start = replace(disturbed(scene, rng, 1), K=wrong, focal_information=0.3**-2)
    found, error = adjust(start, seen, 1, 1.0, iterations=40)
    assert np.allclose(found.K, scene.K, rtol=5e-3) and error.max() < 0.2
    assert focal_information(found, seen, 1, 1.0) > 1e4
    alone = Observations(*(x[seen.view == 0] for x in (seen.view, seen.point, seen.pixel, seen.depth)))
    one = replace(scene, T_cam_world=scene.T_cam_world[:1], focal_information=1.0)
    assert focal_information(one, alone, 1, 1.0) < 1.0  # a single view says nothing of it


def test_outliers_do_not_rule(rng):
    scene, seen = true_scene(rng)
    wrong = rng.random(len(seen.view)) < 0.05
    pixel = seen.pixel + wrong[:, None] * rng.normal(size=seen.pixel.shape) * 60
    found, error = adjust(disturbed(scene, rng, 2), replace(seen, pixel=pixel), 2, 1.0, iterations=30)
    assert np.abs(found.T_cam_world[:, :3, 3] - scene.T_cam_world[:, :3, 3]).max() < 0.02
    assert np.median(error[~wrong]) < 0.3 and np.median(error[wrong]) > 20


def test_derivatives(rng):
    """Against central differences, where all residuals are within the robust thresholds."""
    scene, seen = true_scene(rng, views=2, points=4)
    scene = replace(scene, focal_information=5.0)
    seen = replace(seen, pixel=seen.pixel + 0.2 * rng.normal(size=seen.pixel.shape))
    sigma, prior, h = 1.0, np.log(500.0), 1e-6

    def residual(scene):
        return bundle._linearise(scene, seen, sigma, prior).residual

    linear = bundle._linearise(scene, seen, sigma, prior)
    for axis in range(6):
        move = np.zeros(6)
        move[axis] = h
        changed = []
        for sign in (1, -1):
            step = np.eye(4)
            step[:3, :3], step[:3, 3] = cv2.Rodrigues(sign * move[3:])[0], sign * move[:3]
            changed.append(residual(replace(scene, T_cam_world=step @ scene.T_cam_world)))
        numeric = (changed[0] - changed[1]) / (2 * h)
        assert np.allclose(numeric, linear.by_pose[:, :, axis], atol=1e-4)
    for axis in range(3):
        shift = np.eye(3)[axis] * h
        numeric = (residual(replace(scene, points=scene.points + shift)) - residual(replace(scene, points=scene.points - shift))) / (2 * h)  # fmt: skip
        assert np.allclose(numeric, linear.by_point[:, :, axis], atol=1e-4)
    scaled = [replace(scene, K=scene.K * np.array([[np.exp(s), 1, 1], [1, np.exp(s), 1], [1, 1, 1]])) for s in (h, -h)]
    numeric = (residual(scaled[0]) - residual(scaled[1])) / (2 * h)
    assert np.allclose(numeric, linear.by_focal, atol=1e-4)
