"""Correctness of the attention kernels at real sizes on the GPU; exits non-zero on any miss.

    python benchmarks/check_kernels.py

Every case draws fresh random inputs, fills what nobody sees and all free memory with NaN, runs the kernels twice (the two
results must agree bit for bit) and compares with the references in float64 on the same rounded inputs, at some random
query frames and heads where the whole does not fit. Columns: `relative` is |out - ref| / |ref|; `storage` is the same of
the reference itself rounded to the output's type, which no kernel can beat (bf16: 1.7e-3, so that the 1e-3 asked for can
only hold of the terms that a weighted sum adds up); `of terms` divides |out - ref| by the same attention of absolute
values. Limits: float32 1e-5 relative; 16 bits twice `storage`, room for the rounding of the softmax weights, which the
flash backend rounds likewise (its own error stands below the table), and four times it for gradients, to which the rounded
output and the rounded gradient of the scores add; their row is the worst of all inputs'.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.kernels import frames as frames_module
from speed3r_ros.kernels.coarse import (
    CoarseAttention,
    coarse_attention_reference,
    coarse_attention_triton,
    group_queries,
)
from speed3r_ros.kernels.frames import (
    FrameAttention,
    Visible,
    frame_attention_reference,
    frame_attention_triton,
)
from speed3r_ros.kernels.qkv import (
    NormaliseAndRotate,
    PrepareTokens,
    Slot,
    normalise_and_rotate_reference,
    normalise_and_rotate_triton,
    prepare_backward,
    prepare_tokens_reference,
    prepare_tokens_triton,
)
from speed3r_ros.kernels.residual import (
    AddNorm,
    add_norm_reference,
    add_norm_triton,
    add_reference,
    add_triton,
    sizes_of,
)
from speed3r_ros.kernels.selected import (
    SelectedAttention,
    begin,
    selected_attention,
    selected_attention_reference,
    selected_attention_triton,
)
from speed3r_ros.model.attention import Tokens, speed3r
from speed3r_ros.model.network import linear_gelu

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Case:
    """Sizes by the shape letters of the kernels; rule: which frames see which."""

    name: str
    rule: str = "random"
    batch: int = 1
    heads: int = 4
    frames: int = 3
    resident: int = 3
    banked: int = 0
    blocks: int = 5
    specials: int = 3
    width: int = 64
    top_k: int = 4
    group: int = 1

    @property
    def length(self) -> int:
        """Tokens per frame."""
        return self.specials + 16 * self.blocks

    def tables(self) -> tuple[Tensor, Tensor]:
        """fine (B, T, N) and coarse (B, T, N + banked) bool."""
        t, n = self.frames, self.resident
        if self.rule == "all":
            fine = torch.ones(1, t, n, dtype=torch.bool)
        elif self.rule == "causal":
            fine = torch.ones(1, t, n, dtype=torch.bool).tril()
        elif self.rule == "self":
            fine = torch.eye(t, n, dtype=torch.bool)[None]
        elif self.rule == "window":
            i, j = torch.arange(t)[:, None], torch.arange(n)
            fine = ((j <= i) & ((i - j < 8) | (j < 2)))[None]
        else:
            fine = torch.rand(self.batch, t, n) < 0.6
            fine[..., 0] = True
            if n > 2:
                fine[..., 1] = False
        bank = torch.rand(len(fine), t, self.banked) < 0.5
        return fine.to(DEVICE), torch.cat([fine, bank], 2).to(DEVICE)


CASES = [
    Case("tails", frames=3, resident=5, blocks=5, top_k=3),
    Case("one block", "all", blocks=1, specials=1, top_k=7),
    Case("K >= blocks", frames=2, resident=4, blocks=3, top_k=100),
    Case("one frame", "all", frames=1, resident=1, blocks=12, top_k=5),
    Case("see only themselves", "self", frames=9, resident=9, blocks=12, top_k=32),
    Case("bank", frames=2, resident=6, banked=11, blocks=12, top_k=9),
    Case("two sequences", batch=2, frames=5, resident=7, banked=3, blocks=7, top_k=13),
    Case("no special tokens", frames=3, resident=4, blocks=6, specials=0),
    Case("window", "window", frames=40, resident=40, blocks=12, top_k=32),
    Case("groups of 4", frames=4, resident=8, blocks=63, specials=5, top_k=32, group=4),
    Case("groups of 2, K 33", "causal", frames=6, resident=6, blocks=13, top_k=33, group=2),
    Case("width 16", frames=5, resident=9, blocks=9, width=16, top_k=6),
    Case("width 128", frames=3, resident=5, blocks=9, width=128, top_k=12),
    Case("K 128", "causal", frames=8, resident=8, blocks=63, specials=5, top_k=128),
    Case("compact, 12 views", "causal", heads=6, frames=12, resident=12, blocks=12, specials=4, top_k=32),
    Case("compact, a step", "all", heads=6, frames=1, resident=11, banked=32, blocks=12, specials=4, top_k=32),
    Case("Pi3 size, 32 views", "all", heads=16, frames=32, resident=32, blocks=63, specials=5, top_k=32),
    Case("Pi3 size, causal", "causal", heads=16, frames=32, resident=32, blocks=63, specials=5, top_k=32, group=4),
    Case("Pi3 size, a step", "random", heads=16, frames=1, resident=25, banked=256, blocks=63, specials=5, top_k=32),
    Case(
        "Pi3 size, a step, no special tokens",
        heads=16,
        frames=1,
        resident=25,
        banked=256,
        blocks=63,
        specials=0,
        top_k=32,
    ),
    Case("Pi3 size, first step", "all", heads=16, frames=1, resident=1, banked=256, blocks=63, specials=5, top_k=128),
    Case("a step, groups of 2", frames=1, resident=9, banked=5, blocks=13, specials=1, top_k=6, group=2),
    Case("Pi3 size, 160 views", heads=2, frames=12, resident=160, blocks=63, specials=5, top_k=32),
    Case("Pi3 size, K 200", heads=1, frames=6, resident=400, banked=9, blocks=63, specials=5, top_k=200),
    Case("1000 views, 63 blocks", heads=1, frames=2, resident=1000, blocks=63, specials=1, width=32, top_k=32),
    Case("1000 views", "all", heads=2, frames=1000, resident=1000, blocks=4, specials=1, width=16, top_k=32),
    Case("1000 views, causal", "causal", heads=2, frames=1000, resident=1000, blocks=3, specials=2, width=32, top_k=20),
]
STEPS = [
    Case("CUDA graph", heads=6, frames=1, resident=11, banked=32, blocks=12, specials=4, top_k=32),
    Case("CUDA graph, Pi3 size", heads=16, frames=1, resident=25, banked=256, blocks=63, specials=5, top_k=32),
    Case("CUDA graph, no special tokens", heads=4, frames=1, resident=5, banked=9, blocks=12, specials=0, top_k=7),
]
WIDE = Case("Pi3 size, wide", heads=16, blocks=63, specials=5)
TINY = [
    Case("tails", heads=2, frames=2, resident=3, blocks=2, specials=2, width=16, top_k=3),
    Case("bank, groups", heads=1, frames=1, resident=3, banked=2, blocks=3, specials=1, width=16, top_k=2, group=2),
]


def poison() -> None:
    """Leave NaN in the memory that the next allocations will get."""
    if CUDA:
        for size in (2**20, 2**24, 2**28):
            torch.full((size,), torch.nan, device=DEVICE)


def draw(heads: int, batch: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random (B, H, rows, D), a strided view of a buffer that otherwise holds NaN."""
    buffer = torch.full((batch, heads + 1, rows + 3, width), torch.nan, dtype=dtype, device=DEVICE)
    view = buffer[:, 1:, 3:]
    view.copy_(torch.randn(view.shape, device=DEVICE))
    return view


def hide(seen: Tensor, rows: int, *tensors: Tensor) -> None:
    """NaN into the rows of frames that nobody sees. seen: (B or 1, frames)."""
    hidden = ~seen.repeat_interleave(rows, 1)
    for x in tensors:
        for i in range(len(x)):
            x[i, :, hidden[i % len(hidden)]] = torch.nan


@dataclass
class Row:
    """One line of the table."""

    case: str
    kernel: str
    dtype: torch.dtype
    relative: float
    terms: float
    storage: float
    note: str = ""
    failed: bool = False

    def __str__(self) -> str:
        verdict = "**MISS**" if self.failed else "ok"
        return (
            f"| {self.case} | {self.kernel} | {NAMES[self.dtype]} | {self.relative:.1e} | {self.terms:.1e} |"
            f" {self.storage:.1e} | {verdict} {self.note} |"
        )


def compare(case: str, kernel: str, dtype: torch.dtype, out: Tensor, ref: Tensor, terms: Tensor, equal: bool) -> Row:
    """Judge an output by its float64 reference and the same attention of absolute values."""
    norm = lambda x: x.double().norm().item() or 1.0  # noqa: E731
    difference = (out.double() - ref).norm().item()
    relative, of_terms = difference / norm(ref), difference / norm(terms)
    storage = (ref.to(dtype).double() - ref).norm().item() / norm(ref)
    if dtype == torch.float32:
        good = relative < 1e-5
    else:
        good = relative <= (4 if "backward" in kernel else 2) * storage
    note = "" if equal else "differs between runs"
    return Row(case, kernel, dtype, relative, of_terms, storage, note, not (good and equal))


def sample(case: Case) -> tuple[Tensor, Tensor]:
    """Query frames and heads to compare at: few enough for float64 scores of all their keys."""
    rows = case.length * case.resident * case.length
    count = max(1, min(case.frames, 10**8 // (rows * case.batch)))
    heads = max(1, min(case.heads, 10**8 // (rows * case.batch * count)))
    frames = torch.cat([torch.tensor([case.frames - 1]), torch.randperm(case.frames - 1)[: count - 1]]).sort().values
    return frames.to(DEVICE), torch.randperm(case.heads)[:heads].sort().values.to(DEVICE)


def pick(x: Tensor, frames: Tensor, heads: Tensor, total: int) -> Tensor:
    """The sampled query frames and heads of (B, H, total * rows, ...)."""
    return x[:, heads].unflatten(2, (total, -1))[:, :, frames].flatten(2, 3)


def check_selection(case: Case, q: Tensor, k: Tensor, index: Tensor, visible: Tensor) -> str:
    """What is wrong with a choice, in words. q: (B, H, T, rows, D), k: (B, H, N, G, D) in float64, of the sample."""
    scores = torch.einsum("bhtxd,bhngd->bhtxng", q, k.nan_to_num())
    scores = scores.masked_fill(~visible[:, None, :, None, :, None], -torch.inf).flatten(4).flatten(2, 3)
    taken = index >= 0
    due = (scores > -torch.inf).sum(-1).clamp(max=index.shape[-1])
    if not torch.equal(taken.sum(-1), due):
        return "wrong count"
    if not (taken[..., 1:] <= taken[..., :-1]).all():
        return "gaps"
    if ((index[..., 1:] <= index[..., :-1]) & taken[..., 1:]).any():
        return "not rising"
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen = torch.cat([chosen, chosen[..., :1]], -1).scatter_(-1, index.long() % (scores.shape[-1] + 1), True)[
        ..., :-1
    ]
    if (scores[chosen] == -torch.inf).any():
        return "invisible block"
    worst = scores.masked_fill(~chosen, torch.inf).amin(-1)
    best = scores.masked_fill(chosen, -torch.inf).amax(-1)
    scale = scores.masked_fill(scores == -torch.inf, 0).abs().amax()
    return "not the best" if (best - worst > 1e-5 * scale).any() else ""


def some_shown(fine: Tensor) -> Tensor:
    """Within a table (B or 1, T, N) of visible frames: the first one to all, as in VGGT, and others to some."""
    shown = torch.rand(fine.shape, device=DEVICE) < 0.1
    shown[..., 0] = True
    return fine & shown


def check_attention(case: Case, dtype: torch.dtype) -> Iterator[Row]:
    """Coarse attention, choice and selected attention of one case."""
    t, n, g, s = case.frames, case.resident, case.blocks, case.specials
    fine, coarse = case.tables()
    q, k, v = (draw(case.heads, case.batch, frames * g, case.width, dtype) for frames in (t, *[n + case.banked] * 2))
    hide(coarse.any(1), g, k, v)
    poison()
    (out, index), (again, index_again) = (
        coarse_attention_triton(q, k, v, Visible(coarse), Visible(fine), case.top_k, case.group) for _ in range(2)
    )
    frames, heads = sample(case)
    part = pick(q, frames, heads, t).double()
    ks, vs = k[:, heads].double(), v[:, heads].double()
    args = Visible(coarse[:, frames]), Visible(fine[:, frames]), case.top_k, case.group
    ref = coarse_attention_reference(part, ks, vs, *args)[0]
    terms = coarse_attention_reference(part, ks, vs.abs(), *args)[0]
    equal = torch.equal(out, again) and torch.equal(index, index_again)
    row = compare(case.name, "coarse", dtype, pick(out, frames, heads, t), ref, terms, equal)
    chooser = group_queries(pick(q, frames, heads, t).unflatten(2, (len(frames), g)), case.group).double()
    visible = (fine & coarse[..., :n])[:, frames]
    keys = ks.unflatten(2, (-1, g))[:, :, :n]
    wrong = check_selection(case, chooser, keys, pick(index, frames, heads, t), visible)
    row.note, row.failed = f"{row.note} {wrong}".strip(), row.failed or bool(wrong)
    yield row

    shown = some_shown(fine)
    others = coarse_attention_triton(q, k, v, Visible(coarse), Visible(fine & ~shown), case.top_k, case.group)[1]
    q, k, v = (draw(case.heads, case.batch, count * case.length, case.width, dtype) for count in (t, n, n))
    hide(fine.any(1), case.length, k, v)
    compressed = draw(case.heads, case.batch, t * g, case.width, dtype)
    gate = torch.rand(case.batch, t * case.length, case.heads, 2, device=DEVICE).to(dtype).transpose(1, 2)
    for name, choice, whole in (("selected", index, None), ("selected, shown", others, shown)):
        poison()
        rest = compressed, gate, Visible(fine), s, case.group, None if whole is None else Visible(whole)
        out, again = (selected_attention_triton(q, k, v, choice, *rest) for _ in range(2))
        over = q.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        over = selected_attention_triton(over, k, v, choice, *rest, out=over)  # its result in the queries' place
        equal = torch.equal(out, again) and torch.equal(out, over)
        part = [pick(x, frames, heads, t) for x in (q, choice, compressed, gate)]
        part = [x.double() if x.is_floating_point() else x for x in part]
        ks, vs = k[:, heads].double(), v[:, heads].double()
        rest = part[3], Visible(fine[:, frames]), s, case.group, None if whole is None else Visible(whole[:, frames])
        ref = selected_attention_reference(part[0], ks, vs, part[1], part[2], *rest)
        terms = selected_attention_reference(part[0], ks, vs.abs(), part[1], part[2].abs(), *rest)
        yield compare(case.name, name, dtype, pick(out, frames, heads, t), ref, terms, equal)


def check_frames(case: Case, dtype: torch.dtype) -> Iterator[Row]:
    """Dense attention between whole frames."""
    fine = case.tables()[0]
    q, k, v = (
        draw(case.heads, case.batch, count * case.length, case.width, dtype).unflatten(2, (count, case.length))
        for count in (case.frames, case.resident, case.resident)
    )
    hide(fine.any(1), case.length, k.flatten(2, 3), v.flatten(2, 3))
    poison()
    (out, _), (again, _) = (frame_attention_triton(q, k, v, Visible(fine)) for _ in range(2))
    frames, heads = sample(case)
    part, ks, vs = (x[:, heads].double() for x in (q[:, :, frames], k, v))
    ref = frame_attention_reference(part, ks, vs, Visible(fine[:, frames]))[0]
    terms = frame_attention_reference(part, ks, vs.abs(), Visible(fine[:, frames]))[0]
    yield compare(case.name, "frames", dtype, out[:, heads][:, :, frames], ref, terms, torch.equal(out, again))


def worst(case: Case, kernel: str, dtype: torch.dtype, *results: Sequence[Tensor]) -> Row:
    """The worst of several outputs. results: of two runs of the kernel, and of the reference."""
    rows = [
        compare(case.name, kernel, a.dtype, a, r, r.abs().amax().expand_as(r), torch.equal(a, b))
        for a, b, r in zip(*results)
    ]
    row = max(rows, key=lambda row: (row.failed, row.relative))
    row.dtype = dtype
    return row


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same in float64."""
    return [None if x is None else x.double() for x in tensors]


def check_qkv(case: Case, dtype: torch.dtype) -> Iterator[Row]:
    """Normalisation and rotation, with pooling and without, all kinds of norms, forward and backward."""
    d, count, length, s = case.width, min(case.frames, 16), case.length, case.specials
    qkv = torch.randn(count, length, 3, case.heads, d, device=DEVICE).to(dtype)
    tables = [torch.randn(1, n, 1, d, device=DEVICE) for n in [length] * 2 + [case.blocks] * 2]
    for name, shape, rotated in (("RMS norm", (d,), True), ("layer norm", (2, d), True), ("layer norm", (2, d), False)):
        norms = [torch.ones(shape, device=DEVICE) + 0.2 * torch.randn(shape, device=DEVICE) for _ in range(2)]
        angles = tables if rotated else [None] * 4
        name += "" if rotated else " alone"
        runs: list[tuple[str, Callable[..., tuple[Tensor, ...]], Callable, Callable, list]] = [
            ("pooled qkv", prepare_tokens_triton, PrepareTokens.apply, prepare_tokens_reference, [*angles, s]),
            ("qkv", normalise_and_rotate_triton, NormaliseAndRotate.apply, normalise_and_rotate_reference, angles[:2]),
        ]
        for kernel, run, differentiable, reference, rest in runs:
            poison()
            first, second = (run(qkv, *norms, *rest) for _ in range(2))
            yield worst(case, f"{kernel}, {name}", dtype, first, second, reference(*double(qkv, *norms), *rest))
            weights = [torch.randn(x.shape, device=DEVICE).to(dtype) for x in first]
            poison()
            inputs = [x.detach().requires_grad_() for x in (qkv, *norms)]
            outs = [differentiable(*inputs, *rest) for _ in range(2)]
            first, second = (torch.autograd.grad(out, inputs, weights) for out in outs)
            inputs = [x.detach().requires_grad_() for x in double(qkv, *norms)]
            expected = torch.autograd.grad(reference(*inputs, *rest), inputs, double(*weights))
            yield worst(case, f"{kernel}, {name}, backward", dtype, first, second, expected)
    given = qkv.clone()
    out = normalise_and_rotate_triton(qkv, *norms, *tables[:2])
    again = normalise_and_rotate_triton(given, *norms, *tables[:2], out=given)
    yield worst(
        case, "qkv, in place", dtype, again, out, normalise_and_rotate_reference(*double(qkv, *norms), *tables[:2])
    )
    slot = Slot(
        torch.full((2, case.heads, 3, length, d), torch.nan, dtype=dtype, device=DEVICE),
        torch.full((2, case.heads, 4, case.blocks, d), torch.nan, dtype=dtype, device=DEVICE),
        torch.tensor([1], device=DEVICE),
    )
    out = prepare_tokens_triton(qkv[:1], *norms, *tables, s)
    again = list(prepare_tokens_triton(qkv[:1], *norms, *tables, s, slot))
    for i in (1, 2, 4, 5):
        again[i] = again[i][1:2]
    row = worst(case, "pooled qkv, into a slot", dtype, again, out, [x.double() for x in out])
    if not all(x[:, :, [0, 2]].isnan().all() for x in slot[:2]):
        row.note, row.failed = f"{row.note} other slots written".strip(), True
    yield row


def check_residual(case: Case, dtype: torch.dtype) -> Iterator[Row]:
    """Sum and layer norm, forward and backward; as many channels as the case has, and one less."""
    for channels in (case.heads * case.width, case.heads * case.width - 1):
        shape = min(case.frames, 16), case.length, channels
        x = 1 + 2 * torch.randn(shape, device=DEVICE)
        branch = torch.randn(shape, device=DEVICE).to(dtype)
        weight, bias, gamma = 1 + 0.2 * torch.randn(3, channels, device=DEVICE)
        for name, inputs in (
            ("sum, norm", (x, branch, weight, bias, None)),
            ("scaled sum, norm", (x, branch, weight, bias, gamma)),
            ("norm", (x, None, weight, bias, None)),
        ):

            def call(run: Callable[..., object], out: torch.dtype, *given: Tensor | None) -> tuple[Tensor, ...]:
                """All results that are not inputs."""
                results = run(*given[:4], 1e-6, out, given[4])
                results = (results,) if isinstance(results, Tensor) else results
                return results if given[1] is not None else results[-1:]

            name = f"{name}, {channels}"
            poison()
            first, second = (call(add_norm_triton, dtype, *inputs) for _ in range(2))
            expected = call(add_norm_reference, torch.float64, *double(*inputs))
            yield worst(case, name, dtype, first, second, expected)
            weights = [torch.randn(y.shape, device=DEVICE).to(y.dtype) for y in first]
            poison()
            leaves = [None if y is None else y.detach().requires_grad_() for y in inputs]
            asked = [y for y in leaves if y is not None]
            outs = [call(AddNorm.apply, dtype, *leaves) for _ in range(2)]
            first, second = (torch.autograd.grad(out, asked, weights) for out in outs)
            leaves = [None if y is None else y.detach().requires_grad_() for y in double(*inputs)]
            asked = [y for y in leaves if y is not None]
            out = call(add_norm_reference, torch.float64, *leaves)
            expected = torch.autograd.grad(out, asked, double(*weights))
            yield worst(case, f"{name}, backward", dtype, first, second, expected)
        for factor in (None, gamma):
            poison()
            first, second = add_triton(x, branch, factor), x.clone()
            add_triton(second, branch, factor, out=second)
            name = f"{'' if factor is None else 'scaled '}sum, {channels}"
            yield worst(case, name, dtype, [first], [second], [add_reference(*double(x, branch, factor))])


@torch.inference_mode()
def check_gelu(case: Case, dtype: torch.dtype) -> Iterator[Row]:
    """GELU within the matrix product: in 16 bits no further from the exact one than the exact GELU of rounded sums."""
    channels = case.heads * case.width
    layer = torch.nn.Linear(channels, 4 * channels, device=DEVICE, dtype=dtype)
    x = torch.randn(case.frames, case.length, channels, device=DEVICE).to(dtype)
    exact = F.gelu(F.linear(*double(x, layer.weight, layer.bias)))
    poison()
    row, apart = (
        compare(case.name, "GELU", dtype, run(layer, x), exact, exact.abs(), torch.equal(run(layer, x), run(layer, x)))
        for run in (linear_gelu, lambda layer, x: F.gelu(layer(x)))
    )
    row.note = f"{row.note} apart {apart.relative:.1e}".strip()
    row.failed |= row.relative > apart.relative
    yield row


def check_wide(case: Case, dtype: torch.dtype) -> Iterator[Row]:
    """More than 2^31 values in a tensor: the last frame, forward and backward, against the same frame alone."""
    d, h, length, s = case.width, case.heads, case.length, case.specials
    frames = 2**31 // (length * 3 * h * d) + 2
    qkv = torch.empty(frames, length, 3, h, d, dtype=dtype, device=DEVICE).normal_()
    norms = [1 + 0.2 * torch.randn(d, device=DEVICE) for _ in range(2)]
    tables = [torch.randn(1, n, 1, d, device=DEVICE) for n in [length] * 2 + [case.blocks] * 2]
    for name, run, rest, blocks in (
        ("pooled qkv", prepare_tokens_triton, [*tables, s], s),
        ("qkv", normalise_and_rotate_triton, tables[:2], length),
    ):
        last = [x[-1:].clone() for x in run(qkv, *norms, *rest)]
        alone = run(qkv[-1:].clone(), *norms, *rest)
        yield worst(case, f"{name}, {frames} frames", dtype, last, alone, [x.double() for x in alone])
        grads = list(run(qkv, *norms, *rest))  # any values of this shape
        given = tables if name == "pooled qkv" else [*tables[:2], None, None]
        last = prepare_backward(qkv, *norms, given, grads, blocks, 1e-6)[0][-1:].clone()
        alone = prepare_backward(qkv[-1:].clone(), *norms, given, [x[-1:] for x in grads], blocks, 1e-6)[0]
        del grads
        yield worst(case, f"{name}, {frames} frames, backward", dtype, [last], [alone], [alone.double()])
    x = torch.empty(frames * length, 3 * h * d, dtype=dtype, device=DEVICE).normal_()
    weight, bias = torch.randn(2, x.shape[1], device=DEVICE)
    sizes = sizes_of(len(x), x.shape[1])
    last = [y[-length:].clone() for y in add_norm_triton(x, x, weight, bias, 1e-6, dtype, sizes=sizes)]
    alone = add_norm_triton(x[-length:], x[-length:], weight, bias, 1e-6, dtype, sizes=sizes)
    yield worst(case, f"sum, norm, {len(x)} rows", dtype, last, alone, [y.double() for y in alone])


def gradients(run: Callable[..., object], inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Of the output, or of the first one, times `weight`."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = run(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    return list(torch.autograd.grad(out, inputs, weight.to(out.dtype)))


def check_backward(case: Case, dtype: torch.dtype) -> Iterator[Row]:
    """Gradients of all inputs, in cases small enough for the references' float64 graph."""
    t, n, g, s, h, d = case.frames, case.resident, case.blocks, case.specials, case.heads, case.width
    if case.batch * h * t * n * case.length**2 > 15 * 10**7:
        return
    fine, coarse = case.tables()
    shown, hidden = (Visible(coarse), Visible(fine)), Visible(fine)
    pooled = [draw(h, case.batch, rows * g, d, dtype) for rows in (t, *[n + case.banked] * 2)]
    hide(coarse.any(1), g, *pooled[1:])
    tokens = [draw(h, case.batch, rows * case.length, d, dtype) for rows in (t, n, n)]
    hide(fine.any(1), case.length, *tokens[1:])
    compressed, index = coarse_attention_triton(*pooled, *shown, case.top_k, case.group)
    whole = some_shown(fine)
    others = coarse_attention_triton(*pooled, shown[0], Visible(fine & ~whole), case.top_k, case.group)[1]
    gate = torch.rand(case.batch, t * case.length, h, 2, device=DEVICE).to(dtype).transpose(1, 2)
    selected = SelectedAttention.apply, selected_attention_reference, [*tokens, compressed, gate]

    def choose(run: Callable[..., object]) -> Callable[..., object]:
        return lambda *x: run(*x, *shown, case.top_k, case.group)

    def select(index: Tensor, whole: Visible | None) -> Callable[..., object]:
        return lambda run: lambda q, k, v, c, w: run(q, k, v, index, c, w, hidden, s, case.group, whole)

    def attend(run: Callable[..., object]) -> Callable[..., object]:
        return lambda *x: run(*(y.unflatten(2, (-1, case.length)) for y in x), hidden)

    for name, bind, run, reference, inputs in (
        ("coarse", choose, CoarseAttention.apply, coarse_attention_reference, pooled),
        ("selected", select(index, None), *selected),
        ("selected, shown", select(others, Visible(whole)), *selected),
        ("frames", attend, FrameAttention.apply, frame_attention_reference, tokens),
    ):
        weight = torch.randn(inputs[0].shape, device=DEVICE).to(dtype)
        if name == "frames":
            weight = weight.unflatten(2, (-1, case.length))
        poison()
        first, second = (gradients(bind(run), inputs, weight) for _ in range(2))
        clean = [x.double().nan_to_num(0, 0, 0) for x in inputs]
        expected = gradients(bind(reference), clean, weight.double())
        rows = [
            compare(case.name, f"{name}, backward", dtype, a, r, r.abs().amax().expand_as(r), torch.equal(a, b))
            for a, b, r in zip(first, second, expected)
        ]
        yield max(rows, key=lambda row: (row.failed, row.relative))


def check_graph(case: Case, dtype: torch.dtype) -> Iterator[Row]:
    """A step captured in a CUDA graph, replayed under other tables and other contents of the ring buffers."""
    fine, coarse = case.tables()
    q, k, v = (draw(case.heads, 1, n * case.length, case.width, dtype) for n in (1, case.resident, case.resident))
    pooled = [draw(case.heads, 1, n * case.blocks, case.width, dtype) for n in (1, *[case.resident + case.banked] * 2)]
    gate = torch.rand(1, case.heads, case.length, 2, device=DEVICE).to(dtype)

    def step() -> Tensor:  # three layers, of which the last one's special queries are ahead of its choice
        shown = Visible(coarse), Visible(fine)
        tokens = [Tokens(*pair, gate) for pair in zip((q, k, v), pooled)]
        outs = [speed3r(*tokens, shown[1], shown[0], case.specials, case.top_k) for _ in range(2)]
        compressed, index = coarse_attention_triton(*pooled, *shown, case.top_k)
        begun = begin(q, k, v, shown[1], case.specials)
        outs.append(selected_attention(q, k, v, index, compressed, gate, shown[1], case.specials, begun=begun))
        return torch.cat(outs)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for x, y in zip((fine, coarse), case.tables()):
        x.copy_(y)
    for x in (q, k, v, *pooled):
        x.copy_(torch.randn(x.shape, device=DEVICE))
    graph.replay()
    expected = step()
    yield compare(case.name, "step", dtype, out, expected.double(), expected.double(), torch.equal(out, expected))
    shown = Visible(coarse), Visible(fine)
    compressed, index = coarse_attention_triton(*pooled, *shown, case.top_k)
    args = compressed.double(), gate.double(), shown[1], case.specials
    ref = selected_attention_reference(q.double(), k.double(), v.double(), index, *args).expand(3, -1, -1, -1)
    terms = selected_attention_reference(q.double(), k.double(), v.double().abs(), index, args[0].abs(), *args[1:])
    yield compare(case.name, "step, exact", dtype, out, ref, terms.expand(3, -1, -1, -1), True)


def flash_error(dtype: torch.dtype) -> float:
    """Relative error of the flash backend itself, dense, for comparison."""
    q, k, v = (torch.randn(1, 4, 4096, 64, device=DEVICE).to(dtype) for _ in range(3))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    ref = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    return ((out.double() - ref).norm() / ref.norm()).item()


CHECKS: dict[str, Callable[[Case, torch.dtype], Iterator[Row]]] = {
    "attention": check_attention,
    "frames": check_frames,
    "qkv": check_qkv,
    "residual": check_residual,
    "gelu": check_gelu,
    "wide": check_wide,
    "backward": check_backward,
    "graph": check_graph,
}


def work(job: tuple[tuple[str, ...], Case, torch.dtype, int]) -> tuple[list[Row], list[str]]:
    """Rows of one case, and what went wrong. In a process of its own, so that no fault spoils another case."""
    names, case, dtype, seed = job
    torch.manual_seed(seed)
    rows: list[Row] = []
    complaints: list[str] = []
    for name in names:
        try:
            for row in CHECKS[name](case, dtype):
                rows.append(row)
        except Exception as e:
            nan = float("nan")
            last = (str(e).strip().splitlines() or [""])[-1][:150]
            rows.append(Row(case.name, name, dtype, nan, nan, nan, f"{type(e).__name__}: {last}", True))
            complaints.append(f"{case.name}, {name}, {NAMES[dtype]}\n{traceback.format_exc(limit=-4)[-3000:]}")
        if CUDA:
            torch.cuda.empty_cache()
    return rows, complaints


def main() -> int:
    """Run all cases; the number of misses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--kernels", nargs="*", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 2) if CUDA else 0,
        help="processes; 0: none but this one",
    )
    args = parser.parse_args()
    if frames_module.triton is None:
        print("Triton is missing: nothing to check")
        return 1
    print(f"{torch.cuda.get_device_name() if CUDA else 'interpreter'}, torch {torch.__version__}, seed {args.seed}\n")
    print(
        "| case | kernel | type | relative | of terms | storage | verdict |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    dtypes = [torch.float32, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
    jobs = [
        (tuple(name for name in args.kernels if name not in ("graph", "wide")), case, dtype, args.seed + i)
        for i, case in enumerate(CASES if CUDA else TINY)
        for dtype in dtypes
        if args.only in case.name
    ]
    if CUDA:
        jobs += [
            ((name,), case, dtype, args.seed)
            for name, cases in (("graph", STEPS), ("wide", [WIDE]))
            for case in cases
            for dtype in (dtypes if name == "graph" else dtypes[1:])
            if name in args.kernels and args.only in case.name
        ]
    misses, complaints = 0, []
    pool = multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) if args.workers else None
    results = pool.imap(work, jobs) if pool else map(work, jobs)
    for _, case, dtype, _ in jobs:
        try:
            rows, found = results.next(timeout=300) if pool else next(results)
        except multiprocessing.TimeoutError:
            nan = float("nan")
            rows, found = [Row(case.name, "", dtype, nan, nan, nan, "no answer in 300 s", True)], []
        misses += sum(row.failed for row in rows)
        complaints += found
        for row in rows:
            print(row, flush=True)
    if pool:
        pool.terminate()
    for complaint in complaints[:6]:
        print(f"\n{complaint}")
    if CUDA:
        print(f"\nrelative error of the flash backend, dense, bf16: {flash_error(torch.bfloat16):.1e}")
    print(f"\n{misses} misses")
    return misses


if __name__ == "__main__":
    sys.exit(min(main(), 1))
