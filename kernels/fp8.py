"""Linear layers in FP8 (E4M3) with a scale per row of the weights and per token (Lite3R, section 3): kernels, reference.

x = values * scale, scale = max |row| / 448, values rounded to E4M3 (4 bits of exponent, 3 of mantissa, to nearest, ties to
even). The product of the values runs on the matrix units' 8-bit type and accumulates in float32; both scales are applied at
the end. Two matrix products are offered: torch's (cuBLAS, CUTLASS), and Triton's for what torch refuses.

Shape letters: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.kernels.frames import multiprocessors, on_kernels, tl, triton

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of E4M3
SMALLEST_ROW = 1e-12  # rows whose largest magnitude is below this become zeros


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless the arguments of a linear layer fit together."""
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        shape = None if bias is None else tuple(bias.shape)
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {shape} do not fit together")


def on_units(x: Tensor) -> bool:
    """Whether x lies on a GPU whose matrix units multiply FP8 (compute capability 8.9 and above)."""
    return on_kernels(x) and torch.cuda.get_device_capability(x.device) >= (8, 9)


def quantise_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch; arguments and results of `quantise_rows`."""
    x = x.float()
    largest = x.abs().amax(-1).clamp(min=SMALLEST_ROW)
    values = (
        x * (torch.full_like(largest, LARGEST) / largest)[..., None]
    )  # torch divides a number by a tensor less exactly
    return values.clamp(-LARGEST, LARGEST).to(E4M3), largest * (1 / LARGEST)


def scaled_product_reference(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Plain torch; arguments and results of `scaled_product`."""
    high = torch.promote_types(dtype, torch.float32)
    out = x.to(high) @ w.to(high).T * x_scale[:, None] * w_scale
    return (out if bias is None else out + bias).to(dtype)


if triton is not None:

    @triton.jit
    def _quantise(x, values, scale, M, K, x_m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """ROWS whole rows."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        inside = (row < M)[:, None] & (column < K)[None, :]
        at = row.to(tl.int64)[:, None]
        value = tl.load(x + at * x_m + column[None, :], mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(value), 1), 1e-12)
        value = value * tl.div_rn(tl.full([ROWS], 448.0, tl.float32), largest)[:, None]
        value = tl.clamp(value, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        # to E4M3's steps, by the sum with a number that has this step: the interpreter's conversion does not round to nearest
        power = ((tl.abs(value).to(tl.int32, bitcast=True) >> 23) << 23).to(tl.float32, bitcast=True)
        large = tl.maximum(power, 0.015625) * 1572864.0
        value = (value + large) - large
        tl.store(values + at * K + column[None, :], value.to(tl.float8e4nv), mask=inside)
        tl.store(scale + row, largest * (1 / 448.0), mask=row < M)

    @triton.jit
    def _product(
        x,
        x_scale,
        w,
        w_scale,
        bias,
        out,
        M,
        N,
        K,
        BIAS: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
        GROUP: tl.constexpr,
    ):
        """One tile of x w'. Neighbouring programs share GROUP rows of tiles, so that the cache holds their operands."""
        tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
        band = tl.program_id(0) // (GROUP * tiles_n)
        height = tl.minimum(tiles_m - band * GROUP, GROUP)
        within = tl.program_id(0) % (GROUP * tiles_n)
        m = (band * GROUP + within % height) * BM + tl.arange(0, BM)
        n = within // height * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        at_x = x + (m % M).to(tl.int64)[:, None] * K + k[None, :]  # rows beyond the end read others, and are not stored
        at_w = w + (n % N).to(tl.int64)[None, :] * K + k[:, None]
        acc = tl.zeros([BM, BN], tl.float32)
        for first in range(0, K, BK):
            left = K - first
            a = tl.load(at_x + first, mask=(k < left)[None, :], other=0.0)
            b = tl.load(at_w + first, mask=(k < left)[:, None], other=0.0)
            acc = tl.dot(a, b, acc, max_num_imprecise_acc=BK)  # the units add up to 14 bits only
        acc *= (
            tl.load(x_scale + m, mask=m < M, other=0.0)[:, None] * tl.load(w_scale + n, mask=n < N, other=0.0)[None, :]
        )
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        place = out + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def quantise_rows_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel; arguments and results of `quantise_rows`."""
    k = x.shape[-1]
    flat = x.reshape(-1, k)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    values = torch.empty(flat.shape, dtype=E4M3, device=x.device)
    scale = torch.empty(len(flat), dtype=torch.float32, device=x.device)
    columns = triton.next_power_of_2(k)
    rows = max(1, 4096 // columns)
    _quantise[(triton.cdiv(len(flat), rows),)](
        flat, values, scale, len(flat), k, flat.stride(0), ROWS=rows, COLUMNS=columns, num_warps=4
    )
    return values.view(x.shape), scale.view(x.shape[:-1])


def product_sizes(m: int, n: int, device: torch.device) -> dict[str, int]:
    """Tiles, warps and pipeline stages: the largest tile that still gives each multiprocessor one."""
    for bm, bn in ((128, 256), (128, 128), (64, 128)):
        if triton.cdiv(m, bm) * triton.cdiv(n, bn) >= multiprocessors(device):
            break
    return {"BM": bm, "BN": bn, "BK": 128, "GROUP": 8, "num_warps": 8 if bm == 128 else 4, "num_stages": 3}


def scaled_product_triton(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    sizes: dict[str, int] | None = None,
) -> Tensor:
    """Triton's product; arguments and results of `scaled_product`. sizes: see `product_sizes`."""
    (m, k), n = x.shape, len(w)
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    sizes = sizes or product_sizes(m, n, x.device)
    grid = (triton.cdiv(m, sizes["BM"]) * triton.cdiv(n, sizes["BN"]),)
    bias_or_any = x_scale if bias is None else bias
    _product[grid](x, x_scale, w, w_scale, bias_or_any, out, m, n, k, BIAS=bias is not None, **sizes)
    return out


def scaled_product_library(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """torch's product; arguments and results of `scaled_product`. Only for bf16, and K and N that 16 divides."""
    bias = None if bias is None else bias.to(dtype)
    return torch._scaled_mm(x, w.T, x_scale[:, None], w_scale[None], bias, out_dtype=dtype, use_fast_accum=True)


def library_fits(k: int, n: int, dtype: torch.dtype) -> bool:
    """Whether torch's product takes row-wise scales at these sizes."""
    return dtype == torch.bfloat16 and k % 16 == 0 and n % 16 == 0


class _Linear(torch.autograd.Function):
    """`fp8_linear_straight_through` by the kernels."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        operands = *quantise_rows_triton(x.reshape(-1, x.shape[-1])), *quantise_rows_triton(weight)
        ctx.save_for_backward(*operands)
        ctx.types = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return scaled_product(*operands, bias, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, x_scale, w, w_scale = ctx.saved_tensors
        x_type, w_type, bias_type = ctx.types
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = flat @ (w.float() * w_scale[:, None]).to(x_type)
        grad_w = flat.T @ (x.float() * x_scale[:, None]).to(x_type)
        grad_bias = None if bias_type is None else flat.sum(0, dtype=torch.float32).to(bias_type)
        return grad_x.view(*grad.shape[:-1], -1), grad_w.to(w_type), grad_bias


class _Round(torch.autograd.Function):
    """To E4M3 with a scale per row, and back; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        values, scale = quantise_rows_reference(x)
        return values.to(x.dtype) * scale[..., None].to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return grad


def fp8_linear_straight_through_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain torch; arguments and results of `fp8_linear_straight_through`."""
    high = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(high)
    return F.linear(_Round.apply(x.to(high)), _Round.apply(weight.to(high)), bias).to(x.dtype)


def fp8_linear_straight_through_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The kernels; arguments and results of `fp8_linear_straight_through`."""
    return _Linear.apply(x, weight, bias)


def fp8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain torch; arguments and results of `fp8_linear`."""
    values, x_scale = quantise_rows_reference(x.reshape(-1, x.shape[-1]))
    return scaled_product_reference(values, x_scale, weight, scale, bias, x.dtype).view(*x.shape[:-1], -1)


def fp8_linear_triton(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The kernels; arguments and results of `fp8_linear`."""
    values, x_scale = quantise_rows_triton(x.reshape(-1, x.shape[-1]))
    return scaled_product(values, x_scale, weight, scale, bias, x.dtype).view(*x.shape[:-1], -1)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in E4M3 with a scale of its own (Lite3R, section 3): tokens of an activation, or rows of a weight.

    x: (..., K), any strides. Returns values (..., K) float8_e4m3fn and scale (...) float32 with x ~ values * scale; a row
    whose largest magnitude is below 1e-12 becomes zeros, one with NaN or infinity makes its products NaN. One pass over x.
    """
    return (quantise_rows_triton if on_units(x) else quantise_rows_reference)(x)


def scaled_product(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product of two matrices in E4M3, scaled: (x * x_scale) (w * w_scale)' + bias.

    x: (M, K), w: (N, K), both float8_e4m3fn and contiguous. x_scale: (M,), w_scale: (N,) float32. bias: (N,) or None.
    Returns (M, N) in `dtype`. Raises ValueError on shapes that do not fit.
    """
    check(x, w, bias)
    if x_scale.shape != x.shape[:1] or w_scale.shape != w.shape[:1]:
        raise ValueError(
            f"scales {tuple(x_scale.shape)} and {tuple(w_scale.shape)} are not ({len(x)},) and ({len(w)},)"
        )
    if not x.is_cuda:
        return scaled_product_reference(x, x_scale, w, w_scale, bias, dtype)
    run = scaled_product_library if library_fits(x.shape[1], len(w), dtype) else scaled_product_triton
    return run(x, x_scale, w, w_scale, bias, dtype)


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer of stored 8-bit weights, for inference (Lite3R, section 3).

    x: (..., K). weight: (N, K) float8_e4m3fn and scale: (N,) from `quantise_rows`. bias: (N,) or None. Each token of x is
    rounded with a scale of its own. Returns (..., N) in x's type. No gradient. Raises ValueError on shapes that do not fit.
    """
    check(x, weight, bias)
    return (fp8_linear_triton if on_units(x) else fp8_linear_reference)(x, weight, scale, bias)


def fp8_linear_straight_through(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer that rounds weights and activations to E4M3 at each call, for quantisation-aware training.

    x: (..., K). weight: (N, K) and bias: (N,) or None in any float type. Returns (..., N) in x's type. Backward, the rounding
    counts as the identity (straight-through) and the rounded operands are the ones multiplied, in x's type
    (Lite3R, section 3). Raises ValueError on shapes that do not fit.
    """
    check(x, weight, bias)
    run = fp8_linear_straight_through_triton if on_units(x) else fp8_linear_straight_through_reference
    return run(x, weight, bias)
