"""Linear attention between the tokens of frames (Lite3R, section 3): Triton kernels and their reference, differentiable.

phi(q) (phi(K)' V) / (phi(q) sum phi(K)) with phi = ELU + 1. What a query needs of a frame's keys and values is one small
matrix per head, and matrices of several frames add up: visibility is a sum over the frames that a query frame sees. A stream
keeps one running sum; whoever sees everything (offline) passes all queries as one frame and all keys as frames seen by it.

Memory feeds these kernels, not the matrix units: so for 16-bit inputs the products run in TF32, whose operands keep 8 times
the precision of bf16 at no cost in time. phi(K), the states and all sums are float32.

Shape letters: see `frames`. A state is float32 (D + 1, D): phi(K)' V, and the sum of phi(K) as its last row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.kernels.frames import Visible, check, on_kernels, tl, triton

CHUNK = 1024  # rows whose contributions to a state one program adds up


def key_states_reference(k: Tensor, v: Tensor) -> Tensor:
    """Plain torch; arguments and results of `key_states`."""
    high = torch.promote_types(k.dtype, torch.float32)
    features = F.elu(k.to(high)) + 1
    return torch.cat([features.mT @ v.to(high), features.sum(-2, keepdim=True)], -2)


def read_states_reference(q: Tensor, states: Tensor) -> Tensor:
    """Plain torch; arguments and results of `read_states`."""
    features = F.elu(q.to(states.dtype)) + 1
    total = (features * states[..., -1:, :]).sum(-1, keepdim=True)
    return (features @ states[..., :-1, :] / total.masked_fill(total == 0, 1)).to(q.dtype)


if triton is not None:

    @triton.jit
    def _feature(x):
        return tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))

    @triton.jit
    def _states(
        k,
        v,
        states,
        k_b,
        k_h,
        k_n,
        k_y,
        v_b,
        v_h,
        v_n,
        v_y,
        H,
        N,
        Y,
        CHUNK,
        D: tl.constexpr,
        BY: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """The state of one chunk of a frame's keys and values, of one head."""
        frame = tl.program_id(0).to(tl.int64)
        b, h, n = frame // (H * N), frame // N % H, frame % N
        d = tl.arange(0, D)
        k += b * k_b + h * k_h + n * k_n
        v += b * v_b + h * v_h + n * v_n
        begin = tl.program_id(1) * CHUNK
        acc = tl.zeros([D, D], tl.float32)
        total = tl.zeros([D], tl.float32)
        for first in range(begin, tl.minimum(begin + CHUNK, Y), BY):
            y = (first + tl.arange(0, BY)).to(tl.int64)
            live = (y < Y)[:, None]
            key = tl.load(k + y[:, None] * k_y + d[None, :], mask=live, other=0.0).to(tl.float32)
            value = tl.load(v + y[:, None] * v_y + d[None, :], mask=live, other=0.0).to(tl.float32)
            feature = tl.where(live, _feature(key), 0.0)
            acc = tl.dot(tl.trans(feature), value, acc, input_precision=PRECISION)
            total += tl.sum(feature, 0)
        states += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + frame) * ((D + 1) * D)
        tl.store(states + d[:, None] * D + d[None, :], acc)
        tl.store(states + D * D + d, total)

    @triton.jit
    def _states_backward(
        k,
        v,
        grad,
        grad_k,
        grad_v,
        k_b,
        k_h,
        k_n,
        k_y,
        v_b,
        v_h,
        v_n,
        v_y,
        H,
        N,
        Y,
        D: tl.constexpr,
        BY: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Gradients of one tile of keys and values; the results are contiguous."""
        frame = tl.program_id(0).to(tl.int64)
        b, h, n = frame // (H * N), frame // N % H, frame % N
        y, d = (tl.program_id(1) * BY + tl.arange(0, BY)).to(tl.int64), tl.arange(0, D)
        live = (y < Y)[:, None]
        k += b * k_b + h * k_h + n * k_n
        v += b * v_b + h * v_h + n * v_n
        key = tl.load(k + y[:, None] * k_y + d[None, :], mask=live, other=0.0).to(tl.float32)
        value = tl.load(v + y[:, None] * v_y + d[None, :], mask=live, other=0.0).to(tl.float32)
        grad += frame * ((D + 1) * D)
        matrix = tl.load(grad + d[:, None] * D + d[None, :])
        total = tl.load(grad + D * D + d)
        feature = _feature(key)
        slope = tl.where(key > 0, 1.0, feature)
        to_key = (tl.dot(value, tl.trans(matrix), input_precision=PRECISION) + total[None, :]) * slope
        to_value = tl.dot(feature, matrix, input_precision=PRECISION)
        at = frame * Y * D + y[:, None] * D + d[None, :]
        tl.store(grad_k + at, to_key.to(grad_k.dtype.element_ty), mask=live)
        tl.store(grad_v + at, to_value.to(grad_v.dtype.element_ty), mask=live)

    @triton.jit
    def _read(
        q,
        states,
        out,
        q_b,
        q_h,
        q_t,
        q_x,
        o_b,
        o_h,
        o_t,
        o_x,
        H,
        T,
        X,
        D: tl.constexpr,
        BX: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """One tile of a frame's queries, of one head, against the state that they see."""
        frame = tl.program_id(0).to(tl.int64)
        b, h, t = frame // (H * T), frame // T % H, frame % T
        x, d = (tl.program_id(1) * BX + tl.arange(0, BX)).to(tl.int64), tl.arange(0, D)
        live = (x < X)[:, None]
        q += b * q_b + h * q_h + t * q_t
        feature = _feature(tl.load(q + x[:, None] * q_x + d[None, :], mask=live, other=0.0).to(tl.float32))
        states += frame * ((D + 1) * D)
        matrix = tl.load(states + d[:, None] * D + d[None, :])
        total = tl.sum(feature * tl.load(states + D * D + d)[None, :], 1)
        value = tl.dot(feature, matrix, input_precision=PRECISION) / tl.where(total == 0, 1.0, total)[:, None]
        out += b * o_b + h * o_h + t * o_t
        tl.store(out + x[:, None] * o_x + d[None, :], value.to(out.dtype.element_ty), mask=live)

    @triton.jit
    def _read_backward(
        q,
        states,
        grad,
        grad_q,
        grad_states,
        q_b,
        q_h,
        q_t,
        q_x,
        g_b,
        g_h,
        g_t,
        g_x,
        H,
        T,
        X,
        CHUNK,
        D: tl.constexpr,
        BX: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Gradients of one chunk of a frame's queries, and what they add to that of the state. grad_q is contiguous."""
        frame = tl.program_id(0).to(tl.int64)
        b, h, t = frame // (H * T), frame // T % H, frame % T
        d = tl.arange(0, D)
        q += b * q_b + h * q_h + t * q_t
        grad += b * g_b + h * g_h + t * g_t
        grad_q += frame * X * D
        states += frame * ((D + 1) * D)
        matrix = tl.load(states + d[:, None] * D + d[None, :])
        total = tl.load(states + D * D + d)
        acc = tl.zeros([D, D], tl.float32)
        acc_total = tl.zeros([D], tl.float32)
        begin = tl.program_id(1) * CHUNK
        for first in range(begin, tl.minimum(begin + CHUNK, X), BX):
            x = (first + tl.arange(0, BX)).to(tl.int64)
            live = (x < X)[:, None]
            query = tl.load(q + x[:, None] * q_x + d[None, :], mask=live, other=0.0).to(tl.float32)
            g = tl.load(grad + x[:, None] * g_x + d[None, :], mask=live, other=0.0).to(tl.float32)
            feature = _feature(query)
            divisor = tl.sum(feature * total[None, :], 1)
            divisor = tl.where(divisor == 0, 1.0, divisor)[:, None]
            # the output once more, because the stored one is rounded and the difference below would feel it
            value = tl.dot(feature, matrix, input_precision=PRECISION) / divisor
            g = g / divisor
            to_divisor = -tl.sum(g * value, 1)
            to_feature = tl.dot(g, tl.trans(matrix), input_precision=PRECISION) + to_divisor[:, None] * total[None, :]
            to_query = to_feature * tl.where(query > 0, 1.0, feature)
            tl.store(grad_q + x[:, None] * D + d[None, :], to_query.to(grad_q.dtype.element_ty), mask=live)
            acc = tl.dot(tl.trans(feature), g, acc, input_precision=PRECISION)
            acc_total += tl.sum(feature * to_divisor[:, None], 0)
        grad_states += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + frame) * ((D + 1) * D)
        tl.store(grad_states + d[:, None] * D + d[None, :], acc)
        tl.store(grad_states + D * D + d, acc_total)


def tile_sizes(rows: int, width: int, dtype: torch.dtype) -> tuple[int, dict[str, int | str]]:
    """Rows per tile, and how the kernels multiply and are scheduled for frames of so many rows of so many numbers."""
    low = dtype != torch.float32
    tile = (4096 if low else 2048) // max(64, width)
    tile = min(tile, max(16, triton.next_power_of_2(rows)))
    return tile, {"PRECISION": "tf32" if low else "ieee", "num_warps": 4 if width <= 64 else 8, "num_stages": 2}


class _KeyStates(torch.autograd.Function):
    """`key_states` by the kernels."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, k: Tensor, v: Tensor) -> Tensor:
        b, h, n, y, d = k.shape
        tile, options = tile_sizes(y, d, k.dtype)
        chunks = triton.cdiv(y, CHUNK)
        states = torch.empty(chunks, b, h, n, d + 1, d, dtype=torch.float32, device=k.device)
        _states[(b * h * n, chunks)](
            k, v, states, *k.stride()[:4], *v.stride()[:4], h, n, y, CHUNK, D=d, BY=tile, **options
        )
        ctx.save_for_backward(k, v)
        return states[0] if chunks == 1 else states.sum(0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        k, v = ctx.saved_tensors
        b, h, n, y, d = k.shape
        tile, options = tile_sizes(y, d, k.dtype)
        grad_k, grad_v = (torch.empty(k.shape, dtype=x.dtype, device=k.device) for x in (k, v))
        grid = b * h * n, triton.cdiv(y, tile)
        strides = *k.stride()[:4], *v.stride()[:4]
        _states_backward[grid](k, v, grad.contiguous(), grad_k, grad_v, *strides, h, n, y, D=d, BY=tile, **options)
        return grad_k, grad_v


class _ReadStates(torch.autograd.Function):
    """`read_states` by the kernels."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, q: Tensor, states: Tensor) -> Tensor:
        b, h, t, x, d = q.shape
        tile, options = tile_sizes(x, d, q.dtype)
        states = states.contiguous()
        out = torch.empty(b, t, x, h, d, dtype=q.dtype, device=q.device).permute(0, 3, 1, 2, 4)
        grid = b * h * t, triton.cdiv(x, tile)
        _read[grid](q, states, out, *q.stride()[:4], *out.stride()[:4], h, t, x, D=d, BX=tile, **options)
        ctx.save_for_backward(q, states)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, states = ctx.saved_tensors
        b, h, t, x, d = q.shape
        tile, options = tile_sizes(x, d, q.dtype)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        chunks = triton.cdiv(x, CHUNK)
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        grad_states = torch.empty(chunks, *states.shape, dtype=torch.float32, device=q.device)
        strides = *q.stride()[:4], *grad.stride()[:4]
        _read_backward[(b * h * t, chunks)](
            q, states, grad, grad_q, grad_states, *strides, h, t, x, CHUNK, D=d, BX=tile, **options
        )
        return grad_q, grad_states[0] if chunks == 1 else grad_states.sum(0)


def key_states_triton(k: Tensor, v: Tensor) -> Tensor:
    """The kernels; arguments and results of `key_states`."""
    return _KeyStates.apply(k, v)


def read_states_triton(q: Tensor, states: Tensor) -> Tensor:
    """The kernels; arguments and results of `read_states`."""
    return _ReadStates.apply(q, states)


def key_states(k: Tensor, v: Tensor) -> Tensor:
    """What linear attention remembers of each frame (Lite3R, section 3), differentiable.

    k, v: (B, H, N, Y, D), strided views allowed, D a power of two, at least 16. Returns states (B, H, N, D + 1, D), float32
    or finer. They are additive: a stream adds a frame's state to its running sum, or takes it off again.
    Raises ValueError on shapes that do not fit.
    """
    if k.ndim != 5 or k.shape != v.shape:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    return (key_states_triton if on_kernels(k) else key_states_reference)(k, v)


def read_states(q: Tensor, states: Tensor) -> Tensor:
    """Linear attention of each query frame to the keys that its state sums up (Lite3R, section 3), differentiable.

    q: (B, H, T, X, D). states: (B, H, T, D + 1, D), sums of `key_states`. Returns (B, H, T, X, D) in q's type; zeros for an
    empty state. Raises ValueError on shapes that do not fit.
    """
    if q.ndim != 5 or states.shape != (*q.shape[:3], q.shape[4] + 1, q.shape[4]):
        raise ValueError(f"q {tuple(q.shape)} and states {tuple(states.shape)} do not fit together")
    return (read_states_triton if on_kernels(q) else read_states_reference)(q, states)


def sum_visible(states: Tensor, visible: Visible) -> Tensor:
    """The sum of the states that each query frame sees.

    states: (B, H, N, D + 1, D). visible: of a table (B or 1, T, N). Returns (B, H, T, D + 1, D). Frames that nobody sees may hold
    anything, also NaN.
    """
    b, h, n = states.shape[:3]
    states = states.masked_fill(~visible.table.any(1)[:, None, :, None, None], 0)
    return (visible.table[:, None].to(states.dtype) @ states.flatten(3)).unflatten(3, states.shape[3:])


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Plain torch; arguments and results of `linear_attention`."""
    check(q, k, v, visible)
    return read_states_reference(q, sum_visible(key_states_reference(k, v), visible))


def linear_attention_triton(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """The kernels; arguments and results of `linear_attention`."""
    check(q, k, v, visible)
    return read_states_triton(q, sum_visible(key_states_triton(k, v), visible))


def linear_attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Linear attention of all rows of a query frame to all rows of the key frames that it sees (Lite3R, section 3).

    q: (B, H, T, X, D). k, v: (B, H, N, Y, D), strided views allowed, D a power of two, at least 16. visible: of a table
    (B or 1, T, N). Returns (B, H, T, X, D) in q's type; a frame that sees nothing gets zeros. Differentiable. Raises
    ValueError on shapes that do not fit.
    """
    run = linear_attention_triton if on_kernels(q) else linear_attention_reference
    with torch.autocast(q.device.type, enabled=False):  # it would round states and their sums
        return run(q, k, v, visible)
