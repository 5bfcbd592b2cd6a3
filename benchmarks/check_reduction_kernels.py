"""Correctness of token merging, linear attention, FP8 layers and resizing at real sizes on the GPU; exits non-zero on any miss.

    python benchmarks/check_reduction_kernels.py

The table is that of `check_kernels.py`: fresh random inputs, free memory full of NaN, every kernel twice (the results must
agree bit for bit), float64 references on the same rounded inputs. Of `match`, `relative` is by how much the cosine of a
chosen partner misses the best; of `quantise`, the share of numbers that are not the reference's (none may differ). FP8
products accumulate in the matrix units' own precision: their float32 outputs may be off by 1e-3.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from check_kernels import CUDA, DEVICE, NAMES, Row, compare, poison
from torch import Tensor

from speed3r_ros.kernels import fp8
from speed3r_ros.kernels.frames import Visible, triton
from speed3r_ros.kernels.linear_attention import linear_attention_reference, linear_attention_triton
from speed3r_ros.kernels.merging import (
    GROUP,
    match_tokens_reference,
    match_tokens_triton,
    merge_tokens_reference,
    merge_tokens_triton,
    merged_length,
    own_cells,
    take_tokens_triton,
)
from speed3r_ros.kernels.resize import resize_reference, resize_triton

LOW = torch.bfloat16 if CUDA else torch.float16  # the interpreter multiplies no bfloat16
FLOAT = torch.float32


@dataclass(frozen=True)
class Job:
    """One check with its sizes."""

    case: str
    check: str
    sizes: tuple
    dtype: torch.dtype


def jobs() -> list[Job]:
    """All cases, or two tiny ones per check without a GPU."""
    merging = [  # frames, special tokens, patches, ratio, heads, channels
        ("Pi3 size, 32 views, ratio 2", (32, 5, 1008, 2, 16, 1024)),
        ("Pi3 size, 32 views, ratio 4", (32, 5, 1008, 4, 16, 1024)),
        ("Pi3 size, by keys, ratio 3", (32, 5, 1008, 3, 16, 64)),
        ("compact, 48 views, ratio 3", (48, 4, 192, 3, 6, 384)),
        ("1000 views, ratio 4", (1000, 1, 61, 4, 2, 64)),
        ("one view", (1, 5, 1008, 2, 16, 1024)),
        ("one patch", (7, 1, 1, 4, 1, 64)),
        ("ratio above patches, 100 channels", (23, 3, 11, 16, 3, 100)),
        ("ratio 1", (3, 5, 77, 1, 2, 64)),
    ]
    linear = [  # sequences, heads, query frames, rows, key frames, rows, width, rule
        ("Pi3 size, all of 32 views", (1, 16, 1, 32 * 1013, 32, 1013, 64, "all")),
        ("Pi3 size, causal, 32 views", (1, 16, 32, 1013, 32, 1013, 64, "causal")),
        ("Pi3 size, a step", (1, 16, 1, 1013, 25, 1013, 64, "random")),
        ("compact, causal, 48 views", (1, 6, 48, 196, 48, 196, 64, "causal")),
        ("tails, two sequences", (2, 3, 5, 67, 7, 33, 32, "random")),
        ("one token", (1, 2, 1, 1, 1, 1, 16, "all")),
        ("width 128", (1, 2, 3, 130, 3, 1025, 128, "random")),
        ("1000 views", (1, 2, 1000, 20, 1000, 20, 16, "causal")),
    ]
    layers = [  # tokens, inputs, outputs
        ("Pi3 size, 32 views, qkv", (32 * 1013, 1024, 3072)),
        ("Pi3 size, 32 views, fc2", (32 * 1013, 4096, 1024)),
        ("Pi3 size, one view, proj", (1013, 1024, 1024)),
        ("compact, one view, qkv", (196, 384, 1152)),
        ("compact, one view, proj", (196, 384, 384)),
        ("one token", (1, 1024, 3072)),
        ("sizes not of 16", (77, 100, 203)),
        ("eleven outputs", (5, 768, 11)),
    ]
    maps = [  # frames, channels, pixels before and after
        ("VGGT, last fusion", (8, 256, 148, 148, 296, 296)),
        ("VGGT, last features", (8, 128, 296, 296, 518, 518)),
        ("Depth Anything 3 small, first fusion", (3, 64, 18, 14, 36, 27)),
        ("one pixel", (2, 6, 1, 1, 7, 5)),
        ("smaller, 100 channels", (5, 100, 61, 47, 33, 9)),
    ]
    if not CUDA:
        maps = [("tails", (2, 6, 5, 3, 7, 9))]
        merging = [("tails", (5, 2, 7, 3, 2, 40)), ("one patch", (3, 1, 1, 4, 1, 16))]
        linear = [("causal", (1, 2, 3, 5, 3, 7, 16, "causal")), ("step", (2, 1, 1, 3, 4, 18, 32, "random"))]
        layers = [("tails", (7, 40, 19)), ("sizes of 16", (20, 32, 48))]
    groups = (("merging", merging), ("linear", linear), ("layer", layers), ("resize", maps))
    return [Job(name, check, s, dtype) for check, cases in groups for name, s in cases for dtype in (FLOAT, LOW)]


def scattered(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random values, an inner part of a buffer that otherwise holds NaN."""
    buffer = torch.full((shape[0], shape[1] + 1, *shape[2:]), torch.nan, dtype=dtype, device=DEVICE)
    buffer[:, 1:] = torch.randn(shape, device=DEVICE)
    return buffer[:, 1:]


def check_matching(case: str, x: Tensor, sizes: tuple) -> tuple[Row, Tensor]:
    """Whether every partner is a destination of the token's group, and none is more similar."""
    frames, specials, patches, ratio, _, _ = sizes
    length, kept = specials + patches, merged_length(specials + patches, specials, ratio)
    poison()
    rows, again = (match_tokens_triton(x, frames, specials, ratio) for _ in range(2))
    own = own_cells(x, frames, length, specials, ratio)[0].long()
    token = torch.arange(frames * length, device=DEVICE)
    p, t = token % length - specials, token // length
    size = (patches - p // ratio * ratio).clamp(max=ratio)
    fixed = (p < 0) | (p % ratio == t % size)
    note, gap = "", 0.0
    if not torch.equal(rows[0, fixed].long(), own[fixed]):
        note = "a destination moved"
    elif ((rows[0].long() // kept // GROUP != t // GROUP) | (rows[0].long() // kept >= frames)).any():
        note = "a partner of another group"
    elif ((rows[0] % kept < specials) & (p >= 0)).any():
        note = "a special token as a partner"
    else:
        position = torch.zeros(frames * kept, dtype=torch.long, device=DEVICE)
        position[own[fixed]] = token[fixed]
        unit = torch.nn.functional.normalize(x[0].double(), dim=-1)
        for group in torch.randperm(-(-frames // GROUP))[:2].tolist():
            inside = t // GROUP == group
            sources, destinations = token[inside & ~fixed], token[inside & fixed & (p >= 0)]
            for some in sources[torch.randperm(len(sources), device=DEVICE)[:4000]].split(1000) if len(sources) else ():
                best = (unit[some] @ unit[destinations].T).amax(1)
                chosen = (unit[some] * unit[position[rows[0, some].long()]]).sum(1)
                gap = max(gap, (best - chosen).max().item())
    row = Row(case, "match", x.dtype, gap, gap, 0.0, note, bool(note) or gap > 1e-5)
    if not torch.equal(rows, again):
        row.note, row.failed = f"{note} differs between runs".strip(), True
    return row, rows


def check_merging(job: Job) -> Iterator[Row]:
    """Matching, merging and unmerging of one sequence."""
    frames, specials, patches, ratio, heads, channels = job.sizes
    length = specials + patches
    x = scattered(1, frames * length, channels, dtype=job.dtype)
    row, rows = check_matching(job.case, x, job.sizes)
    yield row
    few = min(frames, 2 * GROUP) * length  # the reference stores all similarities of a group
    signs = torch.where(torch.rand(1, 8, min(channels, 64), device=DEVICE) < 0.5, -1.0, 1.0).to(job.dtype)
    signs = signs[:, torch.randint(8, (few,), device=DEVICE)]
    equal = torch.equal(
        match_tokens_triton(signs, few // length, specials, ratio),
        match_tokens_reference(signs.float(), few // length, specials, ratio),
    )
    note = "" if equal else "not the first of equals"
    yield Row(job.case, "match, ties", job.dtype, 0.0, 0.0, 0.0, note, not equal)
    count = frames * merged_length(length, specials, ratio)
    q = scattered(1, heads, frames * length, 64, dtype=job.dtype)
    for name, table in (("merge", rows), ("merge, all into one", torch.full_like(rows, count - 1))):
        poison()
        out, again = (merge_tokens_triton(q, table, count) for _ in range(2))
        ref = merge_tokens_reference(q.double(), table, count)
        terms = merge_tokens_reference(q.double().abs(), table, count)
        yield compare(job.case, name, job.dtype, out, ref, terms, torch.equal(out, again))
    full = take_tokens_triton(out, rows)
    expected = out[:, :, rows[0].long()].double()
    yield compare(job.case, "unmerge", job.dtype, full, expected, expected, torch.equal(full.double(), expected))


def check_linear(job: Job) -> Iterator[Row]:
    """Linear attention, forward and backward."""
    b, h, t, x, n, y, d, rule = job.sizes
    q, k, v = (scattered(b, h, frames, rows, d, dtype=job.dtype) for frames, rows in ((t, x), (n, y), (n, y)))
    visible = torch.ones(1, t, n, dtype=torch.bool, device=DEVICE)
    if rule == "causal":
        visible = visible.tril()
    elif rule == "random":
        visible = torch.rand(b, t, n, device=DEVICE) < 0.6
        visible[..., 0] = True
    grad = torch.randn(q.shape, device=DEVICE).to(job.dtype)

    def run(attend: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        inputs = [z.detach().requires_grad_() for z in inputs]
        out = attend(*inputs, Visible(visible))
        out.backward(grad.to(out.dtype))
        return [out.detach(), *(z.grad for z in inputs)]

    poison()
    results, again = (run(linear_attention_triton, q, k, v) for _ in range(2))
    refs = run(linear_attention_reference, q.double(), k.double(), v.double())
    for name, out, twice, ref in zip(("linear attention", "its dq", "its dk", "its dv"), results, again, refs):
        if n * y == 1 and name in ("its dq", "its dk"):
            continue  # zero, up to rounding
        yield compare(job.case, name, job.dtype, out, ref, ref, torch.equal(out, twice))


def check_layer(job: Job) -> Iterator[Row]:
    """Rounding to E4M3, both products and the straight-through gradients of a linear layer."""
    m, k, n = job.sizes
    x = scattered(m, k, dtype=job.dtype) * torch.exp2(torch.randint(-9, 3, (m, k), device=DEVICE)).to(job.dtype)
    weight = torch.randn(n, k, device=DEVICE).to(job.dtype) * k**-0.5
    bias = torch.randn(n, device=DEVICE).to(job.dtype)
    poison()
    (values, scale), (values_again, scale_again) = (fp8.quantise_rows_triton(x) for _ in range(2))
    expected, expected_scale = fp8.quantise_rows_reference(x)
    wrong = (values.float() != expected.float()).double().mean().item()
    equal = torch.equal(values.float(), values_again.float()) and torch.equal(scale, scale_again)
    note = "" if equal else "differs between runs"
    if not torch.equal(scale, expected_scale):
        note += " scale"
    yield Row(job.case, "quantise", job.dtype, wrong, wrong, 0.0, note, bool(note) or wrong > 0)

    stored = fp8.quantise_rows_triton(weight)
    operands = values, scale, *stored, bias
    ref = fp8.scaled_product_reference(*operands, torch.float64)
    products = [("product, Triton", fp8.scaled_product_triton)]
    if CUDA and fp8.library_fits(k, n, job.dtype):
        products.append(("product, torch", fp8.scaled_product_library))
    for name, product in products:
        poison()
        out, again = (product(*operands, job.dtype) for _ in range(2))
        row = compare(job.case, name, job.dtype, out, ref, ref, torch.equal(out, again))
        if job.dtype == FLOAT:
            row.failed = not (row.relative < 1e-3 and torch.equal(out, again))
        yield row

    def run(layer: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        inputs = [z.detach().requires_grad_() for z in inputs]
        out = layer(*inputs)
        out.backward(grad.to(out.dtype))
        return [out.detach(), *(z.grad for z in inputs)]

    grad = torch.randn(m, n, device=DEVICE).to(job.dtype)
    results = run(fp8.fp8_linear_straight_through_triton, x, weight, bias)
    refs = run(fp8.fp8_linear_straight_through_reference, x.double(), weight.double(), bias.double())
    for name, out, ref in zip(("straight through", "its dx", "its dweight", "its dbias"), results, refs):
        row = compare(job.case, name, job.dtype, out, ref, ref, True)
        if job.dtype == FLOAT and name == "straight through":
            row.failed = not row.relative < 1e-3
        yield row


def check_resize(job: Job) -> Iterator[Row]:
    """Maps with channels last, alone and with an embedding of places."""
    f, channels, h, w, height, width = job.sizes
    x = torch.full((f, h, w + 1, channels), torch.nan, dtype=job.dtype, device=DEVICE)
    x[:, :, :w] = torch.randn(f, h, w, channels, device=DEVICE)
    x = x[:, :, :w].permute(0, 3, 1, 2)
    plane = tuple(torch.randn(n, channels // 2, device=DEVICE) for n in (width, height))
    for name, embedding in (("resize", None), ("resize, places", plane)):
        poison()
        out, again = (resize_triton(x, (height, width), embedding) for _ in range(2))
        high = None if embedding is None else tuple(y.double() for y in embedding)
        ref = resize_reference(x.double(), (height, width), high)
        yield compare(job.case, name, job.dtype, out, ref, ref, torch.equal(out, again))


CHECKS: dict[str, Callable[[Job], Iterator[Row]]] = {
    "merging": check_merging,
    "linear": check_linear,
    "layer": check_layer,
    "resize": check_resize,
}


def work(job: tuple[Job, int]) -> tuple[list[Row], str]:
    """Rows of one case, and what went wrong. In a process of its own, so that no fault spoils another case."""
    job, seed = job
    torch.manual_seed(seed)
    rows: list[Row] = []
    try:
        for row in CHECKS[job.check](job):
            rows.append(row)
    except Exception as e:
        nan = float("nan")
        last = (str(e).strip().splitlines() or [""])[-1][:150]
        rows.append(Row(job.case, job.check, job.dtype, nan, nan, nan, f"{type(e).__name__}: {last}", True))
        return rows, f"{job.case}, {job.check}, {NAMES[job.dtype]}\n{traceback.format_exc(limit=-4)[-3000:]}"
    return rows, ""


def main() -> int:
    """Run all cases; the number of misses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="run the cases whose name or check contains this")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--workers", type=int, default=8 if CUDA else 0, help="processes; 0: none but this one")
    args = parser.parse_args()
    if triton is None:
        print("Triton is missing: nothing to check")
        return 1
    print(f"{torch.cuda.get_device_name() if CUDA else 'interpreter'}, torch {torch.__version__}, seed {args.seed}\n")
    print(
        "| case | kernel | type | relative | of terms | storage | verdict |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    todo = [(job, args.seed + i) for i, job in enumerate(jobs()) if args.only in f"{job.case} {job.check}"]
    pool = multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) if args.workers else None
    results = pool.imap(work, todo) if pool else map(work, todo)
    misses, complaints = 0, []
    for job, _ in todo:
        try:
            rows, complaint = results.next(timeout=300) if pool else next(results)
        except multiprocessing.TimeoutError:
            nan = float("nan")
            rows, complaint = [Row(job.case, job.check, job.dtype, nan, nan, nan, "no answer in 300 s", True)], ""
        misses += sum(row.failed for row in rows)
        complaints += [complaint] if complaint else []
        for row in rows:
            print(row, flush=True)
    if pool:
        pool.terminate()
    for complaint in complaints[:6]:
        print(f"\n{complaint}")
    print(f"\n{misses} misses")
    return misses


if __name__ == "__main__":
    sys.exit(min(main(), 1))
