"""Lite3R: a sparse branch of softmax attention plus a projected linear branch, A = A_sparse + Proj(A_linear) (section 3).

The projection D -> D, one per layer for all its heads, is the method's only trained parameter: `add_linear_branch` makes it,
and checkpoints may hold it (`proj_lin.weight`). What the paper and its code disagree on is an option here, `sparse`:

- tokens: for each head and query the best 30 % of all tokens, as trained. Needs every score: slower than dense attention.
- dense: all tokens, as the authors deployed it (in INT8, which this does not do).
- blocks: blocks of tokens by their means, the only one that saves work and the default; the paper's source of the idea, SLA,
  selects so too. How many is the network's `top_k`. Special tokens are seen by all and see all.

The authors replace every attention of a network, also inside views; here only the attention across views, the part whose
cost grows with the square of their number. So their checkpoints, whose other layers have projections too, do not fit. The
method's FP8 layers are a precision here, `engine.precision: fp8`, with any strategy.

The projections are trained by the recipe `lite3r` of `training/`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speed3r_ros.kernels.coarse import coarse_attention
from speed3r_ros.kernels.frames import Visible
from speed3r_ros.kernels.linear_attention import linear_attention
from speed3r_ros.kernels.selected import selected_attention
from speed3r_ros.model.attention import SOME_LAYER, Layer, Strategy, Tokens, dense

BRANCHES = ("blocks", "tokens", "dense")
SCORES = 2**27  # scores held at a time by `attend_to_best`


@dataclass(frozen=True)
class Lite3R(Strategy):
    """Sparse and linear attention; differentiable. sparse: see the module's text. keep: share of tokens, for `tokens`."""

    sparse: str = "blocks"
    keep: float = 0.3

    def __post_init__(self) -> None:
        if self.sparse not in BRANCHES:
            raise ValueError(f"sparse {self.sparse!r}: choose one of {', '.join(BRANCHES)}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep {self.keep}: must be in (0, 1]")

    @property
    def in_blocks(self) -> bool:
        """See `Strategy`."""
        return self.sparse == "blocks"

    @property
    def follows_visibility(self) -> bool:
        """See `Strategy`."""
        return self.sparse != "tokens"

    def __call__(
        self,
        q: Tokens,
        k: Tokens,
        v: Tokens,
        fine: Visible,
        coarse: Visible,
        specials: int,
        top_k: int,
        layer: Layer = SOME_LAYER,
    ) -> Tensor:
        """See `Strategy.__call__`. ValueError if the network has no linear branch."""
        if layer.linear is None:
            raise ValueError(
                "attention 'lite3r': the network has no trained linear branch (proj_lin.weight of its blocks across "
                "views); load a checkpoint with one, or train it: `python -m speed3r_ros.training lite3r`"
            )
        if self.sparse == "blocks":
            compressed, index = coarse_attention(q.pooled, k.pooled, v.pooled, coarse, fine, top_k)
            gate = torch.arange(2, device=q.fine.device, dtype=q.fine.dtype)  # the selected branch alone
            gate = gate.expand(*q.fine.shape[:3], 2)
            out = selected_attention(q.fine, k.fine, v.fine, index, compressed, gate, fine, specials)
        elif self.sparse == "tokens":
            out = attend_to_best(q.fine, k.fine, v.fine, self.keep)
        else:
            out = dense(q, k, v, fine, coarse, specials, top_k, layer)
        queries, keys = fine.table.shape[1:]
        if layer.unmasked:  # all queries read the same sum: one frame of them
            fine, queries = Visible(fine.table[:, :1]), 1
        key, value = (x.fine.unflatten(2, (keys, -1)) for x in (k, v))
        linear = linear_attention(q.fine.unflatten(2, (queries, -1)), key, value, fine).flatten(2, 3)
        weight = layer.linear.weight
        return out + layer.linear(linear.transpose(1, 2).to(weight.dtype)).transpose(1, 2).to(out.dtype)


def attend_to_best(q: Tensor, k: Tensor, v: Tensor, keep: float) -> Tensor:
    """Softmax attention of each query to the keys with the highest scores: int(keep * N) of N, all of equal last ones.

    q: (B, H, X, D). k, v: (B, H, N, D). Returns (B, H, X, D). All scores are computed, a part of the queries at a time.
    """
    high = torch.promote_types(q.dtype, torch.float32)
    batch, heads, count, width = k.shape
    kept, rows = max(1, int(keep * count)), max(1, SCORES // (batch * heads * count))
    keys, values = k.mT.to(high) * width**-0.5, v.to(high)
    parts = []
    for part in q.split(rows, 2):
        scores = part.to(high) @ keys
        least = scores.detach().kthvalue(count - kept + 1, keepdim=True).values
        parts.append((scores.masked_fill(scores < least, -torch.inf).softmax(-1) @ values).to(q.dtype))
    return torch.cat(parts, 2)


def _layers(model: nn.Module) -> list[nn.Module]:
    """What has the projection: the attention of each block across views, in the compact network the block itself."""
    return [getattr(block, "attn", block) for block in model.across_views]


def has_linear_branch(model: nn.Module) -> bool:
    """Whether a network of several views has the projections that Lite3R needs."""
    return all(getattr(layer, "proj_lin", None) is not None for layer in _layers(model))


def add_linear_branch(model: nn.Module) -> list[nn.Parameter]:
    """Give each block across views its projection, normal with deviation 1e-3; returns the new parameters.

    model: the compact network, or an official backbone with several views; ValueError if it is neither.
    """
    if not hasattr(model, "across_views"):
        raise ValueError(f"attention 'lite3r': {type(model).__name__} has no blocks across views that can take it")
    layers = _layers(model)
    for layer in layers:
        weight = layer.proj.weight
        width = len(weight) // layer.heads
        layer.proj_lin = nn.Linear(width, width, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(layer.proj_lin.weight, std=1e-3)
    return [layer.proj_lin.weight for layer in layers]
