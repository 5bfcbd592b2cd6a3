"""Selected fine attention with its gated sum (Speed3R, section 3): Triton kernels and their plain-torch reference.

Special queries attend densely, which is `frames.frame_attention`. The 16 queries of a patch block attend to the special
tokens of the frames that they see and to the tokens of their chosen blocks; the epilogue adds the gated compressed output.
Where the special tokens are many, a dense launch of their own passes its softmax state on; where they are few, each block
of queries reads them along.

16 queries per gathered key do 16 operations per byte, which the cache in front of the multiprocessors cannot feed at the
rate of the tensor cores; `group` lets neighbouring blocks share a selection and thereby their keys. Each warp owns the 16
queries of one block, so no softmax statistic crosses warps.

Shape letters: see `frames`; L = S + 16 G tokens per frame (S special ones first), K chosen blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.kernels.frames import (
    LOG2E,
    Visible,
    alike,
    frame_attention_triton,
    multiprocessors,
    on_kernels,
    tl,
    triton,
    wide,
)

BLOCK = 16  # tokens of one 4 x 4 window of patches
WORKSPACE = 2**29  # bytes at most for softmax states between launches; more heads than that take turns


def check(
    q: Tensor, k: Tensor, index: Tensor, compressed: Tensor, gate: Tensor, fine: Visible, specials: int, group: int
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

    def join(self) -> None:
        """What follows waits for the work beside it."""
        if self.wanted:
            self.main.wait_stream(self.side)


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
) -> Tensor:
    """Plain torch; arguments and results of `selected_attention`."""
    frames, resident, length, blocks = check(q, k, index, compressed, gate, fine, specials, group)
    b, h = q.shape[:2]
    chosen = torch.zeros(*index.shape[:3], resident * blocks + 1, dtype=torch.bool, device=q.device)
    chosen = chosen.scatter_(-1, index.long() % (resident * blocks + 1), True)[..., :-1]  # -1 falls into the last place
    chosen = chosen.view(b, h, frames, -1, 1, resident, blocks).expand(-1, -1, -1, -1, group, -1, -1)
    chosen = chosen.flatten(3, 4)[:, :, :, :blocks]
    table = fine.table
    mask = table[:, None, :, None, :, None].repeat(b // len(table), h, 1, length, 1, length)
    mask[:, :, :, specials:, :, specials:] &= chosen.repeat_interleave(BLOCK, 3).repeat_interleave(BLOCK, 5)
    mask = mask.flatten(4, 5).flatten(2, 3)
    seen = table.any(1).repeat_interleave(length, 1)[:, None, :, None]  # what nobody sees may hold anything, also NaN
    k, v = k.masked_fill(~seen, 0), v.masked_fill(~seen, 0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).masked_fill(~mask.any(-1, keepdim=True), 0)
    out, gate = out.unflatten(2, (frames, length)), gate.unflatten(2, (frames, length))[:, :, :, specials:]
    coarse = compressed.unflatten(2, (frames, blocks)).repeat_interleave(BLOCK, 3)
    patches = gate[..., :1] * coarse + gate[..., 1:] * out[:, :, :, specials:]
    return torch.cat([out[:, :, :, :specials], patches], 3).flatten(2, 3)


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
        WIDE: tl.constexpr,
    ):
        """The queries of GROUP neighbouring blocks against special tokens and chosen blocks, 16 * STEP tokens at a time.

        v has the strides of k. PASSED_ON: `partial` and `partial_lse` hold the attention to the S special tokens.
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

        at = compressed + b * c_b + h * c_h + t64 * c_t
        coarse = tl.load(at + (x // 16)[:, None] * c_x + d[None, :], mask=inside[:, None], other=0.0)
        gate += b * g_b + h * g_h + t64 * g_t
        gate_c = tl.load(gate + x * g_x, mask=inside, other=0.0).to(tl.float32)
        gate_s = tl.load(gate + x * g_x + g_c, mask=inside, other=0.0).to(tl.float32)
        acc = gate_c[:, None] * coarse.to(tl.float32) + gate_s[:, None] * acc
        at = out + b * o_b + h * o_h + t64 * o_t
        tl.store(at + x[:, None] * o_x + d[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None])


def step_sizes(group: int, programs: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Blocks per step, warps (one to a query block, more of them for float32) and pipeline stages; from an H200."""
    if dtype == torch.float32:
        return {"STEP": 2, "num_warps": 2 * group, "num_stages": 2}
    step, stages = {1: (2, 3), 2: (4, 2)}.get(group, (8, 2))
    if group == 1 and programs <= 2 * multiprocessors(device):  # what counts is how long one program takes
        step = 4
    return {"STEP": step, "num_warps": group, "num_stages": stages}


def selected_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    compressed: Tensor,
    gate: Tensor,
    fine: Visible,
    specials: int,
    group: int = 1,
    sizes: dict[str, int] | None = None,
    passed_on: bool | None = None,
) -> Tensor:
    """The kernels; arguments and results of `selected_attention`. group: a power of two.

    sizes: see `step_sizes`. passed_on: whether patches attend to special tokens in a launch of its own, by default if
    that is more than to their chosen blocks.
    """
    frames, resident, length, blocks = check(q, k, index, compressed, gate, fine, specials, group)
    b, h, _, d = q.shape
    q, gate = q.unflatten(2, (frames, length)), gate.unflatten(2, (frames, length))
    k, v = alike(k.unflatten(2, (resident, length)), v.unflatten(2, (resident, length)))
    compressed = compressed.unflatten(2, (frames, blocks))
    out = torch.empty(b, frames, length, h, d, dtype=q.dtype, device=q.device).permute(0, 3, 1, 2, 4)
    beside = Beside(q.device, frames == 1)  # one frame's queries leave most of the device idle
    if specials:
        with beside:
            frame_attention_triton(q[:, :, :, :specials], k, v, fine, out=out[:, :, :, :specials])
    q, gate, patches = q[:, :, :, specials:], gate[:, :, :, specials:], out[:, :, :, specials:]
    if passed_on is None:
        passed_on = resident * specials > index.shape[-1] * BLOCK
    passed_on = passed_on and specials > 0
    turn = max(1, WORKSPACE // (4 * b * frames * blocks * BLOCK * d)) if passed_on else h
    for first in range(0, h, turn):
        heads = slice(first, first + turn)
        qs, ks, vs, cs, gs, os = (x[:, heads] for x in (q, k, v, compressed, gate, patches))
        lse = partial = out  # not read unless passed on
        if passed_on:
            partial = torch.empty(qs.shape, dtype=torch.float32, device=q.device)
            lse = frame_attention_triton(qs, ks[:, :, :, :specials], vs[:, :, :, :specials], fine, out=partial)[1]
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
            cs,
            gs,
            *qs.stride()[:4],
            *ks.stride()[:4],
            *index.stride()[:3],
            *fine.table.expand(b, -1, -1).stride(),
            *os.stride()[:4],
            *cs.stride()[:4],
            *gs.stride(),
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
            WIDE=wide(ks),
            **(sizes or step_sizes(group, grid[0] * grid[1], q.dtype, q.device)),
        )
    beside.join()
    return out.flatten(2, 3)


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
) -> Tensor:
    """Fine attention of every query block to its chosen key blocks, and the gated sum with the compressed output.

    q: (B, H, T * L, D). k, v: (B, H, N * L, D), strided views allowed. index: (B, H, T * ceil(G / group), K) int32 from
    `coarse.coarse_attention`: distinct key blocks of visible frames, -1 for none. compressed: (B, H, T * G, D). gate:
    (B, H, T * L, 2), after the sigmoid. fine: of a table (B or 1, T, N). The 16 queries of a block attend to the tokens of its
    chosen blocks and to the first `specials` tokens of every frame that they see; their output is
    gate[..., 0] * compressed + gate[..., 1] * attended. Special queries attend to all tokens of those frames, ungated.
    Returns (B, H, T * L, D), stored so that `transpose(1, 2)` is contiguous. Raises ValueError on shapes that do not fit.
    """
    run = selected_attention_triton if on_kernels(q) else selected_attention_reference
    return run(q, k, v, index, compressed, gate, fine, specials, group)
