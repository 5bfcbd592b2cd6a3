"""VGGT and StreamVGGT: camera, depth and point heads; the world is, nearly, the first camera's frame.

Official sources: facebookresearch/vggt (Wang et al., CVPR 2025) and wzzheng/StreamVGGT, whose keys and shapes are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed3r_ros.model.attention import Strategy
from speed3r_ros.model.backbones.blocks import (
    AcrossViews,
    Block,
    DinoV2,
    Layout,
    Mlp,
    by_frames,
    normalised,
    patch_grid,
    set_precision,
)
from speed3r_ros.model.backbones.dpt import DPT, planes
from speed3r_ros.model.backbones.heads import Heads
from speed3r_ros.model.backbones.results import (
    Reconstruction,
    intrinsics_from_fov,
    invert,
    rigid,
    rotation_from_quaternion,
    unproject,
)
from speed3r_ros.model.backbones.tracker import TrackerConfig, TrackHead
from speed3r_ros.model.spark3r import sensitive_layers


@dataclass(frozen=True)
class VggtConfig:
    """Sizes; the defaults are those of the published checkpoints. taps: pairs of blocks that the dense heads read."""

    channels: int = 1024
    heads: int = 16
    encoder_blocks: int = 24
    table: int = 37
    pairs: int = 24
    registers: int = 4
    camera_blocks: int = 4
    camera_heads: int = 16
    features: int = 256
    levels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    taps: tuple[int, int, int, int] = (4, 11, 17, 23)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)


class Aggregator(nn.Module):
    """Encoder, then blocks inside frames and blocks across them in turn."""

    def __init__(self, config: VggtConfig) -> None:
        super().__init__()
        self.config = c = config
        self.patch_embed = DinoV2(c.channels, c.heads, c.encoder_blocks, registers=4, table=c.table)
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, c.channels) * 0.02)
        self.register_token = nn.Parameter(torch.randn(1, 2, c.registers, c.channels) * 0.02)
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(Block(c.channels, c.heads, eps=1e-5, qk_eps=1e-5) for _ in range(c.pairs)) for _ in range(2)
        )

    @property
    def specials(self) -> int:
        """Camera token and registers per view."""
        return 1 + self.config.registers

    def encode(self, images: Tensor, chunk: int) -> Tensor:
        """Images (F, 3, H, W) in [0, 1], on any device -> patch tokens (F, h * w, C), row-major."""
        device = self.camera_token.device
        return by_frames(lambda x: self.patch_embed(normalised(x.to(device))), chunk, images)

    def special_tokens(self, batch: int, views: int) -> Tensor:
        """(F, S, C): the first view of a sequence has its own."""
        first, others = torch.cat([self.camera_token, self.register_token], 2)[0]
        return torch.cat([first[None], others.expand(views - 1, -1, -1)]).repeat(batch, 1, 1)

    def forward(
        self,
        x: Tensor,
        views: int,
        grid: tuple[int, int],
        taps: Sequence[int],
        attention: str | Strategy = "dense",
        top_k: int = 32,
        chunk: int = 8,
        causal: bool = False,
    ) -> list[Tensor]:
        """Patch tokens (F, h * w, C) -> for each pair in `taps`, outputs of both blocks (F, L, 2 C), special tokens first."""
        layout = Layout(grid, self.specials, attention, x.device)
        x = layout.arrange(torch.cat([self.special_tokens(len(x) // views, views), x], 1))
        width = self.config.channels // self.config.heads
        sensitive = sensitive_layers("vggt", len(self.global_blocks))
        across = AcrossViews.of(
            layout.at, self.specials, views, width, attention, top_k, chunk, sensitive, causal=causal
        )
        outputs = {}
        for i, (frame, across_views) in enumerate(zip(self.frame_blocks, self.global_blocks)):
            x = by_frames(lambda x, frame=frame: frame(x, across.tables), chunk, x, out=x)
            if i not in taps:
                x = across(across_views, x, i)
                continue
            inside = x.clone()
            x = across(across_views, x, i)
            outputs[i] = layout.restore(torch.cat([inside, x], -1), chunk)
        return [outputs[i] for i in taps]


class CameraHead(nn.Module):
    """Refines the views' cameras in four passes over the camera tokens of a sequence."""

    def __init__(self, channels: int, heads: int, depth: int) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(Block(channels, heads, eps=1e-5) for _ in range(depth))
        self.token_norm, self.trunk_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, 9))
        self.embed_pose = nn.Linear(9, channels)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 3 * channels))
        self.pose_branch = Mlp(channels, channels // 2, 9)

    def forward(self, tokens: Tensor, causal: bool = False) -> list[Tensor]:
        """Camera tokens (B, N, C) -> encoding after each pass (B, N, 9): see `cameras`."""
        tokens = self.token_norm(tokens)
        views = tokens.shape[1]
        mask = torch.ones(views, views, dtype=torch.bool, device=tokens.device).tril() if causal else None
        encoding, passes = None, []
        for _ in range(4):
            previous = self.empty_pose_tokens.expand(*tokens.shape[:2], -1) if encoding is None else encoding
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(previous)).chunk(3, -1)
            x = tokens + gate * (F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift)
            for block in self.trunk:
                x = block(x, mask=mask)
            change = self.pose_branch(self.trunk_norm(x))
            encoding = change if encoding is None else encoding + change
            passes.append(torch.cat([encoding[..., :7], encoding[..., 7:].relu()], -1))
        return passes


def cameras(encoding: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Encodings (..., 9) -> camera-to-world (..., 4, 4) and intrinsics (..., 3, 3) of images of H x W.

    The encoding is camera-from-world: translation, quaternion x, y, z, w, vertical and horizontal field of view (rad).
    """
    t, q, fov = encoding.split([3, 4, 2], -1)
    return invert(rigid(rotation_from_quaternion(q), t)), intrinsics_from_fov(fov, size)


class Vggt(nn.Module):
    """VGGT; with `causal`, StreamVGGT's parallel form."""

    UNUSED = ("aggregator.patch_embed.mask_token",)

    def __init__(self, config: VggtConfig = VggtConfig(), causal: bool = False) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        c, width = config, 2 * config.channels
        self.aggregator = Aggregator(c)
        self.camera_head = CameraHead(width, c.camera_heads, c.camera_blocks)
        self.point_head = DPT(width, c.features, c.levels, 4, relu_skip=True)
        self.depth_head = DPT(width, c.features, c.levels, 2, relu_skip=True)
        self.track_head = TrackHead(width, c.levels, c.tracker)

    @property
    def across_views(self) -> list[Block]:
        """Blocks across views."""
        return list(self.aggregator.global_blocks)

    def precision(self, dtype: torch.dtype | str) -> Vggt:
        """Run the products of the aggregator in `dtype` (see `set_precision`); heads and the residual stream stay float32."""
        set_precision(self, dtype, ("camera_head", "point_head", "depth_head", "track_head"))
        return self

    def forward(self, images: Tensor, queries: Tensor | None = None, **options: object) -> Reconstruction:
        """The geometry of all views at once. Images and options: see `trunk`.

        queries: pixels of the first view (B, Q, 2), x then y, to follow through the others; `raw` then has track (B, N, Q,
        2), track_vis and track_conf (B, N, Q).
        """
        heads = self.trunk(images, **options)
        out = heads.whole()
        if queries is None:
            return out
        taps, grid = list(heads.tokens[:-1]), patch_grid(*images.shape[3:])
        tracks = self.track_head(taps, self.aggregator.specials, heads.views, grid, queries, chunk=heads.chunk)
        more = dict(track=tracks.positions, track_vis=tracks.visibility, track_conf=tracks.confidence)
        return replace(out, raw=out.raw | more)

    def trunk(
        self,
        images: Tensor,
        *,
        attention: str | Strategy = "dense",
        top_k: int = 32,
        chunk: int = 8,
        point_head: bool = True,
    ) -> Heads:
        """Images (B, N, 3, H, W) in [0, 1], on any device -> geometry.

        Its unit is the mean distance of points to the first camera. Points are the depth unprojected, which its authors found
        better than the point head's; that one is only in `raw` (in the world's frame), and left out if `point_head` is False.
        K has its principal point at (W / 2, H / 2) with pixel centres at integers, as in the official code. attention: see
        `model.strategies`; with speed3r and lite3r sides must be multiples of 56, and as there are no trained gates the
        selected blocks alone count. chunk: views that all but that attention take at a time.
        """
        (b, views), size = images.shape[:2], tuple(images.shape[3:])
        grid = patch_grid(*size)
        taps = self.aggregator(
            self.aggregator.encode(images.flatten(0, 1), chunk),
            views,
            grid,
            self.config.taps,
            attention,
            top_k,
            chunk,
            self.causal,
        )
        encoding = self.camera_head(taps[-1][:, 0].unflatten(0, (b, views)), self.causal)[-1]

        def read(*tokens: Tensor) -> tuple[Tensor, ...]:
            *taps, encoding = tokens
            patches = tuple(x[:, self.aggregator.specials :] for x in taps)
            points = [self.point_head(patches, grid)] if point_head else []
            return encoding, *planes(self.depth_head(patches, grid)), *points

        def assemble(
            encoding: Tensor, log_depth: Tensor, logit: Tensor, points: Tensor | None = None
        ) -> Reconstruction:
            T_world_cam, K = cameras(encoding, size)
            depth = log_depth.exp()
            raw = dict(pose_enc=encoding, depth=depth[..., None], depth_conf=1 + logit.exp())
            if points is not None:
                world, conf = points.movedim(-3, -1).split([3, 1], -1)
                raw["world_points"] = world.sign() * world.abs().expm1()
                raw["world_points_conf"] = 1 + conf[..., 0].exp()
            return Reconstruction(depth, unproject(depth, K), logit.sigmoid(), T_world_cam, K, raw=raw)

        return Heads((*taps, encoding.flatten(0, 1)), read, assemble, views, chunk)
