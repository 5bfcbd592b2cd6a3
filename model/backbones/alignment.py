"""Alignment of a backbone's run to the map's gauge by the views that both hold: closed forms, no branches.

Everything is float64. T takes camera coordinates (OpenCV axes) to the world's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from speed3r_ros.model.backbones.results import nearest_rotation, rigid

OUTLIER = 2.5 * 1.4826  # times the median residual: 2.5 standard deviations of a normal one


@dataclass(frozen=True)
class Views:
    """N views in one gauge. T: (N, 4, 4) camera-to-world. depth, confidence in [0, 1]: (N, M), at M pixels of each."""

    T: Tensor
    depth: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Similarity:
    """x -> scale R x + t. scale: (), R: (3, 3), t: (3,).

    spread: (2,) root mean square of what the views that count still differ by: position over depth, and rotation in
    rad.
    """

    scale: Tensor
    R: Tensor
    t: Tensor
    spread: Tensor

    def of(self, T: Tensor) -> Tensor:
        """Camera-to-world poses (..., 4, 4) of the source's gauge in the target's, with orthonormal rotations."""
        return rigid(nearest_rotation(self.R @ T[..., :3, :3]), self.scale * T[..., :3, 3] @ self.R.mT + self.t)


def weighted_median(x: Tensor, weight: Tensor) -> Tensor:
    """Median along the last axis, (..., M) -> (...); the mean of both middle values where the weights split evenly.

    Values that are not finite do not count; without any that counts the result means nothing.
    """
    x, order = x.where(x.isfinite(), torch.inf).sort(-1)
    total = weight.expand_as(x).gather(-1, order).where(x.isfinite(), 0).cumsum(-1)
    half = total[..., -1:] / 2
    places = torch.cat([torch.searchsorted(total, half, right=right) for right in (False, True)], -1)
    return x.gather(-1, places.clamp(max=x.shape[-1] - 1)).mean(-1)


def median_depth(views: Views) -> Tensor:
    """Median of all views' depths by confidence, ()."""
    return weighted_median(views.depth.flatten(), views.confidence.flatten())


def relative_scale(source: Views, target: Views) -> Tensor:
    """Lengths of the target over the source's, (): weighted median of the ratios of what both measured.

    Each view gives the median ratio of its depths, with its confidence as weight; each pair of views the ratio of its
    baselines, with a weight that falls with the baseline over the depth: standing still or turning on the spot, the
    depths alone decide. All pairs together weigh at most half of all views.
    """
    views = len(source.T)
    confidence = source.confidence * target.confidence
    ratios, weights = [weighted_median((target.depth / source.depth).log(), confidence)], [confidence.mean(-1)]
    i, j = torch.triu_indices(views, views, 1, device=confidence.device)
    spans = [(x.T[i, :3, 3] - x.T[j, :3, 3]).norm(dim=-1) for x in (source, target)]
    share = torch.minimum(*(span / (span + median_depth(x)) for span, x in zip(spans, (source, target))))
    ratios.append((spans[1] / spans[0]).log())
    weights.append(share * (weights[0][i] * weights[0][j]).sqrt() / max(views - 1, 1))
    return weighted_median(torch.cat(ratios), torch.cat(weights)).exp()


def align(source: Views, target: Views, with_scale: bool = True) -> Similarity:
    """The similarity that takes the source's views, at least one, to the same views in the target's gauge.

    A pose alone fixes rotation and translation once the scale is known, whatever the motion. So every view proposes,
    the proposal with the least median difference tells which views are outliers (least median of squares: fewer than
    half of three or more views may be), and a closed form over the others gives the result: Umeyama's (PAMI 1991),
    extended by the poses' rotations. It minimises the squares of position over depth and of the angle, weighted by
    confidence.

    with_scale: False where both are in metres.
    """
    scale = relative_scale(source, target) if with_scale else source.T.new_ones(())
    lever = median_depth(target)
    weight = (source.confidence * target.confidence).mean(-1).clamp(min=1e-6)
    (Rs, cs), (Rt, ct) = ((T[:, :3, :3], T[:, :3, 3]) for T in (source.T, target.T))
    cs = scale * cs

    def differences(R: Tensor, t: Tensor) -> Tensor:
        """Position over depth and angle of every view under proposals R (P, 3, 3), t (P, 3): (P, N, 2)."""
        position = (ct - (cs @ R.mT + t[:, None])).norm(dim=-1) / lever
        chord = (Rt - R[:, None] @ Rs).flatten(2).norm(dim=-1) / math.sqrt(8)
        return torch.stack([position, 2 * chord.clamp(max=1).asin()], -1)

    R = Rt @ Rs.mT
    difference = differences(R, ct - (R @ cs[..., None])[..., 0]).norm(dim=-1)
    middle = difference.sort(-1).values[:, len(cs) // 2]
    best = middle.argmin(0, keepdim=True)
    weight = weight * (difference[best] <= OUTLIER * middle[best][:, None] + 1e-9)[0]
    weight = weight / weight.sum()

    mean_s, mean_t = weight @ cs, weight @ ct
    centres = torch.einsum("n,ni,nj->ij", weight, ct - mean_t, cs - mean_s)
    rotations = torch.einsum("n,nij->ij", weight, R) * lever**2 / 2  # half: |R - R'|^2 is twice the angle's square
    R = nearest_rotation(centres + rotations)
    t = mean_t - R @ mean_s
    spread = (weight @ differences(R[None], t[None])[0].square()).sqrt()
    return Similarity(scale, R, t, spread)
