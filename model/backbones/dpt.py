"""Dense prediction heads (DPT: Ranftl et al., ICCV 2021) as VGGT and Depth Anything 3 use them.

Shape letters: f frames of one chunk, (h, w) patch grid, (H, W) = 14 (h, w) pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed3r_ros.kernels.resize import Plane, resize
from speed3r_ros.model.backbones.blocks import PATCH


def view_plane(
    h: int, w: int, aspect: float, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Coordinates u, v (h, w) of a map's pixels on a plane where the image, `aspect` wide, has a half diagonal of 1."""
    diagonal = (aspect**2 + 1) ** 0.5
    span_u, span_v = aspect / diagonal * (w - 1) / w, 1 / diagonal * (h - 1) / h
    u = torch.linspace(-span_u, span_u, w, device=device, dtype=dtype)
    v = torch.linspace(-span_v, span_v, h, device=device, dtype=dtype)
    return u.expand(h, w), v[:, None].expand(h, w)


def plane_embedding(channels: int, h: int, w: int, aspect: float, device: torch.device) -> Plane:
    """A tenth of the sinusoidal embedding of places in the view plane: columns (w, channels / 2), rows (h, channels / 2)."""
    quarter = channels // 4
    rate = 100.0 ** (-torch.arange(quarter, device=device, dtype=torch.float64) / quarter)
    u, v = view_plane(h, w, aspect, device, torch.float64)  # one row, one column: all are the same
    waves = (rate * x[:, None] for x in (u[0], v[:, 0]))
    columns, rows = ((0.1 * torch.cat([x.sin(), x.cos()], -1)).float() for x in waves)
    return columns, rows


def planes(maps: Tensor) -> tuple[Tensor, ...]:
    """The channels of maps (f, X, H, W), X of (f, H, W) that lie in memory alike however many frames there are.

    Elsewhere the last bit of a function of them depends on the layout.
    """
    return tuple(x.contiguous() for x in maps.unbind(1))


def _conv3(inputs: int, out: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, out, 3, padding=1, bias=bias)


class ResidualUnit(nn.Module):
    """Two convolutions with a skip. relu_skip: the skip adds relu(x), as VGGT's in-place activation does, not x."""

    def __init__(self, features: int, relu_skip: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv3(features, features), _conv3(features, features)
        self.relu_skip = relu_skip

    def forward(self, x: Tensor) -> Tensor:
        """(f, features, h, w) -> the same shape."""
        y = F.relu(x)
        return self.conv2(F.relu(self.conv1(y))) + (y if self.relu_skip else x)


class Fusion(nn.Module):
    """One step from a coarse level to the next finer one. lateral: whether that level's features enter."""

    def __init__(self, features: int, relu_skip: bool, lateral: bool) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, 1)
        if lateral:
            self.resConfUnit1 = ResidualUnit(features, relu_skip)
        self.resConfUnit2 = ResidualUnit(features, relu_skip)

    def forward(self, x: Tensor, lateral: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Maps of one size, maybe a lateral one of that size -> (f, features, *size)."""
        if lateral is not None:
            x = x + self.resConfUnit1(lateral)
        return resize(self.out_conv(self.resConfUnit2(x)), size)  # published in the other order, which is the same


class DPT(nn.Module):
    """Four levels of tokens to maps at full resolution.

    inputs: channels of the tokens. features: of the fusion. channels: of the four levels. out: channels of the result, or
    None for features at half the resolution (VGGT's tracker). norm: LayerNorm of the tokens. plane: add the view-plane
    embedding. relu_skip: see `ResidualUnit`. sky: a second result of one channel.
    """

    def __init__(
        self,
        inputs: int,
        features: int,
        channels: tuple[int, int, int, int],
        out: int | None,
        *,
        norm: bool = True,
        plane: bool = True,
        relu_skip: bool = False,
        sky: bool = False,
    ) -> None:
        super().__init__()
        self.plane = plane
        self.norm = nn.LayerNorm(inputs) if norm else nn.Identity()
        self.projects = nn.ModuleList(nn.Conv2d(inputs, c, 1) for c in channels)
        a, b, _, d = channels
        self.resize_layers = nn.ModuleList(
            [nn.ConvTranspose2d(a, a, 4, 4), nn.ConvTranspose2d(b, b, 2, 2), nn.Identity(), nn.Conv2d(d, d, 3, 2, 1)]
        )
        self.scratch = scratch = nn.Module()
        for i, c in enumerate(channels, 1):
            setattr(scratch, f"layer{i}_rn", _conv3(c, features, bias=False))
            setattr(scratch, f"refinenet{i}", Fusion(features, relu_skip, lateral=i < 4))
        if out is None:
            scratch.output_conv1 = _conv3(features, features)
        else:
            scratch.output_conv1 = _conv3(features, features // 2)
            scratch.output_conv2 = self._last(features // 2, out)
        if sky:
            scratch.sky_output_conv2 = self._last(features // 2, 1)

    @staticmethod
    def _last(inputs: int, out: int) -> nn.Sequential:
        return nn.Sequential(_conv3(inputs, 32), nn.ReLU(), nn.Conv2d(32, out, 1))

    def _resize(self, x: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Maps (f, C, h, w) at another size, with the places of their pixels if the head has the embedding."""
        plane = plane_embedding(x.shape[1], *size, grid[1] / grid[0], x.device) if self.plane else None
        return resize(x, size, plane)

    def pyramid(self, tokens: tuple[Tensor, ...], grid: tuple[int, int]) -> list[Tensor]:
        """Four token maps (f, h * w, inputs) -> four levels (f, features, ...), finest first: 4, 2, 1, 1/2 of the grid."""
        levels = []
        for i, (x, project, layer) in enumerate(zip(tokens, self.projects, self.resize_layers), 1):
            x = self._resize(project(self.norm(x).mT.unflatten(2, grid)), grid, grid)
            levels.append(getattr(self.scratch, f"layer{i}_rn")(layer(x)))
        return levels

    def fuse(self, levels: list[Tensor], suffix: str = "") -> Tensor:
        """Levels -> (f, features, 8 h, 8 w), from the coarsest to the finest. suffix: of the fusions' names."""
        x = None
        for i in range(4, 0, -1):
            size = levels[i - 2].shape[2:] if i > 1 else tuple(2 * n for n in levels[0].shape[2:])
            fusion = getattr(self.scratch, f"refinenet{i}{suffix}")
            x = fusion(levels[3], None, size) if i == 4 else fusion(x, levels[i - 1], size)
        return x

    def finish(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Fused features -> (f, out, H, W), with `sky` one channel more."""
        scratch = self.scratch
        if not hasattr(scratch, "output_conv2"):
            size = (grid[0] * PATCH // 2, grid[1] * PATCH // 2)
            return self._resize(scratch.output_conv1(x), size, grid)
        size = (grid[0] * PATCH, grid[1] * PATCH)
        x = self._resize(scratch.output_conv1(x), size, grid)
        out = scratch.output_conv2(x)
        return torch.cat([out, scratch.sky_output_conv2(x)], 1) if hasattr(scratch, "sky_output_conv2") else out

    def forward(self, tokens: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        """Four token maps (f, h * w, inputs) -> (f, out, H, W)."""
        return self.finish(self.fuse(self.pyramid(tokens, grid)), grid)


class ChannelsFirst(nn.LayerNorm):
    """LayerNorm over the channels of (f, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class DualDPT(DPT):
    """Depth Anything 3's head: depth and its confidence, and from the same levels rays and theirs.

    The checkpoint holds an auxiliary output per level; that of the finest is used. All share one LayerNorm, which the file
    stores once.
    """

    def __init__(self, inputs: int, features: int, channels: tuple[int, int, int, int]) -> None:
        super().__init__(inputs, features, channels, 2)
        half, scratch = features // 2, self.scratch
        for i in range(1, 5):
            setattr(scratch, f"refinenet{i}_aux", Fusion(features, False, lateral=i < 4))
        widths = [features, half] * 3
        scratch.output_conv1_aux = nn.ModuleList(
            nn.Sequential(*(_conv3(a, b) for a, b in zip(widths, widths[1:]))) for _ in range(4)
        )
        norm = ChannelsFirst(32)
        scratch.output_conv2_aux = nn.ModuleList(
            nn.Sequential(
                _conv3(half, 32), nn.Identity(), norm, nn.Identity(), nn.ReLU(), nn.Conv2d(32, 7, 1)
            )  # the official sequence permutes where this one does nothing
            for _ in range(4)
        )

    def forward(self, tokens: tuple[Tensor, ...], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Four token maps (f, h * w, inputs) -> (f, 2, H, W) and (f, 7, 8 h, 8 w)."""
        levels, scratch = self.pyramid(tokens, grid), self.scratch
        rays = scratch.output_conv1_aux[3](self.fuse(levels, "_aux"))
        rays = scratch.output_conv2_aux[3](self._resize(rays, tuple(rays.shape[2:]), grid))
        return self.finish(self.fuse(levels), grid), rays
