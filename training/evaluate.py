"""Metrics of a network on many short rendered sequences at once, as training and `benchmarks/selection.py` need them.

The whole pipeline, on any sequence, is measured by `speed3r evaluate`. Baselines: the identity for rotation, a straight
line at constant speed for the trajectory, the median depth for depth.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from speed3r_ros.mapping import metrics
from speed3r_ros.mapping.trajectory import NANO, Trajectory
from speed3r_ros.model.memory import visibility
from speed3r_ros.model.network import Network
from speed3r_ros.training.render import SPLITS, SceneDataset

SHORTEST = 0.02  # path, in mean depths, below which a camera counts as standing
Predict = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def causal(
    network: Network, attention: str = "speed3r", top_k: int = 32, window: int = 4, anchors: int = 6, bank: int = 32
) -> Predict:
    """Images (B, T, 3, H, W) -> points (B, T, 3, H, W), R, t, under the incremental mask, intrinsics unknown.

    Every frame is a keyframe, as in sequences of well-separated views.
    """

    def predict(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine, coarse = (x[None].to(images.device) for x in visibility([True] * images.shape[1], window, anchors, bank))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            out = network(images, fine, coarse, attention=attention, top_k=top_k)
        return out.points.float(), out.R.float(), out.t.float()

    return predict


def focal_length(points: Tensor) -> float:
    """Focal length in pixels of predicted points (T, 3, H, W), by least squares on x/z over the columns."""
    width = points.shape[-1]
    ray = points[:, 0] / points[:, 2]
    u = (torch.arange(width, device=points.device) - (width - 1) / 2).expand_as(ray)
    return float((u * u).sum() / (u * (ray - ray.mean())).sum().clamp_min(1e-6))


def poses_of(R: Tensor, t: Tensor) -> np.ndarray:
    """Rotations (T, 3, 3) and translations (T, 3) -> (T, 4, 4) float64."""
    T = np.tile(np.eye(4), (len(R), 1, 1))
    T[:, :3, :3], T[:, :3, 3] = R.double().cpu().numpy(), t.double().cpu().numpy()
    return T


def pose_errors(T: np.ndarray, T_true: np.ndarray) -> dict[str, np.ndarray | float]:
    """Errors over all pairs of one sequence (T, 4, 4), and ATE / path. NaN where the camera hardly moves."""
    i, j = metrics.pairs_within(len(T), len(T))
    rotation, direction = metrics.pair_angles(T, T_true, i, j)
    identity, _ = metrics.pair_angles(np.broadcast_to(np.eye(4), T.shape), T_true, i, j)
    row: dict[str, np.ndarray | float] = dict(rotation=rotation, rotation_identity=identity, direction=direction)
    path = float(np.linalg.norm(np.diff(T_true[:, :3, 3], axis=0), axis=1).sum())
    if path <= SHORTEST:
        return row | dict(direction=np.zeros(0))
    if len(T) >= 3:
        estimate, truth = (trajectory_of(x) for x in (T, T_true))
        found = metrics.accuracy(estimate, truth)
        row |= dict(ate=found.estimate.ate / path, ate_line=found.line.ate / path)
    return row


def trajectory_of(poses: np.ndarray) -> Trajectory:
    """Poses (T, 4, 4) a tenth of a second apart."""
    out = Trajectory()
    for index, T in enumerate(poses):
        out.append(index * NANO // 10, T)
    return out


def sparse_depth_errors(z: Tensor, z_true: Tensor, valid: Tensor) -> dict[str, float]:
    """AbsRel and d1.25 of every seventh valid pixel of a sequence after one median scale, and of constant depth."""
    depth, truth, valid = (x.flatten()[::7].cpu().numpy() for x in (z.double(), z_true.double(), valid))
    depth, truth = depth[valid], truth[valid]
    absrel, within = metrics.depth_errors(depth * np.median(truth / depth), truth)
    constant, _ = metrics.depth_errors(np.full_like(truth, np.median(truth)), truth)
    return dict(absrel=absrel, within_25=within, absrel_constant=constant)


def summarise(rows: list[dict[str, np.ndarray | float]]) -> dict[str, float]:
    """Medians over pairs and sequences."""

    def every(key: str) -> np.ndarray:
        values = np.concatenate(
            [np.atleast_1d(np.asarray(row[key], dtype=float)) for row in rows if key in row] or [np.zeros(0)]
        )
        return values[np.isfinite(values)]

    def median(key: str) -> float:
        values = every(key)
        return float(np.median(values)) if len(values) else float("nan")

    rotation, identity = every("rotation"), every("rotation_identity")
    summary = dict(
        rotation=median("rotation"),
        rotation_identity=median("rotation_identity"),
        auc5=metrics.area_under_curve(rotation, 5),
        auc5_identity=metrics.area_under_curve(identity, 5),
    )
    for key in ("direction", "ate", "ate_line", "absrel", "absrel_constant", "within_25", "focal"):
        if any(key in row for row in rows):
            summary[key] = median(key)
    return summary


@torch.no_grad()
def score(
    predict: Predict, dataset: SceneDataset, count: int, views: int, motion: str | None = None
) -> dict[str, float]:
    """Summary over `count` rendered sequences of `views` frames."""
    rows: list[dict[str, np.ndarray | float]] = []
    while len(rows) < count:
        batch = dataset.batch(min(max(1, 96 // views), count - len(rows)), views, motion)
        points, R, t = predict(batch["img"])
        for k in range(len(points)):
            row = pose_errors(poses_of(R[k], t[k]), poses_of(batch["R"][k], batch["t"][k]))
            row |= sparse_depth_errors(points[k, :, 2], batch["depth"][k], batch["valid"][k])
            row["focal"] = abs(focal_length(points[k]) / float(batch["K"][k, 0]) - 1)
            rows.append(row)
    return summarise(rows)


def evaluate_rendered(
    network: Network,
    count: int,
    views: int,
    device: torch.device,
    attention: str = "speed3r",
    top_k: int = 32,
    seed: int = 0,
    motion: str | None = None,
    split: str = "rooms",
) -> dict[str, float]:
    """`score` of the network on held-out scenes: other seed, textures and photographs than training.

    split: "rooms", the first test distribution, or "world", that of training. Raises ValueError for another one.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: use one of {', '.join(SPLITS)}")
    cuda = device.type == "cuda"
    dataset = SceneDataset(
        device,
        987654 + seed,
        network.config.height,
        network.config.width,
        held_out=True,
        textures_per_family=8 if cuda else 1,
        samples=4 if cuda else 1,
        world=SPLITS[split],
    )
    return score(causal(network, attention, top_k), dataset, count, views, motion)


COLUMNS = {
    "rotation, deg": ("rotation", "rotation_identity", "{:.2f}"),
    "AUC@5": ("auc5", "auc5_identity", "{:.3f}"),
    "direction, deg": ("direction", None, "{:.1f}"),
    "ATE / path": ("ate", "ate_line", "{:.3f}"),
    "AbsRel": ("absrel", "absrel_constant", "{:.3f}"),
    "d1.25": ("within_25", None, "{:.3f}"),
    "focal": ("focal", None, "{:.3f}"),
}


def table_row(name: str, row: dict[str, float]) -> str:
    """One Markdown row of a summary; the trivial baseline in brackets."""

    def cell(key: str, baseline: str | None, form: str) -> str:
        if not np.isfinite(row.get(key, np.nan)):
            return "–"
        beside = f" ({form.format(row[baseline])})" if baseline and np.isfinite(row.get(baseline, np.nan)) else ""
        return form.format(row[key]) + beside

    return f"| {name} | " + " | ".join(cell(*column) for column in COLUMNS.values()) + " |"


def header(first: str) -> str:
    """Markdown table head."""
    return f"| {first} | " + " | ".join(COLUMNS) + " |\n|---" + "|---" * len(COLUMNS) + "|"
