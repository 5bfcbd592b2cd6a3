"""Fewer queries and fewer keys for dense attention (Spark3R, section 3): token merging, strided pruning; kernels, reference.

Queries: in each group of neighbouring frames every token is matched with the most similar destination token; a destination
and whatever it attracted become one query, their mean; the attention's output of that query goes back to all of them. The
paper leaves open which tokens are destinations. Here the patches of a frame are cut into cells of `ratio` neighbouring ones,
and frame t offers one of each cell, another one than frame t + 1: every frame keeps as many rows, so merged frames are frames
again (`frames.frame_attention` runs on them), every position gets its turn, and nothing but arithmetic says who is who.
Special tokens are never merged.

Keys and values: a temporal stride, no averages.

Shape letters: B sequences, T frames of L = S + P tokens each (S special ones first), groups of G frames, H heads, D head
width, C channels; R = T * (S + ceil(P / ratio)) rows after merging. A row table is int32 (B, T * L): for every token the row
that stands for it. None of this has a gradient: the method is for trained networks.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from speed3r_ros.kernels.frames import on_kernels, tl, triton

GROUP = 20  # frames among which tokens are matched (Spark3R: best partners stand one frame apart, hardly any beyond 20)


def check(x: Tensor, frames: int, specials: int, ratio: int, group: int) -> tuple[int, int]:
    """Tokens L and patches P per frame of the arguments of `match_tokens`; ValueError if they do not fit together."""
    if frames < 1 or x.ndim != 3 or x.shape[1] % frames:
        raise ValueError(f"x {tuple(x.shape)} is not (B, {frames} * L, C)")
    length = x.shape[1] // frames
    if not 0 <= specials < length:
        raise ValueError(f"{specials} special tokens leave no patch of {length} tokens per frame")
    if ratio < 1 or group < 1:
        raise ValueError(f"ratio {ratio} and group {group} must be at least 1")
    return length, length - specials


def merged_length(length: int, specials: int, ratio: int) -> int:
    """Rows that a frame of `length` tokens keeps."""
    return specials + -(-(length - specials) // ratio)


def own_cells(x: Tensor, frames: int, length: int, specials: int, ratio: int) -> Tensor:
    """The row table in which every token goes into its own cell: right for special tokens and destinations."""
    token = torch.arange(length, dtype=torch.int32, device=x.device)
    row = torch.where(token < specials, token, specials + (token - specials).div(ratio, rounding_mode="floor"))
    first = torch.arange(frames, dtype=torch.int32, device=x.device) * merged_length(length, specials, ratio)
    return (first[:, None] + row).flatten().repeat(len(x), 1)


def match_tokens_reference(x: Tensor, frames: int, specials: int, ratio: int, group: int = GROUP) -> Tensor:
    """Plain torch; arguments and results of `match_tokens`."""
    length, patches = check(x, frames, specials, ratio, group)
    rows = own_cells(x, frames, length, specials, ratio)
    p, t = torch.arange(patches, device=x.device), torch.arange(frames, device=x.device)
    size = (patches - p // ratio * ratio).clamp(max=ratio)
    is_destination = (p % ratio == t[:, None] % size).repeat(len(x), 1, 1)
    high = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (frames, length))[:, :, specials:]
    patch_rows = rows.unflatten(1, (frames, length))[:, :, specials:]
    for b in range(len(x)):
        for first in range(0, frames, group):
            part = slice(first, first + group)
            offered = is_destination[b, part]
            source, destination = high[b, part][~offered], high[b, part][offered]
            if len(source) == 0:
                continue
            norm = torch.linalg.vector_norm(destination, dim=-1).clamp(min=1e-12)
            best = (source @ destination.T / norm).argmax(-1)  # of equal ones the first
            patch_rows[b, part][~offered] = patch_rows[b, part][offered][best]
    return rows


def merge_tokens_reference(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """Plain torch; arguments and results of `merge_tokens`."""
    high = torch.promote_types(x.dtype, torch.float32)
    index = rows.long()[:, None, :, None].expand_as(x)
    total = torch.zeros(*x.shape[:2], count, x.shape[3], dtype=high, device=x.device)
    total.scatter_add_(2, index, x.to(high))
    members = torch.zeros(len(x), count, dtype=high, device=x.device)
    members.scatter_add_(1, rows.long(), torch.ones_like(rows, dtype=high))
    return (total / members.clamp(min=1)[:, None, :, None]).to(x.dtype)


def take_tokens_reference(x: Tensor, index: Tensor) -> Tensor:
    """Plain torch; arguments and results of `take_tokens`."""
    b, h, _, d = x.shape
    return x.gather(2, index.long().expand(b, -1)[:, None, :, None].expand(-1, h, -1, d))


if triton is not None:

    @triton.jit
    def _match(
        x,
        scale,
        rows,
        x_b,
        x_n,
        T,
        L,
        S,
        GROUP,
        C,
        RATIO: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BC: tl.constexpr,
        WHOLE: tl.constexpr,
    ):
        """The best destination for each of BM source tokens of a group. WHOLE: all channels fit into one step of BC."""
        P = L - S
        CELLS = tl.cdiv(P, RATIO)
        first = tl.program_id(1) * GROUP
        frames = tl.minimum(GROUP, T - first)
        b = tl.program_id(2).to(tl.int64)
        if tl.program_id(0) * BM >= frames * (P - CELLS):
            return
        x += b * x_b
        scale += b * T * L
        i = tl.program_id(0) * BM + tl.arange(0, BM)
        live = i < frames * (P - CELLS)
        t, i = first + i // (P - CELLS), i % (P - CELLS)
        cell, place = i // (RATIO - 1), i % (RATIO - 1)
        place += (place >= t % tl.minimum(RATIO, P - cell * RATIO)).to(tl.int32)  # skip the cell's destination
        source = t * L + S + cell * RATIO + place
        at = x + source.to(tl.int64)[:, None] * x_n
        c = tl.arange(0, BC)
        if WHOLE:
            token = tl.load(at + c[None, :], mask=live[:, None] & (c < C)[None, :], other=0.0)

        best = tl.full([BM], float("-inf"), tl.float32)
        choice = tl.zeros([BM], tl.int32)
        for start in range(0, frames * CELLS, BN):
            j = start + tl.arange(0, BN)
            known = j < frames * CELLS
            t, cell = first + j // CELLS, j % CELLS
            destination = t * L + S + cell * RATIO + t % tl.minimum(RATIO, P - cell * RATIO)
            to = x + destination.to(tl.int64)[:, None] * x_n
            if WHOLE:
                other = tl.load(to + c[None, :], mask=known[:, None] & (c < C)[None, :], other=0.0)
                s = tl.dot(token, tl.trans(other), input_precision="ieee")
            else:
                s = tl.zeros([BM, BN], tl.float32)
                for k in range(0, C, BC):
                    inside = (k + c < C)[None, :]
                    a = tl.load(at + k + c[None, :], mask=live[:, None] & inside, other=0.0)
                    other = tl.load(to + k + c[None, :], mask=known[:, None] & inside, other=0.0)
                    s = tl.dot(a, tl.trans(other), s, input_precision="ieee")
            s = s * tl.load(scale + destination, mask=known, other=0.0)[None, :]
            s = tl.where(known[None, :], s, float("-inf"))
            score, column = tl.max(s, 1, return_indices=True)  # of equal ones the first
            choice = tl.where(score > best, start + column, choice)
            best = tl.maximum(best, score)
        row = (first + choice // CELLS) * (S + CELLS) + S + choice % CELLS
        tl.store(rows + b * T * L + source, row, mask=live)

    @triton.jit
    def _merge(
        x,
        order,
        start,
        out,
        x_b,
        x_h,
        x_n,
        N,
        HD,
        D: tl.constexpr,
        COLUMNS: tl.constexpr,
        STEP: tl.constexpr,
    ):
        """The mean of the tokens of one row, COLUMNS numbers of all heads at once."""
        row, count = tl.program_id(0), tl.num_programs(0)
        b = tl.program_id(2).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < HD
        x += b * x_b + (column // D).to(tl.int64) * x_h + column % D
        begin = tl.load(start + b * (count + 1) + row)
        end = tl.load(start + b * (count + 1) + row + 1)
        total = tl.zeros([COLUMNS], tl.float32)
        for first in range(begin, end, STEP):
            i = first + tl.arange(0, STEP)
            token = tl.load(order + b * N + i, mask=i < end, other=0).to(tl.int64)
            value = tl.load(x[None, :] + token[:, None] * x_n, mask=(i < end)[:, None] & inside[None, :], other=0.0)
            total += tl.sum(value.to(tl.float32), 0)
        mean = total / tl.maximum(end - begin, 1).to(tl.float32)
        tl.store(out + (b * count + row) * HD + column, mean.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _take(
        x,
        index,
        out,
        x_b,
        x_h,
        x_n,
        index_b,
        M,
        HD,
        D: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """Copy ROWS listed tokens, COLUMNS numbers of all heads at once."""
        b = tl.program_id(2).to(tl.int64)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < M)[:, None] & (column < HD)[None, :]
        token = tl.load(index + b * index_b + row, mask=row < M, other=0).to(tl.int64)
        x += b * x_b + (column // D).to(tl.int64) * x_h + column % D
        value = tl.load(x[None, :] + token[:, None] * x_n, mask=inside, other=0.0)
        tl.store(out + ((b * M + row) * HD)[:, None] + column[None, :], value, mask=inside)


def match_sizes(dtype: torch.dtype, channels: int) -> dict[str, int]:
    """Tiles of sources and destinations, channels per step, warps and pipeline stages."""
    whole = max(16, triton.next_power_of_2(channels))
    if dtype == torch.float32:  # without tensor cores: smaller tiles, so that registers suffice
        return {"BM": 32, "BN": 32, "BC": min(64, whole), "num_warps": 4, "num_stages": 2}
    return {"BM": 128, "BN": 128, "BC": whole if whole <= 128 else 64, "num_warps": 8, "num_stages": 3}


def match_tokens_triton(
    x: Tensor, frames: int, specials: int, ratio: int, group: int = GROUP, sizes: dict[str, int] | None = None
) -> Tensor:
    """The kernel; arguments and results of `match_tokens`. sizes: see `match_sizes`."""
    length, patches = check(x, frames, specials, ratio, group)
    rows = own_cells(x, frames, length, specials, ratio)
    sources = min(group, frames) * (length - merged_length(length, specials, ratio))
    if sources:
        x = x if x.stride(-1) == 1 else x.contiguous()
        scale = 1 / torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp(min=1e-12)
        sizes = sizes or match_sizes(x.dtype, x.shape[2])
        grid = triton.cdiv(sources, sizes["BM"]), triton.cdiv(frames, group), len(x)
        whole = x.shape[2] <= sizes["BC"]
        _match[grid](
            x, scale, rows, *x.stride()[:2], frames, length, specials, group, x.shape[2], RATIO=ratio, WHOLE=whole, **sizes
        )  # fmt: skip
    return rows


def merge_tokens_triton(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """The kernel; arguments and results of `merge_tokens`."""
    b, h, n, d = x.shape
    listed, order = rows.sort(dim=-1, stable=True)  # sums in one order, the same in every run
    bounds = torch.arange(count + 1, dtype=rows.dtype, device=x.device).repeat(b, 1)
    start = torch.searchsorted(listed, bounds, out_int32=True)
    out = torch.empty(b, count, h, d, dtype=x.dtype, device=x.device).transpose(1, 2)
    columns = min(1024, triton.next_power_of_2(h * d))
    grid = count, triton.cdiv(h * d, columns), b
    _merge[grid](x, order, start, out, *x.stride()[:3], n, h * d, D=d, COLUMNS=columns, STEP=4, num_warps=4)
    return out


def take_tokens_triton(x: Tensor, index: Tensor) -> Tensor:
    """The kernel; arguments and results of `take_tokens`."""
    b, h, _, d = x.shape
    count = index.shape[1]
    out = torch.empty(b, count, h, d, dtype=x.dtype, device=x.device).transpose(1, 2)
    columns = min(1024, triton.next_power_of_2(h * d))
    sizes = {"ROWS": max(1, 4096 // columns), "COLUMNS": columns, "num_warps": 4}
    grid = triton.cdiv(count, sizes["ROWS"]), triton.cdiv(h * d, columns), b
    _take[grid](x, index, out, *x.stride()[:3], index.expand(b, -1).stride(0), count, h * d, D=d, **sizes)
    return out


def match_tokens(x: Tensor, frames: int, specials: int, ratio: int, group: int = GROUP) -> Tensor:
    """Which row of the merged sequence stands for each token (Spark3R, section 3: query merging).

    x: (B, T * L, C), by whose cosine tokens are compared (the block's input, or keys). frames: T. ratio: patches per
    destination, r_Q. group: so many consecutive frames are matched among themselves; the last group may be smaller.
    Patch p of frame t is a destination if p % ratio == t % ratio (in the last, smaller cell modulo its size); each other
    patch joins the most similar destination of its group, of equal ones the first. Tokens without direction (all zeros)
    are as similar to all. Returns the row table (B, T * L) int32: frame t owns the rows from t * merged_length on, first
    its special tokens. The tokens x tokens similarities are never stored. Raises ValueError on sizes that do not fit.
    """
    return (match_tokens_triton if on_kernels(x) else match_tokens_reference)(x, frames, specials, ratio, group)


def merge_tokens(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """Mean of the tokens of each row (Spark3R, section 3: query merging).

    x: (B, H, T * L, D), usually queries after their rotation. rows: row table of `match_tokens`. count: rows after
    merging, R. Returns (B, H, R, D) in x's type, summed in float32 or finer, stored so that `transpose(1, 2)` is
    contiguous; zeros where a row has no token. The same in every run. Raises ValueError on shapes that do not fit.
    """
    if x.ndim != 4 or rows.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"x {tuple(x.shape)} and rows {tuple(rows.shape)} do not fit together")
    return (merge_tokens_triton if on_kernels(x) else merge_tokens_reference)(x, rows, count)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Copies of listed tokens: unmerges an output by its row table, and prunes keys and values (Spark3R, section 3).

    x: (B, H, N, D). index: (B or 1, M) int32 within 0 .. N - 1. Returns (B, H, M, D), on a GPU stored so that
    `transpose(1, 2)` is contiguous. Raises ValueError on shapes that do not fit.
    """
    if x.ndim != 4 or index.ndim != 2 or index.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"x {tuple(x.shape)} and index {tuple(index.shape)} do not fit together")
    return (take_tokens_triton if on_kernels(x) else take_tokens_reference)(x, index)


@functools.lru_cache(maxsize=8)  # to count the kept tokens, the host waits for the device: not again in every layer
def kept_tokens(
    frames: int,
    length: int,
    specials: int,
    stride: int,
    stagger: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """The tokens whose keys and values stay under a temporal stride (Spark3R, section 3: key / value pruning).

    stride: r_KV. Frame 0, which some networks measure everything against, stays whole; so do all special tokens. Of the
    patches stay whole frames, every stride-th, or with `stagger` every stride-th patch of each frame, at another offset
    in each (patch p of frame t if p % stride == t % stride): what the paper leaves open. Returns (1, M) int32, rising,
    for `take_tokens`, shared by all callers: not to be written to. Raises ValueError if the sizes do not fit.
    """
    if frames < 1 or stride < 1 or not 0 <= specials <= length:
        raise ValueError(f"{frames} frames of {length} tokens, {specials} special, stride {stride} do not fit together")
    t = torch.arange(frames, device=device)[:, None]
    token = torch.arange(length, device=device)
    patch = token - specials
    kept = patch % stride == t % stride if stagger else (t % stride == 0).expand(-1, length)
    return (kept | (t == 0) | (patch < 0)).flatten().nonzero().int().T.contiguous()
