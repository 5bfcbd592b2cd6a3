"""Alignment of views: closed-form recovery of random similarities, outliers and degenerate motion."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from speed3r_ros.mapping.trajectory import align as umeyama
from speed3r_ros.model.backbones.alignment import Similarity, Views, align, relative_scale, weighted_median

RANDOM = np.random.default_rng()


def random_pose(count, spread=1.0):
    T = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    T[:, :3, :3] = torch.from_numpy(Rotation.random(count).as_matrix())
    T[:, :3, 3] = spread * torch.randn(count, 3, dtype=torch.float64)
    return T


def random_views(count, samples=41, spread=1.0):
    depth = 1 + 4 * torch.rand(count, samples, dtype=torch.float64)
    return Views(random_pose(count, spread), depth, 0.1 + 0.9 * torch.rand(count, samples, dtype=torch.float64))


def moved(views, scale, S):
    """The views after x -> scale R x + t, S holding R and t."""
    T = views.T.clone()
    T[:, :3, 3] *= scale
    return Views(S @ T, scale * views.depth, torch.rand_like(views.confidence))


def random_similarity():
    return float(np.exp(2 * RANDOM.normal())), random_pose(1, 10.0)[0]


def check(found, scale, S, tolerance=1e-10):
    torch.testing.assert_close(float(found.scale), scale, rtol=tolerance, atol=0)
    torch.testing.assert_close(found.R, S[:3, :3], rtol=0, atol=tolerance)
    torch.testing.assert_close(found.t, S[:3, 3], rtol=0, atol=tolerance * max(1, scale) * 100)


@pytest.mark.parametrize("count", [1, 2, 3, 11])
@pytest.mark.parametrize("motion", ["any", "standing still", "turning on the spot", "straight on"])
def test_random_similarities_are_recovered(count, motion):
    views, (scale, S) = random_views(count), random_similarity()
    if motion == "standing still":
        views.T[:] = views.T[:1].clone()
    elif motion == "turning on the spot":
        views.T[:, :3, 3] = views.T[:1, :3, 3].clone()
    elif motion == "straight on":
        views.T[:, :3] = views.T[:1, :3].clone()
        views.T[:, 2, 3] += torch.arange(count)
    target = moved(views, scale, S)
    found = align(views, target)
    check(found, scale, S)
    torch.testing.assert_close(found.of(views.T), target.T, rtol=0, atol=1e-8 * max(1, scale))
    assert found.spread.max() < 1e-6  # the arc sine's argument is a difference of rotations
    check(align(views, moved(views, 1.0, S), with_scale=False), 1.0, S)


@pytest.mark.parametrize("count", [3, 4, 9])
def test_one_outlier_does_not_matter(count):
    views, (scale, S) = random_views(count), random_similarity()
    target = moved(views, scale, S)
    bad = int(RANDOM.integers(count))
    target.T[bad] = random_pose(1, 5 * scale)[0]
    target.depth[bad] *= float(np.exp(RANDOM.normal()))
    check(align(views, target), scale, S)


def test_pixels_that_measured_nothing_or_wrongly_do_not_matter():
    views, (scale, S) = random_views(5), random_similarity()
    views.confidence[:] = 1
    target = moved(views, scale, S)
    target.confidence[:] = 1
    views.depth[:, :8] = torch.tensor([0.0, -1.0, torch.nan, torch.inf]).repeat(2)
    target.depth[:, 8:13] *= 20
    views.confidence[:, 14:35] = 0  # the sky
    target.depth[:, 14:35] = 7 * torch.rand(5, 21, dtype=torch.float64)
    check(align(views, target), scale, S)


def test_noise_is_averaged_and_reported():
    """Of many views with noise the result is near the truth; without rotations it would be Umeyama's."""
    views, (scale, S) = random_views(40), random_similarity()
    target = moved(views, scale, S)
    noise = torch.from_numpy(Rotation.from_rotvec(0.01 * RANDOM.normal(size=(40, 3))).as_matrix())
    target.T[:, :3, :3] = noise @ target.T[:, :3, :3]
    lever = scale * float(views.depth.median())
    target.T[:, :3, 3] += 0.02 * lever * torch.randn(40, 3, dtype=torch.float64)
    target.depth[:] *= (0.05 * torch.randn(40, 1, dtype=torch.float64)).exp()
    found = align(views, target)
    assert abs(np.log(float(found.scale) / scale)) < 0.05
    assert (found.R - S[:3, :3]).abs().max() < 0.02
    assert 0.01 < found.spread[0] < 0.1 and 0.008 < found.spread[1] < 0.03
    _, R, t = umeyama(float(found.scale) * views.T[:, :3, 3].numpy(), target.T[:, :3, 3].numpy(), with_scale=False)
    centres = found.scale * views.T[:, :3, 3] @ found.R.mT + found.t
    rmse = (centres - target.T[:, :3, 3]).square().sum(1).mean().sqrt()
    best = np.sqrt(
        np.square(float(found.scale) * views.T[:, :3, 3].numpy() @ R.T + t - target.T[:, :3, 3].numpy()).sum(1).mean()
    )
    assert best <= rmse + 1e-12 and rmse < 1.2 * best


def test_baselines_correct_depths_where_the_camera_moves_far():
    """Of two scales that the two measurements claim, the depths win on the spot; far apart, both count."""
    views = random_views(6, spread=100.0)
    target = moved(views, 2.0, torch.eye(4, dtype=torch.float64))
    target.depth[:3] *= torch.tensor([0.5, 0.6, 0.7], dtype=torch.float64)[:, None]
    target.depth[3:5] *= torch.tensor([1.3, 1.4], dtype=torch.float64)[:, None]
    target.depth[5] *= 1.5
    views.confidence[:], target.confidence[:] = 1, 1
    torch.testing.assert_close(float(relative_scale(views, target)), 2.0)
    still = Views(torch.eye(4, dtype=torch.float64).repeat(6, 1, 1), views.depth, views.confidence)
    alone = relative_scale(still, Views(still.T, target.depth, target.confidence))
    torch.testing.assert_close(float(alone), float(np.exp(np.median(np.log([1.0, 1.2, 1.4, 2.6, 2.8, 3.0])))))


def test_weighted_median_is_that_of_repeated_values():
    x, times = torch.randn(7, 9, dtype=torch.float64), torch.randint(0, 4, (7, 9))
    times[:, 0] += 1
    found = weighted_median(x, times.double())
    expected = [np.median(row.repeat_interleave(n).numpy()) for row, n in zip(x, times)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_poses_stay_orthonormal():
    S = Similarity(
        torch.tensor(2.0).double(), random_pose(1)[0, :3, :3] * 1.001, torch.zeros(3).double(), torch.zeros(2)
    )
    R = S.of(random_pose(3))[:, :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).double().expand(3, 3, 3), rtol=0, atol=1e-12)
