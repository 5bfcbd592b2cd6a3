"""Speed of the attention kernels on the GPU, beside the flash backend of scaled_dot_product_attention in the same run.

    python benchmarks/kernels.py                 # tables
    python benchmarks/kernels.py --passes        # only the passes between matrix products; with --sweep their tile sizes
    python benchmarks/kernels.py --sweep         # tile sizes, warps, stages and shares instead; about 60 s

TFLOP/s count 4 * width operations for each pair of a query and a key that the method asks for. The floor of a row is the
longer of these operations at the rate of a bf16 matrix product of 8192 and of its bytes (inputs read once, outputs written
once) at the rate of a device copy, both measured at the start. Inputs are random bf16, so the choice of blocks has no
locality; `near` uses a choice in which neighbours share most blocks. Medians of CUDA events; the streaming step is a CUDA
graph. Prints Markdown.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from speed3r_ros.kernels.coarse import CoarseAttention, coarse_attention_triton, select
from speed3r_ros.kernels.frames import FrameAttention, Visible, frame_attention_triton, list_frames, tiles_per_frame
from speed3r_ros.kernels.qkv import (
    normalise_and_rotate_reference,
    normalise_and_rotate_triton,
    prepare_backward,
    prepare_tokens_reference,
    prepare_tokens_triton,
)
from speed3r_ros.kernels.residual import add_norm_backward, add_norm_reference, add_norm_triton
from speed3r_ros.kernels.selected import Beside, SelectedAttention, attend_to_selected, begin, selected_attention_triton
from speed3r_ros.model import attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float16  # the interpreter multiplies no bfloat16


@dataclass(frozen=True)
class Model:
    """Sizes of one global layer."""

    name: str
    heads: int
    width: int
    blocks: int
    specials: int
    top_k: int
    window: int
    anchors: int
    bank: int

    @property
    def length(self) -> int:
        """Tokens per frame."""
        return self.specials + 16 * self.blocks


PI3 = Model("Pi3 size", 16, 64, 63, 5, 32, 8, 16, 256)
COMPACT = Model("compact", 6, 64, 12, 4, 32, 8, 2, 32)
TINY = Model("tiny", 1, 16, 2, 1, 2, 1, 1, 1)


def milliseconds(run: Callable[[], object], budget: float = 0.4) -> float:
    """Median time of a call."""
    if not CUDA:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    run()
    torch.cuda.synchronize()

    def once() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    first = once()
    return statistics.median([first] + [once() for _ in range(min(30, int(budget * 1e3 / max(first, 1e-3))))])


def graph_milliseconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Time of one call among `repeats` in a CUDA graph: no launch gaps."""
    if not CUDA:
        return milliseconds(run)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # where the first call makes a forward pass, autograd runs the backward pass
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            run()
    return milliseconds(graph.replay) / repeats


def rand(*shape: int) -> Tensor:
    """Normal values of the type under test."""
    return torch.randn(shape, device=DEVICE, dtype=torch.float32 if not CUDA else DTYPE).to(DTYPE)


class Tokens:
    """Inputs of one layer with T query frames, N resident ones and M pooled ones, everything visible."""

    def __init__(self, model: Model, frames: int, resident: int, known: int) -> None:
        h, d, g, length = model.heads, model.width, model.blocks, model.length
        self.fine, self.coarse = (
            Visible(torch.ones(1, frames, n, dtype=torch.bool, device=DEVICE)) for n in (resident, known)
        )
        self.q, self.k, self.v = (rand(1, h, n * length, d) for n in (frames, resident, resident))
        self.pooled = [rand(1, h, n * g, d) for n in (frames, known, known)]
        self.gate = torch.rand(1, h, frames * length, 2, device=DEVICE).to(DTYPE)
        self.compressed = rand(1, h, frames * g, d)

    def near(self, model: Model, group: int) -> Tensor:
        """A choice in which neighbouring blocks share most blocks: runs around one's own place in a few frames."""
        t, n = self.fine.table.shape[1:]
        count = min(8, model.blocks)
        places = torch.arange(0, model.blocks, group, device=DEVICE)[:, None] + torch.arange(count, device=DEVICE)
        frames = torch.rand(t, n, device=DEVICE).argsort(-1)[:, : max(1, model.top_k // count)]
        index = frames[:, None, :, None] * model.blocks + (places % model.blocks)[None, :, None]
        index = index.flatten(2).sort(-1).values.flatten(0, 1).int()
        return index.expand(1, model.heads, -1, -1).contiguous()


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention by the flash backend."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if CUDA else SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention by the cuDNN backend."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if CUDA else SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def line(*cells: object) -> None:
    """One row of a Markdown table, at once, so that an interrupted run leaves what it has."""
    print("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)


def size(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


@functools.cache
def ceilings() -> tuple[float, float]:
    """Operations and bytes per millisecond that the device reaches: a bf16 matrix product, a copy (read and written)."""
    n = 8192 if CUDA else 64
    a, b, c = rand(n, n), rand(n, n), rand(16 * n, n)
    copy = torch.empty_like(c)
    return 2 * n**3 / milliseconds(lambda: a @ b), 2 * size(c) / milliseconds(lambda: copy.copy_(c))


def guarded(
    name: str,
    pairs: float,
    width: int,
    moved: int,
    run: Callable[[], object],
    base: float = 0.0,
    graph: bool = False,
) -> float:
    """Time a call that must move so many bytes and print its row; returns TFLOP/s, or 0 if it fails."""
    try:
        ms = (graph_milliseconds if graph else milliseconds)(run)
    except Exception:
        line(name, "failed: " + traceback.format_exc(limit=-1).splitlines()[-1][:200], *[""] * 4)
        traceback.print_exc(limit=-3)
        return 0.0
    operations = 4 * width * pairs
    rate = operations / ms / 1e9
    floor = max(operations / ceilings()[0], moved / ceilings()[1])
    share = f"{100 * rate / base:.0f} %" if base and pairs else ""
    line(name, ms, rate if pairs else "", share, floor, f"{100 * floor / ms:.0f} %")
    return rate


def header(title: str) -> None:
    """Start a table."""
    print(f"\n### {title}\n\n| work | ms | TFLOP/s | of flash | floor, ms | reached |")
    print("| --- | --- | --- | --- | --- | --- |")


def parallel(model: Model, views: int, dense_up_to: int) -> None:
    """All frames see all frames."""
    header(f"{model.name}, {views} views at once")
    h, d, g, s, length = model.heads, model.width, model.blocks, model.specials, model.length
    x = Tokens(model, views, views, views)
    base = 0.0
    q5, k5, v5 = (y.unflatten(2, (views, length)) for y in (x.q, x.k, x.v))
    whole, pooled = size(x.q, x.q, x.k, x.v), size(x.pooled[0], *x.pooled)
    if views <= dense_up_to:
        pairs = h * (views * length) ** 2
        base = guarded("dense, flash", pairs, d, whole, lambda: flash(x.q, x.k, x.v))
        guarded("dense, cuDNN", pairs, d, whole, lambda: cudnn(x.q, x.k, x.v), base)
        guarded("dense, frames kernel", pairs, d, whole, lambda: frame_attention_triton(q5, k5, v5, x.fine), base)
    pairs = h * (views * g) ** 2
    pooled_base = guarded("pooled tokens, flash", pairs, d, pooled, lambda: flash(*x.pooled))
    base = base or pooled_base
    p5 = [y.unflatten(2, (views, g)) for y in x.pooled]
    run = lambda: frame_attention_triton(*p5, x.coarse)  # noqa: E731
    guarded("pooled tokens, frames kernel", pairs, d, pooled, run, pooled_base)
    for group in (1, 4):
        run = lambda: coarse_attention_triton(*x.pooled, x.coarse, x.fine, model.top_k, group)  # noqa: E731, B023
        guarded(f"coarse + top-k, group {group}", pairs, d, pooled, run, pooled_base)
    special, patches = views * s, views * g * 16
    run = lambda: frame_attention_triton(q5[:, :, :, :s], k5, v5, x.fine)  # noqa: E731
    guarded("special queries, all keys", h * special * views * length, d, size(x.k, x.v), run, base)
    run = lambda: frame_attention_triton(q5[:, :, :, s:], k5[:, :, :, :s], v5[:, :, :, :s], x.fine)  # noqa: E731
    guarded("patch queries, special keys", h * patches * special, d, size(x.q, x.q), run, base)
    dense = h * (special * views * length + patches * special)
    for group in (1, 4):
        index = coarse_attention_triton(*x.pooled, x.coarse, x.fine, model.top_k, group)[1]
        moved = whole + size(index, x.compressed, x.gate)
        for name, choice in (("random", index), ("near", x.near(model, group))):
            count = h * patches * choice.shape[-1] * 16
            args = (choice, x.compressed, x.gate, x.fine)
            bare = (x.q.unflatten(2, (views, length))[:, :, :, s:].flatten(2, 3),)
            bare += tuple(y.unflatten(2, (views, length))[:, :, :, s:].flatten(2, 3) for y in (x.k, x.v))
            gate = x.gate.unflatten(2, (views, length))[:, :, :, s:].flatten(2, 3)
            run = lambda: selected_attention_triton(*bare, *args[:2], gate, x.fine, 0, group)  # noqa: E731, B023
            guarded(f"selected blocks alone, group {group}, {name}", count, d, moved, run, base)
            run = lambda: selected_attention_triton(x.q, x.k, x.v, *args, s, group)  # noqa: E731, B023
            guarded(f"selected attention, group {group}, {name}", count + dense, d, moved, run, base)


def prepare(model: Model, frames: int, graph: bool) -> None:
    """Pooling, normalisation and rotation of q, k, v: bound by memory."""
    qkv = rand(frames, model.length, 3, model.heads, model.width)
    weight = torch.ones(model.width, device=DEVICE)
    tables = [torch.randn(1, n, 1, model.width, device=DEVICE) for n in [model.length] * 2 + [model.blocks] * 2]
    run = lambda: prepare_tokens_triton(qkv, weight, weight, *tables, model.specials)  # noqa: E731
    guarded("pool, normalise, rotate q, k, v", 0, model.width, 33 * size(qkv) // 16, run, graph=graph)


def step(model: Model) -> None:
    """One new frame against the memory, per layer; the lists of visible frames are made once for all layers."""
    resident = model.window + model.anchors + 1
    known = resident + model.bank
    words = f"{resident} resident, {model.bank} in the bank, {model.specials} special tokens"
    header(f"{model.name}, one new view: {words} (CUDA graph)")
    h, d, g, s, length = model.heads, model.width, model.blocks, model.specials, model.length
    x = Tokens(model, 1, resident, known)
    pairs = h * g * known * g
    whole, pooled = size(x.q, x.q, x.k, x.v), size(x.pooled[0], *x.pooled)
    run = lambda: flash(x.q, x.k, x.v)  # noqa: E731
    base = guarded("dense against all resident, flash", h * length**2 * resident, d, whole, run, graph=True)
    guarded("pooled tokens, flash", pairs, d, pooled, lambda: flash(*x.pooled), base, graph=True)
    run = lambda: coarse_attention_triton(*x.pooled, x.coarse, x.fine, model.top_k)  # noqa: E731
    guarded("coarse + top-k", pairs, d, pooled, run, base, graph=True)
    index = run()[1]
    q5, k5, v5 = (y.unflatten(2, (n, length)) for y, n in ((x.q, 1), (x.k, resident), (x.v, resident)))
    p5 = [y.unflatten(2, (-1, g)) for y in x.pooled]
    run = lambda: frame_attention_triton(*p5, x.coarse)  # noqa: E731
    guarded("of which the attention", pairs, d, pooled, run, base, graph=True)
    if s:
        run = lambda: frame_attention_triton(q5[:, :, :, :s], k5, v5, x.fine)  # noqa: E731
        guarded("special queries, all keys", h * s * resident * length, d, size(x.k, x.v), run, base, graph=True)
    count = h * (16 * g * (16 * index.shape[-1] + s * resident) + s * resident * length)
    run = lambda: selected_attention_triton(x.q, x.k, x.v, index, x.compressed, x.gate, x.fine, s)  # noqa: E731
    guarded("selected attention, with special queries", count, d, whole + size(index, x.gate), run, base, graph=True)
    tokens = [attention.Tokens(y, z, x.gate) for y, z in zip((x.q, x.k, x.v), x.pooled)]
    run = lambda: attention.speed3r(*tokens, x.fine, x.coarse, s, model.top_k)  # noqa: E731
    moved = whole + pooled + size(x.gate)
    guarded("both, special queries beside the choice", pairs + count, d, moved, run, base, graph=True)
    prepare(model, 1, graph=True)

    def lists() -> None:
        for visible, rows in ((x.coarse, g), (x.fine, s))[: 2 if s else 1]:
            list_frames(visible.table, rows, 64)

    guarded("lists of visible frames, once a step", 0, d, 0, lists, graph=True)


def backward(model: Model, views: int) -> None:
    """Gradients when all frames see all frames; 2.5 times the operations of the forward pass."""
    header(f"{model.name}, {views} views at once, backward")
    h, d, g, s, length = model.heads, model.width, model.blocks, model.specials, model.length
    with torch.inference_mode(False), torch.enable_grad():
        x = Tokens(model, views, views, views)

        def timed(name: str, pairs: float, run: Callable[..., object], inputs: list[Tensor], base: float = 0) -> float:
            inputs = [y.detach().requires_grad_() for y in inputs]
            out = run(*inputs)
            out = out[0] if isinstance(out, tuple) else out
            grad = torch.randn_like(out)
            step = lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)  # noqa: E731
            return guarded(name, 2.5 * pairs, d, 2 * size(out, *inputs), step, base)

        tokens, pairs = [x.q, x.k, x.v], h * (views * length) ** 2
        base = timed("dense, flash", pairs, flash, tokens)
        frames = [y.unflatten(2, (views, length)) for y in tokens]
        timed("dense, frames kernel", pairs, lambda *y: FrameAttention.apply(*y, x.fine), frames, base)
        run = lambda *y: CoarseAttention.apply(*y, x.coarse, x.fine, model.top_k, 1)  # noqa: E731
        timed("coarse", h * (views * g) ** 2, run, x.pooled, base)
        index = coarse_attention_triton(*x.pooled, x.coarse, x.fine, model.top_k)[1]
        pairs = h * views * (16 * g * (16 * index.shape[-1] + s * views) + s * views * length)
        run = lambda q, k, v, c, w: SelectedAttention.apply(q, k, v, index, c, w, x.fine, s, 1)  # noqa: E731
        timed("selected attention", pairs, run, [*tokens, x.compressed, x.gate], base)


@dataclass
class Pass:
    """Work bound by memory: the bytes it must move, the kernel (given tile sizes or None), and plain torch."""

    name: str
    moved: int
    kernel: Callable[[dict[str, int] | None], object]
    eager: Callable[[], object]
    sizes: list[dict[str, int]]


def differentiate(reference: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> Callable[[], object]:
    """The backward pass of a reference by autograd; its forward pass runs at the first call and is kept."""

    @functools.cache
    def graph() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = [x for x in reference(*leaves) if x.requires_grad]
        return out, leaves, [torch.randn_like(x) for x in out]

    def run() -> object:
        with torch.inference_mode(False), torch.enable_grad():
            out, leaves, grads = graph()
            return torch.autograd.grad(out, leaves, grads, retain_graph=True)

    return run


def passes(model: Model, views: int) -> list[Pass]:
    """What one frame block and one global block do besides matrix products and attention."""
    h, d, s, length, channels = model.heads, model.width, model.specials, model.length, model.heads * model.width
    with torch.inference_mode(False):
        qkv = rand(views, length, 3, h, d)
        norms = [torch.ones(d, device=DEVICE) for _ in range(2)]
        tables = [torch.randn(1, n, 1, d, device=DEVICE) for n in [length] * 2 + [model.blocks] * 2]
        x = torch.randn(views, length, channels, device=DEVICE)
        branch = rand(views, length, channels)
        affine = [torch.ones(channels, device=DEVICE) for _ in range(2)]
        wide = rand(views, length, 4 * channels)
    fine = [y.transpose(1, 2) for y in rand(3, views, length, h, d)]
    pooled = list(rand(3, views, h, model.blocks, d))
    grad_x = torch.randn_like(x)
    none = (None, None)
    heads = [{"HEADS": n, "num_warps": w} for n in (1, 2, 4, 8) if h % n == 0 for w in (1, 2, 4, 8)]
    columns = 1 << (channels - 1).bit_length()
    rows = [{"ROWS": r, "COLUMNS": columns, "num_warps": w} for r in (1, 2, 4, 8) for w in (1, 2, 4, 8)]

    def norm_sum(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm_reference(x, branch, weight, bias, 1e-6, DTYPE)

    of_qkv = [qkv, *norms]
    return [
        Pass(
            "norm and rotation, in place",
            4 * size(qkv) // 3,
            lambda n: normalise_and_rotate_triton(*of_qkv, *tables[:2], out=qkv, sizes=n),
            lambda: normalise_and_rotate_reference(*of_qkv, *tables[:2]),
            heads,
        ),
        Pass(
            "norm and rotation, backward",
            8 * size(qkv) // 3,
            lambda n: prepare_backward(*of_qkv, (*tables[:2], *none), fine, length, 1e-6, n),
            differentiate(lambda *y: normalise_and_rotate_reference(*y, *tables[:2]), of_qkv),
            heads,
        ),
        Pass(
            "pooling, norm and rotation",
            33 * size(qkv) // 16,
            lambda n: prepare_tokens_triton(*of_qkv, *tables, s, sizes=n),
            lambda: prepare_tokens_reference(*of_qkv, *tables, s),
            heads,
        ),
        Pass(
            "pooling, norm and rotation, backward",
            131 * size(qkv) // 48,
            lambda n: prepare_backward(*of_qkv, tables, [*fine, *pooled], s, 1e-6, n),
            differentiate(lambda *y: prepare_tokens_reference(*y, *tables, s), of_qkv),
            heads,
        ),
        Pass(
            "sum and layer norm",
            2 * size(x, branch),
            lambda n: add_norm_triton(x, branch, *affine, 1e-6, DTYPE, sizes=n),
            lambda: norm_sum(x, branch, *affine),
            rows,
        ),
        Pass(
            "sum and layer norm, backward",
            size(x, x, x, branch, branch),
            lambda n: add_norm_backward(x, None, None, affine[0], 1e-6, grad_x, branch, branch.dtype, n),
            differentiate(norm_sum, [x, branch, *affine]),
            rows,
        ),
        Pass(
            "layer norm alone",
            size(x, branch),
            lambda n: add_norm_triton(x, None, *affine, 1e-6, DTYPE, sizes=n),
            lambda: add_norm_reference(x, None, *affine, 1e-6, DTYPE),
            rows,
        ),
        Pass("GELU, in plain torch", 2 * size(wide), lambda n: F.gelu(wide), lambda: F.gelu(wide), []),
    ]


def time_passes(model: Model, views: int, tuned: bool) -> None:
    """Each pass beside plain torch, or at all tile sizes. A single view is timed in a CUDA graph."""
    print(f"\n### {model.name}, {views} views: passes between matrix products\n")
    print("| work | ms | TB/s | of a copy | plain torch, ms | times |\n| --- | --- | --- | --- | --- | --- |")

    def timed(run: Callable[[], object]) -> float:
        try:
            return graph_milliseconds(run) if views == 1 else milliseconds(run)
        except Exception:
            traceback.print_exc(limit=-3)
            return float("nan")

    for work in passes(model, views):
        eager = timed(work.eager) if not tuned else float("nan")
        del work.eager  # and with it what its backward pass has kept
        if CUDA:
            torch.cuda.empty_cache()
        for sizes in work.sizes if tuned else [None]:
            ms = timed(lambda: work.kernel(sizes))  # noqa: B023
            share = f"{100 * work.moved / ms / ceilings()[1]:.0f} %"
            line(f"{work.name} {sizes or ''}".strip(), ms, work.moved / ms / 1e9, share, eager, eager / ms)


@dataclass(frozen=True)
class Trial:
    """One candidate of a sweep: a part of a layer at a size (0 views: one new view), and what it is called with."""

    views: int
    part: str
    tile: int = 1
    tuning: tuple[tuple[str, int], ...] = ()
    splits: int | None = None
    model: Model = PI3

    @property
    def sizes(self) -> dict[str, int] | None:
        """Arguments of the launch; None for the defaults."""
        return dict(self.tuning) or None

    def __str__(self) -> str:
        words = [f"tile {self.tile}"] if self.part in ("attention", "choice") else []
        words += [f"{key} {value}" for key, value in self.tuning if value is not None] + (
            [f"splits {self.splits}"] if self.splits else []
        )
        return ", ".join(words) or "defaults"


def candidates() -> list[Trial]:
    """Everything that a sweep times."""
    trials = []

    def sizes(bm: int, bn: int, warps: int, stages: int, registers: int | None = None) -> tuple[tuple[str, int], ...]:
        return ("BM", bm), ("BN", bn), ("num_warps", warps), ("num_stages", stages), ("maxnreg", registers)

    def steps(blocks: int, warps: int, stages: int) -> tuple[tuple[str, int], ...]:
        return ("STEP", blocks), ("num_warps", warps), ("num_stages", stages)

    tiles = {0: (1, 2, 4, 8), 32: (1, 2, 4, 8), 128: (4, 8, 16), 512: (8, 16), 1024: (16, 32)}
    for views, chosen in tiles.items():
        for tile in chosen:
            shapes = [sizes(64, 64, 4, 3), sizes(64, 64, 4, 5), sizes(64, 128, 4, 2)]
            shapes += [sizes(64, 64, 4, 3, 168)] if views == 0 else [sizes(128, 64, 8, 3), sizes(128, 64, 4, 3)]
            for shape, splits in itertools.product(shapes, (8, 16, 24, 32) if views == 0 else (None,)):
                trials.append(Trial(views, "attention", tile, shape, splits))
            trials.append(Trial(views, "choice", tile))
    bare = replace(PI3, specials=0)
    for blocks, warps, stages in [
        (1, 1, 3), (1, 1, 5), (2, 1, 3), (2, 1, 4), (2, 1, 5), (4, 1, 2), (4, 1, 3), (4, 2, 3), (8, 2, 2), (8, 4, 2),
    ]:  # fmt: skip
        trials.append(Trial(0, "selected", tuning=steps(blocks, warps, stages)))
        trials += [Trial(views, "selected", tuning=steps(blocks, warps, stages), model=bare) for views in (0, 32)]
    for shape in (
        sizes(16, 64, 1, 3), sizes(16, 64, 1, 5), sizes(16, 128, 1, 3), sizes(16, 128, 2, 3), sizes(16, 128, 4, 3),
        sizes(16, 256, 4, 3),
    ):  # fmt: skip
        trials += [Trial(0, "special queries", tuning=shape, splits=splits) for splits in (16, 32, 64)]
    return trials + [Trial(0, "whole layer", model=model) for model in (PI3, bare)]


@functools.lru_cache(maxsize=1)
def inputs(model: Model, views: int, pooled: bool) -> tuple[Tokens | None, list[Tensor], Visible, Visible]:
    """Tokens, or only the pooled ones of few heads, and what they see."""
    frames, resident = views or 1, views or model.window + model.anchors + 1
    known = views or resident + model.bank
    x = None if pooled else Tokens(model, frames, resident, known)
    heads = model.heads if views <= 128 else 2
    tokens = [rand(1, heads, n, model.blocks, model.width) for n in (frames, known, known)] if pooled else []
    tables = [Visible(torch.ones(1, frames, n, dtype=torch.bool, device=DEVICE)) for n in (known, resident)]
    return x, tokens, *tables


def bound(trial: Trial) -> Callable[[], object]:
    """The call to time."""
    model, sizes = trial.model, trial.sizes
    pooled = trial.part in ("attention", "choice")
    x, tokens, coarse, fine = inputs(model, trial.views, pooled)
    if pooled:
        (q, k, v), frames = tokens, fine.table.shape[1]
        rows, width = frames * model.blocks, fine.table.shape[2] * tiles_per_frame(model.blocks, trial.tile)
        maxima = torch.empty(1, q.shape[1], rows, width, dtype=torch.float32, device=DEVICE)
        attend = functools.partial(frame_attention_triton, q, k, v, coarse, maxima=(maxima, trial.tile), join=False)
        if trial.part == "attention":
            return lambda: attend(splits=trial.splits, sizes=sizes)
        index = torch.empty(1, q.shape[1], rows, model.top_k, dtype=torch.int32, device=DEVICE)
        shares = attend(splits=16 if trial.views == 0 else 1)
        rest = index, trial.tile, *shares, torch.empty_like(q)
        return lambda: select(maxima, q, k, coarse.table, fine.table, *rest)
    tokens = x.q, x.k, x.v
    if trial.part == "special queries":
        q, k, v = (y.unflatten(2, (-1, model.length)) for y in tokens)
        special = q[:, :, :, : model.specials], k, v, fine
        return lambda: frame_attention_triton(*special, splits=trial.splits, sizes=sizes)
    if trial.part == "whole layer":
        given = [attention.Tokens(y, z, x.gate) for y, z in zip(tokens, x.pooled)]
        return lambda: attention.speed3r(*given, x.fine, x.coarse, model.specials, model.top_k)
    index = coarse_attention_triton(*x.pooled, x.coarse, x.fine, model.top_k)[1]
    rest = index, x.compressed, x.gate, x.fine, model.specials
    begun = begin(*tokens, x.fine, model.specials)
    begun.beside.join()
    begun = replace(begun, beside=Beside(x.q.device, False))  # is there already
    return lambda: attend_to_selected(*tokens, *rest, sizes=sizes, begun=begun)


@torch.inference_mode()
def compile_trials(trials: list[Trial]) -> None:
    """Run each once, so that Triton's cache on the disk has it."""
    for trial in trials:
        try:
            bound(trial)()
        except Exception:  # the sweep itself says so
            pass


def sweep() -> None:
    """Times of tile sizes, warps, stages and shares; best first, per part and size."""
    trials = candidates() if CUDA else [
        Trial(0, "attention", 2, (("BM", 16), ("BN", 16), ("num_warps", 1), ("num_stages", 1)), 2, TINY),
        Trial(2, "choice", 2, model=TINY),
        Trial(0, "selected", tuning=(("STEP", 1), ("num_warps", 1), ("num_stages", 1)), model=TINY),
        Trial(0, "special queries", model=TINY),
        Trial(0, "whole layer", model=TINY),
    ]  # fmt: skip
    start = time.perf_counter()
    if CUDA:  # the compiler is what takes long
        workers = min(14, os.cpu_count() or 1)
        small = [
            replace(trial, views=min(trial.views, 128)) if trial.part == "attention" else trial for trial in trials
        ]
        distinct = list({replace(trial, splits=trial.splits and 16): None for trial in small})
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.map(compile_trials, [distinct[i::workers] for i in range(workers)])
        print(f"compiled in {time.perf_counter() - start:.0f} s")
    times: dict[tuple[str, int, int], list[tuple[float, Trial]]] = {}
    for trial in trials:
        try:
            run = bound(trial)
            ms = graph_milliseconds(run) if trial.views == 0 else milliseconds(run, 0.05)
        except Exception as e:
            print(f"{trial.views} views, {trial.part}, {trial}: {type(e).__name__} {str(e).splitlines()[0][:150]}")
            continue
        key = trial.part, trial.views, trial.model.specials
        times.setdefault(key, []).append((ms, trial))
    for (part, views, specials), results in times.items():
        count = f"{views} views" if views else "one new view"
        print(f"\n### {part}, {count}, {specials} special tokens\n\n| | ms |\n| --- | --- |")
        for ms, trial in sorted(results, key=lambda pair: pair[0])[:12]:
            line(trial, ms)
    print("\n### coarse attention and choice by tile, each at its best, ms\n\n| | attention | choice | both |")
    print("| --- | --- | --- | --- |")
    for views, tile in dict.fromkeys((trial.views, trial.tile) for trial in trials if trial.part == "choice"):
        best = [
            min(
                (ms for ms, trial in times.get((part, views, trials[0].model.specials), []) if trial.tile == tile),
                default=math.nan,
            )
            for part in ("attention", "choice")
        ]
        line(f"{views or 'one new'} views, tile {tile}", *best, sum(best))
    print(f"\n{time.perf_counter() - start:.0f} s")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passes", action="store_true", help="only the passes between matrix products")
    parser.add_argument("--sweep", action="store_true", help="try tile sizes, warps, stages and shares instead")
    parser.add_argument("--views", type=int, nargs="*", default=[32, 128, 512, 1024])
    parser.add_argument("--dense-up-to", type=int, default=128, help="views up to which dense attention is timed")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name() if CUDA else 'interpreter'}, torch {torch.__version__}")
    operations, moved = ceilings()
    print(f"matrix product {operations / 1e9:.0f} TFLOP/s, copy {moved / 1e9:.2f} TB/s")
    if args.passes:
        for model, counts in ((PI3, (1, 32, 1024)), (COMPACT, (1, 48))) if CUDA else ((TINY, (1, 2)),):
            for views in counts[: 2 if args.sweep else None]:
                time_passes(model, views, args.sweep)
        return
    if args.sweep:
        sweep()
        return
    step(PI3 if CUDA else TINY)
    step(replace(PI3 if CUDA else TINY, specials=0))
    if CUDA:
        step(COMPACT)
        parallel(COMPACT, 48, 48)
        prepare(COMPACT, 48, graph=False)
        for views in (12, 48):
            backward(COMPACT, views)
    backward(PI3 if CUDA else TINY, 32 if CUDA else 2)
    for views in args.views if CUDA else [2]:
        parallel(PI3 if CUDA else TINY, views, args.dense_up_to)
        prepare(PI3 if CUDA else TINY, views, graph=False)
        if CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
