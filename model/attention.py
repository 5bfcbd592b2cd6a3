"""Global (cross-frame) attention: what a strategy is given, and those that any network runs. Their names: `strategies`.

One call serves both forms of the network: the parallel one (all frames of a sequence query all frames, under a
visibility rule) and the recurrent one (one new frame queries the slots of the memory). That is what makes
"parallel = recurrent" hold by construction.

Shape suffixes: B sequences, T query frames, N frames whose fine tokens are resident, M >= N frames whose pooled tokens
are known (the first N of them are the resident ones), L = S + P tokens per frame (S special, then P patches in
block-major order), G = P / 16 blocks per frame, H heads, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from speed3r_ros.kernels.coarse import coarse_attention
from speed3r_ros.kernels.frames import Visible, frame_attention, on_kernels
from speed3r_ros.kernels.selected import begin_selected, selected_attention
from speed3r_ros.model.memory import Parts


@dataclass(frozen=True)
class Tokens:
    """Queries, keys and values of whole frames.

    fine: (B, H, frames * L, D), normalised and rotated. pooled: (B, H, frames * G, D): raw tokens averaged over each
    block, then normalised and rotated at the block's mean position (Speed3R); None where only dense attention follows.
    gate: (B, H, frames * L, 2), only of queries. x: the block's normalised input (B, frames * L, C), only of queries and only
    for strategies that read it. given_up: whether a strategy may write its result over `fine`, only of queries and only where
    no gradients are recorded.
    """

    fine: Tensor
    pooled: Tensor | None = None
    gate: Tensor | None = None
    x: Tensor | None = None
    given_up: bool = False


@dataclass(frozen=True)
class Layer:
    """The layer that a strategy is called in.

    number: from 0 among the network's layers across frames. sensitive: whether it bears few keys badly (Spark3R). unmasked:
    whether all frames see all, known on the host. reference: (B,), the frame that a sequence is measured against; None = the
    first. linear: projection D -> D of the linear branch (Lite3R), if the network has one. always: of a table within that of
    the visible frames, those whose tokens a frame's queries all attend to, whatever they choose (Speed3R); None for none.
    bias: what to add to the scores of each key (1, R), where keys and values are the rows of a memory that holds parts of
    frames (Spark3R); else None.
    """

    number: int = 0
    sensitive: bool = True
    unmasked: bool = False
    reference: Tensor | None = None
    linear: nn.Module | None = None
    always: Visible | None = None
    bias: Tensor | None = None


SOME_LAYER = Layer()


class Strategy(ABC):
    """How frames attend to one another; its options are the fields of dataclasses.

    in_blocks: it needs tokens in block-major order, with pooled tokens and gates. reads_input: it needs `Tokens.x`, which is
    not there in blocks. follows_visibility: it obeys the tables, else all frames must see all, or one sees what a memory
    with `parts` holds.
    """

    in_blocks = False
    follows_visibility = True
    reads_input = False

    def parts(self, specials: int, layers: Sequence[Layer]) -> Parts | None:
        """What the bank of a stream's memory keeps of fine tokens: None = nothing."""
        return None

    @abstractmethod
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
        """q.fine: (B, H, T * L, D). k.fine, v.fine: (B, H, N * L, D). fine: of a table (B or 1, T, N), coarse: (B or 1, T, M).

        Returns (B, H, T * L, D).
        """


def unmasked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of all queries (B, H, X, D) to all keys (B, H, Y, D), by the library's fastest kernel.

    bias: what to add to each key's scores (1, Y), in q's type.
    """
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    q, k, v = (
        x if x.shape[2] * x.stride(2) < 2**31 else x.contiguous() for x in (q, k, v)
    )  # offsets of 32 bits suffice
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if bias is None:  # flash attention takes none, and cuDNN's has not been tried with one
        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *backends]
    with sdpa_kernel(backends, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


ROWS = 1024  # queries that share a mask on a CPU: frame by frame, small frames take 1.6 times as long


class Dense(Strategy):
    """Softmax attention of every token of a query frame to every token of the frames it may see."""

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
        """See `Strategy.__call__`; `coarse`, the pooled tokens and `top_k` are not used."""
        if layer.unmasked:
            return unmasked(q.fine, k.fine, v.fine)
        length = q.fine.shape[2] // fine.table.shape[1]
        if on_kernels(q.fine):
            return frame_attention(*(x.fine.unflatten(2, (-1, length)) for x in (q, k, v)), fine)[0].flatten(2, 3)
        together = max(1, ROWS // length)  # frames; the mask of all at once would have all pairs of tokens
        masks = fine.table.repeat_interleave(length, 2).split(together, 1)
        if together > 1:  # else all queries share one row
            masks = [mask.repeat_interleave(length, 1) for mask in masks]
        parts = [
            F.scaled_dot_product_attention(x, k.fine, v.fine, attn_mask=mask[:, None])
            for x, mask in zip(q.fine.split(together * length, 2), masks)
        ]
        return torch.cat(parts, 2)


class Speed3R(Strategy):
    """Global sparse attention (Speed3R, section 3; the gates as in its released code).

    Pooled queries attend to all pooled tokens they may see, which gives the compression output and, per head and query
    block, the top_k key blocks among the resident frames. The 16 queries of a block then attend to the tokens of those
    blocks and to the special tokens of every resident frame. Special queries attend densely. Two independent sigmoid gates
    add both. Frames that the layer shows always come in addition: blocks are chosen among the others.
    """

    in_blocks = True

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
        """See `Strategy.__call__`."""
        out = q.fine if q.given_up else None
        begun = None if q.given_up else begin_selected(q.fine, k.fine, v.fine, fine, specials)
        always = layer.always
        choosable = fine if always is None else Visible(fine.table & ~always.table)
        compressed, index = coarse_attention(q.pooled, k.pooled, v.pooled, coarse, choosable, top_k)
        return selected_attention(
            q.fine, k.fine, v.fine, index, compressed, q.gate, fine, specials, shown=always, begun=begun, out=out
        )


dense, speed3r = Dense(), Speed3R()
