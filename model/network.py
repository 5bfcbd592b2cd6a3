"""The compact network: conv stem, per-frame transformer, alternating frame / global blocks, and two heads.

It maps frames to local point maps (camera frame, OpenCV axes, up to one scale per segment), their confidence, and
camera-to-world poses in the gauge of the segment's first frame. It is causal over frames: the global blocks see only
what the visibility rule or the memory grants, so that a frame is computed once, when it arrives.

Alternating attention is VGGT's (Wang et al., CVPR 2025), ray-plus-log-depth point maps and gauge-free pose losses are
Pi3's (Wang et al., 2025), the sparse global attention is Speed3R's. Shape suffixes: see `attention`; C channels,
F = B * T frames, (h, w) patch grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed3r_ros.kernels.frames import Visible
from speed3r_ros.kernels.qkv import BLOCK, Slot, normalise_and_rotate, prepare_tokens
from speed3r_ros.kernels.residual import add_norm
from speed3r_ros.model.attention import Layer, Strategy, Tokens
from speed3r_ros.model.memory import Memory, Sight
from speed3r_ros.model.quantised import Fp8Linear, Int8Linear, WideBlock, check_precision, set_precision
from speed3r_ros.model.strategies import strategy_for

NOMINAL_FOV = math.radians(65.0)  # field of view that the ray head's residual starts from
COLUMNS = 16  # patches in a row of the first training size; rotary positions are in units of their width
IMAGE_MEAN, IMAGE_STD = 0.45, 0.25


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the network. height and width are multiples of 4 patches, so that blocks tile the grid."""

    height: int = 168
    width: int = 224
    patch: int = 14
    channels: int = 384
    head_width: int = 64
    encoder_blocks: int = 3
    alternating_blocks: int = 5
    stem: int = 48
    registers: int = 3
    decoder: int = 32

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (h, w)."""
        return self.height // self.patch, self.width // self.patch

    @property
    def specials(self) -> int:
        """Special tokens per frame: the camera token, then the registers."""
        return 1 + self.registers


@dataclass(frozen=True)
class Prediction:
    """Network output for F frames of B sequences, T each.

    points: (B, T, 3, H, W) in the camera frame. confidence: (B, T, H, W) logit of "relative error under 8 %".
    R: (B, T, 3, 3), t: (B, T, 3) camera-to-world in the segment's gauge. log_sigma: (B, T, 2) log of the expected
    error of t (in units of mean depth) and of R (rad) against the segment's first frame. descriptor: (B, T, h * w, 128)
    patch descriptors for matching, row-major, which only training needs.
    """

    points: Tensor
    confidence: Tensor
    R: Tensor
    t: Tensor
    log_sigma: Tensor
    descriptor: Tensor | None = None


def rotation_from_6d(x: Tensor) -> Tensor:
    """(..., 6) -> (..., 3, 3) by Gram-Schmidt (Zhou et al., CVPR 2019)."""
    a = F.normalize(x[..., :3], dim=-1, eps=1e-6)
    b = x[..., 3:6]
    b = F.normalize(b - (a * b).sum(-1, keepdim=True) * a, dim=-1, eps=1e-6)
    return torch.stack([a, b, torch.linalg.cross(a, b)], -1)


def compute_dtype(layer: nn.Linear | Int8Linear | Fp8Linear) -> torch.dtype:
    """What the layer takes: autocast's type while training, else the type that its weights are stored in."""
    if not isinstance(layer, nn.Linear):
        return layer.takes
    device = layer.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.weight.dtype


def norm_sum(
    norm: nn.LayerNorm, x: Tensor, branch: Tensor | None, dtype: torch.dtype, gamma: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + gamma * branch, and its layer norm as `dtype`, (..., C) each; without a branch x itself. gamma: (C,), None for 1."""
    return add_norm(x, branch, norm.weight, norm.bias, norm.eps, dtype, gamma)


def patch_product(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution whose stride is its size, as a matrix product, which GPUs do many times as fast.

    (F, inputs, h * s, w * s) -> (F, h * w, C), row-major.
    """
    side = conv.kernel_size[0]
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
    return F.linear(x.flatten(3).flatten(1, 2), conv.weight.flatten(1), conv.bias)


def linear_gelu(layer: nn.Linear | Int8Linear | Fp8Linear, h: Tensor) -> Tensor:
    """GELU of a linear layer: (..., C) -> (..., out).

    Exact, but for inference in 16 bits on a GPU, where the matrix product applies the tanh approximation to its float32 sums
    before it stores them: one pass less, and nearer to the exact result than the exact GELU of rounded sums
    (`benchmarks/check_kernels.py`).
    """
    lowered = h.is_cuda and isinstance(layer, nn.Linear) and h.dtype == layer.weight.dtype != torch.float32
    if not lowered or torch.is_grad_enabled():
        return F.gelu(layer(h))
    out = torch._addmm_activation(layer.bias, h.flatten(0, -2), layer.weight.mT, use_gelu=True)
    return out.unflatten(0, h.shape[:-1])


class Block(WideBlock):
    """Pre-norm transformer block with attention inside each frame; residual stream in float32.

    Its input and output are sums of a residual and a branch that are still to be added (no branch: None), because the next
    norm adds them in the pass that it makes anyway.
    """

    def __init__(self, channels: int, head_width: int, qk_gain: float, residual_gain: float) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm1, self.norm2 = nn.LayerNorm(channels, 1e-6), nn.LayerNorm(channels, 1e-6)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.q_norm = nn.Parameter(torch.full((head_width,), qk_gain))
        self.k_norm = nn.Parameter(torch.full((head_width,), qk_gain))
        for layer in (self.qkv, self.proj, self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02 if channels >= 256 else 0.04)
            nn.init.zeros_(layer.bias)
        for layer in (self.proj, self.fc2):
            layer.weight.data.mul_(residual_gain)

    def project(self, h: Tensor) -> Tensor:
        """Normalised input (F, L, C) -> raw qkv (F, L, 3, H, D)."""
        return self.qkv(h).unflatten(-1, (3, -1, self.head_width))

    def before(self, x: Tensor, branch: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Residual and branch (F, L, C) -> residual (F, L, C), q, k, v (F, H, L, D)."""
        x, h = norm_sum(self.norm1, x, branch, compute_dtype(self.qkv))
        return x, *normalise_and_rotate(self.project(h), self.q_norm, self.k_norm, cos, sin)

    def after(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Residual (F, L, C) and attention output (F, H, L, D) -> residual and branch (F, L, C)."""
        branch = self.proj(attended.transpose(1, 2).flatten(2))
        x, h = norm_sum(self.norm2, x, branch, compute_dtype(self.fc1))
        return x, self.fc2(linear_gelu(self.fc1, h))

    def forward(self, x: Tensor, branch: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Residual and branch (F, L, C) -> the same."""
        x, q, k, v = self.before(x, branch, cos, sin)
        return self.after(x, F.scaled_dot_product_attention(q, k, v))


class GlobalBlock(Block):
    """A block whose attention crosses frames: gates and pooled tokens beside the fine ones."""

    def __init__(self, channels: int, head_width: int, qk_gain: float, residual_gain: float, specials: int) -> None:
        super().__init__(channels, head_width, qk_gain, residual_gain)
        self.specials, self.heads = specials, channels // head_width
        self.proj_lin: nn.Linear | None = None  # Lite3R's projection, if `lite3r.add_linear_branch` has made it
        self.gate = nn.Linear(channels, 2 * channels // head_width)
        nn.init.zeros_(self.gate.weight)
        with torch.no_grad():  # compression starts at sigmoid(-1), selection at sigmoid(1), as released
            self.gate.bias.copy_(torch.tensor([-1.0, 1.0]).repeat(channels // head_width))

    def before_global(
        self,
        x: Tensor,
        branch: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cos_g: Tensor,
        sin_g: Tensor,
        slot: Slot | None = None,
    ) -> tuple[Tensor, ...]:
        """As `before`: residual (F, L, C), fine q, k, v (F, H, L, D), pooled q, k, v (F, H, G, D), gate (F, H, L, 2).

        With a slot, keys and values go there and are those of all frames that its buffers hold.
        """
        x, h = norm_sum(self.norm1, x, branch, compute_dtype(self.qkv))
        gate = self.gate(h).sigmoid().unflatten(-1, (-1, 2)).transpose(1, 2)
        tables = cos, sin, cos_g, sin_g
        tokens = prepare_tokens(self.project(h), self.q_norm, self.k_norm, *tables, self.specials, slot)
        return x, *tokens, gate


Attend = Callable[..., Tensor]  # the layer; q, k, v, pooled q, k, v, gate of its block -> attended (F, H, L, D)


class Network(nn.Module):
    """See the module's text. `forward` is the parallel form, `step` the recurrent one."""

    capturable = True  # see `streaming.StreamingNetwork`
    full_precision = ("point_conv3", "camera_fc1", "camera_fc2")  # see `set_precision`

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or NetworkConfig()
        c, patch = config.channels, config.patch
        residual_gain = (2 * (config.encoder_blocks + 2 * config.alternating_blocks + 2)) ** -0.5

        def block() -> Block:
            return Block(c, config.head_width, 1.0, residual_gain)

        self.stem1, self.stem2 = nn.Conv2d(3, config.stem, 4, 2, 1), nn.Conv2d(config.stem, config.stem, 3, 1, 1)
        self.patch_embed = nn.Conv2d(config.stem, c, patch // 2, patch // 2)
        self.position = nn.Linear(18, c)
        self.ray_embed = nn.Linear(5, c, bias=False)
        self.patch_norm = nn.LayerNorm(c)
        self.special_tokens = nn.Parameter(torch.randn(1, config.specials, c) * 0.02)
        self.first_frame = nn.Parameter(torch.zeros(1, 1, c))
        self.encoder = nn.ModuleList(block() for _ in range(config.encoder_blocks))
        self.frame_blocks = nn.ModuleList(block() for _ in range(config.alternating_blocks))
        self.global_blocks = nn.ModuleList(
            GlobalBlock(c, config.head_width, 1.3, residual_gain, config.specials)
            for _ in range(config.alternating_blocks)
        )
        self.point_block, self.camera_block = block(), block()
        self.describe = nn.Linear(c, 128, bias=False)
        self.match_scale = nn.Parameter(torch.tensor(2.3))
        self.point_norm = nn.LayerNorm(c)
        self.point_expand = nn.Linear(c, (patch // 2) ** 2 * config.decoder)
        self.point_conv1 = nn.Conv2d(config.decoder + config.stem, 48, 3, 1, 1)
        self.point_conv2 = nn.Conv2d(48, 48, 3, 1, 1)
        self.point_conv3 = nn.Conv2d(48, 16, 1)
        self.camera_norm = nn.LayerNorm(c)
        self.camera_fc1, self.camera_fc2 = nn.Linear(2 * c, c), nn.Linear(c, 11)
        nn.init.zeros_(self.ray_embed.weight)
        for layer in (self.point_conv3, self.camera_fc2):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.trained_sizes = ((config.height, config.width),)  # (h, w) of images, the smallest first
        self.resize(config.height, config.width)

    def resize(self, height: int, width: int) -> Network:
        """The same parameters at another size of images; returns itself. ValueError if blocks do not tile the patch grid.

        Only constant tables depend on the size: positions are relative to the width, so that a larger image is a finer one.
        """
        patch = self.config.patch
        if height % (4 * patch) or width % (4 * patch) or min(height, width) <= 0 or patch % 2:
            raise ValueError(f"height {height} and width {width} must be multiples of {4 * patch}")
        self.config = replace(self.config, height=height, width=width)
        device = self.special_tokens.device
        for name, table in self._tables().items():
            self.register_buffer(name, table.to(device), persistent=False)
        return self

    @property
    def across_views(self) -> list[GlobalBlock]:
        """Blocks whose attention crosses frames."""
        return list(self.global_blocks)

    def _tables(self) -> dict[str, Tensor]:
        """Constant tables: rotary angles of tokens and of blocks, position features, nominal rays, block-major order."""
        cfg, (h, w) = self.config, self.config.grid
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        order = torch.arange(h * w).view(h // 4, 4, w // 4, 4).transpose(1, 2).reshape(-1)
        y, x = y.reshape(-1)[order].float(), x.reshape(-1)[order].float()

        def angles(y: Tensor, x: Tensor) -> Tensor:
            quarter = cfg.head_width // 4
            rate = 100.0 ** (-torch.arange(quarter) / quarter)
            return torch.cat([y[:, None] * rate] * 2 + [x[:, None] * rate] * 2, 1)[None, :, None]

        zeros = torch.zeros(cfg.specials)
        row, column = ((z + 0.5) * COLUMNS / w + 0.5 for z in (y, x))  # special tokens are at 0
        token = angles(torch.cat([zeros, row]), torch.cat([zeros, column]))
        block = angles(row.view(-1, BLOCK).mean(1), column.view(-1, BLOCK).mean(1))
        u, v = (x + 0.5 - w / 2) / (w / 2), (y + 0.5 - h / 2) / (w / 2)
        rate = 2.0 ** torch.arange(4) * math.pi / 2
        u, v = u[:, None], v[:, None]
        features = torch.cat([u, v, (u * rate).sin(), (u * rate).cos(), (v * rate).sin(), (v * rate).cos()], 1)
        slope = math.tan(NOMINAL_FOV / 2) / (cfg.width / 2)
        py, px = torch.meshgrid(
            (torch.arange(cfg.height) - (cfg.height - 1) / 2) * slope,
            (torch.arange(cfg.width) - (cfg.width - 1) / 2) * slope,
            indexing="ij",
        )
        return dict(
            cos=token.cos(),
            sin=token.sin(),
            cos_g=block.cos(),
            sin_g=block.sin(),
            position_features=features,
            nominal_rays=torch.stack([px, py])[None],
            order=order,
            inverse_order=order.argsort(),
            identity_6d=torch.tensor([1.0, 0, 0, 0, 1, 0]),
        )

    def precision(self, dtype: torch.dtype | str) -> Network:
        """Store and run the matrix products in `dtype`; norms, heads' outputs and the residual stream stay float32.

        For inference only: torch.int8 (CPU) is for the blocks' linear layers, the rest is float32 then; "fp8" (GPU) for their
        `wide_layers`, the rest is bfloat16 then. ValueError: see `check_precision`.
        """
        if dtype == torch.int8:
            check_precision(self, dtype)
            for block in (m for m in self.modules() if isinstance(m, Block)):
                for name in ("qkv", "proj", "fc1", "fc2"):
                    if isinstance(layer := getattr(block, name), nn.Linear):
                        setattr(block, name, Int8Linear(layer))
            return self
        set_precision(self, dtype)
        return self

    @property
    def input_size(self) -> tuple[int, int]:
        """(h, w) of the images."""
        return self.config.height, self.config.width

    def new_memory(self, window: int, anchors: int, bank: int, attention: str | Strategy) -> Memory:
        """A memory for `step` with this attention, in the type of the matrix products."""
        cfg, (h, w), first = self.config, self.config.grid, self.global_blocks[0]
        return Memory(
            cfg.alternating_blocks,
            cfg.channels // cfg.head_width,
            cfg.specials + h * w,
            h * w // BLOCK,
            cfg.head_width,
            window,
            anchors,
            bank,
            compute_dtype(first.qkv),
            first.gate.weight.device,
            parts=strategy_for(attention).parts(cfg.specials, [Layer(i) for i in range(cfg.alternating_blocks)]),
        )

    def settings(self) -> dict[str, int]:
        """The configuration as plain numbers, for checkpoints."""
        return asdict(self.config)

    # ---------------------------------------------------------------------------------------------- per-frame parts

    def encode(
        self, image: Tensor, rays: Tensor | None, known: Tensor | None, first: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Everything before the first global block.

        image: (F, 3, H, W) in [0, 1]. rays: (F, 2, H, W) of x/z, y/z per pixel where `known` (F,) is True, or None.
        first: (F,) bool, the frame that opens its segment. Returns tokens (F, L, C), stem features (F, stem, H/2, W/2)
        and descriptors (F, h * w, 128) in row-major order.
        """
        cfg, dtype = self.config, self.stem1.weight.dtype
        x = (image - IMAGE_MEAN) / IMAGE_STD
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        stem = F.gelu(self.stem2(F.gelu(self.stem1(x))))
        patches = patch_product(self.patch_embed, stem)[:, self.order].float()
        embedding = self.position(self.position_features.to(self.position.weight.dtype)).float()
        if rays is not None:
            features = F.avg_pool2d(rays, cfg.patch).flatten(2)
            slope = torch.stack(
                [rays[:, 0, :, -1].mean(1) - rays[:, 0, :, 0].mean(1), rays[:, 1, -1].mean(1) - rays[:, 1, 0].mean(1)],
                1,
            )[..., None].expand_as(features)
            features = torch.cat([features, slope, torch.ones_like(features[:, :1])], 1) * known[:, None, None]
            features = features.transpose(1, 2)[:, self.order]
            embedding = embedding + self.ray_embed(features.to(self.ray_embed.weight.dtype)).float()
        x = self.patch_norm(patches + embedding)
        special = (self.special_tokens + self.first_frame * first[:, None, None]).to(x.dtype)
        x = torch.cat([special, x], 1)
        branch = None
        for block in self.encoder:
            x, branch = block(x, branch, self.cos, self.sin)
        x = x if branch is None else x + branch
        descriptor = self.describe(x[:, cfg.specials :].to(self.describe.weight.dtype)).float()[:, self.inverse_order]
        scale = self.match_scale.exp().clamp(max=60).sqrt()
        return x, stem, F.normalize(descriptor, dim=-1) * scale

    def trunk(self, x: Tensor, attend: Attend, memory: Memory | None = None) -> Tensor:
        """Alternate attention inside frames and across them; `attend` grants frames of this call, or of the memory."""
        branch = None
        for i, (frame_block, global_block) in enumerate(zip(self.frame_blocks, self.global_blocks)):
            x, branch = frame_block(x, branch, self.cos, self.sin)
            slot = None if memory is None else memory.slot(i)
            tables = self.cos, self.sin, self.cos_g, self.sin_g
            x, *tokens = global_block.before_global(x, branch, *tables, slot)
            x, branch = global_block.after(x, attend(Layer(i, linear=global_block.proj_lin), *tokens))
        return x if branch is None else x + branch

    def heads(
        self, x: Tensor, stem: Tensor, rays: Tensor | None, known: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (F, L, C) -> points (F, 3, H, W), confidence logit (F, H, W), camera vector (F, 11)."""
        cfg, (h, w) = self.config, self.config.grid
        y = self.point_block(x, None, self.cos, self.sin)
        y = norm_sum(self.point_norm, *y, compute_dtype(self.point_expand))[1]
        y = self.point_expand(y[:, cfg.specials :][:, self.inverse_order]).transpose(1, 2).unflatten(2, (h, w))
        y = torch.cat([F.pixel_shuffle(y, cfg.patch // 2), stem], 1).contiguous(memory_format=torch.channels_last)
        y = F.gelu(self.point_conv1(y))
        y = F.gelu(self.point_conv2(y))
        c = self.camera_block(x, None, self.cos, self.sin)
        c = norm_sum(self.camera_norm, *c, torch.float32)[1]
        c = torch.cat([c[:, 0], c[:, cfg.specials :].mean(1)], -1)
        with torch.autocast(x.device.type, enabled=False):
            y = F.pixel_shuffle(F.conv2d(y.float(), self.point_conv3.weight, self.point_conv3.bias), 2)
            z = (5 * torch.tanh(y[:, 2:3] / 5)).exp()
            ray = self.nominal_rays + y[:, :2]
            if rays is not None:
                ray = torch.where(known[:, None, None, None], rays, ray)
            c = self.camera_fc2(F.gelu(self.camera_fc1(c.float())))
        return torch.cat([ray * z, z], 1), y[:, 3], c

    def _predict(
        self, batch: int, x: Tensor, stem: Tensor, descriptor: Tensor, rays: Tensor | None, known: Tensor | None
    ) -> Prediction:
        points, confidence, camera = self.heads(x, stem, rays, known)
        points, confidence, camera, descriptor = (
            y.unflatten(0, (batch, -1)) for y in (points, confidence, camera, descriptor)
        )
        return Prediction(
            points,
            confidence,
            rotation_from_6d(camera[..., :6] + self.identity_6d),
            camera[..., 6:9],
            camera[..., 9:],
            descriptor,
        )

    # ------------------------------------------------------------------------------------------------ the two forms

    def _attend(self, batch: int, sight: Sight, attention: str | Strategy, top_k: int) -> Attend:
        """Attention across the frames of B sequences; queries of B * T frames, keys and values of as many as they have."""
        strategy, memory = strategy_for(attention, sight.in_parts), sight.memory
        fine, coarse = Visible(sight.fine), Visible(sight.coarse)

        def attend(layer: Layer, *tensors: Tensor) -> Tensor:
            frames = len(tensors[0]) // batch
            q, k, v, q_g, k_g, v_g, gate = (y.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3) for y in tensors)
            tokens = Tokens(q, q_g, gate), Tokens(k, k_g), Tokens(v, v_g)
            if not strategy.follows_visibility:  # rows of whole frames and of parts
                k, v, bias = memory.rows(layer.number)
                tokens, layer = (tokens[0], Tokens(k), Tokens(v)), replace(layer, bias=bias)
            out = strategy(*tokens, fine, coarse, self.config.specials, top_k, layer)
            return out.unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1)

        return attend

    def forward(
        self,
        images: Tensor,
        fine: Tensor,
        coarse: Tensor,
        rays: Tensor | None = None,
        known: Tensor | None = None,
        attention: str | Strategy = "speed3r",
        top_k: int = 32,
    ) -> Prediction:
        """All frames of B sequences at once.

        images: (B, T, 3, H, W) in [0, 1]. fine, coarse: (B or 1, T, T) bool, which frames' fine and pooled tokens a
        frame sees (`memory.visibility`); both contain the diagonal. rays: (B, T, 2, H, W) with known: (B, T) bool.
        """
        batch, frames = images.shape[:2]
        flat = None if rays is None else (rays.flatten(0, 1), known.flatten(0, 1))
        first = (torch.arange(frames, device=images.device) == 0).repeat(batch)
        x, stem, descriptor = self.encode(images.flatten(0, 1), *(flat or (None, None)), first)
        attend = self._attend(batch, Sight(fine, coarse), attention, top_k)
        return self._predict(batch, self.trunk(x, attend), stem, descriptor, *(flat or (None, None)))

    def step(
        self,
        image: Tensor,
        memory: Memory,
        rays: Tensor | None = None,
        attention: str | Strategy = "speed3r",
        top_k: int = 32,
        known: Tensor | None = None,
    ) -> Prediction:
        """One new frame (3, H, W) against the memory, which receives its keys and values in the slot it has reserved.

        rays: (2, H, W), valid where known: (1,) bool is True, or None when intrinsics are unknown. No synchronisation with
        the host. Batch and frame axes of the prediction are 1.
        """
        if rays is not None:
            rays = rays[None]
            known = torch.ones(1, dtype=torch.bool, device=image.device) if known is None else known
        x, stem, descriptor = self.encode(image[None], rays, known, memory.first)
        # the lists of visible frames are made here, so that a CUDA graph makes them anew
        attend = self._attend(1, Sight.into(memory), attention, top_k)
        return self._predict(1, self.trunk(x, attend, memory), stem, descriptor, rays, known)
