"""Attention between the tokens of frames under a frame-level rule of visibility: Triton kernels and their reference.

Both other attention modules are built on it. No token-level mask exists: a tile of queries walks along the list of the
frames that its rows may see, first those that all of its rows see (no masks), then those that only some see. Flash
attention's online softmax (Dao et al., 2022) does the rest. The tables and lists live on the device, so nothing
synchronises with the host and a CUDA graph can hold every launch; a frame that no query sees is never read.

Shape letters: B sequences, T query frames of X rows each, N key frames of Y rows each, H heads, D head width. All tensors
may be strided views (ring buffers, the special tokens of every frame); only the last axis must be contiguous.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # platforms without Triton use the reference
    triton = tl = None

LOG2E = 1.4426950408889634
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_kernels(x: Tensor) -> bool:
    """Whether the public functions run their Triton kernels for x, else the reference."""
    return triton is not None and x.is_cuda and x.dtype in KERNEL_TYPES


def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs side by side, at one per multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


class Visible:
    """Which frames a frame sees, with the lists that the kernels walk: each is made at its first use, then kept.

    All layers of a step share one object. Make a new one whenever the table changes; to capture a CUDA graph, make it
    inside, so that a replay lists what the table holds by then. table: (B or 1, T, N) bool; ValueError if it is not.
    """

    def __init__(self, table: Tensor) -> None:
        if table.dtype != torch.bool or table.dim() != 3:
            raise ValueError(f"visible must be bool of three axes, not {table.dtype} {tuple(table.shape)}")
        self.table = table
        self._lists: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    @functools.cached_property
    def transposed(self) -> Visible:
        """By which frames a frame is seen."""
        return Visible(self.table.transpose(1, 2))

    def lists(self, rows: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
        """`list_frames` of the table."""
        if (rows, tile) not in self._lists:
            self._lists[rows, tile] = list_frames(self.table, rows, tile)
        return self._lists[rows, tile]


def check(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> None:
    """Raise ValueError unless the arguments of `frame_attention` fit together."""
    (b, h, t, _, d), n = q.shape, k.shape[2]
    if k.shape != v.shape or k.shape[:2] != (b, h) or k.shape[4] != d:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if visible.table.shape not in ((1, t, n), (b, t, n)):
        raise ValueError(f"visible must be (1 or {b}, {t}, {n}), not {tuple(visible.table.shape)}")


def frame_attention_reference(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
    """Plain torch; arguments and results of `frame_attention`."""
    check(q, k, v, visible)
    high = torch.promote_types(q.dtype, torch.float32)
    mask = visible.table[:, None, :, None, :, None]
    scores = torch.einsum("bhtxd,bhnyd->bhtxny", q.to(high), k.to(high)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf).flatten(4)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    seen = visible.table.any(1)[:, None, :, None, None]  # what nobody sees may hold anything, also NaN
    values = v.to(high).masked_fill(~seen, 0).flatten(2, 3)
    return torch.einsum("bhtxj,bhjd->bhtxd", weights, values).to(q.dtype), lse


if triton is not None:

    @triton.jit
    def _list_frames(
        visible, lists, words, counts, T, N, X, stride_b, stride_t, stride_n, TILE: tl.constexpr, CHUNK: tl.constexpr
    ):
        """Frames seen by all rows of a tile of TILE query rows, then those seen by some only, each in rising order.

        Bit i of a listed frame's word says that the tile's i-th query frame sees it.
        """
        tile, b = tl.program_id(0), tl.program_id(1)
        first = tile * TILE // X
        last = tl.minimum((tile * TILE + TILE - 1) // X, T - 1)
        row = b * tl.num_programs(0) + tile
        count = 0
        for part in tl.static_range(2):
            for start in range(0, N, CHUNK):
                n = start + tl.arange(0, CHUNK)
                word = tl.zeros([CHUNK], tl.int32)
                every = n < N
                for t in range(first, last + 1):
                    seen = tl.load(visible + b * stride_b + t * stride_t + n * stride_n, mask=n < N, other=0) != 0
                    every = every & seen
                    word = word | (seen.to(tl.int32) << (t - first))
                if part == 0:
                    pick = every.to(tl.int32)
                else:
                    pick = ((word != 0) & ~every).to(tl.int32)
                place = count + tl.cumsum(pick, 0) - 1
                tl.store(lists + row.to(tl.int64) * N + place, n, mask=pick != 0)
                tl.store(words + row.to(tl.int64) * N + place, word, mask=pick != 0)
                count += tl.sum(pick, 0)
            tl.store(counts + row * 2 + part, count)  # seen by all; seen by any

    @triton.jit
    def _forward(
        q,
        k,
        v,
        out,
        lse,
        maxima,
        lists,
        words,
        counts,
        q_b,
        q_h,
        q_t,
        q_x,
        k_b,
        k_h,
        k_n,
        k_y,
        o_s,
        o_b,
        o_h,
        o_t,
        o_x,
        list_b,
        H,
        T,
        N,
        X,
        resident,
        scale,
        Y: tl.constexpr,
        Y_PADDED: tl.constexpr,
        D: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        TILE: tl.constexpr,
        LANES: tl.constexpr,
        SCORES: tl.constexpr,
        VALUES: tl.constexpr,
        RUN: tl.constexpr,
        BANKED: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        """One tile of BM query rows against one share of its keys.

        v has the strides of k. SCORES stores the largest score of each TILE keys of the first `resident` frames, of which
        RUN neighbours always lie in one frame; BANKED: there are other frames. VALUES stores the attention, where q lies
        if out is q: no other tile reads these rows.
        """
        tile, split = tl.program_id(0), tl.program_id(2)
        b, h = tl.program_id(1) // H, tl.program_id(1) % H
        PADDED: tl.constexpr = Y_PADDED != Y

        rows = tile * BM + tl.arange(0, BM)
        inside = rows < T * X
        t, x = tl.minimum(rows // X, T - 1), rows % X
        d = tl.arange(0, D)
        b64, h64 = b.to(tl.int64), h.to(tl.int64)
        q += b64 * q_b + h64 * q_h
        query = tl.load(q + (t.to(tl.int64) * q_t + x * q_x)[:, None] + d[None, :], mask=inside[:, None], other=0.0)
        k += b64 * k_b + h64 * k_h
        v += b64 * k_b + h64 * k_h
        bit = t - tile * BM // X
        listed = b * list_b + tile
        lists += listed.to(tl.int64) * N
        words += listed.to(tl.int64) * N
        total = tl.load(counts + listed * 2 + 1) * Y_PADDED
        full = tl.load(counts + listed * 2) * Y_PADDED // BN
        share = tl.cdiv(tl.cdiv(total, BN), tl.num_programs(2))
        low = split * share
        high = tl.minimum(low + share, tl.cdiv(total, BN))

        ONE: tl.constexpr = Y_PADDED % BN == 0  # a tile of keys lies in one frame, whose number needs no vectors
        column = tl.arange(0, BN)  # of the tile of scores: which key stands there
        if SCORES and TILE > 1:
            # A thread of the tensor cores' result owns two neighbouring columns of eight. It is given a run of neighbouring
            # keys, so that each tile's maximum is found inside one thread of LANES.
            column = column // 2 % LANES * (BN // LANES) + column // (2 * LANES) * 2 + column % 2

        m = tl.full([BM], float("-inf"), tl.float32)
        l = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, D], tl.float32)
        for part in tl.static_range(2):  # tiles of keys that all rows see; then the others, with masks
            if part == 0:
                begin, end = low, tl.minimum(high, full)
            else:
                begin, end = tl.maximum(low, full), high
            for i in range(begin, end):
                j = i * BN + column
                if ONE:
                    y = i * BN % Y_PADDED + column
                    n = tl.load(lists + i * BN // Y_PADDED)
                elif part == 0:
                    y = j % Y_PADDED
                    n = tl.load(lists + j // Y_PADDED)
                else:
                    y = j % Y_PADDED
                    n = tl.load(lists + j // Y_PADDED, mask=j < total, other=0)
                frame_at = (n.to(tl.int64) if WIDE else n) * k_n
                if part == 0:
                    at = frame_at + tl.minimum(y, Y - 1) * k_y
                    key = tl.load(k + at[:, None] + d[None, :])
                    s = tl.dot(query, tl.trans(key), input_precision="ieee")
                    if PADDED:
                        s = tl.where((y < Y)[None, :], s, float("-inf"))
                else:
                    live = (j < total) & (y < Y)
                    at = frame_at + y * k_y
                    key = tl.load(k + at[:, None] + d[None, :], mask=live[:, None], other=0.0)
                    s = tl.dot(query, tl.trans(key), input_precision="ieee")
                    s = tl.where(live[None, :], s, float("-inf"))
                tops = s
                if SCORES:
                    if TILE > 1:
                        parts = tl.reshape(s, (BM, BN // LANES // TILE, TILE // 2, LANES, 2))
                        tops = tl.trans(tl.max(tl.max(parts, 4), 2), 0, 2, 1)
                    tops = tl.reshape(tops, (BM, BN // TILE // RUN, RUN))
                    first = i * BN + tl.arange(0, BN // TILE // RUN) * (RUN * TILE)
                    frame = tl.load(lists + first // Y_PADDED, mask=first < total, other=resident)
                    if tl.min(frame, 0) < resident if BANKED else True:
                        place = frame * (Y_PADDED // TILE) + first % Y_PADDED // TILE
                        row = (tl.program_id(1) * T * X + rows).to(tl.int64) * (resident * (Y_PADDED // TILE))
                        tl.store(
                            maxima + row[:, None, None] + place[None, :, None] + tl.arange(0, RUN)[None, None, :],
                            tops,
                            mask=inside[:, None, None] & (frame < resident)[None, :, None],
                        )
                if VALUES:
                    if part == 0:
                        value = tl.load(v + at[:, None] + d[None, :])
                    else:
                        value = tl.load(v + at[:, None] + d[None, :], mask=live[:, None], other=0.0)
                        if ONE:
                            word = tl.load(words + i * BN // Y_PADDED)
                            s = tl.where(((word >> bit) & 1)[:, None] != 0, s, float("-inf"))
                        else:
                            word = tl.load(words + j // Y_PADDED, mask=live, other=0)
                            s = tl.where(((word[None, :] >> bit[:, None]) & 1) != 0, s, float("-inf"))
                    m_new = tl.maximum(m, tl.max(s, 1) * scale)
                    origin = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen so far
                    p = tl.exp2(s * scale - origin[:, None])
                    shrink = tl.exp2(m - origin)
                    l = l * shrink + tl.sum(p, 1)
                    acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
                    m = m_new
        if VALUES:
            acc = acc / tl.where(l == 0, 1.0, l)[:, None]
            out += split.to(tl.int64) * o_s + b64 * o_b + h64 * o_h
            place = (t.to(tl.int64) * o_t + x * o_x)[:, None] + d[None, :]
            tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside[:, None])
            lse += (split * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * T * X
            tl.store(lse + rows, (m + tl.log2(l)) * 0.6931471805599453, mask=inside)

    @triton.jit
    def _join(partial, partial_lse, at, rows, splits, D: tl.constexpr, SPLITS: tl.constexpr):
        """Row `at` of `rows` from the shares that `_forward` made of its keys, and its logarithm of a sum."""
        share = tl.arange(0, SPLITS)
        at_share = at + share * rows
        d = tl.arange(0, D)
        part = tl.load(partial_lse + at_share, mask=share < splits, other=float("-inf"))
        value = tl.load(partial + at_share[:, None] * D + d[None, :], mask=(share < splits)[:, None], other=0.0)
        m = tl.max(part, 0)
        weight = tl.exp(part - tl.where(m == float("-inf"), 0.0, m))
        l = tl.sum(weight, 0)
        return tl.sum(weight[:, None] * value, 0) / tl.where(l == 0, 1.0, l), m + tl.log(l)

    @triton.jit
    def _combine(
        partial,
        partial_lse,
        out,
        lse,
        o_b,
        o_h,
        o_t,
        o_x,
        H,
        X,
        splits,
        D: tl.constexpr,
        SPLITS: tl.constexpr,
    ):
        """Join the shares that `_forward` made of one row's keys."""
        row, b, h = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
        at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + row
        rows = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        acc, total = _join(partial, partial_lse, at, rows, splits, D, SPLITS)
        place = out + b * o_b + h * o_h + (row // X).to(tl.int64) * o_t + row % X * o_x
        tl.store(place + tl.arange(0, D), acc.to(out.dtype.element_ty))
        tl.store(lse + at, total)

    @triton.jit
    def _exponent(lse):
        """A natural logarithm of a sum in powers of two; +inf for an empty sum, so that every probability is 0."""
        return tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)

    @triton.jit
    def _backward_queries(
        q,
        k,
        v,
        grad,
        lse,
        delta,
        grad_q,
        lists,
        words,
        counts,
        q_b,
        q_h,
        q_t,
        q_x,
        k_b,
        k_h,
        k_n,
        k_y,
        g_b,
        g_h,
        g_t,
        g_x,
        r_b,
        r_h,
        r_t,
        r_x,
        list_b,
        H,
        T,
        N,
        X,
        scale,
        Y: tl.constexpr,
        D: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        ADD: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        """Gradient of one tile of BM query rows, stored in grad_q or added to what it holds. v has the strides of k.

        delta is what every row's gradient of scores loses.
        """
        tile = tl.program_id(0)
        b, h = tl.program_id(1) // H, tl.program_id(1) % H
        b64, h64 = b.to(tl.int64), h.to(tl.int64)
        rows = tile * BM + tl.arange(0, BM)
        inside = rows < T * X
        t, x = tl.minimum(rows // X, T - 1), rows % X
        d = tl.arange(0, D)
        at = q + b64 * q_b + h64 * q_h + (t.to(tl.int64) * q_t + x * q_x)[:, None]
        query = tl.load(at + d[None, :], mask=inside[:, None], other=0.0)
        at = grad + b64 * g_b + h64 * g_h + (t.to(tl.int64) * g_t + x * g_x)[:, None]
        g = tl.load(at + d[None, :], mask=inside[:, None], other=0.0)
        row = tl.program_id(1).to(tl.int64) * T * X + rows
        row_lse = _exponent(tl.load(lse + row, mask=inside, other=float("-inf")))
        row_delta = tl.load(delta + row, mask=inside, other=0.0)
        k += b64 * k_b + h64 * k_h
        v += b64 * k_b + h64 * k_h
        bit = t - tile * BM // X
        listed = b * list_b + tile
        lists += listed.to(tl.int64) * N
        words += listed.to(tl.int64) * N
        total = tl.load(counts + listed * 2 + 1) * Y
        full = tl.load(counts + listed * 2) * Y // BN

        acc = tl.zeros([BM, D], tl.float32)
        for part in tl.static_range(2):  # as in `_forward`
            for i in range(0 if part == 0 else full, full if part == 0 else tl.cdiv(total, BN)):
                j = i * BN + tl.arange(0, BN)
                live = j < total
                n = tl.load(lists + j // Y, mask=live, other=0)
                place = ((n.to(tl.int64) if WIDE else n) * k_n + j % Y * k_y)[:, None] + d[None, :]
                key = tl.load(k + place, mask=live[:, None], other=0.0)
                value = tl.load(v + place, mask=live[:, None], other=0.0)
                s = tl.dot(query, tl.trans(key), input_precision="ieee")
                p = tl.exp2(s * scale - row_lse[:, None])
                ds = p * (tl.dot(g, tl.trans(value), input_precision="ieee") - row_delta[:, None])
                if part == 1:
                    word = tl.load(words + j // Y, mask=live, other=0)
                    ds = tl.where(((word[None, :] >> bit[:, None]) & 1) != 0, ds, 0.0)
                acc = tl.dot(ds.to(key.dtype), key, acc, input_precision="ieee")
        acc *= scale * 0.6931471805599453
        at = grad_q + b64 * r_b + h64 * r_h + (t.to(tl.int64) * r_t + x * r_x)[:, None] + d[None, :]
        if ADD:
            acc += tl.load(at, mask=inside[:, None], other=0.0)
        tl.store(at, acc.to(grad_q.dtype.element_ty), mask=inside[:, None])

    @triton.jit
    def _backward_keys(
        q,
        k,
        v,
        grad,
        lse,
        delta,
        grad_k,
        grad_v,
        lists,
        words,
        counts,
        q_b,
        q_h,
        q_t,
        q_x,
        k_b,
        k_h,
        k_n,
        k_y,
        g_b,
        g_h,
        g_t,
        g_x,
        r_b,
        r_h,
        r_n,
        r_y,
        list_b,
        H,
        T,
        N,
        Y,
        scale,
        X: tl.constexpr,
        D: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        ADD: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        """Gradients of one tile of BM keys and values, along the list of the frames that see them, BN queries at a time.

        See `_backward_queries`; grad_v has the strides of grad_k.
        """
        tile = tl.program_id(0)
        b, h = tl.program_id(1) // H, tl.program_id(1) % H
        b64, h64 = b.to(tl.int64), h.to(tl.int64)
        rows = tile * BM + tl.arange(0, BM)
        inside = rows < N * Y
        n, y = tl.minimum(rows // Y, N - 1), rows % Y
        d = tl.arange(0, D)
        at = b64 * k_b + h64 * k_h + (n.to(tl.int64) * k_n + y * k_y)[:, None] + d[None, :]
        key = tl.load(k + at, mask=inside[:, None], other=0.0)
        value = tl.load(v + at, mask=inside[:, None], other=0.0)
        q += b64 * q_b + h64 * q_h
        grad += b64 * g_b + h64 * g_h
        lse += tl.program_id(1).to(tl.int64) * T * X
        delta += tl.program_id(1).to(tl.int64) * T * X
        bit = n - tile * BM // Y
        listed = b * list_b + tile
        lists += listed.to(tl.int64) * T
        words += listed.to(tl.int64) * T
        total = tl.load(counts + listed * 2 + 1) * X
        full = tl.load(counts + listed * 2) * X // BN

        acc_k = tl.zeros([BM, D], tl.float32)
        acc_v = tl.zeros([BM, D], tl.float32)
        for part in tl.static_range(2):  # as in `_forward`
            for i in range(0 if part == 0 else full, full if part == 0 else tl.cdiv(total, BN)):
                j = i * BN + tl.arange(0, BN)
                live = j < total
                t = tl.load(lists + j // X, mask=live, other=0)
                t_wide = t.to(tl.int64) if WIDE else t
                x = j % X
                place = (t_wide * q_t + x * q_x)[:, None] + d[None, :]
                query = tl.load(q + place, mask=live[:, None], other=0.0)
                place = (t_wide * g_t + x * g_x)[:, None] + d[None, :]
                g = tl.load(grad + place, mask=live[:, None], other=0.0)
                row_lse = _exponent(tl.load(lse + t * X + x, mask=live, other=float("-inf")))
                row_delta = tl.load(delta + t * X + x, mask=live, other=0.0)
                s = tl.dot(key, tl.trans(query), input_precision="ieee")
                p = tl.exp2(s * scale - row_lse[None, :])
                ds = p * (tl.dot(value, tl.trans(g), input_precision="ieee") - row_delta[None, :])
                if part == 1:
                    word = tl.load(words + j // X, mask=live, other=0)
                    seen = ((word[None, :] >> bit[:, None]) & 1) != 0
                    p = tl.where(seen, p, 0.0)
                    ds = tl.where(seen, ds, 0.0)
                acc_v = tl.dot(p.to(g.dtype), g, acc_v, input_precision="ieee")
                acc_k = tl.dot(ds.to(query.dtype), query, acc_k, input_precision="ieee")
        acc_k *= scale * 0.6931471805599453
        place = b64 * r_b + h64 * r_h + (n.to(tl.int64) * r_n + y * r_y)[:, None] + d[None, :]
        if ADD:
            acc_k += tl.load(grad_k + place, mask=inside[:, None], other=0.0)
            acc_v += tl.load(grad_v + place, mask=inside[:, None], other=0.0)
        tl.store(grad_k + place, acc_k.to(grad_k.dtype.element_ty), mask=inside[:, None])
        tl.store(grad_v + place, acc_v.to(grad_v.dtype.element_ty), mask=inside[:, None])


def list_frames(visible: Tensor, rows: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each tile of `tile` query rows has to look at, `rows` rows to a query frame.

    visible: (B or 1, T, N) bool. Returns lists (B or 1, tiles, N) int32, of which row i holds the frames that all of
    tile i's rows see and then those that some of them see; words like it, of which bit j says whether the j-th query
    frame of the tile sees the listed one; and counts (B or 1, tiles, 2) int32: how many all see, how many any sees.
    Raises ValueError if a tile touches more than 32 frames, the bits of a word.
    """
    b, t, n = visible.shape
    if touched(t, rows, tile) > 32:
        raise ValueError(f"a tile of {tile} rows touches more than 32 frames of {rows} rows")
    tiles = triton.cdiv(t * rows, tile)
    lists, words = torch.empty(2, b, tiles, n, dtype=torch.int32, device=visible.device)
    counts = torch.empty(b, tiles, 2, dtype=torch.int32, device=visible.device)
    chunk = min(1024, triton.next_power_of_2(n))
    _list_frames[(tiles, b)](
        visible.view(torch.uint8), lists, words, counts, t, n, rows, *visible.stride(), TILE=tile, CHUNK=chunk
    )
    return lists, words, counts


def touched(frames: int, rows: int, tile: int) -> int:
    """How many of the query frames one tile of rows touches at most."""
    return min(frames, -(-tile // rows) + (tile % rows > 0))


def tile_sizes(frames: int, rows: int, keys: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of queries and keys, warps and pipeline stages, measured on an H200.

    frames: query frames of `rows` rows each; keys: rows of a key frame.
    """
    low = dtype != torch.float32  # without tensor cores: smaller tiles, so that registers suffice
    pooled = max(rows, keys) <= 128
    bm = min((64 if pooled else 128) if low else 32, max(16, triton.next_power_of_2(frames * rows)))
    while touched(frames, rows, bm) > 32:
        bm //= 2
    if not low:
        return {"BM": bm, "BN": 32, "num_warps": 4, "num_stages": 2}
    if bm < 64:
        return {"BM": bm, "BN": 64, "num_warps": bm // 16, "num_stages": 3}
    warps = 4 if bm * width <= 128 * 64 else 8
    if pooled:
        return {"BM": bm, "BN": 128, "num_warps": warps, "num_stages": 2}
    return {"BM": bm, "BN": 64, "num_warps": warps, "num_stages": 3}


def shares(programs: int, keys: int, sizes: dict[str, int], device: torch.device) -> int:
    """Into how many shares to split the keys so that few programs fill the device: about 8 warps a multiprocessor."""
    room = max(1, 8 // sizes["num_warps"]) * multiprocessors(device)
    return max(1, min(room // programs, triton.cdiv(keys, 4 * sizes["BN"]), 64))


def lanes(keys: int, tile: int, dtype: torch.dtype) -> int:
    """Threads among which the tensor cores' result spreads a row's `keys` scores; float32 does not run on them."""
    return 1 if dtype == torch.float32 else min(4, keys // tile)


def alike(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with the same strides, copied only if they differ."""
    return (k, v) if k.stride() == v.stride() else (k.contiguous(), v.contiguous())


def wide(k: Tensor) -> bool:
    """Whether rows of one sequence and head, (B, H, N, Y, D), lie further apart than 32 bits can say."""
    return k.shape[2] * k.stride(2) + k.shape[3] * k.stride(3) >= 2**31


def frame_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    out: Tensor | None = None,
    maxima: tuple[Tensor, int] | None = None,
    values: bool = True,
    splits: int | None = None,
    sizes: dict[str, int] | None = None,
    join: bool = True,
) -> tuple[Tensor, Tensor]:
    """The kernels; arguments and results of `frame_attention`, and more.

    out: where to write, (B, H, T, X, D) of any type and strides, maybe q itself. maxima: (buffer, tile): also store, before
    scaling, the largest score of every `tile` keys, where buffer is float32 (B, H, T * X, R * `tiles_per_frame(Y, tile)`) and
    belongs to the first R key frames; entries of frames outside a row's tile's list stay as they were. values=False does only
    that. splits: shares of the keys that run side by side; sizes: tile sizes, both chosen by shape if None. join=False
    returns the shares' results if there are several, float32 (splits, B, H, T, X, D) and (splits, B, H, T, X), for
    `_join`.
    """
    check(q, k, v, visible)
    (b, h, t, x, d), (n, y) = q.shape, k.shape[2:4]
    if d < 16 or d & (d - 1):
        raise ValueError(f"head width {d} must be a power of two, at least 16")
    k, v = alike(k, v)
    sizes = sizes or tile_sizes(t, x, y, d, q.dtype)
    tile = maxima[1] if maxima else 1
    per_frame = tiles_per_frame(y, tile)
    padded = per_frame * tile if maxima else y
    resident = maxima[0].shape[-1] // per_frame if maxima else 0
    lists, words, counts = visible.lists(x, sizes["BM"])
    tiles = lists.shape[1]
    splits = splits or shares(tiles * b * h, n * padded, sizes, q.device)
    if splits == 1 or not values:
        if out is None:
            out = torch.empty(b, h, t, x, d, dtype=q.dtype, device=q.device)
        target, target_lse = out, torch.empty(b, h, t, x, dtype=torch.float32, device=q.device)
        strides = 0, *out.stride()[:4]
    else:
        target = torch.empty(splits, b, h, t, x, d, dtype=torch.float32, device=q.device)
        target_lse = torch.empty(splits, b, h, t, x, dtype=torch.float32, device=q.device)
        strides = target.stride()[:5]
    _forward[(tiles, b * h, splits)](
        q,
        k,
        v,
        target,
        target_lse,
        maxima[0] if maxima else target_lse,
        lists,
        words,
        counts,
        *q.stride()[:4],
        *k.stride()[:4],
        *strides,
        tiles if lists.shape[0] > 1 else 0,
        h,
        t,
        n,
        x,
        resident,
        d**-0.5 * LOG2E,
        Y=y,
        Y_PADDED=padded,
        D=d,
        TILE=tile,
        LANES=lanes(sizes["BN"], tile, q.dtype),
        SCORES=maxima is not None,
        VALUES=values,
        RUN=math.gcd(sizes["BN"] // tile, per_frame),
        BANKED=resident < n,
        WIDE=wide(k),
        **sizes,
    )
    if target.dim() == 5 or not join:
        return target, target_lse
    if out is None:
        out = torch.empty(b, h, t, x, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, t, x, dtype=torch.float32, device=q.device)
    _combine[(t * x, b * h)](
        target,
        target_lse,
        out,
        lse,
        *out.stride()[:4],
        h,
        x,
        splits,
        D=d,
        SPLITS=triton.next_power_of_2(splits),
        num_warps=1 if splits * d <= 1024 else 4,
    )
    return out, lse


def tiles_per_frame(keys: int, tile: int) -> int:
    """Tiles of so many keys in a frame; rows of single scores are padded so that they can be stored four at a time."""
    return triton.cdiv(keys, tile) if tile > 1 else triton.cdiv(keys, 4) * 4


def frame_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    totals: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. grad: of the output; lse: from the forward pass.

    delta: (B, H, T, X) float32, the output times its gradient, summed over each row, less the gradient of lse. totals: what
    to add the gradients to, of the same shapes, strided views allowed; None for new tensors. The keys' gradients are gathered
    along transposed lists, without atomics, so that they are the same in every run.
    """
    (b, h, t, x, d), (n, y) = q.shape, k.shape[2:4]
    k, v = alike(k, v)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grads = totals or tuple(torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (q, k, v))
    for kernel, table, mine, other, results in (
        (_backward_queries, visible, (t, x), (n, y), grads[:1]),
        (_backward_keys, visible.transposed, (n, y), (t, x), grads[1:]),
    ):
        sizes = tile_sizes(*mine, other[1], d, q.dtype)
        sizes |= {"BM": min(64, sizes["BM"]), "BN": min(64, sizes["BN"]), "num_stages": 2}
        lists, words, counts = table.lists(mine[1], sizes["BM"])
        kernel[(lists.shape[1], b * h)](
            q,
            k,
            v,
            grad,
            lse,
            delta,
            *results,
            lists,
            words,
            counts,
            *q.stride()[:4],
            *k.stride()[:4],
            *grad.stride()[:4],
            *results[0].stride()[:4],
            lists.shape[1] if lists.shape[0] > 1 else 0,
            h,
            t,
            n,
            mine[1],
            d**-0.5 * LOG2E,
            other[1],
            D=d,
            ADD=totals is not None,
            WIDE=wide(k) or wide(q) or wide(grad),
            **sizes,
        )
    return grads


class FrameAttention(torch.autograd.Function):
    """`frame_attention` by the kernels, differentiable."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
        """See `frame_attention`."""
        out, lse = frame_attention_triton(q, k, v, visible)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.visible = visible
        return out, lse

    @staticmethod
    def backward(ctx, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, out, lse = ctx.saved_tensors
        delta = (out.float() * grad.float()).sum(-1) - grad_lse
        return *frame_attention_backward(q, k, v, ctx.visible, grad, lse, delta), None


def frame_attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
    """Softmax attention of all rows of a query frame to all rows of the key frames that it sees.

    q: (B, H, T, X, D). k, v: (B, H, N, Y, D). visible: of a table (B or 1, T, N). Scores are scaled by D ** -0.5. Returns
    the output (B, H, T, X, D) in q's type and the logarithm of the sum of exponentials (B, H, T, X), float32 or finer. A
    frame that sees nothing gets zeros, and -inf. Raises ValueError on shapes that do not fit.
    """
    return (FrameAttention.apply if on_kernels(q) else frame_attention_reference)(q, k, v, visible)
