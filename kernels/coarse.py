"""Coarse attention among pooled tokens and the choice of key blocks (Speed3R, section 3): Triton kernels and reference.

The attention also notes the largest score of every row among each tile of neighbouring key blocks. The K best key blocks of
a row lie in the K tiles with the largest maxima, and those in the K frames with the largest ones (each of them holds a
block that beats whatever lies elsewhere; ties go to the lower index in every order). So a second kernel, one program per
row, narrows the choice from frames to tiles to blocks, of which only the last K tiles' are scored again. Among few blocks
the scores themselves are noted, as tiles of one. Each narrowing finds its threshold by bisection on the bits of the scores,
from a bracket that the maxima of a few groups of them give: any K, exact, and the same in every run. That kernel also joins
the shares of an attention whose keys were split.

Shape letters: see `frames`; G = blocks per frame, M >= N frames with pooled tokens, of which the first N are resident.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speed3r_ros.kernels.frames import (
    Visible,
    frame_attention_backward,
    frame_attention_reference,
    frame_attention_triton,
    on_kernels,
    tile_sizes,
    tiles_per_frame,
    tl,
    touched,
    triton,
)
from speed3r_ros.kernels.qkv import differentiated

WORKSPACE = 2**30  # bytes at most for the maxima; more heads than that take turns


def check(q: Tensor, k: Tensor, v: Tensor, coarse: Visible, fine: Visible, top_k: int) -> tuple[int, int, int]:
    """T, N and blocks G per frame of the arguments of `coarse_attention`; ValueError if they do not fit together."""
    (b, h, rows, d), (frames, known) = q.shape, coarse.table.shape[1:]
    blocks, resident = rows // frames, fine.table.shape[2]
    if rows != frames * blocks or k.shape != v.shape or k.shape != (b, h, known * blocks, d):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit {frames} and {known} frames"
        )
    if fine.table.shape[1] != frames or resident > known:
        raise ValueError(f"fine {tuple(fine.table.shape)} does not fit coarse {tuple(coarse.table.shape)}")
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
    q: Tensor, k: Tensor, v: Tensor, coarse: Visible, fine: Visible, top_k: int, group: int = 1
) -> tuple[Tensor, Tensor]:
    """Plain torch; arguments and results of `coarse_attention`."""
    frames, resident, blocks = check(q, k, v, coarse, fine, top_k)
    q, k, v = q.unflatten(2, (frames, -1)), k.unflatten(2, (-1, blocks)), v.unflatten(2, (-1, blocks))
    compressed = frame_attention_reference(q, k, v, coarse)[0].flatten(2, 3)
    chooser = group_queries(q.detach(), group)
    high = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bhtxd,bhngd->bhtxng", chooser.to(high), k[:, :, :resident].detach().to(high))
    visible = (fine.table & coarse.table[:, :, :resident])[:, None, :, None, :, None]
    scores = scores.masked_fill(~visible, -torch.inf).flatten(4).flatten(2, 3)
    best, index = scores.sort(dim=-1, descending=True, stable=True)
    none = torch.iinfo(torch.int32).max
    index = index.masked_fill(best == -torch.inf, none)[..., :top_k].sort(-1).values
    return compressed, index.masked_fill(index == none, -1).int()


if triton is not None:
    from speed3r_ros.kernels.frames import _join

    @triton.jit
    def _threshold(rank, low, count, K):
        """Raise `low` until K ranks reach it, or until those equal to it decide. Returns it, and how many reach it.

        At first `count` of them do: K at least, or all that there are.
        """
        high = tl.max(rank, 0) + 1  # fewer than K reach it
        # the K-th is often beyond half of the best, which is one exponent less
        middle = tl.maximum(tl.where(high > 0x1000000, high - 0x800000, low), (low & high) + ((low ^ high) >> 1))
        while (count > K) & (high - low != 1):
            reach = tl.sum((rank >= middle).to(tl.int32), 0)
            low = tl.where(reach >= K, middle, low)
            count = tl.where(reach >= K, reach, count)
            high = tl.where(reach >= K, high, middle)
            middle = (low & high) + ((low ^ high) >> 1)  # their mean, which does not overflow
        return low, count

    @triton.jit
    def _best(score, live, K, GROUPS: tl.constexpr):
        """Where the K largest live scores are (ties: lower index), as int32.

        K of the maxima of GROUPS disjoint groups of scores reach their K-th largest, so that the threshold of all scores
        lies there or above, and above few scores of many.
        """
        NONE: tl.constexpr = -2147483648
        bits = (score + 0.0).to(tl.int32, bitcast=True)  # + 0.0: minus zero would sort below zero
        rank = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)  # integers in the order of the floats
        rank = tl.where(live, tl.minimum(rank, 0x7F800000), NONE)  # not a number counts as infinite
        low, count = tl.full([], NONE, tl.int32), tl.sum(live.to(tl.int32), 0)
        if rank.shape[0] > GROUPS:
            tops = tl.max(tl.reshape(rank, (rank.shape[0] // GROUPS, GROUPS)), 0)
            low = _threshold(tops, low, tl.sum((tops > NONE).to(tl.int32), 0), K)[0]
            count = tl.where(low == NONE, count, tl.sum((rank >= low).to(tl.int32), 0))
        low, count = _threshold(rank, low, count, K)
        taken = (live & (rank >= low)).to(tl.int32)
        if count > K:  # equal scores at the threshold
            above = (rank > low).to(tl.int32)
            equal = taken - above
            taken = tl.where((equal == 0) | (tl.cumsum(equal, 0) <= K - tl.sum(above, 0)), taken, 0)
        return taken

    @triton.jit
    def _select(
        maxima,
        q,
        k,
        fine,
        coarse,
        index,
        partial,
        partial_lse,
        out,
        lse,
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
        o_b,
        o_h,
        o_t,
        o_x,
        H,
        N,
        X,
        K,
        splits,
        G: tl.constexpr,
        D: tl.constexpr,
        TILE: tl.constexpr,
        PER_FRAME: tl.constexpr,
        TILES: tl.constexpr,
        FRAMES: tl.constexpr,
        KEPT: tl.constexpr,
        GROUPS: tl.constexpr,
        CHUNK: tl.constexpr,
        SPLITS: tl.constexpr,
        FRAMES_KEPT: tl.constexpr,
    ):
        """Choose the key blocks of one row, and join the shares of its attention if there are SPLITS > 1 of them.

        FRAMES and TILES are the powers of two above the frames and the PER_FRAME stored maxima of each, KEPT the one above
        the K blocks or the fewer tiles that hold them, FRAMES_KEPT the one above K if there are more frames: then the choice
        begins among these. CHUNK blocks are scored at once. GROUPS: see `_best`.
        """
        row = tl.program_id(0)
        b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
        t = (row // X).to(tl.int64)
        at_row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + row
        index += b * i_b + h * i_h + row.to(tl.int64) * i_x  # the result's row doubles as a note pad
        maxima += at_row * (N * PER_FRAME)
        fine += b * fine_b + t * fine_t
        coarse += b * coarse_b + t * coarse_t
        d = tl.arange(0, D)

        n = tl.arange(0, FRAMES)
        live = n < N
        live = live & (tl.load(fine + n * fine_n, mask=live, other=0) != 0)
        live = live & (tl.load(coarse + n * coarse_n, mask=live, other=0) != 0)
        within = tl.arange(0, TILES)
        stored = live[:, None] & (within * TILE < G)[None, :]
        best = tl.load(maxima + n[:, None] * PER_FRAME + within[None, :], mask=stored, other=float("-inf"))
        if FRAMES_KEPT < FRAMES:
            taken = _best(tl.max(best, 1), live, K, GROUPS)
            count = tl.sum(taken, 0)
            tl.store(index + tl.cumsum(taken, 0) - 1, n, mask=taken != 0)
            tl.debug_barrier()
            i = tl.arange(0, FRAMES_KEPT)
            n = tl.load(index + i, mask=i < count, other=0)
            tl.debug_barrier()
            stored = (i < count)[:, None] & (within * TILE < G)[None, :]
            best = tl.load(maxima + n[:, None] * PER_FRAME + within[None, :], mask=stored, other=float("-inf"))
        best = tl.reshape(best, (FRAMES_KEPT * TILES,))
        taken = _best(best, tl.reshape(stored, (FRAMES_KEPT * TILES,)), K, GROUPS)
        count = tl.sum(taken, 0)
        number = n[:, None] * (G if TILE == 1 else PER_FRAME) + within[None, :]
        number = tl.reshape(number, (FRAMES_KEPT * TILES,))
        tl.store(index + tl.cumsum(taken, 0) - 1, number, mask=taken != 0)
        if TILE > 1:
            tl.debug_barrier()
            query = tl.load(q + b * q_b + h * q_h + t * q_t + (row % X) * q_x + d).to(tl.float32)
            k += b * k_b + h * k_h
            STEPS: tl.constexpr = KEPT * TILE // CHUNK
            score = tl.zeros([STEPS, CHUNK], tl.float32)
            for step in range(STEPS):
                entry = step * CHUNK + tl.arange(0, CHUNK)
                source = tl.load(index + entry // TILE, mask=entry // TILE < count, other=0)
                y = source % PER_FRAME * TILE + entry % TILE
                at = (source // PER_FRAME).to(tl.int64) * k_n + y * k_y
                some = (entry // TILE < count) & (y < G)
                key = tl.load(k + at[:, None] + d[None, :], mask=some[:, None], other=0.0)
                part = tl.sum(key.to(tl.float32) * query[None, :], 1)
                score = tl.where((tl.arange(0, STEPS) == step)[:, None], part[None, :], score)
            i = tl.arange(0, KEPT * TILE)
            tile = tl.load(index + i // TILE, mask=i // TILE < count, other=0)
            tl.debug_barrier()
            y = tile % PER_FRAME * TILE + i % TILE
            taken = _best(tl.reshape(score, (KEPT * TILE,)), (i // TILE < count) & (y < G), K, GROUPS)
            count = tl.sum(taken, 0)
            tl.store(index + tl.cumsum(taken, 0) - 1, tile // PER_FRAME * G + y, mask=taken != 0)
        i = tl.arange(0, KEPT * TILE)
        tl.store(index + i, -1, mask=(i >= count) & (i < K))

        if SPLITS > 1:
            rows = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
            acc, total = _join(partial, partial_lse, at_row, rows, splits, D, SPLITS)
            out += b * o_b + h * o_h + t * o_t + (row % X) * o_x
            tl.store(out + d, acc.to(out.dtype.element_ty))
            tl.store(lse + at_row, total)


def tile_size(resident: int, blocks: int) -> int:
    """Key blocks per stored maximum, measured on an H200: more of them mean less traffic for the maxima and more blocks to
    score again."""
    keys = resident * blocks
    tile = 1 if keys <= 512 else 4 if keys <= 4096 else 8 if keys <= 8192 else 16
    while tile > blocks:
        tile //= 2
    return tile


def coarse_sizes(frames: int, rows: int, keys: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes of the coarse attention, see `frames.tile_sizes`; noting maxima takes registers."""
    sizes = tile_sizes(frames, rows, keys, width, dtype)
    if sizes["BN"] == 128:
        many = frames * rows > 8192 and touched(frames, rows, 128) <= 32
        sizes |= {"BM": 128, "BN": 64, "num_stages": 3} if many else {"BN": 64, "num_stages": 5}
    return sizes


def coarse_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coarse: Visible,
    fine: Visible,
    top_k: int,
    group: int = 1,
    tile: int | None = None,
    **tuning: int | dict[str, int] | None,
) -> tuple[Tensor, Tensor]:
    """The kernels; arguments and results of `coarse_attention`. tile, tuning: see `attend_and_choose`."""
    return attend_and_choose(q, k, v, coarse, fine, top_k, group, tile, **tuning)[:2]


def attend_and_choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coarse: Visible,
    fine: Visible,
    top_k: int,
    group: int,
    tile: int | None = None,
    sizes: dict[str, int] | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of `coarse_attention`, and the logarithm of the sum of exponentials (B, H, T, G).

    tile: key blocks per stored maximum, a power of two, see `tile_size`; sizes, splits: see
    `frames.frame_attention_triton`.
    """
    frames, resident, blocks = check(q, k, v, coarse, fine, top_k)
    b, h, _, d = q.shape
    q, k, v = q.unflatten(2, (frames, -1)), k.unflatten(2, (-1, blocks)), v.unflatten(2, (-1, blocks))
    compressed = torch.empty_like(q, memory_format=torch.contiguous_format)
    chooser = group_queries(q, group)
    rows, keep = chooser.shape[3], min(top_k, resident * blocks)
    sizes = sizes or coarse_sizes(frames, rows, blocks, d, q.dtype)
    parts = []
    if group > 1:
        parts = [frame_attention_triton(q, k, v, coarse, out=compressed)[1]]
    tile = tile or tile_size(resident, blocks)
    width = resident * tiles_per_frame(blocks, tile)
    index = torch.empty(b, h, frames * rows, keep, dtype=torch.int32, device=q.device)
    turn = max(1, WORKSPACE // (4 * b * frames * rows * width))
    for first in range(0, h, turn):
        heads = slice(first, first + turn)
        qs, ks = chooser[:, heads], k[:, heads]
        maxima = torch.empty(b, qs.shape[1], frames * rows, width, dtype=torch.float32, device=q.device)
        shares = frame_attention_triton(
            qs,
            ks,
            v[:, heads],
            coarse,
            out=compressed[:, heads],
            maxima=(maxima, tile),
            values=group == 1,
            splits=splits,
            sizes=sizes,
            join=False,
        )
        lse = select(maxima, qs, ks, coarse.table, fine.table, index[:, heads], tile, *shares, compressed[:, heads])
        if group == 1:
            parts.append(lse)
    return compressed.flatten(2, 3), index, torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def select(
    maxima: Tensor,
    q: Tensor,
    k: Tensor,
    coarse: Tensor,
    fine: Tensor,
    index: Tensor,
    tile: int,
    attended: Tensor,
    lse: Tensor,
    out: Tensor,
) -> Tensor:
    """Write the choice of every row, from the maxima of its tiles of key blocks, to `index` (B, H, T * X, K).

    attended, lse: from `frames.frame_attention_triton`, of which shares are joined to `out`, if they are shares. Returns
    the logarithms of the sums.
    """
    (b, h, frames, rows, d), blocks, (resident, keep) = q.shape, k.shape[3], (fine.shape[2], index.shape[3])
    per_frame = tiles_per_frame(blocks, tile)
    tiles, all_frames = triton.next_power_of_2(per_frame), triton.next_power_of_2(resident)
    kept = triton.next_power_of_2(min(keep, resident * per_frame))
    splits = len(attended) if attended.dim() == 6 else 1
    total = torch.empty(lse.shape[1:], dtype=lse.dtype, device=lse.device) if splits > 1 else lse
    _select[(frames * rows, b * h)](
        maxima,
        q,
        k,
        fine.view(torch.uint8),
        coarse.view(torch.uint8),
        index,
        attended,
        lse,
        out,
        total,
        *q.stride()[:4],
        *k.stride()[:4],
        *fine.expand(b, -1, -1).stride(),
        *coarse.expand(b, -1, -1).stride(),
        *index.stride()[:3],
        *out.stride()[:4],
        h,
        resident,
        rows,
        keep,
        splits,
        G=blocks,
        D=d,
        TILE=tile,
        PER_FRAME=per_frame,
        TILES=tiles,
        FRAMES=all_frames,
        KEPT=kept,
        GROUPS=max(triton.next_power_of_2(2 * keep), 128),
        CHUNK=min(kept * tile, max(16, 4096 // d)),
        SPLITS=triton.next_power_of_2(splits),
        FRAMES_KEPT=min(all_frames, triton.next_power_of_2(keep)),
        num_warps=max(1, min(8, max(all_frames * tiles, kept * tile) // 4096)),
    )
    return total


class CoarseAttention(torch.autograd.Function):
    """`coarse_attention` by the kernels, differentiable."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, coarse: Visible, fine: Visible, top_k: int, group: int
    ) -> tuple[Tensor, Tensor]:
        """See `coarse_attention`."""
        compressed, index, lse = attend_and_choose(q, k, v, coarse, fine, top_k, group)
        ctx.save_for_backward(q, k, v, compressed, lse)
        ctx.coarse = coarse
        ctx.mark_non_differentiable(index)
        return compressed, index

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, compressed, lse = ctx.saved_tensors
        frames, blocks = lse.shape[2:]
        delta = (compressed.float() * grad.float()).sum(-1).unflatten(2, (frames, blocks))
        q, k, v, grad = (x.unflatten(2, (-1, blocks)) for x in (q, k, v, grad))
        grads = frame_attention_backward(q, k, v, ctx.coarse, grad, lse, delta)
        return *(x.flatten(2, 3) for x in grads), *[None] * 4


def coarse_attention(
    q: Tensor, k: Tensor, v: Tensor, coarse: Visible, fine: Visible, top_k: int, group: int = 1
) -> tuple[Tensor, Tensor]:
    """Attention among pooled tokens, and the best key blocks of every query block and head.

    q: (B, H, T * G, D). k, v: (B, H, M * G, D), strided views allowed. coarse: of a table (B or 1, T, M), the frames
    whose pooled tokens a frame attends to. fine: of a table (B or 1, T, N): blocks are chosen among the first N frames,
    those that both tables show. group: so many neighbouring blocks of a frame choose together, by the mean of their queries.

    Returns the attention's output (B, H, T * G, D) and the choice (B, H, T * ceil(G / group), K) int32 with
    K = min(top_k, N * G): block numbers (frame * G + block) in rising order, then -1 where fewer are visible. Of equal
    scores the lower number wins. The choice has no gradient. Raises ValueError on shapes that do not fit.
    """
    if on_kernels(q):
        return CoarseAttention.apply(q, k, v, coarse, fine, top_k, group)
    frames, _, _ = check(q, k, v, coarse, fine, top_k)
    if frames == 1 or differentiated(q, k, v):
        return coarse_attention_reference(q, k, v, coarse, fine, top_k, group)
    parts = [  # a frame's queries at a time: all scores of many frames would not fit
        coarse_attention_reference(x, k, v, *(Visible(y.table[:, t : t + 1]) for y in (coarse, fine)), top_k, group)
        for t, x in enumerate(q.chunk(frames, 2))
    ]
    return tuple(torch.cat(part, 2) for part in zip(*parts))
