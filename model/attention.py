"""Global (cross-frame) attention strategies, chosen by name.

One function serves both forms of the network: the parallel one (all frames of a sequence query all frames, under a
visibility rule) and the recurrent one (one new frame queries the slots of the memory). That is what makes
"parallel = recurrent" hold by construction.

Shape suffixes: B sequences, T query frames, N frames whose fine tokens are resident, M >= N frames whose pooled tokens
are known (the first N of them are the resident ones), L = S + P tokens per frame (S special, then P patches in
block-major order), G = P / 16 blocks per frame, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.kernels.coarse import coarse_attention
from speed3r_ros.kernels.frames import Visible, frame_attention, on_kernels
from speed3r_ros.kernels.selected import begin_selected, selected_attention


@dataclass(frozen=True)
class Tokens:
    """Queries, keys and values of whole frames.

    fine: (B, H, frames * L, D), normalised and rotated. pooled: (B, H, frames * G, D): raw tokens averaged over each
    block, then normalised and rotated at the block's mean position (Speed3R); None where only dense attention follows.
    gate: (B, H, frames * L, 2), only of queries.
    """

    fine: Tensor
    pooled: Tensor | None = None
    gate: Tensor | None = None


def dense(q: Tokens, k: Tokens, v: Tokens, fine: Visible, coarse: Visible, specials: int, top_k: int) -> Tensor:
    """Softmax attention of every token of a query frame to every token of the frames it may see.

    q.fine: (B, H, T * L, D). k.fine, v.fine: (B, H, N * L, D). fine: of a table (B or 1, T, N). `coarse`, the pooled tokens
    and `top_k` are not used. Returns (B, H, T * L, D).
    """
    length = q.fine.shape[2] // fine.table.shape[1]
    if on_kernels(q.fine):
        return frame_attention(*(x.fine.unflatten(2, (-1, length)) for x in (q, k, v)), fine)[0].flatten(2, 3)
    mask = fine.table.repeat_interleave(length, 1).repeat_interleave(length, 2).unsqueeze(1)
    return F.scaled_dot_product_attention(q.fine, k.fine, v.fine, attn_mask=mask)


def speed3r(q: Tokens, k: Tokens, v: Tokens, fine: Visible, coarse: Visible, specials: int, top_k: int) -> Tensor:
    """Global sparse attention (Speed3R, section 3; the gates as in its released code).

    Pooled queries attend to all pooled tokens they may see (`coarse`: of a table (B or 1, T, M)), which gives the compression
    output and, per head and query block, the top_k key blocks among the resident frames (`fine`: of a table (B or 1, T, N)).
    The 16 queries of a block then attend to the tokens of those blocks and to the special tokens of every resident
    frame. Special queries attend densely. Two independent sigmoid gates add both. Returns (B, H, T * L, D).
    """
    begun = begin_selected(q.fine, k.fine, v.fine, fine, specials)
    compressed, index = coarse_attention(q.pooled, k.pooled, v.pooled, coarse, fine, top_k)
    return selected_attention(q.fine, k.fine, v.fine, index, compressed, q.gate, fine, specials, begun=begun)


STRATEGIES = {"dense": dense, "speed3r": speed3r}
