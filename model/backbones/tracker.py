"""VGGT's point tracker (after CoTracker: Karaev et al., 2023): follows pixels of the first view through the others.

Shape letters: B sequences of N views, Q queries, C channels of the features, (h, w) feature map at half the image's size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed3r_ros.model.backbones.blocks import Mlp, by_frames
from speed3r_ros.model.backbones.dpt import DPT

STRIDE = 2  # pixels per cell of the feature map
FLOW_SCALE = 518.0  # side of the training images, by which displacements are divided
VIRTUAL = 64  # learned tracks through which the queries exchange what they know
ROUNDS = 6


@dataclass(frozen=True)
class TrackerConfig:
    """Sizes; the defaults are those of the published checkpoints. levels: of the correlation pyramid."""

    features: int = 128
    hidden: int = 384
    levels: int = 7
    radius: int = 4
    iterations: int = 4


@dataclass(frozen=True)
class Tracks:
    """positions: (B, N, Q, 2) in pixels, x then y. visibility, confidence: (B, N, Q) in [0, 1]."""

    positions: Tensor
    visibility: Tensor
    confidence: Tensor


def sample(maps: Tensor, at: Tensor, padding: str) -> Tensor:
    """Bilinear samples of maps (F, C, h, w) at cells (F, X, Y, 2), x then y -> (F, X, Y, C)."""
    size = at.new_tensor([maps.shape[3] - 1, maps.shape[2] - 1]).clamp(min=1)
    return F.grid_sample(maps, at * 2 / size - 1, padding_mode=padding, align_corners=True).permute(0, 2, 3, 1)


def waves(x: Tensor, rate: Tensor) -> Tensor:
    """Sine and cosine, by turns, of each coordinate of (..., 2) at rates (J,) -> (..., 4 J): x first, then y."""
    angle = x[..., None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-3)


class TrackBlock(nn.Module):
    """Attention to the tokens themselves or to a context. The residual is taken from the normalised input."""

    def __init__(self, channels: int, cross: bool, heads: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        if cross:
            self.norm_context, self.cross_attn = nn.LayerNorm(channels), attention
        else:
            self.attn = attention
        self.mlp = Mlp(channels, 4 * channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(F, X, C), and a context (F, Y, C) -> (F, X, C)."""
        x = self.norm1(x)
        attention = self.attn if context is None else self.cross_attn
        context = x if context is None else self.norm_context(context)
        x = x + attention(x, context, context, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class UpdateFormer(nn.Module):
    """Attention along each track, and among the tracks of each view by way of the virtual ones."""

    def __init__(self, inputs: int, channels: int, out: int) -> None:
        super().__init__()
        self.input_norm, self.input_transform = nn.LayerNorm(inputs), nn.Linear(inputs, channels)
        self.output_norm, self.flow_head = nn.LayerNorm(channels), nn.Linear(channels, out)
        self.virual_tracks = nn.Parameter(torch.randn(1, VIRTUAL, 1, channels) * 0.02)  # spelt so in the checkpoints
        (
            self.time_blocks,
            self.space_virtual_blocks,
            self.space_point2virtual_blocks,
            self.space_virtual2point_blocks,
        ) = (nn.ModuleList(TrackBlock(channels, cross) for _ in range(ROUNDS)) for cross in (False, False, True, True))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, Q, N, inputs) -> (B, Q, N, out)."""
        b, queries, views = tokens.shape[:3]
        first = self.input_transform(self.input_norm(tokens))
        x = torch.cat([first, self.virual_tracks.expand(b, -1, views, -1)], 1)
        rounds = zip(
            self.time_blocks,
            self.space_virtual2point_blocks,
            self.space_virtual_blocks,
            self.space_point2virtual_blocks,
        )
        for along, gather, exchange, spread in rounds:
            x = along(x.flatten(0, 1)).unflatten(0, (b, -1))
            points, virtual = x.transpose(1, 2).flatten(0, 1).split([queries, VIRTUAL], 1)
            virtual = exchange(gather(virtual, points))
            x = torch.cat([spread(points, virtual), virtual], 1).unflatten(0, (b, views)).transpose(1, 2)
        return self.flow_head(self.output_norm(x[:, :queries] + first))


class Refiner(nn.Module):
    """Refines positions and features of the tracks in a few iterations."""

    def __init__(self, config: TrackerConfig) -> None:
        super().__init__()
        self.config, c = config, config.features
        window = (2 * config.radius + 1) ** 2
        token = 3 * c + 4
        self.query_ref_token = nn.Parameter(torch.randn(1, 2, token) * 0.02)
        self.corr_mlp = Mlp(config.levels * window, config.hidden, c)
        self.updateformer = UpdateFormer(token, config.hidden, c + 2)
        self.fmap_norm, self.ffeat_norm = nn.LayerNorm(c), nn.GroupNorm(1, c)
        self.ffeat_updater = nn.Sequential(nn.Linear(c, c), nn.GELU())
        self.vis_predictor, self.conf_predictor = nn.Sequential(nn.Linear(c, 1)), nn.Sequential(nn.Linear(c, 1))

    def correlations(self, pyramid: list[Tensor], features: Tensor, at: Tensor) -> Tensor:
        """Products of features (F, Q, C) with those around cells (F, Q, 2) in every level -> (F, Q, levels * window)."""
        shifts = torch.arange(-self.config.radius, self.config.radius + 1.0, device=at.device)
        window = torch.cartesian_prod(shifts, shifts)  # y varies fastest
        parts = []
        for level, maps in enumerate(pyramid):
            around = sample(maps, at[:, :, None] / 2**level + window, "zeros")
            parts.append(torch.einsum("fqxc,fqc->fqx", around, features))
        return torch.cat(parts, -1) / features.shape[-1] ** 0.5

    def flow_embedding(self, flow: Tensor) -> Tensor:
        """Displacements (..., 2) in cells -> (..., C + 4)."""
        half = self.config.features // 2
        rate = torch.arange(0, half, 2, device=flow.device) * (1000.0 / half)
        scaled = flow / FLOW_SCALE
        return torch.cat([waves(flow, rate), scaled, scaled], -1)

    def place_embedding(self, size: tuple[int, int], at: Tensor) -> Tensor:
        """Sinusoidal table of cells, sampled at (B, Q, 2) -> (B, Q, 3 C + 4)."""
        quarter = self.query_ref_token.shape[-1] // 4
        rate = 1e-4 ** (torch.arange(quarter, device=at.device, dtype=torch.float64) / quarter)
        x, y = (rate[:, None] * torch.arange(n, device=at.device) for n in size[::-1])
        x, y = (torch.cat([a.sin(), a.cos()]).to(at.dtype) for a in (x, y))
        table = torch.cat([x[:, None].expand(-1, *size), y[:, :, None].expand(-1, *size)])
        return sample(table.expand(len(at), -1, -1, -1), at[:, :, None], "border")[:, :, 0]

    def forward(self, maps: Tensor, queries: Tensor, iterations: int) -> Tracks:
        """Feature maps (B, N, C, h, w), pixels of the first view (B, Q, 2). ValueError if the maps have too few levels."""
        b, views = maps.shape[:2]
        least = 2 ** (self.config.levels - 1)
        if min(maps.shape[3:]) < least:
            raise ValueError(f"tracks need images of at least {STRIDE * least} pixels on each side")
        maps = self.fmap_norm(maps.movedim(2, -1)).movedim(-1, 2)
        first = queries / STRIDE
        pyramid = [maps.flatten(0, 1)]
        for _ in range(self.config.levels - 1):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        at = first[:, None].expand(-1, views, -1, -1)  # (B, N, Q, 2)
        features = sample(maps[:, 0], first[:, :, None], "border")[:, :, 0]
        features = features[:, None].expand(-1, views, -1, -1)
        place = self.place_embedding(maps.shape[3:], first)[:, None]
        reference, others = self.query_ref_token[0]
        role = torch.cat([reference[None], others.expand(views - 1, -1)])[:, None]
        for _ in range(iterations):
            correlation = self.correlations(pyramid, features.flatten(0, 1), at.flatten(0, 1)).unflatten(0, (b, views))
            tokens = torch.cat([self.flow_embedding(at - at[:, :1]), self.corr_mlp(correlation), features], -1)
            change = self.updateformer((tokens + place + role).transpose(1, 2)).transpose(1, 2)
            update = self.ffeat_updater(self.ffeat_norm(change[..., 2:].flatten(0, 2)))
            features = features + update.unflatten(0, features.shape[:3])
            at = at + change[..., :2]
            at = torch.cat([first[:, None], at[:, 1:]], 1)
        visibility, confidence = (
            head(features)[..., 0].sigmoid() for head in (self.vis_predictor, self.conf_predictor)
        )
        return Tracks(at * STRIDE, visibility, confidence)


class TrackHead(nn.Module):
    """Feature maps from the aggregator's taps, and the refinement of tracks on them."""

    def __init__(self, inputs: int, levels: tuple[int, int, int, int], config: TrackerConfig) -> None:
        super().__init__()
        self.feature_extractor = DPT(inputs, config.features, levels, None, plane=False, relu_skip=True)
        self.tracker = Refiner(config)

    def forward(
        self,
        taps: list[Tensor],
        specials: int,
        views: int,
        grid: tuple[int, int],
        queries: Tensor,
        iterations: int | None = None,
        chunk: int = 8,
    ) -> Tracks:
        """Taps (F, L, 2 C), pixels of the first view (B, Q, 2), x then y."""

        def read(*tokens: Tensor) -> Tensor:
            return self.feature_extractor(tuple(x[:, specials:] for x in tokens), grid)

        maps = by_frames(read, chunk, *taps).unflatten(0, (-1, views))
        return self.tracker(maps, queries, iterations or self.tracker.config.iterations)
