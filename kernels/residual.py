"""Residual sum, alone and fused with the layer norm that follows: Triton kernels and their references.

Between two linear layers of a pre-norm transformer stand x + gamma * branch, its layer norm and the cast for the next matrix
product, all three bound by memory: one pass reads x and the branch, and writes the sum and the normalised rows, without a
float32 copy of either operand. The sum alone is there for operands of two types, which plain torch adds at half the rate. The backward pass is one kernel too: it makes the statistics again from the sum, which it has
to read anyway.

Shape letters: M rows (all axes but the last) of C channels; C need not be a power of two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.kernels.frames import multiprocessors, tl, triton
from speed3r_ros.kernels.qkv import contiguous, differentiated, fused


def check(x: Tensor, branch: Tensor | None, *vectors: Tensor | None) -> None:
    """Raise ValueError unless the arguments of `add_norm` or `add` fit together."""
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"x {tuple(x.shape)} and branch {tuple(branch.shape)} differ in shape")
    for vector in vectors:
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{tuple(vector.shape)} is not ({x.shape[-1]},), a value per channel")


def add_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    gamma: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain torch; arguments and results of `add_norm`."""
    check(x, branch, weight, bias, gamma)
    if branch is not None:
        x = x + (branch if gamma is None else branch * gamma)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(dtype)


if triton is not None:

    @triton.jit
    def _standardise(y, inside, C: tl.constexpr, eps):
        """Rows with mean 0 and variance 1, zero outside, and the reciprocals of their deviations."""
        y = tl.where(inside, y - (tl.sum(y, 1) / C)[:, None], 0.0)
        r = tl.rsqrt(tl.sum(y * y, 1) / C + eps)[:, None]
        return y * r, r

    @triton.jit(do_not_specialize=["M"])
    def _add_norm(
        x,
        branch,
        gamma,
        weight,
        bias,
        total,
        out,
        M,
        eps,
        C: tl.constexpr,
        BRANCH: tl.constexpr,
        GAMMA: tl.constexpr,
        NORM: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """ROWS whole rows. BRANCH: there is something to add; GAMMA: times a factor per channel; NORM: norm the sum."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        channel = column < C
        inside = (row < M)[:, None] & channel[None, :]
        at = row.to(tl.int64)[:, None] * C + column[None, :]
        y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if BRANCH:
            z = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
            if GAMMA:
                z *= tl.load(gamma + column, mask=channel, other=0.0).to(tl.float32)[None, :]
            y += z
            tl.store(total + at, y.to(total.dtype.element_ty), mask=inside)
        if NORM:
            y, _ = _standardise(y, inside, C, eps)
            y *= tl.load(weight + column, mask=channel, other=0.0).to(tl.float32)[None, :]
            y += tl.load(bias + column, mask=channel, other=0.0).to(tl.float32)[None, :]
            tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["M"])
    def _backward(
        total,
        branch,
        gamma,
        weight,
        grad_total,
        grad_out,
        grad_x,
        grad_branch,
        partial,
        M,
        eps,
        C: tl.constexpr,
        BRANCH: tl.constexpr,
        GAMMA: tl.constexpr,
        PASSED_ON: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """Gradients of every n-th ROWS rows, n programs, and their share of the gradients of weight, bias and gamma.

        PASSED_ON: the sum itself has a gradient too. partial: (n, 2 or, with gamma, 3, C).
        """
        column = tl.arange(0, COLUMNS)
        channel = column < C
        w = tl.load(weight + column, mask=channel, other=0.0).to(tl.float32)[None, :]
        if GAMMA:
            factor = tl.load(gamma + column, mask=channel, other=0.0).to(tl.float32)[None, :]
        of_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
        of_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
        of_gamma = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
            row = first + tl.arange(0, ROWS)
            inside = (row < M)[:, None] & channel[None, :]
            at = row.to(tl.int64)[:, None] * C + column[None, :]
            y = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
            y, r = _standardise(y, inside, C, eps)
            of_weight += g * y
            of_bias += g
            g *= w
            mean = (tl.sum(g, 1) / C)[:, None]
            along = (tl.sum(g * y, 1) / C)[:, None]
            g = (g - mean - y * along) * r
            if PASSED_ON:
                g += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_x + at, g.to(grad_x.dtype.element_ty), mask=inside)
            if GAMMA:
                of_gamma += g * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
                g *= factor
            if BRANCH:
                tl.store(grad_branch + at, g.to(grad_branch.dtype.element_ty), mask=inside)
        partial += tl.program_id(0) * ((3 if GAMMA else 2) * C) + column
        tl.store(partial, tl.sum(of_weight, 0), mask=channel)
        tl.store(partial + C, tl.sum(of_bias, 0), mask=channel)
        if GAMMA:
            tl.store(partial + 2 * C, tl.sum(of_gamma, 0), mask=channel)


def sizes_of(rows: int, channels: int) -> dict[str, int]:
    """Rows and columns of a tile, and its warps: 8 values to a thread; several rows where they are narrow and many."""
    columns = triton.next_power_of_2(channels)
    count = max(1, 2048 // columns) if rows > 4096 else 1
    return {"ROWS": count, "COLUMNS": columns, "num_warps": min(16, max(1, count * columns // 256))}


def add_norm_triton(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    gamma: Tensor | None = None,
    sizes: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel; arguments and results of `add_norm`. sizes: see `sizes_of`."""
    check(x, branch, weight, bias, gamma)
    channels = x.shape[-1]
    rows = x.numel() // channels
    sizes = sizes or sizes_of(rows, channels)
    total = x = x.contiguous()
    branch, gamma, weight, bias = contiguous(branch, gamma, weight, bias)
    if branch is not None:
        total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype), device=x.device)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _add_norm[(triton.cdiv(rows, sizes["ROWS"]),)](
        x,
        branch,
        gamma,
        weight,
        bias,
        total,
        out,
        rows,
        eps,
        C=channels,
        BRANCH=branch is not None,
        GAMMA=gamma is not None,
        NORM=True,
        **sizes,
    )
    return total, out


def add_norm_backward(
    total: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    eps: float,
    grad_total: Tensor | None,
    grad_out: Tensor,
    branch_dtype: torch.dtype | None,
    sizes: dict[str, int] | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, of the branch if it has a type, and of weight, bias and maybe gamma, (2 or 3, C) in float32.

    branch: only read with gamma. The latter are sums of each program's share: no atomics, the same in every run.
    """
    channels = total.shape[-1]
    rows = total.numel() // channels
    sizes = sizes or sizes_of(rows, channels)
    programs = programs or min(
        triton.cdiv(rows, sizes["ROWS"]), 32 // sizes["num_warps"] * multiprocessors(total.device)
    )
    branch, gamma, weight, grad_total, grad_out = contiguous(branch, gamma, weight, grad_total, grad_out)
    grad_x = torch.empty_like(total)
    grad_branch = None if branch_dtype is None else torch.empty_like(total, dtype=branch_dtype)
    partial = torch.empty(programs, 2 if gamma is None else 3, channels, dtype=torch.float32, device=total.device)
    _backward[(programs,)](
        total,
        branch,
        gamma,
        weight,
        grad_total,
        grad_out,
        grad_x,
        grad_branch,
        partial,
        rows,
        eps,
        C=channels,
        BRANCH=grad_branch is not None,
        GAMMA=gamma is not None,
        PASSED_ON=grad_total is not None,
        **sizes,
    )
    return grad_x, grad_branch, partial.sum(0)


class AddNorm(torch.autograd.Function):
    """`add_norm` by the kernels, differentiable; without a branch only the normalised rows are a result."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
        gamma: Tensor | None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """See `add_norm`."""
        total, out = add_norm_triton(x, branch, weight, bias, eps, dtype, gamma)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, branch if gamma is not None else None, gamma, weight)
        ctx.eps, ctx.dtypes = eps, (x.dtype, None if branch is None else branch.dtype, dtype, bias.dtype)
        return out if branch is None else (total, out)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, branch, weight, bias and gamma."""
        total, branch, gamma, weight = ctx.saved_tensors
        of_x, of_branch, of_out, of_bias = ctx.dtypes
        grad_total, grad_out = grads if len(grads) == 2 else (None, *grads)
        if grad_out is None:
            grad_out = torch.zeros_like(total, dtype=of_out)
        grad_x, grad_branch, shares = add_norm_backward(
            total, branch, gamma, weight, ctx.eps, grad_total, grad_out, of_branch
        )
        grad_gamma = None if gamma is None else shares[2].to(gamma.dtype)
        grad_weight, grad_bias = shares[0].to(weight.dtype), shares[1].to(of_bias)
        return grad_x.to(of_x), grad_branch, grad_weight, grad_bias, None, None, grad_gamma


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    gamma: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + gamma * branch, and its layer norm as `dtype`.

    x, branch: (..., C), the branch of the same or a coarser type, or None: then the sum is x itself. weight, bias, gamma:
    (C,); gamma is LayerScale's, None for 1. All arithmetic in float32. Raises ValueError on shapes that do not fit.
    """
    if not fused(x):
        return add_norm_reference(x, branch, weight, bias, eps, dtype, gamma)
    if not differentiated(x, branch, weight, bias, gamma):
        return add_norm_triton(x, branch, weight, bias, eps, dtype, gamma)
    out = AddNorm.apply(x, branch, weight, bias, eps, dtype, gamma)
    return (x, out) if branch is None else out


def add_reference(x: Tensor, branch: Tensor, gamma: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Plain torch; arguments and results of `add`."""
    check(x, branch, gamma)
    return torch.add(x, branch, out=out) if gamma is None else torch.addcmul(x, branch, gamma, out=out)


def add_triton(x: Tensor, branch: Tensor, gamma: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The kernel; arguments and results of `add`."""
    check(x, branch, gamma)
    channels = x.shape[-1]
    rows = x.numel() // channels
    if out is None:
        out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype), device=x.device)
    x, branch, gamma = contiguous(x, branch, gamma)
    sizes = sizes_of(rows, channels)
    _add_norm[(triton.cdiv(rows, sizes["ROWS"]),)](
        x, branch, gamma, None, None, out, None, rows, 0.0, C=channels, BRANCH=True, GAMMA=gamma is not None, NORM=False,
        **sizes,
    )  # fmt: skip
    return out


def add(x: Tensor, branch: Tensor, gamma: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x + gamma * branch, all arithmetic in float32 or finer.

    x, branch: (..., C), the branch of the same or a coarser type. gamma: (C,), None for 1. out: where to write, contiguous,
    maybe x itself; only where no gradients are recorded. Raises ValueError on shapes that do not fit.
    """
    run = add_triton if fused(x) and not differentiated(x, branch, gamma) else add_reference
    return run(x, branch, gamma, out)
