"""Coarse attention among pooled tokens and the choice of key blocks (Speed3R, section 3): Triton kernels and reference.

The attention also notes the largest score of every row among each TILE neighbouring key blocks. The K best key blocks of a
row lie in the K tiles with the largest maxima (each of them holds a block that beats whatever lies elsewhere; ties go to the
lower index in both orders), so a second kernel, one program per row, scores only those K * TILE candidates again and keeps
the best. Both steps find their threshold by bisection on the bits of the scores: any K, exact, and the same in every run.

Shape letters: see `frames`; G = blocks per frame, M >= N frames with pooled tokens, of which the first N are resident.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speed3r_ros.kernels.frames import (
    frame_attention_reference,
    frame_attention_triton,
    on_kernels,
    tl,
    triton,
)

TILE = 16  # key blocks per stored maximum
WORKSPACE = 2**30  # bytes at most for the maxima; more heads than that take turns


def check(q: Tensor, k: Tensor, v: Tensor, coarse: Tensor, fine: Tensor, top_k: int) -> tuple[int, int, int]:
    """T, N and blocks G per frame of the arguments of `coarse_attention`; ValueError if they do not fit together."""
    (b, h, rows, d), (frames, known) = q.shape, coarse.shape[1:]
    blocks, resident = rows // frames, fine.shape[2]
    if rows != frames * blocks or k.shape != v.shape or k.shape != (b, h, known * blocks, d):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit {frames} and {known} frames"
        )
    if fine.shape[1] != frames or resident > known:
        raise ValueError(f"fine {tuple(fine.shape)} does not fit coarse {tuple(coarse.shape)}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    return frames, resident, blocks


def group_queries(q: Tensor, group: int) -> Tensor:
    """Mean of each `group` neighbouring blocks of a frame, the last ones maybe fewer.

    (B, H, T, G, D) -> (B, H, T, ceil(G / group), D). A mean's score is the mean of its members' scores.
    """
    if group == 1:
        return q
    return torch.stack([x.float().mean(3).to(q.dtype) for x in q.split(group, 3)], 3)


def coarse_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, coarse: Tensor, fine: Tensor, top_k: int, group: int = 1
) -> tuple[Tensor, Tensor]:
    """Plain torch; arguments and results of `coarse_attention`."""
    frames, resident, blocks = check(q, k, v, coarse, fine, top_k)
    q, k, v = q.unflatten(2, (frames, -1)), k.unflatten(2, (-1, blocks)), v.unflatten(2, (-1, blocks))
    compressed = frame_attention_reference(q, k, v, coarse)[0].flatten(2, 3)
    chooser = group_queries(q.detach(), group)
    high = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bhtxd,bhngd->bhtxng", chooser.to(high), k[:, :, :resident].detach().to(high))
    visible = (fine & coarse[:, :, :resident])[:, None, :, None, :, None]
    scores = scores.masked_fill(~visible, -torch.inf).flatten(4).flatten(2, 3)
    best, index = scores.sort(dim=-1, descending=True, stable=True)
    none = torch.iinfo(torch.int32).max
    index = index.masked_fill(best == -torch.inf, none)[..., :top_k].sort(-1).values
    return compressed, index.masked_fill(index == none, -1).int()


if triton is not None:

    @triton.jit
    def _best(score, live, K):
        """Where the K largest live scores are (ties: lower index), as int32."""
        bits = (score + 0.0).to(tl.int32, bitcast=True)  # + 0.0: minus zero would sort below zero
        rank = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)  # integers in the order of the floats
        rank = tl.where(live, rank, -2147483648)
        threshold = tl.where(tl.sum((rank >= 0).to(tl.int32), 0) >= K, 0, -2147483648)
        for i in range(31):
            higher = threshold + (tl.full([], 1073741824, tl.int32) >> i)
            threshold = tl.where(tl.sum((rank >= higher).to(tl.int32), 0) >= K, higher, threshold)
        above = rank > threshold
        equal = ((rank == threshold) & live).to(tl.int32)
        room = K - tl.sum(above.to(tl.int32), 0)
        return tl.where(above | ((equal != 0) & (tl.cumsum(equal, 0) <= room)), 1, 0)

    @triton.jit
    def _select(
        maxima,
        q,
        k,
        fine,
        coarse,
        index,
        q_b,
        q_h,
        q_t,
        q_x,
        k_b,
        k_h,
        k_n,
        k_y,
        fine_b,
        fine_t,
        fine_n,
        coarse_b,
        coarse_t,
        coarse_n,
        i_b,
        i_h,
        i_x,
        H,
        N,
        X,
        K,
        G: tl.constexpr,
        D: tl.constexpr,
        TILE: tl.constexpr,
        TILES: tl.constexpr,
        KEEP: tl.constexpr,
        D_STEP: tl.constexpr,
    ):
        """Choose the key blocks of one row: first the tiles, then among their blocks."""
        PER_FRAME: tl.constexpr = (G + TILE - 1) // TILE
        row = tl.program_id(0)
        b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
        t = (row // X).to(tl.int64)
        index += b * i_b + h * i_h + row.to(tl.int64) * i_x

        tile = tl.arange(0, TILES)
        frame = tile // PER_FRAME
        live = frame < N
        live = live & (tl.load(fine + b * fine_b + t * fine_t + frame * fine_n, mask=live, other=0) != 0)
        live = live & (tl.load(coarse + b * coarse_b + t * coarse_t + frame * coarse_n, mask=live, other=0) != 0)
        maxima += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + row) * (N * PER_FRAME)
        taken = _best(tl.load(maxima + tile, mask=live, other=float("-inf")), live, K)
        count = tl.sum(taken, 0)
        tl.store(index + tl.cumsum(taken, 0) - 1, tile, mask=taken != 0)  # the result's row doubles as a note pad
        tl.debug_barrier()

        i = tl.arange(0, KEEP * TILE)
        tile = tl.load(index + i // TILE, mask=i // TILE < count, other=0)
        tl.debug_barrier()
        y = tile % PER_FRAME * TILE + i % TILE
        live = (i // TILE < count) & (y < G)
        n = tile // PER_FRAME
        q += b * q_b + h * q_h + t * q_t + (row % X) * q_x
        at = k + b * k_b + h * k_h + (n.to(tl.int64) * k_n + y * k_y)
        score = tl.zeros([KEEP * TILE], tl.float32)
        for start in tl.static_range(0, D, D_STEP):
            d = start + tl.arange(0, D_STEP)
            key = tl.load(at[:, None] + d[None, :], mask=live[:, None], other=0.0).to(tl.float32)
            score += tl.sum(key * tl.load(q + d).to(tl.float32)[None, :], 1)
        taken = _best(score, live, K)
        count = tl.sum(taken, 0)
        tl.store(index + tl.cumsum(taken, 0) - 1, n * G + y, mask=taken != 0)
        tl.store(index + i, -1, mask=(i >= count) & (i < K))


def coarse_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coarse: Tensor,
    fine: Tensor,
    top_k: int,
    group: int = 1,
    tile: int = TILE,
    sizes: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernels; arguments and results of `coarse_attention`.

    tile: key blocks per stored maximum, a power of two; sizes: see `frames.tile_sizes`.
    """
    frames, resident, blocks = check(q, k, v, coarse, fine, top_k)
    b, h, _, d = q.shape
    q, k, v = q.unflatten(2, (frames, -1)), k.unflatten(2, (-1, blocks)), v.unflatten(2, (-1, blocks))
    compressed = torch.empty_like(q, memory_format=torch.contiguous_format)
    chooser = group_queries(q, group)
    if group > 1:
        frame_attention_triton(q, k, v, coarse, out=compressed, sizes=sizes)
    rows, per_frame = chooser.shape[3], triton.cdiv(blocks, tile)
    tiles, keep = resident * per_frame, min(top_k, resident * blocks)
    candidates = triton.next_power_of_2(min(keep, tiles)) * tile
    index = torch.empty(b, h, frames * rows, keep, dtype=torch.int32, device=q.device)
    turn = max(1, WORKSPACE // (4 * b * frames * rows * tiles))
    for first in range(0, h, turn):
        heads = slice(first, first + turn)
        qs, ks, chosen = chooser[:, heads], k[:, heads], index[:, heads]
        maxima = torch.empty(b, qs.shape[1], frames * rows, tiles, dtype=torch.float32, device=q.device)
        frame_attention_triton(
            qs,
            ks,
            v[:, heads],
            coarse,
            out=compressed[:, heads],
            maxima=(maxima, tile),
            values=group == 1,
            sizes=sizes,
        )
        _select[(frames * rows, b * qs.shape[1])](
            maxima,
            qs,
            ks,
            fine.view(torch.uint8),
            coarse.view(torch.uint8),
            chosen,
            *qs.stride()[:4],
            *ks.stride()[:4],
            *fine.expand(b, -1, -1).stride(),
            *coarse.expand(b, -1, -1).stride(),
            *chosen.stride()[:3],
            qs.shape[1],
            resident,
            rows,
            keep,
            G=blocks,
            D=d,
            TILE=tile,
            TILES=triton.next_power_of_2(tiles),
            KEEP=candidates // tile,
            D_STEP=max(2, min(16, 2**14 // candidates)),
            num_warps=4 if max(candidates, tiles) <= 4096 else 16,
        )
    return compressed.flatten(2, 3), index


def coarse_attention(
    q: Tensor, k: Tensor, v: Tensor, coarse: Tensor, fine: Tensor, top_k: int, group: int = 1
) -> tuple[Tensor, Tensor]:
    """Attention among pooled tokens, and the best key blocks of every query block and head.

    q: (B, H, T * G, D). k, v: (B, H, M * G, D), strided views allowed. coarse: (B or 1, T, M) bool, the frames whose
    pooled tokens a frame attends to. fine: (B or 1, T, N) bool: blocks are chosen among the first N frames, those that
    both tables show. group: so many neighbouring blocks of a frame choose together, by the mean of their queries.

    Returns the attention's output (B, H, T * G, D) and the choice (B, H, T * ceil(G / group), K) int32 with
    K = min(top_k, N * G): block numbers (frame * G + block) in rising order, then -1 where fewer are visible. Of equal
    scores the lower number wins. The choice has no gradient. Raises ValueError on shapes that do not fit.
    """
    run = coarse_attention_triton if on_kernels(q) else coarse_attention_reference
    return run(q, k, v, coarse, fine, top_k, group)
