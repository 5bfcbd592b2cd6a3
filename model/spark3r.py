"""Spark3R: fewer queries and, more strongly, fewer keys for dense attention across views, without training (section 3).

In a layer across S views, queries are reduced by r_Q and keys and values by r_KV, both by S; the dense attention's output
goes back to all tokens. Queries merge within groups of 20 consecutive views; of keys and values a temporal stride remains,
three times as long in layers that a probe found to bear it. No code was published. What the paper leaves open is an option
here; its default and the reason:

- Tokens are compared by the cosine of the block's input (`similarity`), shared by all heads, as in FastVGGT.
- Which tokens are destinations: see `kernels.merging`. Queries are averaged after their rotation.
- Special tokens are neither merged nor pruned, and the reference view keeps all its keys: pruning these cost FastVGGT most.
  Where another view than the first is the reference (Depth Anything 3), the stride counts from it.
- The stride keeps whole views; `stagger` keeps as many patches of every view instead.
- Layers are counted from 0 among those across views. Networks of another depth than the probed one take its map stretched.
- A stream has no number of views to prune by. Its memory's bank keeps parts of frames, at strides that double when it is full
  (`memory.Parts`); the new frame's queries are not merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speed3r_ros.kernels.frames import Visible
from speed3r_ros.kernels.merging import GROUP, kept_tokens, match_tokens, merge_tokens, merged_length, take_tokens
from speed3r_ros.model.attention import SOME_LAYER, Layer, Strategy, Tokens, unmasked
from speed3r_ros.model.memory import Parts

SENSITIVE = {"pi3": (11, 16, 18), "vggt": (11, 16, 24), "da3": (3, 12, 14)}  # first, last, of so many layers
SIMILARITIES = ("input", "keys")


def sensitive_layers(family: str, count: int) -> frozenset[int]:
    """The layers of a network of the family, with `count` layers across views, whose keys are pruned less."""
    first, last, of = SENSITIVE[family]
    return frozenset(i for i in range(count) if first <= (i + 0.5) * of / count < last + 1)


def query_ratio(views: int) -> int:
    """r_Q: queries degrade fast, so that it grows slowly."""
    return 1 + sum(views > limit for limit in (100, 300, 500))


def key_stride(views: int) -> int:
    """r_KV of sensitive layers: keys of about 40 views remain."""
    return 1 if views <= 100 else -(-views // 40)


@dataclass(frozen=True)
class Spark3R(Strategy):
    """Training-free reduction of tokens; it has no gradient, and needs all views at once or a memory with `parts`.

    ratio: r_Q, by default `query_ratio` of the views. strides: r_KV of every layer, or one for each, instead of the rule:
    `key_stride` of the views, times `factor` in layers that are not sensitive. sensitive: numbers of layers, by default the
    backbone's. group: consecutive views whose queries are merged. similarity: input or keys. stagger: see the module's text.
    share, weighted: see `memory.Parts`; group and stagger mean nothing in streams. ValueError on options that make no sense.
    """

    ratio: int | None = None
    strides: int | Sequence[int] | None = None
    factor: int = 3
    sensitive: frozenset[int] | None = None
    group: int = GROUP
    similarity: str = "input"
    stagger: bool = False
    share: int = 4
    weighted: bool = True

    follows_visibility = False

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"similarity {self.similarity!r}: choose one of {', '.join(SIMILARITIES)}")
        strides = (self.strides,) if self.strides is None or isinstance(self.strides, int) else self.strides
        if self.share < 1 or self.share & (self.share - 1):
            raise ValueError(f"share {self.share}: must be a power of two")
        for name, values in (("ratio", (self.ratio,)), ("strides", strides), ("factor", (self.factor,))):
            if any(value is not None and value < 1 for value in values):
                raise ValueError(f"{name} {getattr(self, name)!r}: must be at least 1")

    @property
    def reads_input(self) -> bool:
        """See `Strategy`."""
        return self.similarity == "input"

    def stride(self, views: int, layer: Layer) -> int:
        """r_KV. ValueError if `strides` ends before the layer."""
        if isinstance(self.strides, int):
            return self.strides
        if self.strides is not None:
            if layer.number >= len(self.strides):
                raise ValueError(f"{len(self.strides)} strides, but the network has more layers: give one for each")
            return self.strides[layer.number]
        sensitive = layer.sensitive if self.sensitive is None else layer.number in self.sensitive
        return key_stride(views) * (1 if sensitive else self.factor)

    def parts(self, specials: int, layers: Sequence[Layer]) -> Parts:
        """See `Strategy`: at first the strides that a single view would get. ValueError if keys are compared."""
        if self.similarity == "keys":
            raise ValueError("similarity 'keys': a stream's keys are those of many views; choose input")
        return Parts(specials, tuple(self.stride(1, layer) for layer in layers), self.share, self.weighted)

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
        """See `Strategy.__call__`; T = N, and the tables are taken to be all true; or keys and values are a memory's rows,
        which the layer has a bias for. ValueError if gradients are recorded."""
        if torch.is_grad_enabled() and q.fine.requires_grad:
            raise ValueError("attention 'spark3r' has no gradient: run the network under torch.inference_mode()")
        views = fine.table.shape[1]
        length = q.fine.shape[2] // views
        ratio, stride = self.ratio or query_ratio(views), self.stride(views, layer)
        keys, values, queries, rows = k.fine, v.fine, q.fine, None
        if stride > 1 and layer.bias is None:  # what a memory holds is pruned
            index = kept_keys(views, length, specials, stride, self.stagger, layer.reference, keys.device)
            keys, values = take_tokens(keys, index), take_tokens(values, index)
        if ratio > 1:
            compared = q.x if self.similarity == "input" else k.fine.mean(1)
            if compared is None:
                raise ValueError(f"ratio {ratio}: this network does not hand on the input to compare; choose 1")
            rows = match_tokens(compared, views, specials, ratio, self.group)
            queries = merge_tokens(queries, rows, views * merged_length(length, specials, ratio))
        out = unmasked(queries, keys, values, layer.bias)
        return out if rows is None else take_tokens(out, rows)


def kept_keys(
    views: int,
    length: int,
    specials: int,
    stride: int,
    stagger: bool,
    reference: Tensor | None,
    device: torch.device,
) -> Tensor:
    """`kernels.merging.kept_tokens` for sequences whose reference views (B,) come first in the order that the stride counts.

    reference: None = view 0. Returns (1 or B, M) int32.
    """
    index = kept_tokens(views, length, specials, stride, stagger, device)
    if reference is None:
        return index
    view = torch.arange(views, device=device)
    order = torch.where(view == reference[:, None], -1, view).argsort(-1)  # the reference, then the others
    place = index[0] // length
    return (order[:, place] * length + index[0] % length).int()


def probe(
    error: Callable[[Spark3R], float], layers: int, stride: int = 32, raised: int = 256, limit: float = 1.05
) -> tuple[frozenset[int], list[float]]:
    """Find the sensitive layers: those where a far longer stride raises the error by more than `limit` (section 3).

    error: of the network's output under a strategy, on sequences of the user's choice. layers: how many across views.
    Returns the sensitive layers and each layer's ratio of errors.
    """
    base = error(Spark3R(strides=stride))
    ratios = [
        error(Spark3R(strides=[raised if j == i else stride for j in range(layers)])) / base for i in range(layers)
    ]
    return frozenset(i for i, ratio in enumerate(ratios) if ratio > limit), ratios
