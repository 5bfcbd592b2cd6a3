"""The vocabulary that the official backbones share: DINOv2 encoder, transformer block, rotary embedding, attention across
views. What differs between them is an option.

Modules and parameters carry the names of the published checkpoints, so that these load key for key. Sources: DINOv2 (Oquab
et al., 2023), VGGT (Wang et al., CVPR 2025), Pi3 (Wang et al., 2025), Depth Anything 3 (Lin et al., 2025), Speed3R.

Precision: matrix products run in the type that their weights are stored in (`quantised.set_precision`); norms, LayerScale and the
residual stream keep theirs, float32.

Shape letters: B sequences of N views, F = B * N frames, L = S + P tokens per frame (S special ones, then patches), C channels,
H heads, D head width, (h, w) patch grid, G = P / 16 blocks per frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed3r_ros.kernels.frames import Visible
from speed3r_ros.kernels.qkv import BLOCK, Slot, normalise_and_rotate, prepare_tokens
from speed3r_ros.kernels.residual import add
from speed3r_ros.model.attention import Layer, Strategy, Tokens
from speed3r_ros.model.backbones.results import Reconstruction
from speed3r_ros.model.memory import Memory, Sight
from speed3r_ros.model.network import compute_dtype, linear_gelu, norm_sum, patch_product
from speed3r_ros.model.quantised import WideBlock, set_precision
from speed3r_ros.model.strategies import strategy_for

if TYPE_CHECKING:  # it imports this module
    from speed3r_ros.model.backbones.heads import Heads

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH = 14
SIDE = 4  # patches along the side of a block
TURNS = 8  # at most, in which queries, keys and values are made: few, so that their matrix products stay large

Tables = tuple[Tensor, Tensor]  # cosines and sines of a rotary embedding, (1, X, 1, D)


def by_frames(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    chunk: int,
    *inputs: Tensor,
    out: Tensor | tuple[Tensor, ...] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`function` of tensors (F, ...), `chunk` frames at a time, so that its temporary memory does not grow with F.

    out: where to write the result or results, maybe inputs themselves; ignored while gradients are recorded. ValueError on a
    chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk {chunk}: must be at least 1")
    frames = len(inputs[0])
    recording = torch.is_grad_enabled()
    if frames <= chunk and (out is None or recording):
        return function(*inputs)
    if recording:
        parts = [function(*part) for part in zip(*(x.split(chunk) for x in inputs))]
        return torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(map(torch.cat, zip(*parts)))
    joined = (out,) if isinstance(out, Tensor) else out
    for first in range(0, frames, chunk):
        result = function(*(x[first : first + chunk] for x in inputs))
        parts = (result,) if isinstance(result, Tensor) else result
        if joined is None:
            joined = tuple(torch.empty(frames, *x.shape[1:], dtype=x.dtype, device=x.device) for x in parts)
        for whole, part in zip(joined, parts):
            place = whole[first : first + chunk]
            if part.data_ptr() != place.data_ptr():  # it may have been written there
                place.copy_(part)
    return joined[0] if isinstance(result, Tensor) else joined


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Let the GPU round inputs of float32 matrix products to 11 bits, eight times as fast, as it does in convolutions anyway."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def patch_grid(height: int, width: int) -> tuple[int, int]:
    """Patches (h, w) of an image; ValueError if its sides are not multiples of 14 pixels."""
    if height % PATCH or width % PATCH:
        near = [max(1, round(side / PATCH)) * PATCH for side in (height, width)]
        raise ValueError(
            f"images are {height} x {width}: sides must be multiples of {PATCH}, resize to {near[0]} x {near[1]}"
        )
    return height // PATCH, width // PATCH


def normalised(images: Tensor) -> Tensor:
    """Images (F, 3, H, W) in [0, 1], less ImageNet's mean and over its deviation."""
    # by channel: a tensor of the constants would have to be copied to the GPU, which a CUDA graph cannot do
    return torch.stack([(images[:, i] - m) / s for i, (m, s) in enumerate(zip(IMAGE_MEAN, IMAGE_STD))], 1)


# ------------------------------------------------------------------------------------------------------------ positions


def block_order(h: int, w: int, device: torch.device | str | None = None) -> Tensor:
    """Row-major number of each patch in block-major order, (h * w,): 16 neighbours in a row form one 4 x 4 window.

    ValueError if 4 does not divide h and w.
    """
    if h % SIDE or w % SIDE:
        raise ValueError(
            f"{h} x {w} patches: sparse attention needs multiples of {SIDE}, images of {SIDE * PATCH} pixels"
        )
    return torch.arange(h * w, device=device).view(h // SIDE, SIDE, w // SIDE, SIDE).transpose(1, 2).reshape(-1)


def positions(h: int, w: int, specials: int, order: Tensor | None = None, device: torch.device | None = None) -> Tensor:
    """Row and column of each token (L, 2): (0, 0) for special ones, from (1, 1) for patches, in `order` or row-major."""
    y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    patches = torch.stack([y, x], -1).flatten(0, 1) + 1
    return torch.cat([patches.new_zeros(specials, 2), patches if order is None else patches[order]])


class Layout:
    """Order of a view's tokens: special ones, then patches, row by row or, for strategies in blocks, block by block.

    at: (L, 2) positions of the tokens. ValueError: see `block_order`.
    """

    def __init__(self, grid: tuple[int, int], specials: int, attention: str | Strategy, device: torch.device) -> None:
        order = block_order(*grid, device) if strategy_for(attention).in_blocks else None
        self.at = positions(*grid, specials, order, device)
        self._order = self._back = None
        if order is not None:
            self._order = torch.cat([torch.arange(specials, device=device), specials + order])
            self._back = self._order.argsort()

    def arrange(self, x: Tensor) -> Tensor:
        """Tokens (F, L, C) whose patches lie row by row -> in this order; x itself if that is the same."""
        return x if self._order is None else x[:, self._order]

    def restore(self, x: Tensor, chunk: int) -> Tensor:
        """The inverse, in x's place where no gradients are recorded."""
        return x if self._back is None else by_frames(lambda y: y[:, self._back], chunk, x, out=x)


def rotary(at: Tensor, width: int, rounded: torch.dtype = torch.float32) -> Tables:
    """Tables of the 2-D rotary embedding with base 100 at integer positions (X, 2), half of the head for each axis.

    rounded: type in which the angles and their cosines are held; Pi3 ran its training and runs its inference with bfloat16.
    """
    rate = 100.0 ** (-torch.arange(width // 4, device=at.device) / (width // 4))
    angle = (at[..., None] * rate).repeat(1, 1, 2).flatten(1)[None, :, None].to(rounded)
    return angle.cos().to(rate.dtype), angle.sin().to(rate.dtype)


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """Rotary embedding of vectors (F, X, H, D)."""
    a, b, c, d = x.chunk(4, -1)
    return torch.addcmul(x * tables[0], torch.cat([-b, a, -d, c], -1), tables[1])


# --------------------------------------------------------------------------------------------------------------- blocks


class LayerScale(nn.Module):
    """One learned factor per channel."""

    def __init__(self, channels: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, channels: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, out or channels)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., out)."""
        return self.fc2(linear_gelu(self.fc1, x))


class SwiGlu(nn.Module):
    """Gated MLP (Shazeer, 2020) with both input projections in one layer."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(channels, 2 * hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        gate, x = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * x)


class Attention(nn.Module):
    """Projections of multi-head attention; the attention itself is the caller's.

    qk_eps: queries and keys pass a LayerNorm with this epsilon, or none. gated: two gates per head and token (Speed3R).
    """

    def __init__(self, channels: int, heads: int, qk_eps: float | None, gated: bool) -> None:
        super().__init__()
        self.heads, self.qk_eps = heads, qk_eps
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        norms = [nn.Identity() if qk_eps is None else nn.LayerNorm(channels // heads, qk_eps) for _ in range(2)]
        self.q_norm, self.k_norm = norms
        if gated:
            self.gate = nn.Sequential(nn.Linear(channels, 2 * heads))
            nn.init.zeros_(self.gate[0].weight)
            with torch.no_grad():  # compression starts at sigmoid(-1), selection at sigmoid(1)
                self.gate[0].bias.view(heads, 2).copy_(torch.tensor([-1.0, 1.0]))

    def project(self, h: Tensor) -> Tensor:
        """Normalised input (F, L, C) -> raw qkv (F, L, 3, H, D)."""
        return self.qkv(h.to(compute_dtype(self.qkv))).unflatten(-1, (3, self.heads, -1))

    def norms(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Weight and bias (2, D) of the norm of queries and of that of keys, if they have one."""
        if isinstance(self.q_norm, nn.Identity):
            return None, None
        return tuple(torch.stack([norm.weight, norm.bias]) for norm in (self.q_norm, self.k_norm))

    def prepare(self, qkv: Tensor, tables: Tables | None, slot: Slot | None = None) -> tuple[Tensor, ...]:
        """Raw qkv (F, X, 3, H, D), given up -> normalised, rotated q, k and plain v (F, H, X, D), strided views.

        With a slot, F is 1, and k and v are all that its buffers hold, of N frames, this one included.
        """
        if tables is None and self.qk_eps is None:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        else:
            q, k, v = normalise_and_rotate(qkv, *self.norms(), *(tables or (None, None)), self.qk_eps or 0.0)
        if slot is None:
            return q, k, v
        for held, new in zip(slot.fine, (k, v)):
            held.index_copy_(1, slot.index, new.detach().transpose(0, 1))
        return q, *slot.fine.transpose(1, 2)

    def prepare_in_blocks(
        self,
        qkv: Tensor,
        tables: Tables,
        pooled: Tables,
        specials: int,
        slot: Slot | None = None,
        out: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, ...]:
        """The same and, for the means of each block, pooled q, k, v (F, H, G, D). out: see `prepare_tokens`."""
        return prepare_tokens(qkv, *self.norms(), *tables, *pooled, specials, slot, self.qk_eps or 0.0, out)

    def room(self, frames: int, length: int, specials: int, device: torch.device) -> tuple[Tensor, ...]:
        """Where the results of `prepare_in_blocks` for so many frames go, and after them `gates`.

        Keys and values lie heads first, as they are gathered; queries token by token, as the projection after attention
        reads what was written over them.
        """
        dtype, width = compute_dtype(self.qkv), self.proj.in_features // self.heads
        blocks = (length - specials) // BLOCK

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        q, gate = (empty(frames, length, self.heads, n).transpose(1, 2) for n in (width, 2))
        keys = empty(2, self.heads, frames, length, width).transpose(1, 2)
        return q, *keys, *empty(3, self.heads, frames, blocks, width).transpose(1, 2), gate

    def gates(self, h: Tensor) -> Tensor:
        """Normalised input (F, L, C) -> gates of the compressed and of the selected output (F, H, L, 2).

        A block without gates takes the selected output alone.
        """
        if not hasattr(self, "gate"):
            open_one = torch.arange(2, device=h.device, dtype=compute_dtype(self.qkv))
            return open_one.expand(len(h), self.heads, h.shape[1], 2)
        gate = self.gate(h.to(compute_dtype(self.gate[0])))
        high = torch.promote_types(gate.dtype, torch.float32)
        return gate.to(high).sigmoid().to(gate.dtype).unflatten(-1, (self.heads, 2)).transpose(1, 2)


class Block(WideBlock):
    """Pre-norm transformer block: x += ls1(attention(norm1(x))); x += ls2(mlp(norm2(x))).

    eps: of the two LayerNorms. qk_eps, gated: see `Attention`. scale: initial LayerScale, or none.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        eps: float = 1e-6,
        qk_eps: float | None = None,
        scale: float | None = 0.01,
        gated: bool = False,
        swiglu: bool = False,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels, eps), nn.LayerNorm(channels, eps)
        self.attn = Attention(channels, heads, qk_eps, gated)
        if swiglu:  # two thirds of the usual width, rounded up to a multiple of 8
            self.mlp = SwiGlu(channels, (4 * channels * 2 // 3 + 7) // 8 * 8)
        else:
            self.mlp = Mlp(channels, 4 * channels)
        self.ls1, self.ls2 = (nn.Identity() if scale is None else LayerScale(channels, scale) for _ in range(2))

    def before(self, x: Tensor, tables: Tables | None) -> tuple[Tensor, ...]:
        """Input (F, L, C) -> q, k, v (F, H, L, D)."""
        return self.attn.prepare(self.attn.project(self.norm_first(x)), tables)

    def norm_first(self, x: Tensor) -> Tensor:
        """(F, L, C) -> (F, L, C) in the type of the matrix products."""
        return norm_sum(self.norm1, x, None, compute_dtype(self.attn.qkv))[1]

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual (F, L, C) and attention output (F, H, L, D) -> output (F, L, C), over x where no gradients are recorded."""
        branch = self.attn.proj(attended.transpose(1, 2).flatten(2))
        total, h = norm_sum(self.norm2, x, branch, attended.dtype, getattr(self.ls1, "gamma", None))
        out = None if torch.is_grad_enabled() else x
        return add(total, self.mlp(h), getattr(self.ls2, "gamma", None), out)

    def forward(self, x: Tensor, tables: Tables | None = None, mask: Tensor | None = None) -> Tensor:
        """Attention inside each frame: (F, L, C) -> (F, L, C), over x where no gradients are recorded.

        mask: (L, L) bool, which keys a query sees.
        """
        return self.after(x, F.scaled_dot_product_attention(*self.before(x, tables), attn_mask=mask))


@dataclass(frozen=True)
class AcrossViews:
    """Attention of a block across the views of each sequence, by a strategy.

    views: N. specials: S. attention: see `model.strategies`. top_k: blocks that a query block attends to. chunk: frames per
    turn of everything but the attention; what it takes in blocks is made in at most `TURNS` turns. tables, pooled: rotary
    tables of the tokens and of the blocks. fine, coarse: views whose tokens and whose pooled tokens a view sees. unmasked: all
    of them. sensitive: layers that bear few keys badly (Spark3R). memory: keys and values of the one new view go there, and
    those of all views come from there. always: see `Layer`.
    """

    views: int
    specials: int
    attention: Strategy
    top_k: int
    chunk: int
    tables: Tables
    pooled: Tables | None
    fine: Visible
    coarse: Visible
    unmasked: bool
    sensitive: frozenset[int]
    memory: Memory | None
    always: Visible | None

    @staticmethod
    def of(
        at: Tensor,
        specials: int,
        views: int,
        width: int,
        attention: str | Strategy,
        top_k: int,
        chunk: int,
        sensitive: frozenset[int] = frozenset(),
        rounded: torch.dtype = torch.float32,
        sight: Sight | None = None,
        always: Tensor | None = None,
    ) -> AcrossViews:
        """For tokens at positions (L, 2), whose blocks stand at the truncated mean of their tokens' positions (Speed3R).

        width: of a head. rounded: see `rotary`. sight: None = all views see all. always: numbers (R,) of the views that
        `Layer.always` shows to those that see them, None for none. ValueError if there is no such strategy, or if it cannot do
        without later views.
        """
        strategy, pooled = strategy_for(attention, sight is None or sight.in_parts), None
        if strategy.in_blocks:
            pooled = rotary(at[specials:].view(-1, BLOCK, 2).sum(1) // BLOCK, width, rounded)
        tables, unmasked, memory = rotary(at, width, rounded), sight is None, None
        if sight is None:
            fine = coarse = Visible(torch.ones(1, views, views, dtype=torch.bool, device=at.device))
        else:  # lists of visible views are made anew for each call, so that a CUDA graph makes them too
            fine, coarse, memory = Visible(sight.fine), Visible(sight.coarse), sight.memory
        shown = None
        if always is not None:
            shown = Visible(fine.table & torch.zeros_like(fine.table).index_fill(2, always, True))
        return AcrossViews(
            views, specials, strategy, top_k, chunk, tables, pooled, fine, coarse, unmasked, sensitive, memory, shown
        )

    def before(self, block: Block, x: Tensor, number: int) -> tuple[Tokens, Tokens, Tokens]:
        """Input (F, L, C) -> queries, keys and values of B sequences; keys and values lie in memory alike."""
        slot = None if self.memory is None else self.memory.slot(number)
        batch = len(x) // self.views

        def sequences(y: Tensor) -> Tensor:
            """(B * views, H, X, D) -> (B, H, views * X, D), a view; views of the call or of the memory."""
            return y.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)

        if self.pooled is None:
            h = block.norm_first(x)
            q, k, v = map(sequences, block.attn.prepare(block.attn.project(h), self.tables, slot))
            given = h.unflatten(0, (batch, -1)).flatten(1, 2) if self.attention.reads_input else None
            return Tokens(q, x=given), Tokens(k), Tokens(v)

        def prepared(x: Tensor, *out: Tensor) -> tuple[Tensor, ...]:
            h = block.norm_first(x)
            qkv = block.attn.project(h)
            tokens = block.attn.prepare_in_blocks(qkv, self.tables, self.pooled, self.specials, slot, out[:6] or None)
            return *tokens, block.attn.gates(h)

        turn = max(self.chunk, -(-len(x) // TURNS))
        in_turns = len(x) > turn and not torch.is_grad_enabled()
        if in_turns:  # else raw ones of all views beside prepared ones would be the most that the network holds
            room = block.attn.room(*x.shape[:2], self.specials, x.device)
            tokens = by_frames(prepared, turn, x, *room, out=room)
        else:
            tokens = prepared(x)
        q, k, v, q_pooled, k_pooled, v_pooled, gate = map(sequences, tokens)
        return Tokens(q, q_pooled, gate, given_up=in_turns), Tokens(k, k_pooled), Tokens(v, v_pooled)

    def __call__(self, block: Block, x: Tensor, number: int, reference: Tensor | None = None) -> Tensor:
        """(F, L, C) -> (F, L, C), in x's place where no gradients are recorded. number, reference: see `Layer`."""
        linear, bias = getattr(block.attn, "proj_lin", None), None
        tokens = self.before(block, x, number)
        if self.memory is not None and not self.attention.follows_visibility:  # rows of whole frames and of parts
            k, v, bias = self.memory.rows(number)
            tokens = tokens[0], Tokens(k), Tokens(v)
        layer = Layer(number, number in self.sensitive, self.unmasked, reference, linear, self.always, bias)
        out = self.attention(*tokens, self.fine, self.coarse, self.specials, self.top_k, layer)
        del tokens  # their memory is for the temporary tensors of the block's rest
        out = out.unflatten(2, (self.views, -1)).transpose(1, 2).flatten(0, 1)
        return by_frames(block.after, self.chunk, x, out, out=x)


# -------------------------------------------------------------------------------------------------------------- encoder


class PatchEmbed(nn.Module):
    """Linear embedding of 14 x 14 patches."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, channels, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        """(F, inputs, H, W) -> (F, h * w, C), row-major."""
        return patch_product(self.proj, x.to(self.proj.weight.dtype))


class DinoV2(nn.Module):
    """Vision transformer of DINOv2 with patches of 14 pixels: class token, registers, patches.

    table: side of the position table. antialias: how the table is resized to other grids: True = bicubic with antialiasing
    to the output size (VGGT, Pi3); False = bicubic without, by the scale factor (n + 0.1) / table, which also sets where it
    is sampled (Depth Anything 3).
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        *,
        inputs: int = 3,
        registers: int = 0,
        table: int = 37,
        antialias: bool = True,
        swiglu: bool = False,
        qk_norm_from: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.table, self.antialias, self.specials = table, antialias, 1 + registers
        self.patch_embed = PatchEmbed(inputs, channels)
        self.cls_token = nn.Parameter(torch.randn(1, 1, channels) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + table**2, channels) * 0.02)
        if registers:
            self.register_tokens = nn.Parameter(torch.randn(1, registers, channels) * 0.02)
        first = depth if qk_norm_from is None else qk_norm_from
        self.blocks = nn.ModuleList(
            Block(channels, heads, qk_eps=1e-5 if i >= first else None, scale=1.0, swiglu=swiglu) for i in range(depth)
        )
        self.norm = nn.LayerNorm(channels, eps)

    def position_table(self, h: int, w: int) -> Tensor:
        """The table of the patches (1, h * w, C) for a grid of h x w."""
        patches = self.pos_embed[:, 1:]
        if (h, w) == (self.table, self.table):
            return patches
        grid = patches.unflatten(1, (self.table, self.table)).permute(0, 3, 1, 2)
        if self.antialias:
            grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=True)
        else:
            scale = ((h + 0.1) / self.table, (w + 0.1) / self.table)
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return grid.flatten(2).transpose(1, 2)

    def embed(self, images: Tensor) -> Tensor:
        """Normalised images (F, inputs, H, W) -> tokens (F, L, C) before the first block. ValueError: see `patch_grid`."""
        patches = self.patch_embed(images) + self.position_table(*patch_grid(*images.shape[2:]))
        special = self.cls_token + self.pos_embed[:, :1]
        if self.specials > 1:
            special = torch.cat([special, self.register_tokens], 1)
        return torch.cat([special.expand(len(patches), -1, -1), patches], 1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (F, inputs, H, W) -> patch tokens (F, h * w, C), row-major, after the last norm."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, self.specials :])


# --------------------------------------------------------------------------------------------------------------- models


class MultiView(nn.Module):
    """A model of several views: `trunk` is all but its heads, `forward` the whole; the rest is what streaming it needs to know.

    attention: what it was trained with. specials: tokens per view before the patches. full_precision: how the names of modules
    begin that stay in float32, its heads and what reads conditions.
    """

    attention: ClassVar[str] = "dense"
    full_precision: ClassVar[tuple[str, ...]]
    specials: int

    @property
    def across_views(self) -> list[Block]:
        """Blocks across views, in the order in which they run."""
        raise NotImplementedError

    @property
    def sensitive(self) -> frozenset[int]:
        """Numbers of those that bear few keys badly: see `spark3r.sensitive_layers`."""
        raise NotImplementedError

    def precision(self, dtype: torch.dtype | str) -> MultiView:
        """Run matrix products in `dtype` from now on, but those of `full_precision`; residual streams stay float32.

        ValueError: see `quantised.check_precision`. Returns itself.
        """
        set_precision(self, dtype)
        return self

    def trunk(self, images: Tensor, **options: object) -> Heads:
        """Images (B, N, 3, H, W) in [0, 1], on any device -> heads that have yet to run. `sight` is one of the options."""
        raise NotImplementedError

    def forward(self, *args: object, **options: object) -> Reconstruction:
        """The geometry of all views at once. Arguments: see `trunk`."""
        return self.trunk(*args, **options).whole()

    def working_size(self, height: int, width: int) -> tuple[int, int]:
        """Size at which images of the given size are computed. ValueError: see `patch_grid`."""
        patch_grid(height, width)
        return height, width

    def state(self, slots: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what it keeps in a memory of so many slots beside keys and values of `across_views`."""
        return {}

    def step(
        self, image: Tensor, memory: Memory, rays: Tensor | None, known: Tensor | None, attention: str, top_k: int
    ) -> Reconstruction:
        """One new frame (3, H, W) in [0, 1] against the memory, with B = N = 1 in the result.

        rays: (2, H, W), x/z and y/z of each pixel, valid where known: (1,) bool is True; models that cannot be told pass
        them over.
        """
        return self(image[None, None], attention=attention, top_k=top_k, sight=Sight.into(memory))
