"""Fused QK-norm, rotary embedding and block pooling (Speed3R, section 3.1): Triton kernels and their references.

Frame blocks: raw q and k of every token are normalised and rotated, over the raw ones where no gradient is asked for; v
stays where the linear layer put it. Global blocks: fine q, k, v are stored heads first, and the raw means over each block
of 16 patch tokens become pooled ones, by the same normalisation, rotated at the block's mean position. One launch, one pass
over the raw tensor, either way; a frame block is a global one without blocks of patches. So are the backward passes.

A program takes 16 tokens (one block) of one or a few heads. The rotary embedding is 2-D, half of the head for each axis, and turns
channel p of a half's first quarter with channel p of its second one; a program holds both as two tiles of D / 2 channels, so
that each value is read once.

Shape letters: F frames, L = S + 16 G tokens per frame (S special ones, then patches in block-major order), H heads, D head
width. The norm of queries or keys, each by one tensor: (D,) the weight of an RMS norm, (2, D) weight and bias of a layer
norm, None for no norm.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from speed3r_ros.kernels.frames import on_kernels, tl, triton

BLOCK = 16  # tokens of one 4 x 4 window of patches
EPS = 1e-6


class Slot(NamedTuple):
    """Where `prepare_tokens` puts the keys and values of one frame: at place `index` of buffers that hold many.

    fine: (2, H, N, L, D), keys and values; pooled: (2, H, M, G, D); index: (1,) int64 on the device.
    """

    fine: Tensor
    pooled: Tensor
    index: Tensor


def check(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, tables: tuple[Tensor | None, ...], specials: int
) -> int:
    """Blocks G per frame of the arguments of `prepare_tokens`; ValueError if they do not fit together.

    tables: cos, sin, and of the blocks.
    """
    length, three, _, width = qkv.shape[1:]
    blocks = (length - specials) // BLOCK
    if three != 3 or length != specials + BLOCK * blocks:
        raise ValueError(f"qkv {tuple(qkv.shape)} is not (F, {specials} + 16 G, 3, H, D)")
    sizes = [0 if table is None else table.numel() for table in tables]
    if sizes not in ([0] * 4, [length * width] * 2 + [blocks * width] * 2):
        raise ValueError(f"rotary tables have {sizes} entries, not L * D twice and G * D twice")
    shapes = [None if norm is None else tuple(norm.shape) for norm in (q_norm, k_norm)]
    if shapes not in ([None] * 2, [(width,)] * 2, [(2, width)] * 2):
        raise ValueError(f"norms of queries and keys have shapes {shapes}, not ({width},) or (2, {width})")
    return blocks


def transform(
    x: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> Tensor:
    """Norm of each head's vector, then the rotary embedding.

    x: queries and keys (F, X, 2, H, D) of X tokens, float32 or finer. Tables of X * D entries. Same shape out.
    """
    if q_norm is not None:
        norm = torch.stack([q_norm, k_norm])[..., None, :]
        weight, bias = (norm, None) if q_norm.dim() == 1 else norm.unbind(1)
        if bias is not None:
            x = x - x.mean(-1, keepdim=True)
        x = x * (torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight)
        if bias is not None:
            x = x + bias
    if cos is None:
        return x
    a, b, c, d = x.chunk(4, -1)
    cos, sin = (table.reshape(1, -1, 1, 1, x.shape[-1]) for table in (cos, sin))
    return torch.addcmul(x * cos, torch.cat([-b, a, -d, c], -1), sin)


def normalise_and_rotate_reference(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch; arguments and results of `normalise_and_rotate`."""
    check(qkv, q_norm, k_norm, (cos, sin, None, None), qkv.shape[1])
    high = torch.promote_types(qkv.dtype, torch.float32)
    qk = transform(qkv[:, :, :2].to(high), q_norm, k_norm, cos, sin, eps).to(qkv.dtype)
    return *qk.transpose(1, 3).unbind(2), qkv[:, :, 2].transpose(1, 2)


def prepare_tokens_reference(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cos_pooled: Tensor | None,
    sin_pooled: Tensor | None,
    specials: int,
    slot: Slot | None = None,
    eps: float = EPS,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """Plain torch; arguments and results of `prepare_tokens`."""
    blocks = check(qkv, q_norm, k_norm, (cos, sin, cos_pooled, sin_pooled), specials)
    high = torch.promote_types(qkv.dtype, torch.float32)
    raw = qkv.to(high)

    made = []
    pooled = raw[:, specials:].unflatten(1, (blocks, BLOCK)).mean(2)
    for x, c, s in ((raw, cos, sin), (pooled, cos_pooled, sin_pooled)):
        made += [*transform(x[:, :, :2], q_norm, k_norm, c, s, eps).unbind(2), x[:, :, 2]]
    made = [x.to(qkv.dtype).permute(2, 0, 1, 3) for x in made]
    if out is not None:
        return tuple(place.copy_(x.transpose(0, 1)) for place, x in zip(out, made))
    if slot is None:
        return tuple(x.contiguous().transpose(0, 1) for x in made)
    for buffer, parts in ((slot.fine, made[1:3]), (slot.pooled, made[4:])):
        for all_frames, x in zip(buffer, parts):
            all_frames.index_copy_(1, slot.index, x.detach())  # else buffers would hold the graphs of all frames
    q, q_pooled = (x.contiguous().transpose(0, 1) for x in (made[0], made[3]))
    return q, *slot.fine.transpose(1, 2), q_pooled, *slot.pooled.transpose(1, 2)


if triton is not None:

    @triton.jit
    def _place(S, G: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr):
        """What this program works on: frame, group of tokens, heads, and its tokens, of which some may not exist.

        A group is a block of patches or, from number G on, special tokens. Neighbouring programs share tokens, then frames.
        """
        i = tl.program_id(0)
        groups = G + tl.cdiv(S, 16)
        group = i // (H // HEADS) % groups
        f = (i // (H // HEADS) // groups).to(tl.int64)
        heads = i % (H // HEADS) * HEADS + tl.arange(0, HEADS)
        token = tl.where(group < G, S + group * 16, (group - G) * 16) + tl.arange(0, 16)
        inside = tl.broadcast_to((token < tl.where(group < G, S + G * 16, S))[:, None, None], [16, HEADS, D // 2])
        return f, group, heads, token, inside

    @triton.jit
    def _channels(D: tl.constexpr):
        """The first channel of each pair; the second one is D / 4 further."""
        p = tl.arange(0, D // 2)
        return p + p // (D // 4) * (D // 4)

    @triton.jit
    def _load_pairs(x, at, inside, D: tl.constexpr):
        """Both channels of each pair, in float32."""
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        return a, tl.load(x + at + D // 4, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _store_pairs(x, at, inside, a, b, D: tl.constexpr):
        """Both channels of each pair."""
        tl.store(x + at, a.to(x.dtype.element_ty), mask=inside)
        tl.store(x + at + D // 4, b.to(x.dtype.element_ty), mask=inside)

    @triton.jit
    def _block(group, d, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr):
        """Whether the group is a block of patches, and the places of its pairs in the pooled tables, for every token.

        Pooled values are held as many times as there are tokens: then all tiles are alike, and threads exchange nothing.
        """
        patches = tl.full([16, HEADS, D // 2], group, tl.int32) < G
        return patches, tl.broadcast_to((group * D + d)[None, None, :], [16, HEADS, D // 2])

    @triton.jit
    def _means(a, b, D: tl.constexpr, HEADS: tl.constexpr):
        """Means over the tokens, for every token."""
        a = tl.broadcast_to((tl.sum(a, 0) / 16)[None, :, :], [16, HEADS, D // 2])
        return a, tl.broadcast_to((tl.sum(b, 0) / 16)[None, :, :], [16, HEADS, D // 2])

    @triton.jit
    def _unit(a, b, D: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr):
        """The norm before its weight, and the reciprocal of the length. NORM: 1 root mean square, 2 layer norm."""
        if NORM == 2:
            mean = (tl.sum(a + b, 2) / D)[:, :, None]
            a -= mean
            b -= mean
        r = tl.rsqrt(tl.sum(a * a + b * b, 2) / D + EPS)[:, :, None]
        return a * r, b * r, r

    @triton.jit
    def _transform(
        a,
        b,
        norm,
        ca,
        cb,
        sa,
        sb,
        D: tl.constexpr,
        EPS: tl.constexpr,
        NORM: tl.constexpr,
        ROPE: tl.constexpr,
    ):
        """Norm and rotation of tiles (tokens, heads, pairs); NORM: 0 for none."""
        if NORM > 0:
            d = _channels(D)
            a, b, _ = _unit(a, b, D, EPS, NORM)
            a *= tl.load(norm + d).to(tl.float32)[None, None, :]
            b *= tl.load(norm + d + D // 4).to(tl.float32)[None, None, :]
            if NORM == 2:
                a += tl.load(norm + d + D).to(tl.float32)[None, None, :]
                b += tl.load(norm + d + D + D // 4).to(tl.float32)[None, None, :]
        if ROPE:
            a, b = a * ca - b * sa, b * cb + a * sb
        return a, b

    @triton.jit
    def _transform_backward(
        a,
        b,
        ga,
        gb,
        norm,
        ca,
        cb,
        sa,
        sb,
        D: tl.constexpr,
        EPS: tl.constexpr,
        NORM: tl.constexpr,
        ROPE: tl.constexpr,
    ):
        """Gradients of the raw tiles a, b, of the weight at each of their entries, and of the bias."""
        if ROPE:
            ga, gb = ga * ca + gb * sb, gb * cb - ga * sa
        bias_a, bias_b = ga, gb
        weight_a, weight_b = ga, gb
        if NORM > 0:
            d = _channels(D)
            a, b, r = _unit(a, b, D, EPS, NORM)
            weight_a, weight_b = ga * a, gb * b
            ga *= tl.load(norm + d).to(tl.float32)[None, None, :]
            gb *= tl.load(norm + d + D // 4).to(tl.float32)[None, None, :]
            along = (tl.sum(ga * a + gb * b, 2) / D)[:, :, None]
            if NORM == 2:
                mean = (tl.sum(ga + gb, 2) / D)[:, :, None]
                ga -= mean
                gb -= mean
            ga = (ga - a * along) * r
            gb = (gb - b * along) * r
        return ga, gb, weight_a, weight_b, bias_a, bias_b

    @triton.jit
    def _store_sums(x, a, b, D: tl.constexpr, HEADS: tl.constexpr):
        """Both channels of each pair, summed over tokens and heads."""
        d = _channels(D)
        _store_pairs(
            x,
            d,
            d < D,
            tl.sum(tl.reshape(a, [16 * HEADS, D // 2]), 0),
            tl.sum(tl.reshape(b, [16 * HEADS, D // 2]), 0),
            D,
        )

    @triton.jit
    def _prepare(
        qkv,
        q_norm,
        k_norm,
        cos,
        sin,
        cos_pooled,
        sin_pooled,
        q,
        k,
        v,
        q_pooled,
        k_pooled,
        v_pooled,
        slot,
        S,
        x_f,
        x_l,
        x_c,
        x_h,
        q_f,
        q_l,
        q_h,
        k_f,
        k_l,
        k_h,
        q_pooled_f,
        q_pooled_h,
        k_pooled_f,
        k_pooled_h,
        G: tl.constexpr,
        D: tl.constexpr,
        H: tl.constexpr,
        EPS: tl.constexpr,
        NORM: tl.constexpr,
        ROPE: tl.constexpr,
        VALUES: tl.constexpr,
        SLOT: tl.constexpr,
        HEADS: tl.constexpr,
    ):
        """16 tokens of HEADS heads. VALUES: also move v. SLOT: k and v go to the frame that `slot` says."""
        f, group, heads, token, inside = _place(S, G, D, H, HEADS)
        d = _channels(D)
        place = f
        if SLOT:
            place = tl.load(slot)
        wide = heads.to(tl.int64)[None, :, None]  # heads may lie 2^31 values apart
        at = token[:, None, None] * x_l + heads[None, :, None] * x_h + d[None, None, :]
        table = tl.broadcast_to((token[:, None] * D + d[None, :])[:, None, :], [16, HEADS, D // 2])
        # all loads before the first store: what is stored may be what is loaded, so that none could pass it
        qa, qb = _load_pairs(qkv + f * x_f, at, inside, D)
        ka, kb = _load_pairs(qkv + f * x_f + x_c, at, inside, D)
        if VALUES:
            va, vb = _load_pairs(qkv + f * x_f + 2 * x_c, at, inside, D)
        ca, cb, sa, sb = 0.0, 0.0, 0.0, 0.0
        if ROPE:
            ca, cb = _load_pairs(cos, table, inside, D)
            sa, sb = _load_pairs(sin, table, inside, D)
        at_q = wide * q_h + token[:, None, None] * q_l + d[None, None, :]
        at_k = wide * k_h + token[:, None, None] * k_l + d[None, None, :]
        a, b = _transform(qa, qb, q_norm, ca, cb, sa, sb, D, EPS, NORM, ROPE)
        _store_pairs(q + f * q_f, at_q, inside, a, b, D)
        a, b = _transform(ka, kb, k_norm, ca, cb, sa, sb, D, EPS, NORM, ROPE)
        _store_pairs(k + place * k_f, at_k, inside, a, b, D)
        if VALUES:
            _store_pairs(v + place * k_f, at_k, inside, va, vb, D)
        if G > 0:
            patches, table = _block(group, d, G, D, HEADS)
            if ROPE:
                ca, cb = _load_pairs(cos_pooled, table, patches, D)
                sa, sb = _load_pairs(sin_pooled, table, patches, D)
            patches &= tl.arange(0, 16)[:, None, None] == 0
            at_q = wide * q_pooled_h + table
            at_k = wide * k_pooled_h + table
            a, b = _means(qa, qb, D, HEADS)
            a, b = _transform(a, b, q_norm, ca, cb, sa, sb, D, EPS, NORM, ROPE)
            _store_pairs(q_pooled + f * q_pooled_f, at_q, patches, a, b, D)
            a, b = _means(ka, kb, D, HEADS)
            a, b = _transform(a, b, k_norm, ca, cb, sa, sb, D, EPS, NORM, ROPE)
            _store_pairs(k_pooled + place * k_pooled_f, at_k, patches, a, b, D)
            a, b = _means(va, vb, D, HEADS)
            _store_pairs(v_pooled + place * k_pooled_f, at_k, patches, a, b, D)

    @triton.jit
    def _prepare_backward(
        qkv,
        q_norm,
        k_norm,
        cos,
        sin,
        cos_pooled,
        sin_pooled,
        grad_q,
        grad_k,
        grad_v,
        grad_pooled,
        grad,
        partial,
        S,
        x_f,
        x_l,
        x_c,
        x_h,
        g_f,
        g_l,
        g_h,
        p_c,
        G: tl.constexpr,
        D: tl.constexpr,
        H: tl.constexpr,
        EPS: tl.constexpr,
        NORM: tl.constexpr,
        ROPE: tl.constexpr,
        HEADS: tl.constexpr,
    ):
        """Gradients of what `_prepare` read, and this program's share of the gradients of the norms.

        grad_pooled: (3, F, H, G, D) and grad: (F, L, 3, H, D), contiguous; partial: (programs, 2, NORM, D).
        """
        f, group, heads, token, inside = _place(S, G, D, H, HEADS)
        d = _channels(D)
        wide = heads.to(tl.int64)[None, :, None]
        at = token[:, None, None] * x_l + heads[None, :, None] * x_h + d[None, None, :]
        at_g = wide * g_h + token[:, None, None] * g_l + d[None, None, :]
        to = token[:, None, None] * (3 * H * D) + heads[None, :, None] * D + d[None, None, :]
        table = tl.broadcast_to((token[:, None] * D + d[None, :])[:, None, :], [16, HEADS, D // 2])
        qkv += f * x_f
        grad += f * (S + G * 16) * (3 * H * D)
        ca, cb, sa, sb = 0.0, 0.0, 0.0, 0.0
        ca_pooled, cb_pooled, sa_pooled, sb_pooled = 0.0, 0.0, 0.0, 0.0
        if ROPE:
            ca, cb = _load_pairs(cos, table, inside, D)
            sa, sb = _load_pairs(sin, table, inside, D)
        if G > 0:
            patches, table = _block(group, d, G, D, HEADS)
            once = patches & (tl.arange(0, 16)[:, None, None] == 0)
            grad_pooled += f * (H * G * D)
            at_pooled = heads[None, :, None] * (G * D) + table
            if ROPE:
                ca_pooled, cb_pooled = _load_pairs(cos_pooled, table, patches, D)
                sa_pooled, sb_pooled = _load_pairs(sin_pooled, table, patches, D)
        for part in tl.static_range(2):
            norm = q_norm if part == 0 else k_norm
            a, b = _load_pairs(qkv + part * x_c, at, inside, D)
            ga, gb = _load_pairs((grad_q if part == 0 else grad_k) + f * g_f, at_g, inside, D)
            ga, gb, weight_a, weight_b, bias_a, bias_b = _transform_backward(
                a, b, ga, gb, norm, ca, cb, sa, sb, D, EPS, NORM, ROPE
            )
            if G > 0:
                a, b = _means(a, b, D, HEADS)
                pa, pb = _load_pairs(grad_pooled + part * p_c, at_pooled, patches, D)
                pa, pb, mean_weight_a, mean_weight_b, mean_bias_a, mean_bias_b = _transform_backward(
                    a, b, pa, pb, norm, ca_pooled, cb_pooled, sa_pooled, sb_pooled, D, EPS, NORM, ROPE
                )
                ga += pa / 16
                gb += pb / 16
                weight_a += tl.where(once, mean_weight_a, 0.0)
                weight_b += tl.where(once, mean_weight_b, 0.0)
                bias_a += tl.where(once, mean_bias_a, 0.0)
                bias_b += tl.where(once, mean_bias_b, 0.0)
            _store_pairs(grad + part * H * D, to, inside, ga, gb, D)
            if NORM > 0:
                row = partial + (tl.program_id(0).to(tl.int64) * 2 + part) * (NORM * D)
                _store_sums(row, weight_a, weight_b, D, HEADS)
                if NORM == 2:
                    _store_sums(row + D, bias_a, bias_b, D, HEADS)
        ga, gb = _load_pairs(grad_v + f * g_f, at_g, inside, D)
        if G > 0:
            pa, pb = _load_pairs(grad_pooled + 2 * p_c, at_pooled, patches, D)
            ga += pa / 16
            gb += pb / 16
        _store_pairs(grad + 2 * H * D, to, inside, ga, gb, D)


def kind(norm: Tensor | None) -> int:
    """The kernels' number of a norm, and how many rows of D its weights have."""
    return 0 if norm is None else norm.dim()


def sizes_of(heads: int, width: int, sums: bool) -> dict[str, int]:
    """Heads per program, and its warps. sums: whether values are summed over tokens: best within one warp."""
    if sums:
        return {"HEADS": 1, "num_warps": max(1, width // 64)}
    each = math.gcd(heads, 4)
    return {"HEADS": each, "num_warps": max(1, each * width // 32)}


def prepare(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    tables: tuple[Tensor | None, ...],
    fine: tuple[Tensor, ...],
    pooled: tuple[Tensor, ...] | None,
    specials: int,
    index: Tensor | None,
    eps: float,
    sizes: dict[str, int] | None,
) -> None:
    """Launch the forward kernel. tables: cos, sin, and of the blocks. fine: where to write q, k and maybe v, (F, H, L, D);
    pooled: q, k, v (F, H, G, D) or None. index: the frame of these that k and v belong to, if not each its own."""
    frames, length, _, heads, width = qkv.shape
    blocks = (length - specials) // BLOCK
    sizes = sizes or sizes_of(heads, width, blocks > 0)
    q, k, v = (*fine, None)[:3]
    q_pooled, k_pooled, v_pooled = pooled or (None,) * 3
    _prepare[(frames * (blocks + triton.cdiv(specials, BLOCK)) * (heads // sizes["HEADS"]),)](
        qkv,
        q_norm,
        k_norm,
        *tables,
        q,
        k,
        v,
        q_pooled,
        k_pooled,
        v_pooled,
        index,
        specials,
        *qkv.stride()[:4],
        *(x.stride(i) for x in (q, k) for i in (0, 2, 1)),
        *(x.stride(i) if pooled else 0 for x in (q_pooled, k_pooled) for i in (0, 1)),
        G=blocks,
        D=width,
        H=heads,
        EPS=eps,
        NORM=kind(q_norm),
        ROPE=tables[0] is not None,
        VALUES=v is not None,
        SLOT=index is not None,
        **sizes,
    )


def contiguous(*tables: Tensor | None) -> tuple[Tensor | None, ...]:
    """Rotary tables, norms and factors as the kernels read them."""
    return tuple(None if table is None else table.contiguous() for table in tables)


def normalise_and_rotate_triton(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float = EPS,
    out: Tensor | None = None,
    sizes: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel; arguments and results of `normalise_and_rotate`.

    out: (F, L, 2 or more, H, D) for q and k, which may be qkv; sizes: see `sizes_of`.
    """
    frames, length, _, heads, width = qkv.shape
    check(qkv, q_norm, k_norm, (cos, sin, None, None), length)
    if out is None:
        out = torch.empty(frames, length, 2, heads, width, dtype=qkv.dtype, device=qkv.device)
    q, k = (out[:, :, i].transpose(1, 2) for i in range(2))
    q_norm, k_norm, *tables = contiguous(q_norm, k_norm, cos, sin)
    prepare(qkv, q_norm, k_norm, (*tables, None, None), (q, k), None, length, None, eps, sizes)
    return q, k, qkv[:, :, 2].transpose(1, 2)


def prepare_tokens_triton(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cos_pooled: Tensor | None,
    sin_pooled: Tensor | None,
    specials: int,
    slot: Slot | None = None,
    eps: float = EPS,
    out: tuple[Tensor, ...] | None = None,
    sizes: dict[str, int] | None = None,
) -> tuple[Tensor, ...]:
    """The kernel; arguments and results of `prepare_tokens`. sizes: see `sizes_of`."""
    blocks = check(qkv, q_norm, k_norm, (cos, sin, cos_pooled, sin_pooled), specials)
    frames, length, _, heads, width = qkv.shape
    if out is None:
        parts = 3 if slot is None else 1
        fine, pooled = (
            list(torch.empty(parts, heads, frames, rows, width, dtype=qkv.dtype, device=qkv.device).transpose(1, 2))
            for rows in (length, blocks)
        )
    else:
        fine, pooled = out[:3], out[3:]
    if slot is not None:
        fine += slot.fine.transpose(1, 2)
        pooled += slot.pooled.transpose(1, 2)
    q_norm, k_norm, *tables = contiguous(q_norm, k_norm, cos, sin, cos_pooled, sin_pooled)
    index = None if slot is None else slot.index
    prepare(qkv, q_norm, k_norm, tables, fine, pooled, specials, index, eps, sizes)
    return *fine, *pooled


def prepare_backward(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    tables: tuple[Tensor | None, ...],
    grads: tuple[Tensor, ...],
    specials: int,
    eps: float,
    sizes: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of qkv and of both norms. grads: of q, k, v (F, H, L, D) and, with blocks, of pooled q, k, v.

    The norms' gradients are sums of each program's share: no atomics, the same in every run.
    """
    frames, length, _, heads, width = qkv.shape
    sizes = sizes or sizes_of(heads, width, True)
    blocks = (length - specials) // BLOCK
    fine, pooled = grads[:3], torch.stack(grads[3:]) if blocks else None
    if len({x.stride() for x in fine}) > 1 or fine[0].stride(-1) != 1:
        fine = [x.contiguous() for x in fine]
    grad = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    rows = kind(q_norm)
    programs = frames * (blocks + triton.cdiv(specials, BLOCK)) * (heads // sizes["HEADS"])
    partial = torch.empty(programs, 2, rows, width, dtype=torch.float32, device=qkv.device) if rows else None
    _prepare_backward[(programs,)](
        qkv,
        *contiguous(q_norm, k_norm, *tables),
        *fine,
        pooled,
        grad,
        partial,
        specials,
        *qkv.stride()[:4],
        *(fine[0].stride(i) for i in (0, 2, 1)),
        pooled.stride(0) if blocks else 0,
        G=blocks,
        D=width,
        H=heads,
        EPS=eps,
        NORM=rows,
        ROPE=tables[0] is not None,
        **sizes,
    )
    if not rows:
        return grad, None, None
    of_q, of_k = partial.sum(0)
    return grad, of_q.view(q_norm.shape).to(q_norm.dtype), of_k.view(k_norm.shape).to(k_norm.dtype)


class NormaliseAndRotate(torch.autograd.Function):
    """`normalise_and_rotate` by the kernels, differentiable; qkv is left as it is."""

    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float = EPS,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `normalise_and_rotate`."""
        ctx.save_for_backward(qkv, q_norm, k_norm, cos, sin)
        ctx.eps = eps
        return normalise_and_rotate_triton(qkv, q_norm, k_norm, cos, sin, eps)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of qkv and the two norms; the tables are constant."""
        qkv, q_norm, k_norm, cos, sin = ctx.saved_tensors
        tables = cos, sin, None, None
        return *prepare_backward(qkv, q_norm, k_norm, tables, grads, qkv.shape[1], ctx.eps), None, None, None


class PrepareTokens(torch.autograd.Function):
    """`prepare_tokens` by the kernels, differentiable."""

    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        cos_pooled: Tensor | None,
        sin_pooled: Tensor | None,
        specials: int,
        eps: float = EPS,
    ) -> tuple[Tensor, ...]:
        """See `prepare_tokens`."""
        tables = cos, sin, cos_pooled, sin_pooled
        ctx.save_for_backward(qkv, q_norm, k_norm, *tables)
        ctx.specials, ctx.eps = specials, eps
        return prepare_tokens_triton(qkv, q_norm, k_norm, *tables, specials, eps=eps)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of qkv and the two norms; the tables are constant."""
        qkv, q_norm, k_norm, *tables = ctx.saved_tensors
        return *prepare_backward(qkv, q_norm, k_norm, tables, grads, ctx.specials, ctx.eps), *[None] * 6


def fused(x: Tensor) -> bool:
    """Whether these kernels run for x; torch.compile fuses the plain operations itself."""
    return on_kernels(x) and not torch.compiler.is_compiling()


def differentiated(*inputs: Tensor | None) -> bool:
    """Whether autograd will ask for gradients of any of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def normalise_and_rotate(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised, rotated q, k and plain v of all tokens of a frame block, each (F, H, L, D), a strided view.

    qkv: (F, L, 3, H, D) as the linear layer gives it, and given up: where no gradient is asked for, q and k may be written
    over it; v is a view of it in any case. q_norm, k_norm: see the module's text. cos, sin: (1, L, 1, D), or None for no
    rotation. All arithmetic in float32. Raises ValueError on shapes that do not fit.
    """
    if not fused(qkv):
        return normalise_and_rotate_reference(qkv, q_norm, k_norm, cos, sin, eps)
    if differentiated(qkv, q_norm, k_norm):
        return NormaliseAndRotate.apply(qkv, q_norm, k_norm, cos, sin, eps)
    return normalise_and_rotate_triton(qkv, q_norm, k_norm, cos, sin, eps, out=qkv)


def prepare_tokens(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cos_pooled: Tensor | None,
    sin_pooled: Tensor | None,
    specials: int,
    slot: Slot | None = None,
    eps: float = EPS,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """Normalised, rotated q, k and plain v of all tokens of a global block, and the same of the blocks' raw means.

    qkv: (F, L, 3, H, D) as the linear layer gives it. q_norm, k_norm: see the module's text. cos, sin: (1, L, 1, D);
    cos_pooled, sin_pooled: (1, G, 1, D); None for no rotation. All arithmetic in float32. Returns q, k, v (F, H, L, D) and
    pooled q, k, v (F, H, G, D) in qkv's type, each stored heads first so that frames and tokens flatten into one axis
    without a copy. With a slot, F is 1, and k, v, pooled k and v, without gradients, are all that the slot's buffers hold, of
    N and M frames, this one included. out: where to write the six results instead, only without a slot and where no
    gradients are recorded; fine q may lie in memory as it likes, k as v, and of pooled ones each head's G * D in a row, k as v.
    Raises ValueError on shapes that do not fit.
    """
    arguments = qkv, q_norm, k_norm, cos, sin, cos_pooled, sin_pooled, specials
    if slot is not None and len(qkv) != 1:
        raise ValueError(f"a slot takes one frame, not {len(qkv)}")
    if not fused(qkv):
        return prepare_tokens_reference(*arguments, slot, eps, out)
    if slot is None and differentiated(qkv, q_norm, k_norm):
        return PrepareTokens.apply(*arguments, eps)
    return prepare_tokens_triton(*arguments, slot, eps, out)
