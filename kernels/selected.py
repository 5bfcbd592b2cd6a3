"""Selected fine attention with its gated sum (Speed3R, section 3): Triton kernels and their plain-torch reference.

Special queries attend densely, which is `frames.frame_attention`. The 16 queries of a patch block attend to the special
tokens of the frames that they see and to the tokens of their chosen blocks; the epilogue adds the gated compressed output.
Where the special tokens are many, or the queries one new frame's, a dense launch of their own passes its softmax state on;
else each block of queries reads them along. What needs no choice of blocks may begin before it is made (`begin_selected`).
Frames shown whole, the same to all blocks and heads, are a dense launch too: no list of their blocks exists.

16 queries per gathered key do 16 operations per byte, which the cache in front of the multiprocessors cannot feed at the
rate of the tensor cores; `group` lets neighbouring blocks share a selection and thereby their keys. Each warp owns the 16
queries of one block, so no softmax statistic crosses warps.

Shape letters: see `frames`; L = S + 16 G tokens per frame (S special ones first), K chosen blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.kernels.frames import (
    LOG2E,
    Visible,
    _exponent,
    alike,
    frame_attention_backward,
    frame_attention_triton,
    multiprocessors,
    on_kernels,
    tl,
    triton,
    wide,
)
from speed3r_ros.kernels.gathered import on_gathered, selected_attention_gathered
from speed3r_ros.kernels.qkv import BLOCK, differentiated

WORKSPACE = 2**29  # bytes at most for softmax states between launches; more heads than that take turns


def check(
    q: Tensor,
    k: Tensor,
    index: Tensor,
    compressed: Tensor,
    gate: Tensor,
    fine: Visible,
    specials: int,
    group: int,
    shown: Visible | None,
) -> tuple[int, int, int, int]:
    """T, N, tokens L and blocks G per frame of the arguments of `selected_attention`; ValueError if they do not fit."""
    (b, h, rows, d), (frames, resident) = q.shape, fine.table.shape[1:]
    length = rows // frames
    blocks = (length - specials) // BLOCK
    expected = {
        "q": (q, (b, h, frames * (specials + BLOCK * blocks), d)),
        "k": (k, (b, h, resident * length, d)),
        "compressed": (compressed, (b, h, frames * blocks, d)),
        "gate": (gate, (b, h, rows, 2)),
        "index": (index, (b, h, frames * -(-blocks // group), index.shape[-1])),
    }
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}")
    if shown is not None and shown.table.shape != fine.table.shape:
        raise ValueError(f"shown has shape {tuple(shown.table.shape)}, expected fine's {tuple(fine.table.shape)}")
    if blocks < 1:
        raise ValueError(f"{length} tokens per frame, of which {specials} are special, leave no block of {BLOCK}")
    return frames, resident, length, blocks


class Beside:
    """Work of the `with` block runs beside what follows it, on a second stream, until `join`; else in order.

    A CUDA graph that captures it gets two branches.
    """

    streams: dict[torch.device, torch.cuda.Stream] = {}

    def __init__(self, device: torch.device, wanted: bool) -> None:
        self.device, self.wanted = device, wanted and device.type == "cuda"

    def __enter__(self) -> None:
        """Go to the second stream."""
        if self.wanted:
            self.main = torch.cuda.current_stream(self.device)
            if self.device not in self.streams:
                self.streams[self.device] = torch.cuda.Stream(self.device)
            self.side = self.streams[self.device]
            self.side.wait_stream(self.main)
            torch.cuda.set_stream(self.side)

    def __exit__(self, *_: object) -> None:
        """Back to the first one."""
        if self.wanted:
            torch.cuda.set_stream(self.main)

    def mark(self) -> None:
        """What is queued on the second stream by now is what `wait` waits for."""
        if self.wanted:
            self.event = self.side.record_event()

    def wait(self) -> None:
        """What follows waits for the work before the mark."""
        if self.wanted:
            self.main.wait_event(self.event)

    def join(self) -> None:
        """What follows waits for the work beside it."""
        if self.wanted:
            self.main.wait_stream(self.side)


@dataclass(frozen=True)
class Begun:
    """What `begin` started, on a second stream if the queries are one frame's.

    out: (B, H, T, L, D), of which special queries are being written; lse: (B, H, T, S), the logarithms of their sums of
    exponentials. passed_on: of one frame's patches, their attention to special tokens, float32 (B, H, 1, 16 G, D), and its
    logarithms of sums; else None.
    """

    out: Tensor
    lse: Tensor
    passed_on: tuple[Tensor, Tensor] | None
    beside: Beside


def begin(q: Tensor, k: Tensor, v: Tensor, fine: Visible, specials: int, out: Tensor | None = None) -> Begun:
    """Start what `selected_attention` can do before blocks are chosen; arguments as there.

    That is the special queries and, of one frame, the patches' attention to special tokens.
    """
    b, h, rows, d = q.shape
    frames, resident = fine.table.shape[1:]
    q = q.unflatten(2, (frames, rows // frames))
    k, v = alike(k.unflatten(2, (resident, -1)), v.unflatten(2, (resident, -1)))
    if out is None:
        out = torch.empty(b, frames, q.shape[3], h, d, dtype=q.dtype, device=q.device).permute(0, 3, 1, 2, 4)
    else:
        out = out.unflatten(2, (frames, -1))
    beside = Beside(q.device, frames == 1 and specials > 0)  # one frame's queries leave most of the device idle
    lse = torch.empty(b, h, frames, 0, device=q.device)
    partial = None
    if specials and frames == 1:
        with beside:
            target = torch.empty(b, h, frames, q.shape[3] - specials, d, dtype=torch.float32, device=q.device)
            special = k[:, :, :, :specials], v[:, :, :, :specials]
            partial = frame_attention_triton(q[:, :, :, specials:], *special, fine, out=target)
        beside.mark()
    if specials:
        with beside:
            target = out[:, :, :, :specials]
            lse = frame_attention_triton(q[:, :, :, :specials], k, v, fine, out=target)[1]
    return Begun(out, lse, partial, beside)


def selected_attention_reference(
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
    """Plain torch; arguments and results of `selected_attention`."""
    frames, resident, length, blocks = check(q, k, index, compressed, gate, fine, specials, group, shown)
    b, h = q.shape[:2]
    chosen = torch.zeros(*index.shape[:3], resident * blocks + 1, dtype=torch.bool, device=q.device)
    chosen = chosen.scatter_(-1, index.long() % (resident * blocks + 1), True)[..., :-1]  # -1 falls into the last place
    chosen = chosen.view(b, h, frames, -1, 1, resident, blocks).expand(-1, -1, -1, -1, group, -1, -1)
    chosen = chosen.flatten(3, 4)[:, :, :, :blocks]
    if shown is not None:
        chosen = chosen | shown.table[:, None, :, None, :, None]
    table = fine.table
    mask = table[:, None, :, None, :, None].repeat(b // len(table), h, 1, length, 1, length)
    mask[:, :, :, specials:, :, specials:] &= chosen.repeat_interleave(BLOCK, 3).repeat_interleave(BLOCK, 5)
    mask = mask.flatten(4, 5).flatten(2, 3)
    seen = table.any(1).repeat_interleave(length, 1)[:, None, :, None]  # what nobody sees may hold anything, also NaN
    k, v = k.masked_fill(~seen, 0), v.masked_fill(~seen, 0)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).masked_fill(~mask.any(-1, keepdim=True), 0)
    attended, gate = attended.unflatten(2, (frames, length)), gate.unflatten(2, (frames, length))[:, :, :, specials:]
    coarse = compressed.unflatten(2, (frames, blocks)).repeat_interleave(BLOCK, 3)
    patches = gate[..., :1] * coarse + gate[..., 1:] * attended[:, :, :, specials:]
    joined = torch.cat([attended[:, :, :, :specials], patches], 3).flatten(2, 3)
    return joined if out is None else out.copy_(joined)


if triton is not None:

    @triton.jit
    def _attend(query, key, value, live, m, l, acc, scale):
        """One step of the online softmax: maximum (in powers of two), sum and weighted sum of values go on."""
        s = tl.dot(query, tl.trans(key), input_precision="ieee")
        s = tl.where(live[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * scale - origin[:, None])
        shrink = tl.exp2(m - origin)
        l = l * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        return m_new, l, acc

    @triton.jit
    def _selected(
        q,
        k,
        v,
        index,
        fine,
        out,
        partial,
        partial_lse,
        whole,
        whole_lse,
        attended,
        lse,
        compressed,
        gate,
        q_b,
        q_h,
        q_t,
        q_x,
        k_b,
        k_h,
        k_n,
        k_y,
        i_b,
        i_h,
        i_x,
        f_b,
        f_t,
        f_n,
        o_b,
        o_h,
        o_t,
        o_x,
        c_b,
        c_h,
        c_t,
        c_x,
        g_b,
        g_h,
        g_t,
        g_x,
        g_c,
        s_b,
        s_h,
        H,
        T,
        N,
        K,
        scale,
        G: tl.constexpr,
        S: tl.constexpr,
        D: tl.constexpr,
        GROUP: tl.constexpr,
        STEP: tl.constexpr,
        PASSED_ON: tl.constexpr,
        SHOWN: tl.constexpr,
        SAVED: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        """The queries of GROUP neighbouring blocks against special tokens and chosen blocks, 16 * STEP tokens at a time.

        v has the strides of k. out may be q: no other program reads these queries. PASSED_ON: `partial` and `partial_lse` hold
        the attention to the S special tokens. SHOWN: `whole` and `whole_lse` hold that to the patches of the frames shown
        whole. SAVED: keep the attention before the gate and the logarithm of its sum of exponentials, for the backward pass.
        """
        GROUPS: tl.constexpr = (G + GROUP - 1) // GROUP
        t, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
        b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
        t64 = t.to(tl.int64)
        x = group * GROUP * 16 + tl.arange(0, GROUP * 16)
        inside = x < G * 16
        d = tl.arange(0, D)
        at = q + b * q_b + h * q_h + t64 * q_t
        query = tl.load(at + x[:, None] * q_x + d[None, :], mask=inside[:, None], other=0.0)
        index += b * i_b + h * i_h + tl.program_id(0).to(tl.int64) * i_x
        fine += b * f_b + t64 * f_t
        k += b * k_b + h * k_h
        v += b * k_b + h * k_h

        j = tl.arange(0, STEP * 16)
        if PASSED_ON:
            state = (tl.program_id(1).to(tl.int64) * T + t) * (G * 16) + x
            m = tl.load(partial_lse + state, mask=inside, other=float("-inf")) * 1.4426950408889634
            l = tl.where(m == float("-inf"), 0.0, 1.0)
            acc = tl.load(partial + state[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        else:
            m = tl.full([GROUP * 16], float("-inf"), tl.float32)
            l = tl.zeros([GROUP * 16], tl.float32)
            acc = tl.zeros([GROUP * 16, D], tl.float32)
            if S > 0:
                for start in range(0, N * S, STEP * 16):
                    n = (start + j) // S
                    live = tl.load(fine + n * f_n, mask=n < N, other=0) != 0
                    row = (n.to(tl.int64) if WIDE else n) * k_n + (start + j) % S * k_y
                    key = tl.load(k + row[:, None] + d[None, :], mask=live[:, None], other=0.0)
                    value = tl.load(v + row[:, None] + d[None, :], mask=live[:, None], other=0.0)
                    m, l, acc = _attend(query, key, value, live, m, l, acc, scale)
        if SHOWN:
            state = (tl.program_id(1).to(tl.int64) * T + t) * (G * 16) + x
            m_shown = tl.load(whole_lse + state, mask=inside, other=float("-inf")) * 1.4426950408889634
            m_new = tl.maximum(m, m_shown)
            origin = tl.where(m_new == float("-inf"), 0.0, m_new)
            shrink, grow = tl.exp2(m - origin), tl.exp2(m_shown - origin)
            attended_whole = tl.load(whole + state[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
            acc = acc * shrink[:, None] + attended_whole * grow[:, None]
            l = l * shrink + grow
            m = m_new
        for start in range(0, K, STEP):
            place = start + j // 16
            block = tl.load(index + place, mask=place < K, other=-1)
            live = block >= 0
            n = block // G
            row = (n.to(tl.int64) if WIDE else n) * k_n + (S + block % G * 16 + j % 16) * k_y
            key = tl.load(k + row[:, None] + d[None, :], mask=live[:, None], other=0.0)
            value = tl.load(v + row[:, None] + d[None, :], mask=live[:, None], other=0.0)
            m, l, acc = _attend(query, key, value, live, m, l, acc, scale)
        acc = acc / tl.where(l == 0, 1.0, l)[:, None]
        if SAVED:
            state = b * s_b + h * s_h + t64 * (G * 16) + x
            at = attended + state[:, None] * D
            tl.store(at + d[None, :], acc.to(attended.dtype.element_ty), mask=inside[:, None])
            tl.store(lse + state, (m + tl.log2(l)) * 0.6931471805599453, mask=inside)

        at = compressed + b * c_b + h * c_h + t64 * c_t
        coarse = tl.load(at + (x // 16)[:, None] * c_x + d[None, :], mask=inside[:, None], other=0.0)
        gate += b * g_b + h * g_h + t64 * g_t
        gate_c = tl.load(gate + x * g_x, mask=inside, other=0.0).to(tl.float32)
        gate_s = tl.load(gate + x * g_x + g_c, mask=inside, other=0.0).to(tl.float32)
        acc = gate_c[:, None] * coarse.to(tl.float32) + gate_s[:, None] * acc
        at = out + b * o_b + h * o_h + t64 * o_t
        tl.store(at + x[:, None] * o_x + d[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None])

    @triton.jit
    def _selected_backward_queries(
        q,
        k,
        v,
        index,
        grad,
        lse,
        delta,
        grad_q,
        q_b,
        q_h,
        q_t,
        q_x,
        k_b,
        k_h,
        k_n,
        k_y,
        r_b,
        r_h,
        r_t,
        r_x,
        H,
        T,
        N,
        K,
        scale,
        G: tl.constexpr,
        D: tl.constexpr,
        GROUP: tl.constexpr,
        STEP: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        """Gradient of the queries of GROUP neighbouring blocks from their chosen blocks.

        v has the strides of k, grad_q strides of its own; the rest is contiguous. delta is what every row's gradient of
        scores loses.
        """
        GROUPS: tl.constexpr = (G + GROUP - 1) // GROUP
        t, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
        b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
        x = group * GROUP * 16 + tl.arange(0, GROUP * 16)
        inside = x < G * 16
        d = tl.arange(0, D)
        at = q + b * q_b + h * q_h + t * q_t + x[:, None] * q_x
        query = tl.load(at + d[None, :], mask=inside[:, None], other=0.0)
        state = (tl.program_id(1).to(tl.int64) * T + t) * (G * 16) + x
        g = tl.load(grad + state[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        row_lse = _exponent(tl.load(lse + state, mask=inside, other=float("-inf")))
        row_delta = tl.load(delta + state, mask=inside, other=0.0)
        index += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * K
        k += b * k_b + h * k_h
        v += b * k_b + h * k_h
        j = tl.arange(0, STEP * 16)
        acc = tl.zeros([GROUP * 16, D], tl.float32)
        for start in range(0, K, STEP):
            place = start + j // 16
            block = tl.load(index + place, mask=place < K, other=-1)
            live = block >= 0
            n = block // G
            row = (n.to(tl.int64) if WIDE else n) * k_n + (block % G * 16 + j % 16) * k_y
            key = tl.load(k + row[:, None] + d[None, :], mask=live[:, None], other=0.0)
            value = tl.load(v + row[:, None] + d[None, :], mask=live[:, None], other=0.0)
            p = tl.exp2(tl.dot(query, tl.trans(key), input_precision="ieee") * scale - row_lse[:, None])
            ds = p * (tl.dot(g, tl.trans(value), input_precision="ieee") - row_delta[:, None])
            acc = tl.dot(ds.to(key.dtype), key, acc, input_precision="ieee")  # keys that are not live are zeros
        acc *= scale * 0.6931471805599453
        at = grad_q + b * r_b + h * r_h + t * r_t + x[:, None] * r_x
        tl.store(at + d[None, :], acc, mask=inside[:, None])

    @triton.jit
    def _selected_backward_keys(
        q,
        k,
        v,
        order,
        starts,
        grad,
        lse,
        delta,
        grad_k,
        grad_v,
        q_b,
        q_h,
        q_t,
        q_x,
        k_b,
        k_h,
        k_n,
        k_y,
        r_b,
        r_h,
        r_n,
        r_y,
        H,
        T,
        N,
        K,
        scale,
        G: tl.constexpr,
        D: tl.constexpr,
        GROUP: tl.constexpr,
        STEP: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        """Gradients of the keys and values of one block, along the list of the entries of the index that chose it.

        See `_selected_backward_queries`; grad_v has the strides of grad_k. order: entries sorted by block; starts: where
        each block's begin.
        """
        GROUPS: tl.constexpr = (G + GROUP - 1) // GROUP
        ROWS: tl.constexpr = GROUP * 16
        block = tl.program_id(0)
        b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
        y = tl.arange(0, 16)
        d = tl.arange(0, D)
        row = b * k_b + h * k_h + (block // G).to(tl.int64) * k_n + (block % G * 16 + y) * k_y
        order += tl.program_id(1).to(tl.int64) * (T * GROUPS * K)
        starts += tl.program_id(1).to(tl.int64) * (N * G + 1) + block
        begin, end = tl.load(starts), tl.load(starts + 1)
        chosen = (y < 16 * (end - begin))[:, None]  # all or none: what nobody chose may hold anything, also NaN
        key = tl.load(k + row[:, None] + d[None, :], mask=chosen, other=0.0)
        value = tl.load(v + row[:, None] + d[None, :], mask=chosen, other=0.0)
        q += b * q_b + h * q_h
        state = tl.program_id(1).to(tl.int64) * T * (G * 16)
        j = tl.arange(0, STEP * ROWS)
        acc_k = tl.zeros([16, D], tl.float32)
        acc_v = tl.zeros([16, D], tl.float32)
        for start in range(begin, end, STEP):
            place = start + j // ROWS
            entry = tl.load(order + place, mask=place < end, other=0).to(tl.int32)
            t, x = entry // K // GROUPS, entry // K % GROUPS * ROWS + j % ROWS
            live = (place < end) & (x < G * 16)
            at = (t.to(tl.int64) if WIDE else t) * q_t + x * q_x
            query = tl.load(q + at[:, None] + d[None, :], mask=live[:, None], other=0.0)
            at = state + t * (G * 16) + x
            g = tl.load(grad + at[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
            row_lse = _exponent(tl.load(lse + at, mask=live, other=float("-inf")))
            row_delta = tl.load(delta + at, mask=live, other=0.0)
            p = tl.exp2(tl.dot(key, tl.trans(query), input_precision="ieee") * scale - row_lse[None, :])
            ds = p * (tl.dot(value, tl.trans(g), input_precision="ieee") - row_delta[None, :])
            acc_v = tl.dot(p.to(g.dtype), g, acc_v, input_precision="ieee")
            acc_k = tl.dot(ds.to(query.dtype), query, acc_k, input_precision="ieee")
        acc_k *= scale * 0.6931471805599453
        at = b * r_b + h * r_h + (block // G).to(tl.int64) * r_n + (block % G * 16 + y) * r_y
        tl.store(grad_k + at[:, None] + d[None, :], acc_k)
        tl.store(grad_v + at[:, None] + d[None, :], acc_v)

    @triton.jit
    def _gate_backward(
        grad,
        attended,
        compressed,
        gate,
        of_attended,
        of_compressed,
        of_gate,
        delta,
        o_b,
        o_h,
        o_t,
        o_x,
        c_b,
        c_h,
        c_t,
        c_x,
        g_b,
        g_h,
        g_t,
        g_x,
        g_c,
        H,
        T,
        G: tl.constexpr,
        S: tl.constexpr,
        D: tl.constexpr,
        PART: tl.constexpr,
    ):
        """Gradients through the gated sum of PART neighbouring blocks, and the row sums that softmax's gradient loses.

        grad, compressed and gate are strided; the rest is contiguous, `of_gate` with S rows before every frame's patches.
        """
        PARTS: tl.constexpr = (G + PART - 1) // PART
        t, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
        b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
        frame = tl.program_id(1).to(tl.int64) * T + t
        x = part * PART * 16 + tl.arange(0, PART * 16)
        inside = x < G * 16
        d = tl.arange(0, D)
        at = grad + b * o_b + h * o_h + t * o_t + x[:, None] * o_x
        g = tl.load(at + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        at = compressed + b * c_b + h * c_h + t * c_t + (x // 16)[:, None] * c_x
        coarse = tl.load(at + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        row = frame * (G * 16) + x
        fine = tl.load(attended + row[:, None] * D + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        gate += b * g_b + h * g_h + t * g_t + x * g_x
        gate_c = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
        gate_s = tl.load(gate + g_c, mask=inside, other=0.0).to(tl.float32)

        ours = (gate_s[:, None] * g).to(of_attended.dtype.element_ty)
        tl.store(of_attended + row[:, None] * D + d[None, :], ours, mask=inside[:, None])
        tl.store(delta + row, tl.sum(ours.to(tl.float32) * fine, 1), mask=inside)
        at = of_gate + (frame * (S + G * 16) + S + x) * 2
        tl.store(at, tl.sum(g * coarse, 1).to(of_gate.dtype.element_ty), mask=inside)
        tl.store(at + 1, tl.sum(g * fine, 1).to(of_gate.dtype.element_ty), mask=inside)
        theirs = tl.sum(tl.reshape(gate_c[:, None] * g, (PART, 16, D)), 1)
        block = part * PART + tl.arange(0, PART)
        at = of_compressed + (frame * G + block)[:, None] * D + d[None, :]
        tl.store(at, theirs.to(of_compressed.dtype.element_ty), mask=(block < G)[:, None])


def step_sizes(group: int, programs: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Blocks per step, warps (one to a query block, more of them for float32) and pipeline stages; from an H200."""
    if dtype == torch.float32:
        return {"STEP": 2, "num_warps": 2 * group, "num_stages": 2}
    step, stages = {1: (2, 3), 2: (4, 2)}.get(group, (8, 2))
    if group == 1 and programs <= 2 * multiprocessors(device):  # what counts is how long one program takes
        step = 4
    return {"STEP": step, "num_warps": group, "num_stages": stages}


def selected_attention_triton(*args, **kwargs) -> Tensor:
    """The kernels; arguments and results of `selected_attention`, and those of `attend_to_selected`."""
    return attend_to_selected(*args, **kwargs)[0]


def attend_to_selected(
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
    sizes: dict[str, int] | None = None,
    passed_on: bool | None = None,
    save: bool = False,
    begun: Begun | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The output of `selected_attention`, and with `save` what the backward pass needs.

    That is the patches' attention before the gate (B, H, T, 16 G, D), and the logarithms of the sums of exponentials of
    patches (B, H, T, 16 G) and special queries (B, H, T, S). group: a power of two. sizes: see `step_sizes`. passed_on:
    whether patches of several frames attend to special tokens in a launch of its own, by default if that is more than to
    their chosen blocks; those of one frame do. begun: what `begin` returned for the same arguments, if it was called before.
    out: without `save` and `begun`.
    """
    frames, resident, length, blocks = check(q, k, index, compressed, gate, fine, specials, group, shown)
    begun = begun or begin(q, k, v, fine, specials, out)
    out, special_lse = begun.out, begun.lse
    b, h, _, d = q.shape
    q, gate = q.unflatten(2, (frames, length)), gate.unflatten(2, (frames, length))
    k, v = alike(k.unflatten(2, (resident, length)), v.unflatten(2, (resident, length)))
    compressed = compressed.unflatten(2, (frames, blocks))
    q, gate, patches = q[:, :, :, specials:], gate[:, :, :, specials:], out[:, :, :, specials:]
    if passed_on is None:
        passed_on = resident * specials > index.shape[-1] * BLOCK
    passed_on = specials > 0 and (frames == 1 or passed_on)
    attended, attended_lse = out, special_lse  # not written unless saved
    if save:
        attended = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        attended_lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    states = 0 if begun.passed_on else passed_on + (shown is not None)  # of one frame they are small
    turn = max(1, WORKSPACE // (4 * b * frames * blocks * BLOCK * d * states)) if states else h
    for first in range(0, h, turn):
        heads = slice(first, first + turn)
        qs, ks, vs, cs, gs, os = (x[:, heads] for x in (q, k, v, compressed, gate, patches))
        lse = partial = whole_lse = whole = out  # not read unless passed on or shown
        if begun.passed_on:
            partial, lse = begun.passed_on
            begun.beside.wait()
        elif passed_on:
            partial = torch.empty(qs.shape, dtype=torch.float32, device=q.device)
            lse = frame_attention_triton(qs, ks[:, :, :, :specials], vs[:, :, :, :specials], fine, out=partial)[1]
        if shown is not None:
            whole = torch.empty(qs.shape, dtype=torch.float32, device=q.device)
            whole_lse = frame_attention_triton(qs, ks[:, :, :, specials:], vs[:, :, :, specials:], shown, out=whole)[1]
        grid = (frames * triton.cdiv(blocks, group), b * qs.shape[1])
        _selected[grid](
            qs,
            ks,
            vs,
            index[:, heads],
            fine.table.view(torch.uint8),
            os,
            partial,
            lse,
            whole,
            whole_lse,
            attended[:, heads],
            attended_lse[:, heads],
            cs,
            gs,
            *qs.stride()[:4],
            *ks.stride()[:4],
            *index.stride()[:3],
            *fine.table.expand(b, -1, -1).stride(),
            *os.stride()[:4],
            *cs.stride()[:4],
            *gs.stride(),
            *attended_lse.stride()[:2],
            qs.shape[1],
            frames,
            resident,
            index.shape[-1],
            d**-0.5 * LOG2E,
            G=blocks,
            S=specials,
            D=d,
            GROUP=group,
            PASSED_ON=passed_on,
            SHOWN=shown is not None,
            SAVED=save,
            WIDE=wide(ks),
            **(sizes or step_sizes(group, grid[0] * grid[1], q.dtype, q.device)),
        )
    begun.beside.join()
    return out.flatten(2, 3), attended, attended_lse, special_lse


def gate_backward(
    grad: Tensor, attended: Tensor, compressed: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the patches' attention before the gate, of compressed and gate, and the first one's `delta`.

    grad: of the gated sum (B, H, T, 16 G, D). attended: like it. compressed: (B, H, T, G, D). gate: (B, H, T, L, 2).
    """
    (b, h, t, blocks, d), specials = compressed.shape, gate.shape[3] - attended.shape[3]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    of_attended = torch.empty(attended.shape, dtype=attended.dtype, device=grad.device)
    of_compressed = torch.empty(compressed.shape, dtype=compressed.dtype, device=grad.device)
    of_gate = torch.zeros(gate.shape, dtype=gate.dtype, device=grad.device)
    delta = torch.empty(attended.shape[:4], dtype=torch.float32, device=grad.device)
    gate = gate[:, :, :, specials:]
    strides = *grad.stride()[:4], *compressed.stride()[:4], *gate.stride()
    part = min(4, triton.next_power_of_2(blocks))
    _gate_backward[(t * triton.cdiv(blocks, part), b * h)](
        grad,
        attended,
        compressed,
        gate,
        of_attended,
        of_compressed,
        of_gate,
        delta,
        *strides,
        h,
        t,
        G=blocks,
        S=specials,
        D=d,
        PART=part,
        num_warps=part,
    )
    return of_attended, of_compressed, of_gate, delta


def chosen_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    group: int,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of patch tokens from the attention to chosen blocks to `grads`, float32 and shaped like q, k, v.

    q: (B, H, T, 16 G, D); k, v: (B, H, N, 16 G, D); grad like q; lse, delta: (B, H, T, 16 G), all three contiguous. The
    keys' gradients follow the inverted index, made by a stable sort: no atomics, the same in every run.
    """
    (b, h, t, patches, d), n, keep = q.shape, k.shape[2], index.shape[-1]
    k, v = alike(k, v)
    blocks = patches // BLOCK
    index = index.contiguous()
    place = index.flatten(2).masked_fill(index.flatten(2) < 0, n * blocks)
    place, order = place.sort(dim=-1, stable=True)
    first = torch.arange(n * blocks + 1, dtype=torch.int32, device=q.device).expand(b, h, -1).contiguous()
    starts = torch.searchsorted(place, first, out_int32=True)
    strides = *q.stride()[:4], *k.stride()[:4]
    shared = h, t, n, keep, d**-0.5 * LOG2E
    constants = {"G": blocks, "D": d, "GROUP": group, "WIDE": wide(k) or wide(q)}
    low = q.dtype != torch.float32
    steps = {"STEP": 4 if low else 2, "num_warps": group if low else 2 * group, "num_stages": 2}
    _selected_backward_queries[(index.shape[2], b * h)](
        q, k, v, index, grad, lse, delta, grads[0], *strides, *grads[0].stride()[:4], *shared, **constants, **steps
    )
    steps = {"STEP": max(1, 2 // group), "num_warps": 1 if low and group <= 2 else 2, "num_stages": 2}
    strides = *strides, *grads[1].stride()[:4]
    _selected_backward_keys[(n * blocks, b * h)](
        q, k, v, order, starts, grad, lse, delta, *grads[1:], *strides, *shared, **constants, **steps
    )


class SelectedAttention(torch.autograd.Function):
    """`selected_attention` by the kernels, differentiable."""

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        compressed: Tensor,
        gate: Tensor,
        fine: Visible,
        specials: int,
        group: int,
        shown: Visible | None = None,
        begun: Begun | None = None,
    ) -> Tensor:
        """See `selected_attention`."""
        save = any(ctx.needs_input_grad)
        out, *saved = attend_to_selected(
            q, k, v, index, compressed, gate, fine, specials, group, shown, save=save, begun=begun
        )
        if save:
            ctx.save_for_backward(q, k, v, index, compressed, gate, out, *saved)
            ctx.fine, ctx.shown, ctx.specials, ctx.group = fine, shown, specials, group
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, compressed and gate."""
        q, k, v, index, compressed, gate, out, attended, lse, special_lse = ctx.saved_tensors
        specials, (frames, resident) = ctx.specials, ctx.fine.table.shape[1:]
        q, gate, out, grad = (x.unflatten(2, (frames, -1)) for x in (q, gate, out, grad))
        k, v = (x.unflatten(2, (resident, -1)) for x in (k, v))
        grads = tuple(torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))

        def rows(xs: tuple[Tensor, ...], part: slice) -> tuple[Tensor, ...]:
            return tuple(x[:, :, :, part] for x in xs)

        special, patch = slice(specials), slice(specials, None)
        of_attended, grad_coarse, grad_gate, delta = gate_backward(
            grad[:, :, :, patch], attended, compressed.unflatten(2, (frames, -1)), gate
        )
        chosen_backward(*rows((q, k, v), patch), index, of_attended, lse, delta, ctx.group, rows(grads, patch))
        if ctx.shown is not None:
            totals = rows(grads, patch)
            frame_attention_backward(*rows((q, k, v), patch), ctx.shown, of_attended, lse, delta, totals)
        if specials:
            for x in rows(grads, special):
                x.zero_()
            totals = *rows(grads[:1], patch), *rows(grads[1:], special)
            keys = rows((k, v), special)
            frame_attention_backward(q[:, :, :, patch], *keys, ctx.fine, of_attended, lse, delta, totals)
            totals = *rows(grads[:1], special), *grads[1:]
            q, out, grad = rows((q, out, grad), special)
            delta = (out.float() * grad.float()).sum(-1)
            frame_attention_backward(q, k, v, ctx.fine, grad, special_lse, delta, totals)
        results = [total.to(ctx.saved_tensors[0].dtype).flatten(2, 3) for total in grads]
        return *results, None, grad_coarse.flatten(2, 3), grad_gate.flatten(2, 3), *[None] * 5


def begin_selected(q: Tensor, k: Tensor, v: Tensor, fine: Visible, specials: int) -> Begun | None:
    """Start the part of `selected_attention` that needs no choice, beside what makes the choice; arguments as there.

    Only of one new frame, whose queries leave most of the device idle, and without gradients of them; else None.
    """
    if not on_kernels(q) or specials == 0 or fine.table.shape[1] > 1 or differentiated(q, k, v):
        return None
    return begin(q, k, v, fine, specials)


def selected_attention(
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
    begun: Begun | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Fine attention of every query block to its chosen key blocks, and the gated sum with the compressed output.

    q: (B, H, T * L, D). k, v: (B, H, N * L, D), strided views allowed. index: (B, H, T * ceil(G / group), K) int32 from
    `coarse.coarse_attention`: distinct key blocks of visible frames, -1 for none. compressed: (B, H, T * G, D). gate:
    (B, H, T * L, 2), after the sigmoid. fine: of a table (B or 1, T, N). The 16 queries of a block attend to the tokens of its
    chosen blocks, to all tokens of the frames `shown` to them and to the first `specials` tokens of every frame that they
    see; their output is gate[..., 0] * compressed + gate[..., 1] * attended. shown: of a table like fine's and within it, or
    None for no frame; none of their blocks may be in the index. Special queries attend to all tokens of those frames, ungated.
    begun: what `begin_selected` returned for the same arguments. out: where to write, maybe q itself, of which nothing is read
    once it is written. Returns (B, H, T * L, D), if not out stored so that `transpose(1, 2)` is contiguous. Raises ValueError on
    shapes that do not fit, and on an `out` where gradients are recorded or something has begun.
    """
    arguments = q, k, v, index, compressed, gate, fine, specials, group, shown
    if out is not None and (begun is not None or differentiated(q, k, v, compressed, gate)):
        raise ValueError("out: gradients are recorded, or the output has begun to be written elsewhere")
    if begun is not None or on_kernels(q):
        if out is not None:
            return attend_to_selected(*arguments, out=out)[0]
        return SelectedAttention.apply(*arguments, begun)
    if on_gathered(q, fine):
        check(q, k, index, compressed, gate, fine, specials, group, shown)
        return selected_attention_gathered(*arguments, out)
    return selected_attention_reference(*arguments, out)
