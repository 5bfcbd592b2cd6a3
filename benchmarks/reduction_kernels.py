"""Speed of token merging, linear attention, FP8 layers and resizing of maps on the GPU, each beside the plain way in the same run.

    python benchmarks/reduction_kernels.py

The plain ways: gather, scatter and batched products of torch for merging; dense flash attention for the attentions; nn.Linear
in bf16 for the layers; F.interpolate and a sum for the maps. Inputs are random bf16, maps float32 as in VGGT. GB/s count every byte that must be read or written once, TFLOP/s the
operations asked for. Medians of CUDA events; what concerns one new view runs in a CUDA graph. Prints Markdown.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import CUDA, DEVICE, DTYPE, flash, graph_milliseconds, line, milliseconds, rand
from speed3r_ros.kernels import fp8
from speed3r_ros.kernels.frames import Visible
from speed3r_ros.kernels.linear_attention import (
    key_states_triton,
    linear_attention_triton,
    read_states_triton,
)
from speed3r_ros.kernels.merging import (
    GROUP,
    kept_tokens,
    match_tokens_triton,
    merge_tokens_triton,
    merged_length,
    take_tokens_triton,
)
from speed3r_ros.kernels.resize import resize_reference, resize_triton


@dataclass(frozen=True)
class Model:
    """Sizes of one global layer; views: how many at once."""

    name: str
    heads: int
    width: int
    length: int
    specials: int
    views: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Width of a token."""
        return self.heads * self.width


PI3 = Model("Pi3 size", 16, 64, 1013, 5, (32, 128))
COMPACT = Model("compact", 6, 64, 196, 4, (48,))
TINY = Model("tiny", 1, 16, 18, 2, (3,))


def header(title: str) -> None:
    """Start a table."""
    print(f"\n### {title}\n\n| work | ms | rate | times the plain way |\n| --- | --- | --- | --- |")


def timed(
    name: str,
    run: Callable[[], object],
    gigabytes: float = 0.0,
    teraflops: float = 0.0,
    plain: float = 0.0,
    graph: bool = False,
) -> float:
    """Time a call and print its row; returns milliseconds, or 0 if it fails."""
    try:
        ms = (graph_milliseconds if graph else milliseconds)(run)
    except Exception:
        line(name, "failed: " + traceback.format_exc(limit=-1).splitlines()[-1][:200], "", "")
        traceback.print_exc(limit=-3)
        return 0.0
    rate = f"{gigabytes / ms * 1e3:.0f} GB/s" if gigabytes else f"{teraflops / ms * 1e3:.0f} TFLOP/s"
    line(name, ms, rate if gigabytes or teraflops else "", f"{plain / ms:.2f}" if plain else "")
    return ms


def gigabytes(*tensors: Tensor) -> float:
    """Size of all of them."""
    return sum(x.numel() * x.element_size() for x in tensors) / 1e9


def match_by_products(x: Tensor, model: Model, views: int, ratio: int) -> list[Tensor]:
    """Partners by similarity matrices of whole groups; patch 0 of each cell is the destination, for simplicity."""
    patches = F.normalize(x.unflatten(1, (views, model.length))[0, :, model.specials :], dim=-1)
    is_destination = torch.arange(patches.shape[1]) % ratio == 0
    out = []
    for group in patches.split(GROUP):
        source, destination = group[:, ~is_destination].flatten(0, 1), group[:, is_destination].flatten(0, 1)
        out.append((source @ destination.T).argmax(-1))
    return out


def merge_by_scatter(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """Means by torch's scatter, which adds in any order."""
    out = torch.zeros(*x.shape[:2], count, x.shape[3], dtype=x.dtype, device=x.device)
    return out.scatter_reduce_(2, rows.long()[:, None, :, None].expand_as(x), x, "mean", include_self=False)


def spark3r(model: Model, views: int, ratio: int, stride: int) -> None:
    """Matching, merging, unmerging, pruning, and a whole attention layer by them."""
    header(f"Spark3R, {model.name}, {views} views, query ratio {ratio}, key stride {stride}")
    h, d, n = model.heads, model.width, views * model.length
    q, k, v = (rand(1, n, h, d).transpose(1, 2) for _ in range(3))
    cells = merged_length(model.length, model.specials, ratio) - model.specials
    rows_of = lambda x: match_tokens_triton(x, views, model.specials, ratio)  # noqa: E731
    for name, x in (("the block's input", rand(1, n, model.channels)), ("keys, mean of heads", k.mean(1))):
        patches = model.length - model.specials
        pairs = sum(
            min(GROUP, views - first) ** 2 * (patches - cells) * cells for first in range(0, views, GROUP)
        )  # of sources and destinations
        work = 2 * pairs * x.shape[2] / 1e12
        plain = timed(
            f"match by {name}, torch", lambda: match_by_products(x, model, views, ratio), teraflops=work  # noqa: B023
        )  # fmt: skip
        timed(f"match by {name}", lambda: rows_of(x), teraflops=work, plain=plain)  # noqa: B023
    rows, count = rows_of(k.mean(1)), views * (model.specials + cells)
    merged = merge_tokens_triton(q, rows, count)
    moved = gigabytes(q, merged)
    plain = timed("merge, torch", lambda: merge_by_scatter(q, rows, count), moved)
    timed("merge", lambda: merge_tokens_triton(q, rows, count), moved, plain=plain)
    index = rows.long()[:, None, :, None].expand_as(q)
    moved = 2 * gigabytes(q)
    plain = timed("unmerge, torch", lambda: merged.gather(2, index), moved)
    timed("unmerge", lambda: take_tokens_triton(merged, rows), moved, plain=plain)
    kept = kept_tokens(views, model.length, model.specials, stride, stagger=True, device=DEVICE)
    moved = 2 * gigabytes(k) * kept.shape[1] / n
    plain = timed("prune keys, torch", lambda: k.index_select(2, kept[0]), moved)
    timed("prune keys", lambda: take_tokens_triton(k, kept), moved, plain=plain)

    def layer() -> Tensor:
        rows = rows_of(k.mean(1))
        out = flash(merge_tokens_triton(q, rows, count), take_tokens_triton(k, kept), take_tokens_triton(v, kept))
        return take_tokens_triton(out, rows)

    plain = timed("dense attention, flash", lambda: flash(q, k, v), teraflops=4e-12 * h * d * n * n)
    asked = 4e-12 * h * d * count * kept.shape[1]
    timed("merged and pruned attention, everything", layer, teraflops=asked, plain=plain)


def lite3r(model: Model, views: int) -> None:
    """Linear attention, forward and backward."""
    header(f"Lite3R's linear branch, {model.name}, {views} views")
    h, d, n = model.heads, model.width, views * model.length
    q, k, v = (rand(1, h, views, model.length, d) for _ in range(3))
    flat = q.flatten(2, 3)[:, :, None]
    everything = torch.ones(1, 1, views, dtype=torch.bool, device=DEVICE)
    causal = torch.ones(1, views, views, dtype=torch.bool, device=DEVICE).tril()
    plain = timed(
        "dense attention, flash", lambda: flash(*(x.flatten(2, 3) for x in (q, k, v))), teraflops=4e-12 * h * d * n * n
    )

    def by_products() -> Tensor:
        key, query = F.elu(k.flatten(2, 3)) + 1, F.elu(q.flatten(2, 3)) + 1
        return query @ (key.mT @ v.flatten(2, 3)) / (query @ key.sum(2)[..., None])

    moved = 4 * gigabytes(q)
    timed("linear, torch in bf16", by_products, moved, plain=plain)
    states = key_states_triton(k, v)
    timed("its states of keys", lambda: key_states_triton(k, v), moved / 2, plain=plain)
    timed("its reading by queries", lambda: read_states_triton(q, states), moved / 2, plain=plain)
    timed("linear, all frames", lambda: linear_attention_triton(flat, k, v, Visible(everything)), moved, plain=plain)
    timed("linear, causal", lambda: linear_attention_triton(q, k, v, Visible(causal)), moved, plain=plain)

    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        tokens = [x.flatten(2, 3) for x in leaves]
        dense, linear = flash(*tokens), linear_attention_triton(*leaves, Visible(causal.clone()))
        grads = [torch.randn_like(x) for x in (dense, linear)]
        plain = timed(
            "dense attention, flash, backward",
            lambda: torch.autograd.grad(dense, leaves, grads[0], retain_graph=True),
            teraflops=1e-11 * h * d * n * n,
        )
        timed(
            "linear, causal, backward",
            lambda: torch.autograd.grad(linear, leaves, grads[1], retain_graph=True),
            2 * moved,
            plain=plain,
        )


def layers(model: Model, views: int, graph: bool = False) -> None:
    """Linear layers of a block."""
    header(f"FP8 layers, {model.name}, {views} views" + (" (CUDA graph)" if graph else ""))
    m, c = views * model.length, model.channels
    for k, n in ((c, 3 * c), (c, c), (c, 4 * c), (4 * c, c)):
        x, weight, bias = rand(m, k), rand(n, k), rand(n)
        stored = fp8.quantise_rows_triton(weight)
        operands = *fp8.quantise_rows_triton(x), *stored, bias
        work = 2e-12 * m * k * n

        def run(name: str, call: Callable[[], object], plain: float = 0.0, moved: float = 0.0, work: float = work):
            return timed(f"{k} -> {n}: {name}", call, moved, 0 if moved else work, plain, graph)  # noqa: B023

        plain = run("nn.Linear, bf16", lambda: F.linear(x, weight, bias))  # noqa: B023
        run("rounding of activations", lambda: fp8.quantise_rows_triton(x), moved=1.5 * gigabytes(x))  # noqa: B023
        run("rounding, torch", lambda: fp8.quantise_rows_reference(x), moved=1.5 * gigabytes(x))  # noqa: B023
        if CUDA:
            run("product, torch", lambda: fp8.scaled_product_library(*operands, DTYPE), plain)  # noqa: B023
        run("product, Triton", lambda: fp8.scaled_product_triton(*operands, DTYPE), plain)  # noqa: B023
        run("FP8 layer", lambda: fp8.fp8_linear_triton(x, *stored, bias), plain)  # noqa: B023


def maps(frames: int, side: int, channels: int) -> None:
    """What a DPT head resizes: its last fusion, and its last features with the embedding of places. side: patches."""
    header(f"Resizing of maps, DPT head of {channels} features, {frames} views of {14 * side} x {14 * side}")
    for name, features, before, after, embedded in (
        ("last fusion", channels, 4 * side, 8 * side, False),
        ("last features, places", channels // 2, 8 * side, 14 * side, True),
    ):
        x = torch.randn(frames, features, before, before, device=DEVICE).contiguous(memory_format=torch.channels_last)
        plane = tuple(torch.randn(after, features // 2, device=DEVICE) for _ in range(2)) if embedded else None
        moved = gigabytes(x) * (1 + (after / before) ** 2)
        plain = timed(f"{name}, torch", lambda: resize_reference(x, (after, after), plane), moved)  # noqa: B023
        timed(name, lambda: resize_triton(x, (after, after), plane), moved, plain=plain)  # noqa: B023


def main() -> None:
    """Print the tables."""
    print(f"{torch.cuda.get_device_name() if CUDA else 'interpreter'}, torch {torch.__version__}")
    maps(*(8, 37, 256) if CUDA else (1, 1, 16))
    for model in (PI3, COMPACT) if CUDA else (TINY,):
        layers(model, 1, graph=True)
        for views in model.views:
            layers(model, views)
            lite3r(model, views)
            for ratio, stride in ((2, 4), (4, 25)) if views > 100 else ((3, 3),):
                spark3r(model, views, ratio, stride)
            if CUDA:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
