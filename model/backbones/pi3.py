"""Pi3, Pi3X and Speed3R-Pi3: no reference view, camera-frame point maps, camera-to-world poses.

The world's frame and, but for Pi3X, its scale are arbitrary, and the views' order does not matter. Official sources:
yyfz/Pi3 (Wang et al., "Permutation-equivariant visual geometry learning", 2025) and Visual-AI/speed3r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed3r_ros.model.attention import Strategy
from speed3r_ros.model.backbones.blocks import (
    IMAGE_MEAN,
    IMAGE_STD,
    PATCH,
    SIDE,
    AcrossViews,
    Block,
    DinoV2,
    Layout,
    Mlp,
    MultiView,
    PatchEmbed,
    Tables,
    by_frames,
    patch_grid,
    positions,
    rotary,
    rotate,
    tf32_products,
)
from speed3r_ros.model.backbones.dpt import view_plane
from speed3r_ros.model.backbones.heads import Heads, per_view
from speed3r_ros.model.backbones.results import Reconstruction, invert, nearest_rotation, rigid
from speed3r_ros.model.memory import Memory, Sight
from speed3r_ros.model.network import compute_dtype
from speed3r_ros.model.spark3r import sensitive_layers
from speed3r_ros.model.strategies import strategy_for


@dataclass(frozen=True)
class Pi3Config:
    """Sizes; the defaults are those of the published checkpoints. Fields from `metric_channels` on are Pi3X's."""

    channels: int = 1024
    heads: int = 16
    encoder_blocks: int = 24
    table: int = 37
    decoder_blocks: int = 36
    registers: int = 5
    head_blocks: int = 5
    camera_channels: int = 512
    metric_channels: int = 512
    metric_heads: int = 8
    metric_blocks: int = 5
    upsample: tuple[int, ...] = (256, 128, 64)
    last_channels: int = 32


class TokenDecoder(nn.Module):
    """Blocks inside each frame, between two linear layers."""

    def __init__(self, inputs: int, channels: int, heads: int, depth: int, out: int) -> None:
        super().__init__()
        self.projects = nn.Linear(inputs, channels)
        self.blocks = nn.ModuleList(Block(channels, heads, scale=None) for _ in range(depth))
        self.linear_out = nn.Linear(channels, out)

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        """(F, L, inputs) -> (F, L, out) in the type of x."""
        y = self.projects(x.to(compute_dtype(self.projects))).to(x.dtype)
        for block in self.blocks:
            y = block(y, tables)
        return self.linear_out(y.to(compute_dtype(self.linear_out))).to(x.dtype)


class LinearHead(nn.Module):
    """One linear layer per patch, spread over its pixels."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, out * PATCH**2)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(F, h * w, C) -> (F, out, H, W)."""
        return F.pixel_shuffle(self.proj(x).mT.unflatten(2, grid), PATCH)


class ConvHead(nn.Module):
    """Three steps of upsampling by two with residual blocks, then a resize to the image and one small head per output."""

    def __init__(self, channels: int, widths: tuple[int, ...], last: int, outs: tuple[int, ...]) -> None:
        super().__init__()
        self.upsample_blocks = nn.ModuleList(
            nn.ModuleList([self._up(a + 2, b), self._Residual(b), self._Residual(b)])
            for a, b in zip((channels, *widths), widths)
        )
        self.output_block = nn.ModuleList(
            nn.Sequential(_conv3(widths[-1] + 2, last), nn.ReLU(), nn.Conv2d(last, out, 1)) for out in outs
        )

    @staticmethod
    def _up(inputs: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.ConvTranspose2d(inputs, out, 2, 2), _conv3(out, out))

    class _Residual(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.GroupNorm(1, width),
                nn.ReLU(),
                _conv3(width, 2 * width),
                nn.GroupNorm(2 * width // 32, 2 * width),
                nn.ReLU(),
                _conv3(2 * width, width),
            )

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layers(x)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(F, h * w, C) -> (F, sum of outs, H, W)."""
        height, width = grid[0] * PATCH, grid[1] * PATCH
        x = x.mT.unflatten(2, grid)

        def with_plane(x: Tensor) -> Tensor:
            plane = torch.stack(view_plane(*x.shape[2:], width / height, x.device, x.dtype))
            return torch.cat([x, plane.expand(len(x), -1, -1, -1)], 1)

        for up, first, second in self.upsample_blocks:
            x = second(first(up(with_plane(x))))
        x = with_plane(F.interpolate(x, (height, width), mode="bilinear"))
        return torch.cat([head(x) for head in self.output_block], 1)


def _conv3(inputs: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, out, 3, padding=1, padding_mode="replicate")


class CameraHead(nn.Module):
    """Pose of a view from its patch tokens."""

    class _Residual(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.res_conv1, self.res_conv2, self.res_conv3 = (nn.Linear(channels, channels) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + F.relu(self.res_conv3(F.relu(self.res_conv2(F.relu(self.res_conv1(x))))))

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.res_conv = nn.ModuleList(self._Residual(channels) for _ in range(2))
        self.more_mlps = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU()
        )
        self.fc_t, self.fc_rot = nn.Linear(channels, 3), nn.Linear(channels, 9)

    def forward(self, x: Tensor) -> Tensor:
        """(F, h * w, C) -> (F, 12): translation, then a 3 x 3 matrix row by row, whose rows are to be normalised."""
        for block in self.res_conv:
            x = block(x)
        x = self.more_mlps(x.mean(1))
        return torch.cat([self.fc_t(x), self.fc_rot(x)], 1)


class Pi3(MultiView):
    """Pi3 by its published sizes. `forward` is the whole model, `trunk` all but its heads; the other methods are its stages."""

    full_precision = ("point_head", "conf_head", "camera_head")
    max_log_depth = float("inf")

    def __init__(self, config: Pi3Config = Pi3Config()) -> None:
        super().__init__()
        self.config = c = config
        self.encoder = DinoV2(c.channels, c.heads, c.encoder_blocks, registers=4, table=c.table)
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(1, 3, 1, 1))
        self._make_decoder()
        self.point_decoder, self.conf_decoder, self.camera_decoder = (
            TokenDecoder(2 * c.channels, c.channels, c.heads, c.head_blocks, out)
            for out in (c.channels, c.channels, c.camera_channels)
        )
        self._make_heads()
        self.camera_head = CameraHead(c.camera_channels)

    def _make_decoder(self) -> None:
        c = self.config
        self.decoder = nn.ModuleList(Block(c.channels, c.heads, qk_eps=1e-5) for _ in range(c.decoder_blocks))
        self.register_token = nn.Parameter(torch.randn(1, 1, c.registers, c.channels) * 0.02)

    def _make_heads(self) -> None:
        self.point_head, self.conf_head = LinearHead(self.config.channels, 3), LinearHead(self.config.channels, 1)

    @property
    def pairs(self) -> list[tuple[Block, Block]]:
        """Blocks inside frames, each with the block across views that follows it."""
        return list(zip(self.decoder[::2], self.decoder[1::2]))

    @property
    def across_views(self) -> list[Block]:
        """Blocks across views."""
        return [across for _, across in self.pairs]

    @property
    def sensitive(self) -> frozenset[int]:
        """See `MultiView.sensitive`."""
        return sensitive_layers("pi3", len(self.pairs))

    @property
    def specials(self) -> int:
        """Register tokens per view."""
        return self.config.registers

    def encode(self, images: Tensor, chunk: int) -> Tensor:
        """Images (F, 3, H, W) in [0, 1], on any device -> patch tokens (F, h * w, C), row-major."""
        mean, std = self.image_mean, self.image_std
        return by_frames(lambda x: self.encoder((x.to(mean.device) - mean) / std), chunk, images)

    def _tables(self, at: Tensor) -> Tables:
        return rotary(at, self.config.channels // self.config.heads, self._rounded)

    @property
    def _rounded(self) -> torch.dtype:
        """The official model's rotary tables have the type of its products."""
        return self.point_decoder.projects.weight.dtype

    def decode(
        self,
        x: Tensor,
        views: int,
        grid: tuple[int, int],
        attention: str | Strategy,
        top_k: int,
        chunk: int,
        inject: Callable[[int, Tensor], None] | None = None,
        sight: Sight | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Patch tokens (F, h * w, C) -> outputs of the last two blocks (F, L, C), row-major, registers first.

        inject: called after each pair of blocks with its number and the tokens, which it changes.
        """
        layout, given = Layout(grid, self.specials, attention, x.device), x
        if self.specials:
            x = torch.cat([self.register_token[0].expand(len(x), -1, -1), x], 1)
        x = layout.arrange(x)
        if x is given:
            x = x.clone()  # the blocks write in its place
        del given
        tables = self._tables(layout.at)
        width = tables[0].shape[-1]
        across = AcrossViews.of(
            layout.at, self.specials, views, width, attention, top_k, chunk, self.sensitive, self._rounded, sight
        )
        for i, (frame, across_views) in enumerate(self.pairs):
            x = by_frames(lambda x, frame=frame: frame(x, tables), chunk, x, out=x)
            last = x.clone() if i == len(self.pairs) - 1 else x
            x = across(across_views, x, i)
            if inject:
                inject(i, x)
        return layout.restore(last, chunk), layout.restore(x, chunk)

    def read(self, x: Tensor, grid: tuple[int, int], tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """Decoder output (F, L, 2 C) -> points (F, 3, H, W) as x/z, y/z and log z; confidence logit (F, 1, H, W); (F, 12)."""
        point, conf, camera = (
            decoder(x, tables)[:, self.specials :]
            for decoder in (self.point_decoder, self.conf_decoder, self.camera_decoder)
        )
        with tf32_products(self._rounded != torch.float32):  # what they read was rounded to fewer bits
            return self.point_head(point, grid), self.conf_head(conf, grid), self.camera_head(camera)

    def heads(
        self, decoded: tuple[Tensor, Tensor], views: int, grid: tuple[int, int], size: tuple[int, int], chunk: int
    ) -> Heads:
        """Outputs of `decode` -> maps at `size` (H, W), which may differ from the size of the grid, and poses."""
        tables = self._tables(positions(*grid, self.specials, None, decoded[0].device))

        def maps(frame: Tensor, across: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            point, conf, camera = self.read(torch.cat([frame, across], -1), grid, tables)
            if tuple(point.shape[2:]) != tuple(size):
                # Rays are linear in the pixel, so that resized before the exponential they stay exact.
                point, conf = (F.interpolate(y, size, mode="bilinear") for y in (point, conf))
            z = point[:, 2:].clamp(max=self.max_log_depth).exp()
            return torch.cat([point[:, :2] * z, z], 1).permute(0, 2, 3, 1).contiguous(), conf[:, 0], camera

        return Heads(decoded, maps, self.assemble, views, chunk)

    @staticmethod
    def assemble(points: Tensor, conf: Tensor, camera: Tensor) -> Reconstruction:
        """Points (..., H, W, 3), confidence logit (..., H, W) and the camera head's output (..., 12)."""
        R = nearest_rotation(F.normalize(camera[..., 3:].unflatten(-1, (3, 3)), dim=-1))
        pose = rigid(R, camera[..., :3])
        raw = dict(conf=conf[..., None], camera_poses=pose, local_points=points)
        return Reconstruction(points[..., 2], points, conf.sigmoid(), pose, raw=raw)

    def trunk(
        self,
        images: Tensor,
        *,
        attention: str | Strategy | None = None,
        top_k: int = 32,
        chunk: int = 128,
        sight: Sight | None = None,
    ) -> Heads:
        """Images (B, N, 3, H, W) in [0, 1], on any device -> geometry at H x W, up to one scale per sequence.

        attention: strategy across views, by default the one that the model was trained with; top_k: see there. chunk:
        views that encoder, heads and all else but that attention take at a time. sight: None = all views see all. ValueError
        on sides that do not fit.
        """
        views, size = images.shape[1], images.shape[3:]
        images = images.flatten(0, 1)
        working = self.working_size(*size)
        if working != tuple(size):
            images = F.interpolate(images, working, mode="bilinear", antialias=True)
        grid = patch_grid(*working)
        attention = attention or self.attention
        # the patch tokens have no name here, so that they are freed once the decoder has made its own of them
        decoded = self.decode(self.encode(images, chunk), views, grid, attention, top_k, chunk, sight=sight)
        return self.heads(decoded, views, grid, size, chunk)


class Speed3RPi3(Pi3):
    """Speed3R's student of Pi3: sparse attention across views, gated; no register tokens.

    Its blocks of 4 x 4 patches need sides that are multiples of 56 pixels. Other images are resized to the nearest such size
    and the maps back to the given one: that is what its training did with every image, it needs no masks in the kernels, and
    tokens of padding would enter the blocks' means. Source: pi3_sparse.py of the released code.
    """

    attention = "speed3r"

    def __init__(self, config: Pi3Config = Pi3Config(registers=0)) -> None:
        super().__init__(config)

    def _make_decoder(self) -> None:
        c = self.config
        if c.registers:
            raise ValueError(f"registers = {c.registers}: Speed3R-Pi3 has none")

        def blocks(gated: bool) -> nn.ModuleList:
            return nn.ModuleList(
                Block(c.channels, c.heads, qk_eps=1e-6, gated=gated) for _ in range(c.decoder_blocks // 2)
            )

        self.local_decoder, self.global_decoder = blocks(False), blocks(True)

    @property
    def pairs(self) -> list[tuple[Block, Block]]:
        """See `Pi3.pairs`."""
        return list(zip(self.local_decoder, self.global_decoder))

    def working_size(self, height: int, width: int) -> tuple[int, int]:
        """The nearest multiples of 56 pixels."""
        step = SIDE * PATCH
        return tuple(max(1, round(side / step)) * step for side in (height, width))


# ----------------------------------------------------------------------------------------------------------------- Pi3X


class CrossAttention(nn.Module):
    """Attention of queries to a context, with a rotary embedding."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor, tables: Tables, context_tables: Tables) -> Tensor:
        """(B, X, C) and (B, Y, C) -> (B, X, C)."""
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1))
            for layer, y in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        q, k = rotate(q, tables).to(v.dtype), rotate(k, context_tables).to(v.dtype)
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Cross attention and MLP, without self attention."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm2, self.norm_y, self.norm3 = (nn.LayerNorm(channels, 1e-6) for _ in range(3))
        self.cross_attn = CrossAttention(channels, heads)
        self.mlp = Mlp(channels, 4 * channels)

    def forward(self, x: Tensor, context: Tensor, tables: Tables, context_tables: Tables) -> Tensor:
        """(B, X, C) and (B, Y, C) -> (B, X, C)."""
        x = x + self.cross_attn(self.norm2(x), self.norm_y(context), tables, context_tables)
        return x + self.mlp(self.norm3(x))


class MetricDecoder(nn.Module):
    """One query that reads the tokens of all views of a sequence."""

    def __init__(self, inputs: int, channels: int, heads: int, depth: int) -> None:
        super().__init__()
        self.width = channels // heads
        self.projects_x, self.projects_y = nn.Linear(inputs, channels), nn.Linear(inputs, channels)
        self.blocks = nn.ModuleList(CrossBlock(channels, heads) for _ in range(depth))
        self.linear_out = nn.Linear(channels, channels)

    def forward(self, query: Tensor, context: Tensor, at: Tensor) -> Tensor:
        """query (B, 1, inputs), projected context (B, Y, C) whose tokens stand at (Y, 2) -> (B, 1, C)."""
        x = self.projects_x(query)
        tables, context_tables = rotary(at.new_zeros(1, 2), self.width), rotary(at, self.width)
        for block in self.blocks:
            x = block(x, context, tables, context_tables)
        return self.linear_out(x)


class PoseBlock(Block):
    """Attention among the patches of all views that sees the views' poses.

    The camera part of PRoPE (Li et al., 2025), i.e. GTA: half of each head is transformed by the 4 x 4 world-to-camera
    matrix of the token's view, the rest turns with the patch's column and row. Values are transformed too, outputs back.
    """

    def transform(self, x: Tensor, matrix: Tensor, angle: Tensor) -> Tensor:
        """x: (V, P, H, D) of V views. matrix: (V, 4, 4). angle: (P, 2, D / 8), by column and by row."""
        head, rest = x.split(x.shape[-1] // 2, -1)
        head = torch.einsum("vij,vphgj->vphgi", matrix, head.unflatten(-1, (-1, 4))).flatten(-2)
        a, b = rest.unflatten(-1, (2, 2, -1)).unbind(-2)  # each (V, P, H, 2, D / 8)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([head, torch.stack([a * cos + b * sin, b * cos - a * sin], -2).flatten(-3)], -1)

    def change(self, x: Tensor, T_world_cam: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens (V, P, C) of the views of a sequence with poses (V, 4, 4) -> what to add to them."""
        qkv = self.attn.project(self.norm1(x))
        rate = 100.0 ** (-torch.arange(qkv.shape[-1] // 8, device=x.device) / (qkv.shape[-1] // 8))
        angle = (positions(*grid, 0, None, x.device) - 1).flip(1)[..., None] * rate
        T_cam_world = invert(T_world_cam)
        q, k, v = (
            self.transform(y.transpose(1, 2).to(T_world_cam.dtype), matrix, angle).flatten(0, 1).transpose(0, 1)[None]
            for y, matrix in zip(self.attn.prepare(qkv, None), (T_cam_world.mT, T_world_cam, T_world_cam))
        )
        out = F.scaled_dot_product_attention(*(y.to(qkv.dtype) for y in (q, k, v)))
        out = out[0].transpose(0, 1).unflatten(0, (len(x), -1))
        out = self.transform(out.to(T_world_cam.dtype), T_cam_world, -angle).flatten(2).to(qkv.dtype)
        return self.ls1(self.attn.proj(out)) + self.ls2(self.mlp(self.norm2(x).to(qkv.dtype)))


class Pi3X(Pi3):
    """Pi3X: smooth convolutional heads, approximate metres, and conditions that each view may have or lack."""

    full_precision = (*Pi3.full_precision, "metric_", "depth_encoder", "ray_embed")
    INJECTED = range(0, 17, 4)  # pairs of blocks after which poses are injected
    max_log_depth = 15.0

    def __init__(self, config: Pi3Config = Pi3Config()) -> None:
        super().__init__(config)
        c = config
        self.metric_token = nn.Parameter(torch.randn(1, 1, 2 * c.channels) * 0.02)
        self.metric_decoder = MetricDecoder(2 * c.channels, c.metric_channels, c.metric_heads, c.metric_blocks)
        self.metric_head = nn.Linear(c.metric_channels, 1)
        self.depth_encoder = DinoV2(c.channels, c.heads, c.encoder_blocks, inputs=2, registers=4, table=c.table)
        self.depth_emb = nn.Parameter(torch.zeros(1, 1, c.channels))
        self.ray_embed = PatchEmbed(2, c.channels)
        injected = [i for i in self.INJECTED if i < c.decoder_blocks // 2]
        self.pose_inject_blk = nn.ModuleList(PoseBlock(c.channels, c.heads, qk_eps=1e-5) for _ in injected)

    def _make_heads(self) -> None:
        c = self.config
        self.point_head = ConvHead(c.channels, c.upsample, c.last_channels, (2, 1))
        self.conf_head = ConvHead(c.channels, c.upsample, c.last_channels, (1,))

    def trunk(
        self,
        images: Tensor,
        depth: Tensor | None = None,
        K: Tensor | None = None,
        T_world_cam: Tensor | None = None,
        *,
        rays: Tensor | None = None,
        has_depth: Tensor | None = None,
        has_K: Tensor | None = None,
        has_pose: Tensor | None = None,
        attention: str | Strategy | None = None,
        top_k: int = 32,
        chunk: int = 32,
        sight: Sight | None = None,
    ) -> Heads:
        """Images (B, N, 3, H, W) in [0, 1], on any device -> geometry at H x W, approximately in metres.

        depth: (B, N, H, W) along the optical axis, <= 0 or not finite where unknown; K: (B, N, 3, 3) in pixels, whose centres
        are at half integers here; rays: (B, N, 2, H, W), x/z and y/z of each pixel, instead of K; T_world_cam: (B, N, 4, 4)
        camera-to-world in the units of depth. has_*: (B, N) bool, which views have them, by default all; as in the official
        code, all known depths count in a sequence's unit, also those of views that are said to have none. The rest as in
        `Pi3.trunk`. With `sight`, the first view alone says how long a metre is.
        """
        (b, views), size = images.shape[:2], images.shape[3:]
        grid = patch_grid(*size)
        x = self.encode(images.flatten(0, 1), chunk)
        depth, K, T_world_cam, rays, has_depth, has_K, has_pose = (
            None if value is None else value.to(x.device)
            for value in (depth, K, T_world_cam, rays, has_depth, has_K, has_pose)
        )

        def given(value: Tensor | None, has: Tensor | None) -> Tensor:
            every = torch.full((b, views), value is not None, device=x.device)
            return every if has is None else has & every

        has_depth, has_pose = given(depth, has_depth), given(T_world_cam, has_pose)
        unit = None
        if depth is not None:
            valid = (depth > 0) & depth.isfinite()
            has_depth = has_depth & valid.flatten(1).any(1, keepdim=True)  # else there is no unit
            known, count = depth.where(valid, 0), valid.sum((1, 2, 3))
            unit = torch.where(count > 0, known.sum((1, 2, 3)) / count, 1)
            pair = torch.stack([known / unit[:, None, None, None], valid.to(depth.dtype)], 2).flatten(0, 1)
            x = x + (by_frames(self.depth_encoder, chunk, pair) + self.depth_emb) * has_depth.flatten()[:, None, None]
        if K is not None:
            has_K = given(K, has_K)
            K = K.where(has_K[..., None, None], torch.eye(3, dtype=K.dtype, device=K.device))  # no NaN of absent ones
            v, u = torch.meshgrid(*(torch.arange(n, device=x.device) + 0.5 for n in size), indexing="ij")

            def pinhole(K: Tensor) -> Tensor:
                fx, fy, cx, cy = (K[:, i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
                return self.ray_embed(torch.stack([(u - cx) / fx, (v - cy) / fy], 1))

            x = x + by_frames(pinhole, chunk, K.flatten(0, 1)) * has_K.flatten()[:, None, None]
        elif rays is not None:
            embedded = by_frames(self.ray_embed, chunk, rays.flatten(0, 1))
            x = x + embedded * given(rays, has_K).flatten()[:, None, None]

        attention = attention or self.attention
        has_pose = has_pose & (has_pose.sum(1, keepdim=True) > 1)  # one pose alone says nothing
        inject = None
        if T_world_cam is not None and has_pose.any():
            if strategy_for(attention).in_blocks:
                raise ValueError(
                    f"attention {attention!r}: with poses, Pi3X runs no attention in blocks: choose dense or spark3r"
                )
            T = self._normalised(T_world_cam, has_pose, unit, has_depth)

            def inject(i: int, x: Tensor) -> None:
                if i in self.INJECTED:
                    block = self.pose_inject_blk[self.INJECTED.index(i)]
                    for sequence, (poses, posed) in enumerate(zip(T, has_pose)):
                        frames = sequence * views + posed.nonzero()[:, 0]
                        x[frames, self.specials :] += block.change(x[frames, self.specials :], poses[posed], grid)

        decoded = self.decode(x, views, grid, attention, top_k, chunk, inject, sight)
        if sight is None:
            metric = self._metric(decoded, views, grid, chunk)
        else:
            first = tuple(y.unflatten(0, (b, views))[:, 0] for y in decoded)
            metric = sight.of_first("metric", self._metric(first, 1, grid, chunk))
        read = self.heads(decoded, views, grid, size, chunk).read
        tokens = (*decoded, per_view(metric, views))
        return Heads(tokens, lambda *x: (*read(*x[:2]), x[2]), self.scaled, views, chunk)

    def state(self, slots: int) -> dict[str, tuple[int, ...]]:
        """See `MultiView.state`."""
        return {"metric": (1,)}

    def step(
        self, image: Tensor, memory: Memory, rays: Tensor | None, known: Tensor | None, attention: str, top_k: int
    ) -> Reconstruction:
        """See `MultiView.step`."""
        given = {} if rays is None else {"rays": rays[None, None], "has_K": known[None]}
        return self(image[None, None], **given, attention=attention, top_k=top_k, sight=Sight.into(memory))

    @staticmethod
    def _normalised(T_world_cam: Tensor, posed: Tensor, unit: Tensor | None, has_depth: Tensor) -> Tensor:
        """Poses relative to the first posed view, in the unit of depth where used, else of the mean distance to it."""
        first = posed.int().argmax(1)
        T = invert(T_world_cam[torch.arange(len(T_world_cam), device=first.device), first])[:, None] @ T_world_cam
        T = torch.where(posed[..., None, None], T, torch.eye(4, device=T.device, dtype=T.dtype))
        distance = T[..., :3, 3].norm(dim=-1)
        mean = distance.sum(1) / (posed.sum(1) - 1).clamp(min=1)
        mean = torch.where(distance.max(1).values < 0.02, 1, mean)  # the camera only turned
        if unit is not None:
            mean = torch.where(has_depth.any(1), unit, mean)
        return rigid(T[..., :3, :3], T[..., :3, 3] / mean[:, None, None])

    def _metric(self, decoded: tuple[Tensor, Tensor], views: int, grid: tuple[int, int], chunk: int) -> Tensor:
        """Metres per unit of each sequence, (B,)."""

        def project(frame: Tensor, across: Tensor) -> Tensor:
            return self.metric_decoder.projects_y(torch.cat([frame, across], -1))

        context = by_frames(project, chunk, *decoded).unflatten(0, (-1, views)).flatten(1, 2)
        at = positions(*grid, self.specials, None, context.device).repeat(views, 1)
        query = self.metric_token.expand(len(context), -1, -1)
        return self.metric_head(self.metric_decoder(query, context, at))[:, 0, 0].exp()

    @classmethod
    def scaled(cls, points: Tensor, conf: Tensor, camera: Tensor, metric: Tensor) -> Reconstruction:
        """As `Pi3.assemble`, then in metres, of which metric (...) are a unit of each view."""
        out = cls.assemble(points, conf, camera)
        rays = F.normalize(
            torch.cat([out.points[..., :2] / out.points[..., 2:], torch.ones_like(out.points[..., 2:])], -1), dim=-1
        )
        points = out.points * metric[..., None, None, None]
        pose = rigid(out.T_world_cam[..., :3, :3], out.T_world_cam[..., :3, 3] * metric[..., None])
        raw = dict(out.raw, camera_poses=pose, local_points=points, rays=rays, metric=metric[..., 0])
        return Reconstruction(points[..., 2], points, out.confidence, pose, metric=True, raw=raw)
