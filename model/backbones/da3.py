"""Depth Anything 3: any-view models (small to giant), single-view ones (mono, metric), and both nested for metric scale.

The any-view models' world is the reference view's frame, of unknown scale. Official source: ByteDance-Seed/Depth-Anything-3
(Lin et al., 2025), whose Gaussian branch and ray-based poses are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    rotary,
)
from speed3r_ros.model.backbones.dpt import DPT, DualDPT, planes
from speed3r_ros.model.backbones.heads import Heads, per_view
from speed3r_ros.model.backbones.results import (
    Reconstruction,
    intrinsics_from_fov,
    invert,
    quaternion_from_rotation,
    rigid,
    rotation_from_quaternion,
    unproject,
)
from speed3r_ros.model.memory import Sight
from speed3r_ros.model.quantised import set_precision
from speed3r_ros.model.spark3r import sensitive_layers

SKY = 0.3  # of the sky output, from which a pixel counts as sky
REFERENCES = ("saddle_balanced", "middle", "first")


@dataclass(frozen=True)
class Da3Config:
    """Sizes. alternate_from: first block with QK-norm and rotary embedding, from which odd blocks attend across views;
    None in single-view models. taps: blocks that the heads read."""

    channels: int
    heads: int
    blocks: int
    alternate_from: int | None
    taps: tuple[int, int, int, int]
    features: int = 256
    levels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    swiglu: bool = False
    table: int = 37


SMALL = Da3Config(384, 6, 12, 4, (5, 7, 9, 11), 64, (48, 96, 192, 384))
BASE = Da3Config(768, 12, 12, 4, (5, 7, 9, 11), 128, (96, 192, 384, 768))
LARGE = Da3Config(1024, 16, 24, 8, (11, 15, 19, 23))
GIANT = Da3Config(1536, 24, 40, 13, (19, 27, 33, 39), swiglu=True)
MONO = Da3Config(1024, 16, 24, None, (4, 11, 17, 23))


def reference_view(tokens: Tensor, strategy: str) -> Tensor:
    """Number of the view of each sequence that takes the part of the reference, (B,), from class tokens (B, N, C).

    saddle_balanced: the view least extreme in its mean cosine similarity to the others, its norm and its variance. Of
    fewer than three views it is the first.
    """
    batch, views = tokens.shape[:2]
    if views < 3 or strategy == "first":
        return torch.zeros(batch, dtype=torch.long, device=tokens.device)
    if strategy == "middle":
        return torch.full((batch,), views // 2, device=tokens.device)
    unit = F.normalize(tokens, dim=-1)
    similarity = (unit @ unit.mT).sum(-1) - 1
    measures = torch.stack([similarity / (views - 1), tokens.norm(dim=-1), unit.var(-1)])
    low, high = measures.amin(-1, keepdim=True), measures.amax(-1, keepdim=True)
    return ((measures - low) / (high - low + 1e-8) - 0.5).abs().sum(0).argmin(-1)


class Encoder(DinoV2):
    """DINOv2 whose later blocks attend, alternately, across views."""

    def __init__(self, config: Da3Config) -> None:
        c = config
        super().__init__(
            c.channels,
            c.heads,
            c.blocks,
            table=c.table,
            antialias=False,
            swiglu=c.swiglu,
            qk_norm_from=c.alternate_from,
            eps=1e-5,
        )
        self.config = config
        if c.alternate_from is not None:
            self.camera_token = nn.Parameter(torch.randn(1, 2, c.channels) * 0.02)

    def forward(
        self,
        images: Tensor,
        views: int,
        camera: Tensor | None = None,
        reference: str = "saddle_balanced",
        attention: str | Strategy = "dense",
        top_k: int = 32,
        chunk: int = 8,
        sight: Sight | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Images (F, 3, H, W) in [0, 1] -> taps, reference view (B,).

        A tap is (F, 1 + h * w, 2 C), the last output inside frames beside the current one, or (F, 1 + h * w, C) of a
        single-view model. camera: tokens (B, N, C) that stand for known poses; then there is no reference, as in
        single-view models. sight: None = all views see all; else the reference is the first view.
        """
        start, taps = self.config.alternate_from, self.config.taps
        grid = patch_grid(*images.shape[2:])
        device = self.cls_token.device
        x = by_frames(lambda part: self.embed(normalised(part.to(device))), chunk, images)
        layout = tables = across = chosen = None
        if start is not None:
            layout = Layout(grid, 1, attention, x.device)
            x = layout.arrange(x)
            width = self.config.channels // self.config.heads
            tables = rotary(layout.at, width)
            # across views, all patches stand at the same place
            at = layout.at.clamp(max=1)
            across = AcrossViews.of(at, 1, views, width, attention, top_k, chunk, self.sensitive, sight=sight)
        outputs, inside = [], x
        for i, block in enumerate(self.blocks):
            if start is not None and i == start - 1 and camera is None and sight is None:
                chosen = reference_view(x[:, 0].unflatten(0, (-1, views)), reference)
            if i == start:
                if camera is None:
                    number = torch.arange(views, device=x.device)
                    is_reference = number == chosen[:, None] if sight is None else sight.first
                    camera = self._camera_tokens(is_reference.expand(len(x) // views, -1))
                x[:, 0] = camera.flatten(0, 1)
            if start is not None and i >= start and i % 2:
                x = across(block, x, i // 2 - start // 2, chosen)
            else:
                rotated = tables if start is not None and i >= start else None
                x = by_frames(lambda x, block=block, rotated=rotated: block(x, rotated), chunk, x, out=x)
                inside = x.clone() if i + 1 in taps else x  # the next block may write in its place
            if i in taps:
                outputs.append(x.clone() if layout is None else layout.restore(torch.cat([inside, x], -1), chunk))
        return outputs, chosen

    @property
    def across_views(self) -> list[Block]:
        """Blocks across views."""
        start = self.config.alternate_from
        return [block for i, block in enumerate(self.blocks) if i >= start and i % 2]

    @property
    def sensitive(self) -> frozenset[int]:
        """See `MultiView.sensitive`."""
        return sensitive_layers("da3", len(self.across_views))

    def _camera_tokens(self, is_reference: Tensor) -> Tensor:
        first, others = self.camera_token[0]
        return torch.where(is_reference[..., None], first, others)

    def features(self, taps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Taps -> what the dense head reads: patch tokens, of which the current output has passed the last norm."""
        c = self.config.channels
        return tuple(torch.cat([x[:, 1:, :-c], self.norm(x[:, 1:, -c:])], -1) for x in taps)


class CameraDecoder(nn.Module):
    """Camera-to-world pose and field of view from one token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU()
        )
        self.fc_t, self.fc_qvec = nn.Linear(channels, 3), nn.Linear(channels, 4)
        self.fc_fov = nn.Sequential(nn.Linear(channels, 2), nn.ReLU())

    def forward(self, token: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(F, C) -> camera-to-world (F, 4, 4), intrinsics (F, 3, 3) of images of H x W."""
        x = self.backbone(token)
        T = rigid(rotation_from_quaternion(self.fc_qvec(x)), self.fc_t(x))
        return T, intrinsics_from_fov(self.fc_fov(x), size)


class CameraEncoder(nn.Module):
    """A token for each known pose, after attention among the views' poses."""

    def __init__(self, channels: int, heads: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.pose_branch = Mlp(9, channels // 2, channels)
        self.token_norm, self.trunk_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.trunk = nn.ModuleList(Block(channels, heads, eps=1e-5) for _ in range(depth))

    def forward(self, T_world_cam: Tensor, K: Tensor, size: tuple[int, int]) -> Tensor:
        """Camera-to-world (B, N, 4, 4) and intrinsics (B, N, 3, 3) of images of H x W -> (B, N, C)."""
        q = quaternion_from_rotation(T_world_cam[..., :3, :3])
        fov = [2 * torch.atan(side / 2 / K[..., i, i]) for side, i in zip(size, (1, 0))]
        x = self.token_norm(self.pose_branch(torch.cat([T_world_cam[..., :3, 3], q, torch.stack(fov, -1)], -1)))
        for block in self.trunk:
            x = block(x)
        return self.trunk_norm(x)


def normalised_poses(T_world_cam: Tensor) -> Tensor:
    """Poses (B, N, 4, 4) relative to view 0, translations in units of the (lower) median distance to it, at least 0.1."""
    T = invert(T_world_cam[:, :1]) @ T_world_cam
    median = T[..., :3, 3].norm(dim=-1).median(1).values.clamp(min=0.1)
    return rigid(T[..., :3, :3], T[..., :3, 3] / median[:, None, None])


class AnyView(nn.Module):
    """The network of small, base, large and giant; `Da3` wraps it as the checkpoints' keys do."""

    def __init__(self, config: Da3Config) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.pretrained = Encoder(config)
        self.head = DualDPT(2 * config.channels, config.features, config.levels)
        self.cam_dec, self.cam_enc = CameraDecoder(2 * config.channels), CameraEncoder(config.channels)

    def trunk(
        self,
        images: Tensor,
        T_world_cam: Tensor | None = None,
        K: Tensor | None = None,
        *,
        reference: str = "saddle_balanced",
        attention: str | Strategy = "dense",
        top_k: int = 32,
        chunk: int = 8,
        sight: Sight | None = None,
    ) -> Heads:
        """See `Da3.trunk`."""
        views, size = images.shape[1], tuple(images.shape[3:])
        if reference not in REFERENCES:
            raise ValueError(f"reference {reference!r}: choose one of {', '.join(REFERENCES)}")
        if (T_world_cam is None) != (K is None):
            raise ValueError("known poses need known intrinsics, and these need poses: give both T_world_cam and K")
        grid, encoder = patch_grid(*size), self.backbone.pretrained
        camera, device = None, encoder.cls_token.device
        if K is not None:
            camera = self.cam_enc(normalised_poses(T_world_cam.to(device)), K.to(device), size)
        taps, chosen = encoder(images.flatten(0, 1), views, camera, reference, attention, top_k, chunk, sight)
        raw = {} if chosen is None else dict(ref_view=chosen)
        if camera is not None:
            raw["cam_token_in"] = camera

        def read(*taps: Tensor) -> tuple[Tensor, ...]:
            token, (maps, rays) = taps[-1][:, 0], self.head(encoder.features(taps), grid)
            return *planes(maps), rays, *self.cam_dec(token, size), token

        return Heads(tuple(taps), read, self.assemble, views, chunk, raw)

    @staticmethod
    def assemble(log_depth: Tensor, logit: Tensor, rays: Tensor, T: Tensor, K: Tensor, token: Tensor) -> Reconstruction:
        """Outputs of both heads, (..., H, W) twice and (..., 7, 8 h, 8 w), and the cameras from tokens (..., C)."""
        depth, rays = log_depth.exp(), rays.movedim(-3, -1)
        raw = dict(depth=depth, depth_conf=1 + logit.exp(), ray=rays[..., :6], ray_conf=1 + rays[..., 6].exp())
        raw |= dict(extrinsics=invert(T)[..., :3, :], intrinsics=K, camera_token_last=token)
        return Reconstruction(depth, unproject(depth, K), logit.sigmoid(), T, K, raw=raw)


class Da3(MultiView):
    """Depth Anything 3, any number of views."""

    specials = 1
    full_precision = ("model.cam_enc", "model.cam_dec", "model.head")
    UNUSED = ("model.gs_head.",)

    def __init__(self, config: Da3Config = SMALL) -> None:
        super().__init__()
        self.model = AnyView(config)

    @property
    def across_views(self) -> list[Block]:
        """Blocks across views."""
        return self.model.backbone.pretrained.across_views

    @property
    def sensitive(self) -> frozenset[int]:
        """See `MultiView.sensitive`."""
        return self.model.backbone.pretrained.sensitive

    def trunk(
        self,
        images: Tensor,
        T_world_cam: Tensor | None = None,
        K: Tensor | None = None,
        *,
        reference: str = "saddle_balanced",
        attention: str | Strategy = "dense",
        top_k: int = 32,
        chunk: int = 8,
        sight: Sight | None = None,
    ) -> Heads:
        """Images (B, N, 3, H, W) in [0, 1], on any device -> geometry in the reference view's frame, one scale per sequence.

        T_world_cam (B, N, 4, 4), camera-to-world, and K (B, N, 3, 3) condition the network where known. The poses that
        come back are the network's still: relative to view 0 then, in units of the median distance to it. K has its
        principal point at (W / 2, H / 2) with pixel centres at integers. reference: see `reference_view`. attention: see
        `model.strategies`; with speed3r and lite3r sides must be multiples of 56, and as there are no trained gates the
        selected blocks alone count. chunk: views that all but that attention take at a time. sight: None = all views see
        all; else the reference is the first view. raw: ray (B, N, 8 h, 8 w, 6), direction and origin in the world.
        """
        options = dict(reference=reference, attention=attention, top_k=top_k, chunk=chunk, sight=sight)
        return self.model.trunk(images, T_world_cam, K, **options)


class Mono(nn.Module):
    """The single-view network; `Da3Mono` wraps it as the checkpoints' keys do."""

    def __init__(self, config: Da3Config) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.pretrained = Encoder(config)
        self.head = DPT(config.channels, config.features, config.levels, 1, norm=False, plane=False, sky=True)

    def forward(self, images: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Images (B, N, 3, H, W) in [0, 1] -> depth and sky, (B, N, H, W); sky is 0 or more."""
        grid, encoder = patch_grid(*images.shape[3:]), self.backbone.pretrained

        def predict(images: Tensor) -> Tensor:
            taps, _ = encoder(images, 1, chunk=chunk)
            return self.head(encoder.features(taps), grid)

        log_depth, sky = by_frames(predict, chunk, images.flatten(0, 1)).unflatten(0, images.shape[:2]).unbind(2)
        return log_depth.exp(), sky.relu()


def quantile(x: Tensor, q: float, valid: Tensor) -> Tensor:
    """Linearly interpolated quantile of the valid ones of finite values, both (...); infinite where there are none.

    Of any number of values, where torch's own takes 16 million at most, and without waiting for the GPU to count them.
    """
    x = x.masked_fill(~valid, torch.inf).flatten().sort().values
    last = (valid.sum() - 1).clamp(min=0)
    place = q * last.double()
    low = place.long()
    values = x[torch.stack([low, (low + 1).minimum(last)])]
    return torch.where(values[0].isinf(), values[0], torch.lerp(*values, (place - low).to(x.dtype)))


def far_depth(depth: Tensor, sky: Tensor, limit: float = float("inf")) -> Tensor:
    """Depth () of the sky of one sequence: the 0.99 quantile of the rest, at most `limit`. depth, sky (bool): (N, H, W).

    NaN, to leave the sky's depth as it is, if either has 10 pixels or fewer.
    """
    enough = torch.minimum(sky.sum(), (~sky).sum()) > 10
    return quantile(depth, 0.99, ~sky).clamp(max=limit).where(enough, torch.nan)


def with_sky(depth: Tensor, sky: Tensor, far: Tensor) -> Tensor:
    """Depth with the sky at `far`, or as it is where that is NaN. All broadcast."""
    return torch.where(sky & ~far.isnan(), far, depth)


class Da3Mono(nn.Module):
    """Depth Anything 3 for single views; `metric` is the checkpoint whose depth is in metres once a focal length is known."""

    full_precision = ("model.head",)

    def __init__(self, config: Da3Config = MONO, metric: bool = False) -> None:
        super().__init__()
        self.model, self.metric = Mono(config), metric

    def precision(self, dtype: torch.dtype | str) -> Da3Mono:
        """Run the products of the encoder in `dtype` (see `set_precision`); the head and the residual stream stay float32."""
        set_precision(self, dtype)
        return self

    def forward(self, images: Tensor, K: Tensor | None = None, *, chunk: int = 8) -> Reconstruction:
        """Images (B, N, 3, H, W) in [0, 1] -> depth of each view by itself; the sky is set to a far depth per sequence.

        K: (B, N, 3, 3) in pixels, gives points and, with the metric checkpoint, metres; without it, scale is unknown. raw:
        sky (B, N, H, W), of which values from 0.3 on mean sky.
        """
        head_depth, sky = self.model(images, chunk)
        depth = torch.stack([with_sky(d, s >= SKY, far_depth(d, s >= SKY)) for d, s in zip(head_depth, sky)])
        raw = dict(head_depth=head_depth, depth_after_sky=depth, sky=sky)
        if K is None:
            return Reconstruction(depth, raw=raw)
        if self.metric:
            depth = depth * focal(K) / 300
        return Reconstruction(depth, unproject(depth, K), K=K, metric=self.metric, raw=raw)


def focal(K: Tensor) -> Tensor:
    """Mean focal length (..., 1, 1) of intrinsics (..., 3, 3)."""
    return ((K[..., 0, 0] + K[..., 1, 1]) / 2)[..., None, None]


class Da3Nested(MultiView):
    """An any-view network whose scale comes from the metric single-view one."""

    specials = 1
    full_precision = ("model.da3.cam_enc", "model.da3.cam_dec", "model.da3.head", "model.da3_metric.head")
    UNUSED = ("model.da3.gs_head.",)

    def __init__(self, config: Da3Config = GIANT, mono: Da3Config = MONO) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.da3, self.model.da3_metric = AnyView(config), Mono(mono)

    @property
    def across_views(self) -> list[Block]:
        """Blocks across views."""
        return self.model.da3.backbone.pretrained.across_views

    @property
    def sensitive(self) -> frozenset[int]:
        """See `MultiView.sensitive`."""
        return self.model.da3.backbone.pretrained.sensitive

    def state(self, slots: int) -> dict[str, tuple[int, ...]]:
        """See `MultiView.state`."""
        return {"metric": (1,)}

    def trunk(
        self,
        images: Tensor,
        T_world_cam: Tensor | None = None,
        K: Tensor | None = None,
        *,
        reference: str = "saddle_balanced",
        attention: str | Strategy = "dense",
        top_k: int = 32,
        chunk: int = 8,
        sight: Sight | None = None,
    ) -> Heads:
        """As `Da3.trunk`, in metres; the sky has a far depth, 200 m at most, and no confidence.

        Scale and far depth come from all pixels, with `sight` the scale from those of the first view, so that the networks'
        heads run here; what they say waits where the images lie, on the host if that is there.
        """
        views = images.shape[1]
        options = dict(reference=reference, attention=attention, top_k=top_k, chunk=chunk, sight=sight)
        any_view = self.model.da3.trunk(images, T_world_cam, K, **options)
        device, home = any_view.tokens[0].device, images.device

        def read(images: Tensor, *taps: Tensor) -> tuple[Tensor, ...]:
            metres, sky = self.model.da3_metric(images[None].to(device), chunk)
            return tuple(x.to(home) for x in (metres[0], sky[0], *any_view.read(*taps)))

        outputs = by_frames(read, chunk, images.flatten(0, 1), *any_view.tokens)
        metres, sky, log_depth, logit, _, _, K, _ = (x.unflatten(0, (-1, views)) for x in outputs)
        depth, metres, sky = log_depth.exp(), metres * focal(K) / 300, sky >= SKY
        asked = [y if sight is None else y[:, :1] for y in (depth, metres, 1 + logit.exp(), sky)]
        scale = torch.stack([self._scale(*x) for x in zip(*asked)])
        if sight is not None:
            scale = sight.of_first("metric", scale)
        far = torch.stack([far_depth(d * s, k, 200.0) for d, s, k in zip(depth, scale, sky)])
        tokens = (*outputs[1:], per_view(scale, views), per_view(far, views))
        return Heads(tokens, lambda *x: tuple(y.to(device) for y in x), self.assemble, views, chunk, any_view.raw)

    @staticmethod
    def assemble(sky: Tensor, *outputs: Tensor) -> Reconstruction:
        """Sky output (..., H, W), what `AnyView.assemble` takes, and (...) metres per unit and the sky's far depth."""
        *any_view, scale, far = outputs
        out, sky = AnyView.assemble(*any_view), sky >= SKY
        depth = with_sky(out.depth * scale[..., None, None], sky, far[..., None, None])
        T = rigid(out.T_world_cam[..., :3, :3], out.T_world_cam[..., :3, 3] * scale[..., None])
        raw = dict(out.raw, depth=depth, depth_conf=out.raw["depth_conf"].masked_fill(sky, 1))
        raw |= dict(scale_factor=scale[..., 0], extrinsics=invert(T)[..., :3, :])
        confidence = out.confidence.masked_fill(sky, 0)
        return replace(
            out, depth=depth, points=unproject(depth, out.K), confidence=confidence, T_world_cam=T, metric=True, raw=raw
        )

    @staticmethod
    def _scale(depth: Tensor, metres: Tensor, confidence: Tensor, sky: Tensor) -> Tensor:
        """Metres per unit of one sequence, by least squares over confident pixels; 1 without any. (N, H, W) each."""
        good = (confidence >= quantile(confidence, 0.5, ~sky)) & ~sky & (metres > 0.01) & (depth > 1e-3)
        scale = (metres * depth).where(good, 0).sum() / depth.square().where(good, 0).sum()
        return scale.where(good.any(), 1)
