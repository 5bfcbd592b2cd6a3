"""Losses of the compact model: geometry up to one scale per sequence, poses without a gauge.

Targets are a batch of `training.render.SceneDataset`: depth (B, T, H, W), ray (B, H, W, 2), camera-to-world R
(B, T, 3, 3) and t (B, T, 3), K (B, 5), with mean depth 1 per sequence. valid (B, T, H, W) is False where depth is not to be
learnt: where it is unknown, on sky, whose depth is infinite, and on what moves. judged (B, T, H, W) is where the right
confidence is known: where valid, and where none is deserved, on sky and on what moves. Rays are learnt everywhere. Shape
suffixes as in `model.attention`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.model.network import Prediction

Batch = dict[str, Tensor]

CONFIDENT = 0.08  # relative error under which a point counts as right for the confidence head
BASELINE_FLOOR = 0.08  # of mean depth: keeps the translation loss finite for cameras that stand still


@dataclass(frozen=True)
class LossWeights:
    """Relative weights of the terms."""

    points: float = 1.0
    rotation: float = 4.0
    translation: float = 0.5
    matching: float = 0.2
    gradient: float = 0.3
    confidence: float = 0.05
    scale: float = 0.2
    sigma: float = 0.02


def relative_poses(R: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Camera-to-world (B, T, ...) -> pose of camera j in camera i: R_ij (B, T, T, 3, 3), t_ij (B, T, T, 3)."""
    R_i = R.transpose(-1, -2)[:, :, None]
    return R_i @ R[:, None], (R_i @ (t[:, None] - t[:, :, None]).unsqueeze(-1)).squeeze(-1)


def path_scale(t: Tensor, t_true: Tensor) -> Tensor:
    """Scale (B,) that brings relative translations t (B, T, T, 3) to the true ones: least squares of their lengths."""
    length, true = t.norm(dim=-1).flatten(1), t_true.norm(dim=-1).flatten(1)
    return (length * true).sum(1) / (length * length).sum(1).clamp_min(1e-12)


def sequence_scale(z: Tensor, z_true: Tensor, valid: Tensor, t: Tensor, t_true: Tensor) -> Tensor:
    """Robust scale (B,) that brings a prediction to the truth, without a gradient.

    The median ratio of a subsample of valid depths z (B, T, H, W), or where none is valid, that of the lengths of relative
    translations t (B, T, T, 3).
    """
    stride = max(1, z[0].numel() // 4096) | 1
    a, b, known = (x.detach().flatten(1)[:, ::stride] for x in (z, z_true, valid))
    scale = torch.where(known, b / a.clamp_min(1e-6), torch.nan).nanmedian(1).values
    return torch.where(scale.isnan(), path_scale(t.detach(), t_true), scale)


def share_of_batch(count: Tensor) -> Tensor:
    """A count of this process -> its mean over all processes, so that the mean of gradients is that of one large batch."""
    world = 1
    if dist.is_available() and dist.is_initialized():
        count, world = count.clone(), dist.get_world_size()
        dist.all_reduce(count)
    return count.clamp_min(1) / world


def mean_where(x: Tensor, valid: Tensor) -> Tensor:
    """Mean of x where it is valid (of the same shape) over the batches of all processes; 0 where nothing is."""
    return torch.where(valid, x, 0.0).sum() / share_of_batch(valid.sum())


def where_counted(valid: Tensor, judged: Tensor) -> Tensor:
    """Where a sequence's own geometry counts (B, T, H, W): where valid, or if nothing is, wherever depth is unknown."""
    some = valid.flatten(1).any(1).view(-1, 1, 1, 1)
    return torch.where(some, valid, ~judged)


def mean_depth(z: Tensor, counted: Tensor) -> Tensor:
    """Mean (B,) of depths z (B, T, H, W) where they count; 1 where none does."""
    count = counted.sum((1, 2, 3))
    mean = torch.where(counted, z, 0.0).sum((1, 2, 3)) / count.clamp_min(1)
    return torch.where(count > 0, mean, 1.0)


def soften(error: Tensor) -> Tensor:
    """Linear up to 1, then logarithmic, so that outliers do not rule."""
    return torch.where(error < 1, error, 1 + error.clamp_min(1).log())


def project(points: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Camera points (B, M, 3) -> pixels u, v and depth z (B, M), inverting the one-parameter distortion of K (B, 5)."""
    fx, fy, cx, cy, k1 = K[:, None].unbind(-1)
    z = points[..., 2].clamp_min(1e-4)
    xd, yd = points[..., 0] / z, points[..., 1] / z
    x, y = xd, yd
    for _ in range(6):
        s = 1 + k1 * (x * x + y * y)
        x, y = xd / s, yd / s
    return x * fx + cx, y * fy + cy, points[..., 2]


def matching_loss(descriptor: Tensor, batch: Batch, shift: int, patch: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of patch descriptors against the true correspondence in the view `shift` frames on.

    Without pretrained features this is what makes matching emerge. Returns the loss and the share of right matches.
    """
    R, t, known = batch["R"], batch["t"], batch["valid"]
    depth = torch.where(known, batch["depth"], 0.0)  # 0 is like no projected depth: never visible
    sequences, views, height, width = depth.shape
    columns, centre = width // patch, patch // 2
    z = depth[..., centre::patch, centre::patch].flatten(2)  # (B, T, P)
    valid = known[..., centre::patch, centre::patch].flatten(2)
    ray = batch["ray"][:, centre::patch, centre::patch].flatten(1, 2)[:, None]
    camera = torch.cat([ray * z[..., None], z[..., None]], -1)
    world = (R[:, :, None] @ camera[..., None]).squeeze(-1) + t[:, :, None]
    R_to, t_to, depth_to = (x.roll(-shift, 1) for x in (R, t, depth))
    other = (R_to.transpose(-1, -2)[:, :, None] @ (world - t_to[:, :, None])[..., None]).squeeze(-1)
    u, v, z_to = (x.unflatten(1, (views, -1)) for x in project(other.flatten(1, 2), batch["K"]))
    inside = (u > -0.5) & (u < width - 0.5) & (v > -0.5) & (v < height - 0.5) & (z_to > 0.01)
    column, row = u.round().clamp(0, width - 1).long(), v.round().clamp(0, height - 1).long()
    seen = torch.gather(depth_to.flatten(2), 2, row * width + column)
    visible = (valid & inside & ((seen - z_to).abs() < 0.04 * z_to)).float()
    target = (row // patch) * columns + column // patch
    logits = descriptor @ descriptor.roll(-shift, 1).transpose(-1, -2)
    entropy = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view_as(visible)
    right = (logits.argmax(-1) == target).float()
    matched = (right * visible).sum() / visible.sum().clamp_min(1)
    return (entropy * visible).sum() / share_of_batch(visible.sum()), matched.detach()


def losses(
    out: Prediction, batch: Batch, shift: int, patch: int = 14, weights: LossWeights | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss and detached figures to log (rotation in degrees beside that of the identity)."""
    weights = weights or LossWeights()
    valid, ray_true = batch["valid"], batch["ray"].permute(0, 3, 1, 2)[:, None]
    z_true = torch.where(valid, batch["depth"], 1.0)
    sequences, views = z_true.shape[:2]
    z = out.points[:, :, 2]
    ray = out.points[:, :, :2] / out.points[:, :, 2:]
    R, t = relative_poses(out.R, out.t)
    R_true, t_true = relative_poses(batch["R"], batch["t"])
    scale = sequence_scale(z, z_true, valid, t, t_true).clamp(1e-2, 1e2)

    # depth and rays apart: a joint |s P - P*| with a detached s lets the global scale run away
    log_error = (z * scale.view(-1, 1, 1, 1)).log() - z_true.log()
    ray_error = (ray - ray_true).abs().sum(2)
    error = log_error.abs() + ray_error
    points = mean_where(soften(error), valid) + mean_where(soften(ray_error), ~valid)  # rays are known everywhere
    gradient = z.new_zeros(())
    for step in (1, 4):
        d, m = log_error[..., ::step, ::step], valid[..., ::step, ::step]
        for axis in (-1, -2):
            both = m.narrow(axis, 1, m.shape[axis] - 1) & m.narrow(axis, 0, m.shape[axis] - 1)
            gradient = gradient + mean_where(d.diff(dim=axis).abs().clamp(max=0.5), both)
    right = ((error.detach() < CONFIDENT) & valid).float()
    confidence = mean_where(
        F.binary_cross_entropy_with_logits(out.confidence, right, reduction="none"), batch["judged"]
    )
    first = mean_depth(z[:, :1], where_counted(valid[:, :1], batch["judged"][:, :1]))
    unit = first.log().abs().mean()  # the first frame fixes the scale: mean depth 1

    off = 1 - torch.eye(views, device=z.device)
    pairs = sequences * views * (views - 1)
    angle = ((R - R_true).square().sum((-1, -2)) + 1e-8).sqrt() / math.sqrt(2)  # radians, for small angles
    rotation = (angle * off).sum() / pairs
    baseline = (t_true.norm(dim=-1) * off).sum((1, 2)) / (views * (views - 1))
    offset = ((scale.view(-1, 1, 1, 1) * t - t_true).square().sum(-1) + 1e-8).sqrt()
    translation = (soften(offset / (baseline.view(-1, 1, 1) + BASELINE_FLOOR)) * off).sum() / pairs

    to_first = torch.stack([offset[:, 0, 1:], angle[:, 0, 1:]], -1).detach()
    log_sigma = out.log_sigma[:, 1:].clamp(-10, 5)
    sigma = (to_first * (-log_sigma).exp() + log_sigma).mean()  # Laplace likelihood of detached errors
    matching, matched = matching_loss(out.descriptor, batch, shift, patch)

    total = (
        weights.points * points
        + weights.rotation * rotation
        + weights.translation * translation
        + weights.matching * matching
        + weights.gradient * gradient
        + weights.confidence * confidence
        + weights.scale * unit
        + weights.sigma * sigma
    )
    with torch.no_grad():
        still = (
            ((torch.eye(3, device=z.device) - R_true).square().sum((-1, -2)).sqrt() * off).sum() / pairs / math.sqrt(2)
        )
        figures = dict(
            loss=total,
            points=points,
            rot_deg=rotation.rad2deg(),
            rot_identity=still.rad2deg(),
            translation=translation,
            matching=matching,
            matched=matched,
            gradient=gradient,
            sigma=sigma,
            absrel=torch.where(valid, log_error.exp() - 1, torch.nan)
            .flatten()[::97]
            .abs()
            .nanmedian(0)
            .values.nan_to_num(),
        )
    return total, {name: value.detach() for name, value in figures.items()}
