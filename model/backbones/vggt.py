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
    MultiView,
    by_frames,
    normalised,
    patch_grid,
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
from speed3r_ros.model.memory import Memory, Sight
from speed3r_ros.model.spark3r import sensitive_layers

PASSES = 4  # of the camera head
ALWAYS_EVERY = 100  # views, of which Speed3R shows the first, the reference, to all queries (section 3)


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

    @property
    def sensitive(self) -> frozenset[int]:
        """See `MultiView.sensitive`."""
        return sensitive_layers("vggt", len(self.global_blocks))

    def encode(self, images: Tensor, chunk: int) -> Tensor:
        """Images (F, 3, H, W) in [0, 1], on any device -> patch tokens (F, h * w, C), row-major."""
        device = self.camera_token.device
        return by_frames(lambda x: self.patch_embed(normalised(x.to(device))), chunk, images)

    def special_tokens(self, batch: int, is_first: Tensor) -> Tensor:
        """(F, S, C) for views of which the first one of a sequence, is_first: (N,) bool, has its own."""
        first, others = torch.cat([self.camera_token, self.register_token], 2)[0]
        return torch.where(is_first[:, None, None], first, others).repeat(batch, 1, 1)

    def forward(
        self,
        x: Tensor,
        views: int,
        grid: tuple[int, int],
        taps: Sequence[int],
        attention: str | Strategy = "dense",
        top_k: int = 32,
        chunk: int = 8,
        sight: Sight | None = None,
    ) -> list[Tensor]:
        """Patch tokens (F, h * w, C) -> for each pair in `taps`, outputs of both blocks (F, L, 2 C), special tokens first."""
        layout = Layout(grid, self.specials, attention, x.device)
        is_first = torch.arange(views, device=x.device) == 0 if sight is None else sight.first
        x = layout.arrange(torch.cat([self.special_tokens(len(x) // views, is_first), x], 1))
        width = self.config.channels // self.config.heads
        always = torch.arange(0, views, ALWAYS_EVERY, device=x.device) if sight is None else None
        across = AcrossViews.of(
            layout.at, self.specials, views, width, attention, top_k, chunk, self.sensitive, sight=sight, always=always
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
    """Refines the views' cameras in four passes over the camera tokens of a sequence.

    In a stream, keys and values of each pass are cached for the frames whose fine tokens are in the memory. all_passes:
    whether a frame then also sees other frames' other passes, and its own earlier ones, as in StreamVGGT's released
    frame-by-frame code; its parallel form, like VGGT, keeps the passes apart.
    """

    def __init__(self, channels: int, heads: int, depth: int, all_passes: bool) -> None:
        super().__init__()
        self.all_passes = all_passes
        self.trunk = nn.ModuleList(Block(channels, heads, eps=1e-5) for _ in range(depth))
        self.token_norm, self.trunk_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, 9))
        self.embed_pose = nn.Linear(9, channels)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 3 * channels))
        self.pose_branch = Mlp(channels, channels // 2, 9)

    def cached(self, slots: int) -> tuple[int, ...]:
        """Shape of the cache: keys and values, blocks, heads, slots, passes, D."""
        attention = self.trunk[0].attn
        width = attention.proj.out_features // attention.heads
        return 2, len(self.trunk), attention.heads, slots, PASSES, width

    def _block(self, number: int, turn: int, x: Tensor, sight: Sight | None) -> Tensor:
        block, memory = self.trunk[number], None if sight is None else sight.memory
        if memory is None:
            return block(x, mask=None if sight is None else sight.fine)
        q, *new = block.before(x, None)  # one frame, one token: (1, H, 1, D)
        held = memory.state["camera"][:, number]
        for cache, y in zip(held[:, :, :, turn], new):
            cache.index_copy_(1, memory.index, y.detach()[0])
        attended = F.scaled_dot_product_attention(q, *held.flatten(2, 3)[:, None], attn_mask=self._seen(turn, sight))
        return block.after(x, attended)

    def _seen(self, turn: int, sight: Sight) -> Tensor:
        """(1, slots * passes) bool: the entries of the cache that a pass of the newest frame sees."""
        entry = torch.arange(PASSES, device=sight.fine.device)
        seen = entry == turn
        if self.all_passes:
            own = torch.arange(sight.fine.shape[2], device=entry.device)[:, None] == sight.memory.index
            seen = ~own | (entry <= turn)
        return (sight.fine[0, 0, :, None] & seen).flatten()[None]

    def forward(self, tokens: Tensor, sight: Sight | None = None) -> list[Tensor]:
        """Camera tokens (B, N, C) -> encoding after each pass (B, N, 9): see `cameras`."""
        tokens = self.token_norm(tokens)
        encoding, passes = None, []
        for turn in range(PASSES):
            previous = self.empty_pose_tokens.expand(*tokens.shape[:2], -1) if encoding is None else encoding
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(previous)).chunk(3, -1)
            x = tokens + gate * (F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift)
            for number in range(len(self.trunk)):
                x = self._block(number, turn, x, sight)
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


class Vggt(MultiView):
    """VGGT; with `causal`, StreamVGGT, whose views see earlier ones only."""

    full_precision = ("camera_head", "point_head", "depth_head", "track_head")
    UNUSED = ("aggregator.patch_embed.mask_token",)

    def __init__(self, config: VggtConfig = VggtConfig(), causal: bool = False) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        c, width = config, 2 * config.channels
        self.aggregator = Aggregator(c)
        self.camera_head = CameraHead(width, c.camera_heads, c.camera_blocks, causal)
        self.point_head = DPT(width, c.features, c.levels, 4, relu_skip=True)
        self.depth_head = DPT(width, c.features, c.levels, 2, relu_skip=True)
        self.track_head = TrackHead(width, c.levels, c.tracker)

    @property
    def across_views(self) -> list[Block]:
        """Blocks across views."""
        return list(self.aggregator.global_blocks)

    @property
    def sensitive(self) -> frozenset[int]:
        """See `MultiView.sensitive`."""
        return self.aggregator.sensitive

    @property
    def specials(self) -> int:
        """See `Aggregator.specials`."""
        return self.aggregator.specials

    def state(self, slots: int) -> dict[str, tuple[int, ...]]:
        """See `MultiView.state`."""
        return {"camera": self.camera_head.cached(slots)}

    def step(
        self, image: Tensor, memory: Memory, rays: Tensor | None, known: Tensor | None, attention: str, top_k: int
    ) -> Reconstruction:
        """See `MultiView.step`."""
        sight = Sight.into(memory)
        return self(image[None, None], attention=attention, top_k=top_k, sight=sight, point_head=False)

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
        sight: Sight | None = None,
    ) -> Heads:
        """Images (B, N, 3, H, W) in [0, 1], on any device -> geometry.

        Its unit is the mean distance of points to the first camera. Points are the depth unprojected, which its authors found
        better than the point head's; that one is only in `raw` (in the world's frame), and left out if `point_head` is False.
        K has its principal point at (W / 2, H / 2) with pixel centres at integers, as in the official code. attention: see
        `model.strategies`; with speed3r and lite3r sides must be multiples of 56, and as there are no trained gates the
        selected blocks alone count. chunk: views that all but that attention take at a time. sight: None = all views see all,
        or those before them if the model is causal.
        """
        (b, views), size = images.shape[:2], tuple(images.shape[3:])
        grid = patch_grid(*size)
        x = self.aggregator.encode(images.flatten(0, 1), chunk)
        if sight is None and self.causal:
            sight = Sight.causal(views, x.device)
        taps = self.aggregator(x, views, grid, self.config.taps, attention, top_k, chunk, sight)
        encoding = self.camera_head(taps[-1][:, 0].unflatten(0, (b, views)), sight)[-1]

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
