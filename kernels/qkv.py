"""Fused block pooling, QK-norm and rotary embedding (Speed3R, section 3.1): a Triton kernel and its reference.

Raw q, k, v of every token become fine q, k, v; their raw means over each block of 16 patch tokens become pooled ones, by
the same normalisation, rotated at the block's mean position. One pass over the raw tensor. The rotary embedding is 2-D:
half of the head for each axis.

Shape letters: F frames, L = S + 16 G tokens per frame (S special ones, then patches in block-major order), H heads, D head
width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speed3r_ros.kernels.frames import on_kernels, tl, triton

BLOCK = 16  # tokens of one 4 x 4 window of patches
EPS = 1e-6


def check(qkv: Tensor, cos: Tensor, cos_pooled: Tensor, specials: int) -> int:
    """Blocks G per frame of the arguments of `prepare_tokens`; ValueError if they do not fit together."""
    length, three, _, width = qkv.shape[1:]
    blocks = (length - specials) // BLOCK
    if three != 3 or length != specials + BLOCK * blocks:
        raise ValueError(f"qkv {tuple(qkv.shape)} is not (F, {specials} + 16 G, 3, H, D)")
    if cos.numel() != length * width or cos_pooled.numel() != blocks * width:
        raise ValueError(f"rotary tables have {cos.numel()} and {cos_pooled.numel()} entries, not L * D and G * D")
    return blocks


def normalise_and_rotate(x: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RMS norm of each head's vector, then the 2-D rotary embedding, half of the head for each axis.

    x: queries and keys (F, X, 2, H, D) of X tokens, float32 or finer. Weights (D,); tables of X * D entries. Same shape out.
    """
    x = x * (torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * torch.stack([q_weight, k_weight])[:, None])
    a, b, c, d = x.chunk(4, -1)
    cos, sin = (table.reshape(1, -1, 1, 1, x.shape[-1]) for table in (cos, sin))
    return torch.addcmul(x * cos, torch.cat([-b, a, -d, c], -1), sin)


def prepare_tokens_reference(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_pooled: Tensor,
    sin_pooled: Tensor,
    specials: int,
) -> tuple[Tensor, ...]:
    """Plain torch; arguments and results of `prepare_tokens`."""
    blocks = check(qkv, cos, cos_pooled, specials)
    high = torch.promote_types(qkv.dtype, torch.float32)
    raw = qkv.to(high)

    out = []
    pooled = raw[:, specials:].unflatten(1, (blocks, BLOCK)).mean(2)
    for x, c, s in ((raw, cos, sin), (pooled, cos_pooled, sin_pooled)):
        out += [*normalise_and_rotate(x[:, :, :2], q_weight, k_weight, c, s).unbind(2), x[:, :, 2]]
    return tuple(x.to(qkv.dtype).permute(2, 0, 1, 3).contiguous().transpose(0, 1) for x in out)


if triton is not None:

    @triton.jit
    def _prepare(
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        cos_pooled,
        sin_pooled,
        fine,
        pooled,
        F,
        S,
        x_f,
        x_l,
        x_c,
        x_h,
        G: tl.constexpr,
        D: tl.constexpr,
        EPS: tl.constexpr,
    ):
        """16 tokens of one frame and one head: a block of patches, or (the last programs of a frame) special tokens."""
        f, group, h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        H = tl.num_programs(2)
        L = S + G * 16
        i = tl.arange(0, 16)
        row = tl.where(group < G, S + group * 16 + i, (group - G) * 16 + i)
        inside = row < tl.where(group < G, L, S)
        d = tl.arange(0, D)
        odd = (d // (D // 4)) % 2  # each half of the head turns its first quarter into its second
        other = tl.where(odd == 0, d + D // 4, d - D // 4)
        sign = tl.where(odd == 0, -1.0, 1.0)

        table = row[:, None] * D + d[None, :]
        c = tl.load(cos + table, mask=inside[:, None], other=0.0).to(tl.float32)
        s = tl.load(sin + table, mask=inside[:, None], other=0.0).to(tl.float32)
        qkv += f.to(tl.int64) * x_f + h * x_h
        size = H.to(tl.int64) * F * L * D  # of q, of k, of v
        at = (h.to(tl.int64) * F + f) * L * D + table
        size_pooled = H.to(tl.int64) * F * G * D
        at_pooled = ((h.to(tl.int64) * F + f) * G + group) * D + d
        for part in tl.static_range(3):
            x = tl.load(qkv + part * x_c + row[:, None] * x_l + d[None, :], mask=inside[:, None], other=0.0)
            x = x.to(tl.float32)
            if part < 2:
                partner = tl.load(
                    qkv + part * x_c + row[:, None] * x_l + other[None, :], mask=inside[:, None], other=0.0
                )
                partner = partner.to(tl.float32)
                weight = q_weight if part == 0 else k_weight
                w = tl.load(weight + d).to(tl.float32)
                w_partner = tl.load(weight + other).to(tl.float32) * sign
                r = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
                y = x * r * w[None, :] * c + partner * r * w_partner[None, :] * s
            else:
                y = x
            tl.store(fine + part * size + at, y.to(fine.dtype.element_ty), mask=inside[:, None])
            if group < G:
                mean = tl.sum(x, 0) / 16
                if part < 2:
                    mean_partner = tl.sum(partner, 0) / 16
                    c_pooled = tl.load(cos_pooled + group * D + d).to(tl.float32)
                    s_pooled = tl.load(sin_pooled + group * D + d).to(tl.float32)
                    r_pooled = tl.rsqrt(tl.sum(mean * mean, 0) / D + EPS)
                    mean = mean * r_pooled * w * c_pooled + mean_partner * r_pooled * w_partner * s_pooled
                tl.store(pooled + part * size_pooled + at_pooled, mean.to(pooled.dtype.element_ty))

    def prepare_tokens_triton(
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        cos_pooled: Tensor,
        sin_pooled: Tensor,
        specials: int,
    ) -> tuple[Tensor, ...]:
        """The kernel; arguments and results of `prepare_tokens`."""
        blocks = check(qkv, cos, cos_pooled, specials)
        frames, length, _, heads, width = qkv.shape
        fine = torch.empty(3, heads, frames, length, width, dtype=qkv.dtype, device=qkv.device)
        pooled = torch.empty(3, heads, frames, blocks, width, dtype=qkv.dtype, device=qkv.device)
        _prepare[(frames, blocks + triton.cdiv(specials, BLOCK), heads)](
            qkv,
            q_weight,
            k_weight,
            cos.contiguous(),
            sin.contiguous(),
            cos_pooled.contiguous(),
            sin_pooled.contiguous(),
            fine,
            pooled,
            frames,
            specials,
            *qkv.stride()[:4],
            G=blocks,
            D=width,
            EPS=EPS,
            num_warps=2,
        )
        return tuple(x.transpose(0, 1) for x in (*fine.unbind(), *pooled.unbind()))


class PrepareTokens(torch.autograd.Function):
    """`prepare_tokens` by the kernel, differentiable: the backward pass computes the reference once more."""

    @staticmethod
    def forward(ctx, *arguments: Tensor | int) -> tuple[Tensor, ...]:
        """See `prepare_tokens`."""
        ctx.save_for_backward(*arguments[:-1])
        ctx.specials = arguments[-1]
        return prepare_tokens_triton(*arguments)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of qkv and the two weights; the tables are constant."""
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors[:3]]
        with torch.enable_grad():
            out = prepare_tokens_reference(*inputs, *ctx.saved_tensors[3:], ctx.specials)
        return *torch.autograd.grad(out, inputs, grads), *[None] * 5


def prepare_tokens(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_pooled: Tensor,
    sin_pooled: Tensor,
    specials: int,
) -> tuple[Tensor, ...]:
    """Normalised, rotated q, k and plain v of all tokens, and the same of the blocks' raw means.

    qkv: (F, L, 3, H, D) as the linear layer gives it. q_weight, k_weight: (D,) of the RMS norm (eps 1e-6). cos, sin:
    (1, L, 1, D); cos_pooled, sin_pooled: (1, G, 1, D). All arithmetic in float32. Returns q, k, v (F, H, L, D) and pooled
    q, k, v (F, H, G, D) in qkv's type, each stored heads first so that frames and tokens flatten into one axis without a
    copy. Raises ValueError on shapes that do not fit.
    """
    run = PrepareTokens.apply if on_kernels(qkv) else prepare_tokens_reference
    return run(qkv, q_weight, k_weight, cos, sin, cos_pooled, sin_pooled, specials)
