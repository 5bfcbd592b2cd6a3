"""Global (cross-frame) attention strategies, chosen by name.

One function serves both forms of the network: the parallel one (all frames of a sequence query all frames, under a
visibility rule) and the recurrent one (one new frame queries the slots of the memory). That is what makes
"parallel = recurrent" hold by construction.

Shape suffixes: B sequences, T query frames, N frames whose fine tokens are resident, M >= N frames whose pooled tokens
are known (the first N of them are the resident ones), L = S + P tokens per frame (S special, then P patches in
block-major order), G = P / 16 blocks per frame, H heads, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16  # tokens of one 4 x 4 window of patches (Speed3R, section 3.1)


@dataclass(frozen=True)
class Tokens:
    """Queries, keys and values of whole frames.

    fine: (B, H, frames * L, D), normalised and rotated. pooled: (B, H, frames * G, D): raw tokens averaged over each
    block, then normalised and rotated at the block's mean position (Speed3R). gate: (B, H, frames * L, 2), only of
    queries.
    """

    fine: Tensor
    pooled: Tensor
    gate: Tensor | None = None


def pool_blocks(x: Tensor, specials: int) -> Tensor:
    """Mean of each block's patch tokens: (F, L, H, D) -> (F, G, H, D)."""
    patches = x[:, specials:]
    return patches.unflatten(1, (-1, BLOCK)).mean(2)


def select_blocks(scores: Tensor, visible: Tensor, top_k: int) -> Tensor:
    """The top_k visible key blocks of every query block and head.

    scores: (B, H, T * G, N * G). visible: broadcastable bool of the same shape. Returns a bool of the same shape with
    at most top_k True per row; rows with fewer visible blocks keep all of them.
    """
    scores = scores.masked_fill(~visible, -torch.inf)
    if top_k >= scores.shape[-1]:
        return visible.expand_as(scores)
    index = scores.topk(top_k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True) & visible


def dense(q: Tokens, k: Tokens, v: Tokens, fine: Tensor, coarse: Tensor, specials: int, top_k: int) -> Tensor:
    """Softmax attention of every token of a query frame to every token of the frames it may see.

    q.fine: (B, H, T * L, D). k.fine, v.fine: (B, H, N * L, D). fine: (B or 1, T, N) bool. `coarse`, the pooled tokens
    and `top_k` are not used. Returns (B, H, T * L, D).
    """
    length = q.fine.shape[2] // fine.shape[1]
    mask = fine.repeat_interleave(length, 1).repeat_interleave(length, 2).unsqueeze(1)
    return F.scaled_dot_product_attention(q.fine, k.fine, v.fine, attn_mask=mask)


def speed3r(q: Tokens, k: Tokens, v: Tokens, fine: Tensor, coarse: Tensor, specials: int, top_k: int) -> Tensor:
    """Global sparse attention (Speed3R, section 3; the gates as in its released code).

    Pooled queries attend to all pooled tokens they may see (`coarse`: (B or 1, T, M) bool), which gives the compression
    output and, per head and query block, the top_k key blocks among the resident frames (`fine`: (B or 1, T, N) bool).
    The 16 queries of a block then attend to the tokens of those blocks and to the special tokens of every resident
    frame. Special queries attend densely. Two independent sigmoid gates add both. Returns (B, H, T * L, D).
    """
    batch, heads, _, width = q.fine.shape
    frames, resident = fine.shape[1:]
    length, blocks = q.fine.shape[2] // frames, q.pooled.shape[2] // frames

    scores = (q.pooled @ k.pooled.transpose(-1, -2)) * width**-0.5  # (B, H, T * G, M * G)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    coarse = coarse.repeat_interleave(blocks, 1).repeat_interleave(blocks, 2).unsqueeze(1)
    weights = scores.masked_fill(~coarse, -torch.inf).softmax(-1)
    compressed = (weights.to(v.pooled.dtype) @ v.pooled).unflatten(2, (frames, blocks))

    gather = frames == 1 and batch == 1 and q.fine.device.type == "cpu" and not q.fine.requires_grad
    select = select_by_gathering if gather else select_by_mask
    selected = select(q, k, v, scores.detach()[..., : resident * blocks], fine, specials, top_k)
    selected = selected.unflatten(2, (frames, length))

    gate = q.gate.unflatten(2, (frames, length))[:, :, :, specials:]
    patches = gate[..., :1] * compressed.repeat_interleave(BLOCK, 3) + gate[..., 1:] * selected[:, :, :, specials:]
    return torch.cat([selected[:, :, :, :specials], patches], 3).flatten(2, 3)


def select_by_mask(q: Tokens, k: Tokens, v: Tokens, scores: Tensor, fine: Tensor, specials: int, top_k: int) -> Tensor:
    """Fine attention under a mask of the blocks that `scores` (B, H, T * G, N * G) chooses: (B, H, T * L, D).

    For any number of query frames, and differentiable; but all pairs of tokens are computed, whatever is chosen.
    """
    length, blocks = q.fine.shape[2] // fine.shape[1], q.pooled.shape[2] // fine.shape[1]
    visible = fine.repeat_interleave(blocks, 1).repeat_interleave(blocks, 2).unsqueeze(1)
    chosen = select_blocks(scores, visible, top_k)
    bias = token_bias(chosen, fine, blocks, length, specials, q.fine.dtype)
    return F.scaled_dot_product_attention(q.fine, k.fine, v.fine, attn_mask=bias)


def token_bias(chosen: Tensor, fine: Tensor, blocks: int, length: int, specials: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, H, T * L, N * L), 0 or -inf, of the chosen blocks (B, H, T * G, N * G) and the special tokens."""
    batch, heads = chosen.shape[:2]
    frames, resident = fine.shape[1:]
    # of groups first, each frame's special tokens before its blocks, then copied to tokens in long rows
    groups = fine[:, None, :, None, :, None].repeat(batch // len(fine), heads, 1, blocks + 1, 1, blocks + 1)
    groups[..., 1:, :, 1:] = chosen.view(batch, heads, frames, blocks, resident, blocks)
    group = (torch.arange(length, device=fine.device) - specials).div(BLOCK, rounding_mode="floor").clamp(min=-1) + 1
    bias = torch.zeros(groups.shape, dtype=dtype, device=fine.device).masked_fill_(~groups, -torch.inf)
    return bias.index_select(-1, group).index_select(3, group).flatten(4, 5).flatten(2, 3)


def select_by_gathering(
    q: Tokens, k: Tokens, v: Tokens, scores: Tensor, fine: Tensor, specials: int, top_k: int
) -> Tensor:
    """The same for one frame of one sequence, (1, H, L, D), on copies of the chosen keys and values.

    Head by head, so that the copies stay in the CPU's cache: copied for all heads at once it is slower than the mask.
    """
    heads, length, width = q.fine.shape[1:]
    blocks, resident = q.pooled.shape[2], fine.shape[2]
    hidden = ~fine[0, 0]
    best = scores[0].masked_fill(hidden.repeat_interleave(blocks), -torch.inf).topk(min(top_k, scores.shape[-1]), -1)

    unit = math.gcd(specials, BLOCK)  # tokens that are copied as one row
    block = best.indices // blocks * length + specials + best.indices % blocks * BLOCK  # (H, G, K), its first token
    special = torch.arange(resident)[:, None] * length + torch.arange(0, specials, unit)
    rows = (block[..., None] + torch.arange(0, BLOCK, unit)).flatten(2)
    rows = torch.cat([rows, special.flatten().expand(heads, blocks, -1)], 2) // unit
    unseen = torch.cat(
        [best.values.isinf().repeat_interleave(BLOCK, 2), hidden.repeat_interleave(specials).expand(heads, blocks, -1)],
        2,
    )
    bias = torch.zeros(unseen.shape, dtype=q.fine.dtype).masked_fill_(unseen, -torch.inf)[:, :, None, None]

    out = torch.empty_like(q.fine[0])
    dense_bias = torch.zeros(1, resident * length, dtype=q.fine.dtype).masked_fill_(
        hidden.repeat_interleave(length), -torch.inf
    )
    out[:, :specials] = F.scaled_dot_product_attention(q.fine[:, :, :specials], k.fine, v.fine, attn_mask=dense_bias)[0]
    queries = q.fine[0, :, specials:].unflatten(1, (blocks, 1, BLOCK))
    chosen = q.fine.new_empty(2, rows[0].numel(), unit * width)  # one buffer for all heads
    keys, values = chosen.view(2, blocks, 1, -1, width)
    for h in range(heads):
        for x, copy in zip((k, v), chosen):
            torch.index_select(x.fine[0, h].view(-1, unit * width), 0, rows[h].flatten(), out=copy)
        out[h, specials:] = F.scaled_dot_product_attention(queries[h], keys, values, attn_mask=bias[h]).flatten(0, 2)
    return out[None]


STRATEGIES = {"dense": dense, "speed3r": speed3r}
