"""Selected fine attention of one new frame on a CPU, on copies of the chosen keys and values.

The reference in `selected` masks: it computes all pairs of tokens and throws most away. Here each head's chosen blocks are
copied together first, head by head, so that the copies stay in the cache: for all heads at once it is slower than the mask.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.kernels.frames import Visible
from speed3r_ros.kernels.qkv import BLOCK


def on_gathered(q: Tensor, fine: Visible) -> bool:
    """Whether `selected_attention_gathered` can stand in for the reference: one frame on a CPU, not to be differentiated."""
    differentiated = torch.is_grad_enabled() and q.requires_grad
    return (
        q.device.type == "cpu"
        and q.shape[0] == fine.table.shape[1] == 1
        and not differentiated
        and bool(fine.table.any())
    )


def selected_attention_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    compressed: Tensor,
    gate: Tensor,
    fine: Visible,
    specials: int,
    group: int = 1,
) -> Tensor:
    """Arguments and results of `selected.selected_attention`, for B = T = 1 and at least one visible frame."""
    heads, length, width = q.shape[1:]
    blocks = (length - specials) // BLOCK
    visible = fine.table[0, 0].nonzero()[:, 0]
    index = index[0].long().repeat_interleave(group, 1)[:, :blocks]  # (H, G, K)
    none = index < 0
    index = index.masked_fill(none, int(visible[0]) * blocks)

    unit = math.gcd(specials, BLOCK)  # tokens that are copied as one row
    block = index // blocks * length + specials + index % blocks * BLOCK  # its first token
    special = visible[:, None] * length + torch.arange(0, specials, unit)
    rows = (block[..., None] + torch.arange(0, BLOCK, unit)).flatten(2)
    rows = torch.cat([rows, special.flatten().expand(heads, blocks, -1)], 2) // unit
    bias = torch.zeros(heads, blocks, 1, 1, rows.shape[2] * unit, dtype=q.dtype)
    bias[..., 0, 0, : index.shape[2] * BLOCK].masked_fill_(none.repeat_interleave(BLOCK, 2), -torch.inf)

    out = torch.empty(1, length, heads, width, dtype=q.dtype).transpose(1, 2)
    chosen = q.new_empty(2, rows[0].numel(), unit * width)  # one buffer for all heads
    keys, values = chosen.view(2, blocks, 1, -1, width)
    queries = q[0, :, specials:].unflatten(1, (blocks, 1, BLOCK))
    for h in range(heads):
        for x, copy in zip((k, v), chosen):
            torch.index_select(x[0, h].reshape(-1, unit * width), 0, rows[h].flatten(), out=copy)
        attended = F.scaled_dot_product_attention(queries[h], keys, values, attn_mask=bias[h])
        out[0, h, specials:] = attended.flatten(0, 2)
    gate = gate[:, :, specials:]
    patches = out[:, :, specials:]
    patches *= gate[..., 1:]
    patches += gate[..., :1] * compressed.repeat_interleave(BLOCK, 2)
    if specials:
        if len(visible) < fine.table.shape[2]:
            k, v = (x.unflatten(2, (-1, length))[:, :, visible].flatten(2, 3) for x in (k, v))
        out[:, :, :specials] = F.scaled_dot_product_attention(q[:, :, :specials], k, v)
    return out
