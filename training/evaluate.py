"""Metrics of a model on short sequences with ground truth, with trivial baselines beside each number.

Baselines: the identity for rotation, a straight line at constant speed for the trajectory, the median depth for depth.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from speed3r_ros.mapping.trajectory import align
from speed3r_ros.model.memory import visibility
from speed3r_ros.model.network import Network
from speed3r_ros.training.losses import relative_poses
from speed3r_ros.training.render import SPLITS, SceneDataset

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


def rotation_angle(A: Tensor, B: Tensor) -> Tensor:
    """Angle in degrees between rotations (..., 3, 3); accurate near zero, where the arc cosine is not."""
    return torch.rad2deg(2 * torch.asin(((A - B).square().sum((-1, -2)).sqrt() / 8**0.5).clamp(max=1)))


def relative_ate(t: Tensor, t_true: Tensor) -> float:
    """RMSE of positions (T, 3) after Sim(3) alignment, divided by the path's length."""
    x, y = t.double().numpy(), t_true.double().numpy()
    scale, R, offset = align(x, y, with_scale=True)
    error = scale * x @ R.T + offset - y
    return float(np.sqrt((error**2).sum(1).mean()) / max(np.linalg.norm(np.diff(y, axis=0), axis=1).sum(), 1e-9))


def area_under_curve(error: np.ndarray, threshold: float) -> float:
    """Mean of 1 - error / threshold, clipped: the area under the accuracy curve up to the threshold."""
    error = error[np.isfinite(error)]
    return float(np.clip(1 - error / threshold, 0, None).mean()) if len(error) else float("nan")


def focal_length(points: Tensor) -> float:
    """Focal length in pixels of predicted points (T, 3, H, W), by least squares on x/z over the columns."""
    width = points.shape[-1]
    ray = points[:, 0] / points[:, 2]
    u = (torch.arange(width, device=points.device) - (width - 1) / 2).expand_as(ray)
    return float((u * u).sum() / (u * (ray - ray.mean())).sum().clamp_min(1e-6))


def pose_errors(R: Tensor, t: Tensor, R_true: Tensor, t_true: Tensor, shortest: float) -> dict[str, np.ndarray | float]:
    """Errors over all pairs i < j of one sequence (T, ...), on the CPU.

    Directions of translation count for true baselines above `shortest` only; ATE for paths longer than that.
    """
    count = len(R_true)
    i, j = torch.triu_indices(count, count, 1)
    A, a = (x[0][i, j] for x in relative_poses(R[None], t[None]))
    B, b = (x[0][i, j] for x in relative_poses(R_true[None], t_true[None]))
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp_min(1e-9)
    direction = torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))
    direction[b.norm(dim=-1) <= shortest] = float("nan")
    path = float((t_true[1:] - t_true[:-1]).norm(dim=-1).sum())
    line = torch.arange(count)[:, None] * torch.tensor([[1.0, 0, 0]])
    moved = count >= 3 and path > shortest
    return dict(
        rotation=rotation_angle(A, B).numpy(),
        rotation_identity=rotation_angle(torch.eye(3).expand_as(B), B).numpy(),
        direction=direction.numpy(),
        ate=relative_ate(t, t_true) if moved else float("nan"),
        ate_line=relative_ate(line, t_true) if moved else float("nan"),
    )


def depth_errors(z: Tensor, z_true: Tensor) -> dict[str, float]:
    """Median relative error and share within 25 % of depth after one median scale; the same for constant depth.

    Only where the true depth is finite.
    """
    z, z_true = z.flatten()[::7], z_true.flatten()[::7]
    known = z_true.isfinite()
    z, z_true = z[known], z_true[known]
    z = z * (z_true / z).median()
    ratio = torch.maximum(z / z_true, z_true / z)
    constant = z_true.median()
    return dict(
        absrel=float(((z - z_true).abs() / z_true).median()),
        within_25=float((ratio < 1.25).float().mean()),
        absrel_constant=float(((constant - z_true).abs() / z_true).median()),
    )


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
        auc5=area_under_curve(rotation, 5),
        auc5_identity=area_under_curve(identity, 5),
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
            row = pose_errors(R[k].cpu(), t[k].cpu(), batch["R"][k].cpu(), batch["t"][k].cpu(), 0.02)
            row |= depth_errors(points[k, :, 2], batch["depth"][k].masked_fill(~batch["valid"][k], torch.inf))
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
