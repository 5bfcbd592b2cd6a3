"""Bilinear resizing of feature maps that lie with channels last, with a sum of its result and an embedding of places.

Convolutional heads enlarge maps of hundreds of channels and then add what depends on a pixel's row or column alone. Both are
bound by memory: one pass reads the small maps and writes the large ones, without an embedding at their size.

Shape letters: f maps of C channels, (h, w) -> (H, W) pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.kernels.frames import tl, triton
from speed3r_ros.kernels.qkv import differentiated, fused

Plane = tuple[
    Tensor, Tensor
]  # columns (W, C / 2), for the first half of the channels, and rows (H, C / 2), for the others


def check(x: Tensor, size: tuple[int, int], plane: Plane | None) -> None:
    """Raise ValueError unless the arguments of `resize` fit together."""
    if x.dim() != 4 or min(size) < 1:
        raise ValueError(f"x {tuple(x.shape)} and size {size} are not (f, C, h, w) and at least one pixel")
    if plane is not None:
        half, odd = divmod(x.shape[1], 2)
        shapes = [tuple(y.shape) for y in plane]
        if odd or shapes != [(size[1], half), (size[0], half)]:
            raise ValueError(f"columns and rows {shapes} do not fit {x.shape[1]} channels of {size} pixels")


def resize_reference(x: Tensor, size: tuple[int, int], plane: Plane | None = None) -> Tensor:
    """Plain torch; arguments and results of `resize`."""
    check(x, size, plane)
    if tuple(x.shape[2:]) != tuple(size):
        x = F.interpolate(x, size, mode="bilinear", align_corners=True)
    if plane is None:
        return x
    columns, rows = plane[0].mT[:, None].expand(-1, *size), plane[1].mT[:, :, None].expand(-1, *size)
    return x + torch.cat([columns, rows]).to(x.dtype)


if triton is not None:

    @triton.jit
    def _resize(
        x,
        columns,
        rows,
        out,
        h,
        w,
        W,
        scale_h,
        scale_w,
        C: tl.constexpr,
        PLANE: tl.constexpr,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        """PIXELS of a row of a map, CHANNELS of them at a time."""
        row, height, f = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
        column = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        y, place = row.to(tl.float32) * scale_h, column.to(tl.float32) * scale_w
        top, left = tl.minimum(y.to(tl.int32), h - 1), tl.minimum(place.to(tl.int32), w - 1)
        down, right = y - top.to(tl.float32), (place - left.to(tl.float32))[:, None]
        below, after = tl.minimum(top + 1, h - 1), tl.minimum(left + 1, w - 1)
        x += f * h * w * C
        out += (f * height + row) * W * C
        for first in range(0, C, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            inside = (column < W)[:, None] & (c < C)[None, :]
            a = tl.load(x + ((top * w + left) * C)[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
            b = tl.load(x + ((top * w + after) * C)[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
            upper = (1 - right) * a + right * b
            a = tl.load(x + ((below * w + left) * C)[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
            b = tl.load(x + ((below * w + after) * C)[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
            value = (1 - down) * upper + down * ((1 - right) * a + right * b)
            if PLANE:
                HALF: tl.constexpr = C // 2
                of_column = inside & (c < HALF)[None, :]
                value += tl.load(columns + column[:, None] * HALF + c[None, :], mask=of_column, other=0.0)
                value += tl.load(rows + row * HALF + c - HALF, mask=(c >= HALF) & (c < C), other=0.0)[None, :]
            tl.store(out + column[:, None] * C + c[None, :], value.to(out.dtype.element_ty), mask=inside)


def resize_triton(
    x: Tensor, size: tuple[int, int], plane: Plane | None = None, sizes: dict[str, int] | None = None
) -> Tensor:
    """The kernel; arguments and results of `resize`, channels last. sizes: pixels and channels of a tile, and warps."""
    check(x, size, plane)
    x = x.contiguous(memory_format=torch.channels_last)
    (f, channels, h, w), (height, width) = x.shape, size
    out = torch.empty(f, channels, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    sizes = sizes or {"PIXELS": 16, "CHANNELS": min(128, triton.next_power_of_2(channels)), "num_warps": 4}
    scale_h, scale_w = (a / b if b else 0.0 for a, b in ((h - 1, height - 1), (w - 1, width - 1)))
    columns, rows = (x, x) if plane is None else (y.float().contiguous() for y in plane)
    _resize[triton.cdiv(width, sizes["PIXELS"]), height, f](
        x, columns, rows, out, h, w, width, scale_h, scale_w, C=channels, PLANE=plane is not None, **sizes
    )
    return out


def resize(x: Tensor, size: tuple[int, int], plane: Plane | None = None) -> Tensor:
    """Bilinear resizing of maps with corners aligned, as `F.interpolate` does it, then a sum with an embedding of places.

    x: (f, C, h, w). size: (H, W). plane: columns (W, C / 2), added to the first half of the channels of every row, and rows
    (H, C / 2), added to the others of every column. Returns (f, C, H, W) in x's type, computed in float32 or finer; x itself if
    there is nothing to do. Raises ValueError on shapes that do not fit.
    """
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    changed = plane is not None or tuple(x.shape[2:]) != tuple(size)
    kernel = fused(x) and last and changed and not differentiated(x, *(plane or ()))
    return (resize_triton if kernel else resize_reference)(x, size, plane)
