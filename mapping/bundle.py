"""Bundle adjustment of a few views: poses, points and, when it is unknown, the focal length.

Residuals are reprojections and the logarithm of a measured depth, such as a monocular network's. Levenberg-Marquardt on
the Schur complement of the points (Triggs et al., 2000), dense in the poses, which are few; Huber's weights. It takes 15
to 20 ms on one core, at every keyframe; a general solver (scipy's least_squares with numeric derivatives and a sparsity
pattern) had not come as far after 2 s on the same windows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from speed3r_ros.mapping.geometry import inverse

ROBUST_PIXELS = 1.5  # Huber's threshold; tracked corners are right to a fraction of a pixel
ROBUST_DEPTH = 1.0  # the same for depth, in its sigmas
NEAREST = 1e-3  # of a depth, in the unit of the world
LARGEST_STEP = 0.2  # of the logarithm of the focal length


@dataclass(frozen=True)
class Observations:
    """What was seen: view (O,) and point (O,) indices, pixel (O, 2), and the depth (O,) that was measured there along the
    optical axis, in the unit of the world; NaN where none was. A view sees a point once at most."""

    view: np.ndarray
    point: np.ndarray
    pixel: np.ndarray
    depth: np.ndarray


@dataclass(frozen=True)
class Scene:
    """Camera-from-world poses T_cam_world (M, 4, 4), points (N, 3) in the world, and a pinhole matrix K (3, 3).

    focal_information: inverse variance of the logarithm of the focal length; infinite = calibrated, never changed.
    """

    T_cam_world: np.ndarray
    points: np.ndarray
    K: np.ndarray
    focal_information: float = np.inf


@dataclass(frozen=True)
class _Linear:
    """Residuals (O, 3) in u, v and log depth, whitened; their derivatives; the robust cost; pixel errors (O,)."""

    cost: float
    error: np.ndarray
    residual: np.ndarray
    by_pose: np.ndarray  # (O, 3, 6), translation first
    by_point: np.ndarray  # (O, 3, 3)
    by_focal: np.ndarray  # (O, 3), logarithm


def adjust(
    scene: Scene, seen: Observations, fixed: int, sigma_depth: float, iterations: int = 5
) -> tuple[Scene, np.ndarray]:
    """The scene that explains the observations best, and the reprojection error (O,) in pixels, infinite behind a camera.

    The first `fixed` poses stay. One alone leaves the unit of the scene open, which is then that of the measured depths, in
    the median. sigma_depth: of the logarithm of a depth.
    """
    prior = np.log(scene.K[0, 0])
    linear = _linearise(scene, seen, sigma_depth, prior)
    damping = 1e-4
    for _ in range(iterations):
        for _ in range(3):
            trial = _step(scene, seen, linear, fixed, damping, prior)
            attempt = _linearise(trial, seen, sigma_depth, prior)
            if attempt.cost < linear.cost:
                break
            damping *= 10
        else:
            break
        gain = linear.cost - attempt.cost
        scene, linear, damping = trial, attempt, max(damping / 5, 1e-7)
        if gain < 1e-3 * linear.cost:
            break
    return (_in_unit_of_depth(scene, seen) if fixed == 1 else scene), linear.error


def focal_information(scene: Scene, seen: Observations, fixed: int, sigma_depth: float) -> float:
    """What the observations alone say of the logarithm of the focal length: its marginal inverse variance."""
    free = replace(scene, focal_information=0.0)
    linear = _linearise(free, seen, sigma_depth, np.log(scene.K[0, 0]))
    H, _, W, V_inverse, _ = _normal_equations(free, seen, linear, fixed, 1e-9, 0.0)
    S = H - W.T @ (V_inverse @ W.reshape(-1, 3, W.shape[1])).reshape(W.shape)
    return max(0.0, 1 / np.linalg.pinv(S)[-1, -1])


def _in_unit_of_depth(scene: Scene, seen: Observations) -> Scene:
    """The scene enlarged about the first camera until its depths are the measured ones, in the median. It looks the same to
    all cameras, so that iterations get there too slowly: next to pixels, depths hardly weigh."""
    T = scene.T_cam_world[seen.view]
    z = np.einsum("oi,oi->o", T[:, 2, :3], scene.points[seen.point]) + T[:, 2, 3]
    measured = np.isfinite(seen.depth) & (seen.depth > 0) & (z > 0)
    if not measured.any():
        return scene
    factor = np.median(seen.depth[measured] / z[measured])
    T_world_cam = inverse(scene.T_cam_world)
    origin = T_world_cam[0, :3, 3].copy()
    T_world_cam[:, :3, 3] = origin + factor * (T_world_cam[:, :3, 3] - origin)
    return replace(scene, T_cam_world=inverse(T_world_cam), points=origin + factor * (scene.points - origin))


def _linearise(scene: Scene, seen: Observations, sigma_depth: float, prior: float) -> _Linear:
    T, K = scene.T_cam_world[seen.view], scene.K
    R = T[:, :3, :3]
    x = np.einsum("oij,oj->oi", R, scene.points[seen.point]) + T[:, :3, 3]
    behind = x[:, 2] < NEAREST
    z = np.where(behind, NEAREST, x[:, 2])
    ray = x[:, :2] / z[:, None]
    focal = np.array([K[0, 0], K[1, 1]])
    offset = ray * focal + K[:2, 2] - seen.pixel
    error = np.linalg.norm(offset, axis=1)

    log_ratio = np.log(z / seen.depth)
    measured = np.isfinite(log_ratio) & ~behind
    log_ratio = np.where(measured, log_ratio / sigma_depth, 0.0)

    residual = np.concatenate([offset, log_ratio[:, None]], 1)
    size = np.stack([error, error, np.abs(log_ratio)], 1)
    threshold = np.array([ROBUST_PIXELS, ROBUST_PIXELS, ROBUST_DEPTH])
    weight = np.sqrt(np.minimum(1, threshold / np.maximum(size, 1e-12)))

    by_camera = np.zeros((len(x), 3, 3))  # of the residual by the point in camera coordinates
    by_camera[:, 0, 0], by_camera[:, 1, 1] = focal[0] / z, focal[1] / z
    by_camera[:, :2, 2] = -ray * focal / z[:, None]
    by_camera[:, 2, 2] = measured / (z * sigma_depth)
    by_camera *= weight[:, :, None]
    by_turn = np.zeros((len(x), 3, 3))  # of a camera point by a small rotation: -[x]
    by_turn[:, 0, 1], by_turn[:, 0, 2], by_turn[:, 1, 2] = x[:, 2], -x[:, 1], x[:, 0]
    by_turn -= by_turn.transpose(0, 2, 1)
    by_focal = np.concatenate([ray * focal, np.zeros((len(x), 1))], 1) * weight

    robust = np.where(size < threshold, 0.5 * size**2, threshold * (size - 0.5 * threshold))
    cost = robust[:, 0].sum() + robust[:, 2].sum()
    if np.isfinite(scene.focal_information):
        cost += 0.5 * scene.focal_information * (np.log(K[0, 0]) - prior) ** 2
    by_pose = np.concatenate([by_camera, by_camera @ by_turn], 2)
    return _Linear(float(cost), np.where(behind, np.inf, error), residual * weight, by_pose, by_camera @ R, by_focal)


def _normal_equations(
    scene: Scene, seen: Observations, linear: _Linear, fixed: int, damping: float, prior: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """H (P, P) and g (P,) of the free poses and the focal length, W (3 N, P) between points and these, the inverses
    (N, 3, 3) of the points' own blocks, and g (N, 3) of the points; damped."""
    views, count = len(scene.T_cam_world), len(scene.points)
    calibrated = np.isinf(scene.focal_information)
    size = 6 * views + 1
    H, g = np.zeros((size, size)), np.zeros(size)
    for view in range(fixed, views):
        mine = seen.view == view
        J = linear.by_pose[mine].reshape(-1, 6)
        at = slice(6 * view, 6 * view + 6)
        H[at, at] = J.T @ J
        g[at] = -J.T @ linear.residual[mine].reshape(-1)
        H[at, -1] = H[-1, at] = J.T @ linear.by_focal[mine].reshape(-1)
    W = np.zeros((count, views, 3, 6))
    W[seen.point, seen.view] = linear.by_point.transpose(0, 2, 1) @ linear.by_pose
    W = W.transpose(0, 2, 1, 3).reshape(count, 3, 6 * views)
    W_focal = np.zeros((count, 3))
    np.add.at(W_focal, seen.point, np.einsum("oij,oi->oj", linear.by_point, linear.by_focal))
    W = np.concatenate([W, W_focal[:, :, None]], 2).reshape(3 * count, size)
    H[-1, -1] = (linear.by_focal**2).sum()
    g[-1] = -(linear.by_focal * linear.residual).sum()
    if not calibrated:
        H[-1, -1] += scene.focal_information
        g[-1] -= scene.focal_information * (np.log(scene.K[0, 0]) - prior)
    free = np.arange(6 * fixed, size - calibrated)

    V, g_points = np.zeros((count, 3, 3)), np.zeros((count, 3))
    np.add.at(V, seen.point, linear.by_point.transpose(0, 2, 1) @ linear.by_point)
    np.add.at(g_points, seen.point, -np.einsum("oij,oi->oj", linear.by_point, linear.residual))
    diagonal = np.einsum("nii->ni", V)
    diagonal += damping * diagonal + 1e-9
    H = H[np.ix_(free, free)]
    H[np.diag_indices(len(free))] += damping * np.diag(H) + 1e-9
    return H, g[free], W[:, free], np.linalg.inv(V), g_points


def _step(scene: Scene, seen: Observations, linear: _Linear, fixed: int, damping: float, prior: float) -> Scene:
    H, g, W, V_inverse, g_points = _normal_equations(scene, seen, linear, fixed, damping, prior)
    VW = (V_inverse @ W.reshape(-1, 3, W.shape[1])).reshape(W.shape)
    Vg = np.einsum("nij,nj->ni", V_inverse, g_points)
    change = np.linalg.solve(H - W.T @ VW, g - W.T @ Vg.reshape(-1))
    points = scene.points + Vg - (VW @ change).reshape(-1, 3)
    T, K = scene.T_cam_world.copy(), scene.K.copy()
    for view in range(fixed, len(T)):
        move = change[6 * (view - fixed) :][:6]
        turn = np.eye(4)
        turn[:3, :3], turn[:3, 3] = cv2.Rodrigues(move[3:])[0], move[:3]
        T[view] = turn @ T[view]
    if np.isfinite(scene.focal_information):
        K[[0, 1], [0, 1]] *= np.exp(np.clip(change[-1], -LARGEST_STEP, LARGEST_STEP))
    return replace(scene, T_cam_world=T, points=points, K=K)
