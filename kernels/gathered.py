"""Selected fine attention on a CPU, on copies of the chosen keys and values.

The reference in `selected` masks: it computes all pairs of tokens and throws most away, and its mask grows with the square of
the frames. Here each head's chosen blocks are copied together first, frame by frame, and head by head, so that the copies stay
in the cache: for all heads at once it is slower than the mask.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.kernels.frames import Visible
from speed3r_ros.kernels.qkv import BLOCK, differentiated


def on_gathered(q: Tensor, fine: Visible) -> bool:
    """Whether `selected_attention_gathered` can stand in for the reference: one sequence on a CPU, not to be differentiated,
    each of whose frames sees one."""
    return q.device.type == "cpu" and len(q) == 1 and not differentiated(q) and bool(fine.table.any(2).all())


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
    shown: Visible | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Arguments and results of `selected.selected_attention`, for B = 1 and frames that see at least one."""
    (heads, rows, width), frames = q.shape[1:], fine.table.shape[1]
    if out is None:
        out = torch.empty(1, rows, heads, width, dtype=q.dtype).transpose(1, 2)
    per_frame = (x.unflatten(2, (frames, -1)).unbind(2) for x in (q, index, compressed, gate, out))
    for frame, (q, index, compressed, gate, part) in enumerate(zip(*per_frame)):
        visible = fine.table[0, frame].nonzero()[:, 0]
        whole = visible[:0] if shown is None else shown.table[0, frame].nonzero()[:, 0]
        _one_frame(q, k, v, index, compressed, gate, visible, whole, specials, group, part)
    return out


def _one_frame(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    compressed: Tensor,
    gate: Tensor,
    visible: Tensor,
    whole: Tensor,
    specials: int,
    group: int,
    out: Tensor,
) -> None:
    """The same for the queries of one frame, into `out` (1, H, L, D). visible, whole: numbers of the frames that it sees and
    of those `shown` to it."""
    heads, length, width = q.shape[1:]
    blocks = (length - specials) // BLOCK
    index = index[0].long().repeat_interleave(group, 1)[:, :blocks]  # (H, G, K)
    none = index < 0
    index = index.masked_fill(none, int(visible[0]) * blocks)

    unit = math.gcd(specials, BLOCK)  # tokens that are copied as one row
    block = index // blocks * length + specials + index % blocks * BLOCK  # its first token
    chosen_rows = (block[..., None] + torch.arange(0, BLOCK, unit)).flatten(2)
    special = visible[:, None] * length + torch.arange(0, specials, unit)
    others = whole[:, None] * length + torch.arange(specials, length, unit)
    shared = torch.cat([special.flatten(), others.flatten()]).expand(heads, blocks, -1)
    rows = torch.cat([chosen_rows, shared], 2) // unit
    bias = torch.zeros(heads, blocks, 1, 1, rows.shape[2] * unit, dtype=q.dtype)
    bias[..., 0, 0, : index.shape[2] * BLOCK].masked_fill_(none.repeat_interleave(BLOCK, 2), -torch.inf)

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
        if len(visible) * length < k.shape[2]:
            k, v = (x.unflatten(2, (-1, length))[:, :, visible].flatten(2, 3) for x in (k, v))
        out[:, :, :specials] = F.scaled_dot_product_attention(q[:, :, :specials], k, v)
