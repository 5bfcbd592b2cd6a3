"""Procedural textures and photographs for rendered scenes, as packed mip chains on the device."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.kernels.raycast import TEX


class Rng:
    """Seeded draws on the device: uniform, log-uniform, normal, integers, coins, signs."""

    def __init__(self, device, seed):
        self.d = torch.device(device)
        self.g = torch.Generator(device=self.d)
        self.g.manual_seed(int(seed))

    def u(self, *s, lo=0.0, hi=1.0):
        return torch.rand(s, generator=self.g, device=self.d) * (hi - lo) + lo

    def lu(self, *s, lo, hi):
        return torch.exp(self.u(*s, lo=math.log(lo), hi=math.log(hi)))

    def n(self, *s):
        return torch.randn(s, generator=self.g, device=self.d)

    def i(self, hi, *s):
        return torch.randint(hi, s, generator=self.g, device=self.d)

    def b(self, p, *s):
        return torch.rand(s, generator=self.g, device=self.d) < p

    def choice(self, odds, n):
        return torch.multinomial(torch.tensor(odds, dtype=torch.float32, device=self.d), n, True, generator=self.g)

    def sgn(self, *s):
        return self.b(0.5, *s).float() * 2 - 1


PHOTO_FOLDERS = (
    ("skimage", "data"),
    ("matplotlib", "mpl-data/sample_data"),
    ("sklearn", "datasets/images"),
    ("scipy", "datasets"),
)
UNSUITABLE = (
    "chessboard",
    "phantom",
    "horse",
    "logo",
    "microan",
    "multipage",
    "motorcycle",
    "toc",
    "sphinx",
    "cell",
    "clock_motion",
)
HELD_OUT = ("coffee", "rocket", "china", "gravel", "coins")


def load_photos(device: torch.device | str, held_out: bool = False, size: int = 384) -> Tensor | None:
    """Photographs bundled with installed packages, (M, 3, size, size) in [0, 1], or None; held-out ones apart by name."""
    photos = []
    for module, folder in PHOTO_FOLDERS:
        try:
            root = Path(importlib.import_module(module).__file__).parent / folder
        except ImportError:
            continue
        for path in sorted((*root.glob("*.png"), *root.glob("*.jpg"))):
            name = path.name.lower()
            if name.startswith(UNSUITABLE) or name.startswith(HELD_OUT) != held_out:
                continue
            image = cv2.imread(str(path), cv2.IMREAD_COLOR)
            if image is None or min(image.shape[:2]) < 128:
                continue
            scale = size / min(image.shape[:2])
            shape = [max(size, round(side * scale)) for side in image.shape[1::-1]]
            image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
            x, y = (image.shape[1] - size) // 2, (image.shape[0] - size) // 2
            crop = np.ascontiguousarray(image[y : y + size, x : x + size, ::-1])
            photos.append(torch.from_numpy(crop).permute(2, 0, 1))
    return torch.stack(photos).to(device).float() / 255 if photos else None


def _noise(r, n, res, s=TEX):
    g = F.pad(r.u(n, 1, res, res), (2, 2, 2, 2), mode="circular")
    k = s // res
    return F.interpolate(g, scale_factor=k, mode="bicubic", align_corners=False)[
        :, :, 2 * k : 2 * k + s, 2 * k : 2 * k + s
    ]


def _fbm(r, n, lo=1, hi=7, pers=None):
    pers = r.u(n, 1, 1, 1, lo=0.35, hi=0.85) if pers is None else pers
    f, w = 0, 0
    for o in range(lo, hi + 1):
        a = pers ** (o - lo)
        f = f + a * _noise(r, n, 2**o)
        w = w + a * 0.35
    m = f.mean((2, 3), keepdim=True)
    sd = f.std((2, 3), keepdim=True)
    return ((f - m) / (sd + 1e-5) * 0.22 + 0.5).clamp(0, 1)


def _color(r, *s):
    g = r.u(*s, 1, lo=0.02, hi=0.98)
    sat = r.u(*s, 1) ** 2 * 0.45
    return (g + sat * r.u(*s, 3, lo=-1, hi=1)).clamp(0.01, 0.99)


def _palette(r, f, k=4):
    """scalar field (n,1,S,S) in [0,1] -> RGB via k random control colours"""
    n = f.shape[0]
    c = _color(r, n, k)
    x = f.clamp(0, 1) * (k - 1)
    i = x.floor().clamp(0, k - 2)
    w = x - i
    i = i.long().expand(-1, 3, -1, -1).reshape(n, 3, -1)
    ct = c.permute(0, 2, 1)
    a = torch.gather(ct, 2, i).view(n, 3, *f.shape[2:])
    b = torch.gather(ct, 2, i + 1).view(n, 3, *f.shape[2:])
    return a + (b - a) * w


def _grid(dev):
    a = (torch.arange(TEX, device=dev) + 0.5) / TEX
    return a.view(1, 1, 1, TEX), a.view(1, 1, TEX, 1)


def _voronoi(r, n, k):
    x, y = _grid(r.d)
    pts = r.u(n, k, 2)
    best = torch.full((n, 1, TEX, TEX), 9.0, device=r.d)
    sec = best.clone()
    idx = torch.zeros_like(best)
    for j in range(k):
        dx = (x - pts[:, j, 0].view(n, 1, 1, 1)).abs()
        dx = torch.minimum(dx, 1 - dx)
        dy = (y - pts[:, j, 1].view(n, 1, 1, 1)).abs()
        dy = torch.minimum(dy, 1 - dy)
        d = (dx * dx + dy * dy).sqrt()
        nb = d < best
        sec = torch.where(nb, best, torch.minimum(sec, d))
        idx = torch.where(nb, torch.full_like(idx, j), idx)
        best = torch.minimum(best, d)
    return best, sec, idx


def make_textures(r: Rng, n: int, photos: Tensor | None) -> Tensor:
    """returns (16*n, 3, 256, 256) in [0,1], 16 families"""
    x, y = _grid(r.d)
    out = []

    def sc(lo: float, hi: float) -> Tensor:
        return torch.floor(r.lu(n, 1, 1, 1, lo=lo, hi=hi + 0.999))

    out.append(_palette(r, _fbm(r, n)))  # 0 fractal
    out.append(_palette(r, (2 * _fbm(r, n, 2, 7) - 1).abs().clamp(0, 0.5) * 2))  # 1 ridged
    f = _fbm(r, n, 1, 6)
    out.append(
        _palette(
            r,
            torch.sigmoid((f - r.u(n, 1, 1, 1, lo=0.4, hi=0.6)) * r.lu(n, 1, 1, 1, lo=10, hi=80)) * 0.7
            + 0.3 * _fbm(r, n, 3, 7),
            3,
        )
    )  # 2 blotches
    b, s2, _ = _voronoi(r, n, 32)
    out.append(_palette(r, (b * 5).clamp(0, 1)))  # 3 voronoi F1
    b, s2, i = _voronoi(r, n, 48)
    cell = _color(r, n, 48).permute(0, 2, 1)  # 4 voronoi cells + grout
    col = torch.gather(cell, 2, i.long().view(n, 1, -1).expand(-1, 3, -1)).view(n, 3, TEX, TEX)
    out.append(col * (0.35 + 0.65 * ((s2 - b) * r.lu(n, 1, 1, 1, lo=30, hi=200)).clamp(0, 1)))
    k = sc(2, 12)
    ch = ((x * k * 2).floor() + (y * k * 2).floor()) % 2  # 5 checker
    out.append(_palette(r, ch * 0.8 + 0.2 * _fbm(r, n, 3, 7), 2))
    k = sc(2, 16)
    w = r.lu(n, 1, 1, 1, lo=0.02, hi=1.0)  # 6 warped stripes (wood / marble)
    out.append(
        _palette(
            r,
            0.5
            + 0.5 * torch.sin(2 * math.pi * (x * k + w * 4 * (_fbm(r, n, 1, 4) - 0.5))) * 0.7
            + 0.3 * (_fbm(r, n, 4, 7) - 0.5),
            3,
        )
    )
    kx, ky = sc(2, 8), sc(2, 12)
    ky = torch.floor(ky / 2) * 2
    off = r.b(0.6, n, 1, 1, 1).float() * 0.5  # 7 bricks / tiles
    row = (y * ky).floor()
    xx = x * kx + off * (row % 2)
    fx, fy = xx - xx.floor(), y * ky - row
    h = torch.sin((xx.floor() % kx) * 12.9898 + row * 78.233 + r.u(n, 1, 1, 1) * 100) * 43758.5453
    h = h - h.floor()
    g = r.u(n, 1, 1, 1, lo=0.01, hi=0.08)
    m = ((fx > g) & (fx < 1 - g) & (fy > g) & (fy < 1 - g)).float()
    out.append(_palette(r, (h * 0.6 + 0.4 * _fbm(r, n, 4, 7)), 3) * m + _color(r, n).view(n, 3, 1, 1) * (1 - m))
    img = _palette(r, _fbm(r, n, 1, 3) * 0.5 + 0.25, 2).expand(
        n, 3, TEX, TEX
    )  # 8 rectangle / disc collage (posters, shelves)
    for _ in range(28):
        c = r.u(n, 2, 1, 1, 1)
        hw = r.lu(n, 2, 1, 1, 1, lo=0.015, hi=0.25)
        col = _color(r, n).view(n, 3, 1, 1)
        ax, ay = (x - c[:, 0]).abs() / hw[:, 0], (y - c[:, 1]).abs() / hw[:, 1]
        disc = r.b(0.3, n, 1, 1, 1)
        d = torch.where(disc, (ax * ax + ay * ay).sqrt(), torch.maximum(ax, ay))
        img = torch.where(d < 1, col, img)
    out.append(img)
    pg = _color(r, n).view(n, 3, 1, 1).expand(n, 3, TEX, TEX)
    ink = _color(r, n).view(n, 3, 1, 1)  # 9 glyph / text-like rows
    k = sc(8, 24)
    fy = y * k - (y * k).floor()
    q = F.interpolate(r.u(n, 1, 64, 64), size=(TEX, TEX), mode="nearest")
    m = (fy < 0.65) & (q > 0.45) & (_noise(r, n, 8) > 0.25)
    out.append(torch.where(m, ink, pg))
    out.append(_palette(r, _noise(r, n, 128) * 0.5 + 0.5 * _fbm(r, n, 5, 7), 3))  # 10 carpet / gravel
    out.append(_palette(r, _fbm(r, n, 1, 3), 2))  # 11 smooth
    for _ in range(4):  # 12-15 photographs (random crop / flip / colour)
        if photos is None:
            out.append(_palette(r, _fbm(r, n)))
            continue
        ph = photos[r.i(photos.shape[0], n)]
        th = torch.zeros(n, 2, 3, device=r.d)
        s = r.u(n, lo=0.35, hi=1.0)
        c = 1 - s
        fl = r.sgn(n)
        th[:, 0, 0] = s * fl
        th[:, 1, 1] = s
        th[:, 0, 2] = r.u(n, lo=-1, hi=1) * c
        th[:, 1, 2] = r.u(n, lo=-1, hi=1) * c
        ph = F.grid_sample(
            ph, F.affine_grid(th, (n, 3, TEX, TEX), align_corners=False), align_corners=False, padding_mode="border"
        )
        g = ph.mean(1, keepdim=True)
        ph = g + (ph - g) * r.u(n, 1, 1, 1, lo=0.2, hi=1.4)
        ph = ph * r.u(n, 3, 1, 1, lo=0.75, hi=1.25)
        out.append(torch.where(r.b(0.1, n, 1, 1, 1), 1 - ph, ph))
    return torch.cat([o.expand(n, 3, TEX, TEX) for o in out]).clamp(0, 1)


def make_outdoor_textures(r: Rng, n: int) -> Tensor:
    """(3 * n, 3, 256, 256) in [0, 1]: families 16 to 18, facades with windows, cobbles or slabs, foliage."""
    x, y = _grid(r.d)

    def cells(count: Tensor) -> tuple[Tensor, Tensor]:
        return x * count[0] - (x * count[0]).floor(), y * count[1] - (y * count[1]).floor()

    def inside(u: Tensor, v: Tensor, left: Tensor, top: Tensor, right: Tensor, bottom: Tensor) -> Tensor:
        return (u > left) & (u < right) & (v > top) & (v < bottom)

    def share(lo: float, hi: float) -> Tensor:
        return r.u(n, 1, 1, 1, lo=lo, hi=hi)

    def plain() -> Tensor:
        return _color(r, n).view(n, 3, 1, 1)

    count = r.i(4, 2, n, 1, 1, 1) + 2
    u, v = cells(count)
    left, top, right, bottom = share(0.15, 0.3), share(0.1, 0.3), share(0.7, 0.85), share(0.65, 0.9)
    rim = share(0.02, 0.08)
    wall = plain() + 0.25 * (_fbm(r, n, 3, 7) - 0.5)
    frame = inside(u, v, left - rim, top - rim, right + rim, bottom + rim)
    pane = inside(u, v, left, top, right, bottom) & ((u - 0.5).abs() > rim / 3)
    lit = _noise(r, n, 8).round()  # some panes are bright
    facade = torch.where(frame, plain(), wall)
    facade = torch.where(pane, 0.3 * plain() + 0.4 * lit * share(0, 1), facade)

    near, second, cell = _voronoi(r, n, 40)
    stone = torch.gather(_color(r, n, 40).permute(0, 2, 1), 2, cell.long().flatten(2).expand(-1, 3, -1))
    cobbles = 0.6 * plain() + 0.4 * stone.view(n, 3, TEX, TEX)
    cobbles = cobbles * (0.4 + 0.6 * ((second - near) * 60).clamp(0, 1))
    u, v = cells(r.i(6, 2, n, 1, 1, 1) + 2)
    gap = share(0.01, 0.04)
    slabs = (plain() + 0.3 * (_fbm(r, n, 4, 7) - 0.5)) * (
        1 - 0.6 * (1 - inside(u, v, gap, gap, 1 - gap, 1 - gap).float())
    )
    paving = torch.where(r.b(0.5, n, 1, 1, 1), cobbles, slabs)

    leaves, _, _ = _voronoi(r, n, 64)
    green = torch.tensor([0.35, 0.6, 0.2], device=r.d).view(1, 3, 1, 1) * r.u(n, 3, 1, 1, lo=0.6, hi=1.3)
    foliage = green * (0.25 + 4 * leaves) * (0.5 + _fbm(r, n, 3, 7))
    return torch.cat([facade, paving, foliage]).clamp(0, 1)


FAMILIES = 16  # of `make_textures`
TILES, SMOOTH, FACADE, PAVING, FOLIAGE = (5, 7, 16), (0, 2, 11), (16,), (17, 10), (18,)


def pack_mips(t: Tensor) -> Tensor:
    """Textures (M, 3, 256, 256) in [0, 1] -> packed mip chains (M, texels) int32, 0xBBGGRR."""
    lv = []
    while True:
        v = (t * 255 + 0.5).clamp(0, 255).to(torch.int32)
        lv.append((v[:, 0] | (v[:, 1] << 8) | (v[:, 2] << 16)).flatten(1))
        if t.shape[-1] == 1:
            break
        t = F.avg_pool2d(t, 2)
    return torch.cat(lv, 1)


class TextureBank:
    """Packed textures (M, texels) and the family (M,) of each, of which `refresh` replaces a few at a time.

    outdoor: with the families of `make_outdoor_textures`.
    """

    def __init__(
        self, device: torch.device | str, seed: int, n_per: int = 24, held_out: bool = False, outdoor: bool = False
    ) -> None:
        self.r = Rng(device, seed)
        self.photos = load_photos(device, held_out)
        self.outdoor = outdoor
        parts, left = [], n_per
        while left > 0:
            k = min(4, left)
            parts.append(self._make(k))
            left -= k
        self.data, self.families = (torch.cat(x) for x in zip(*parts))
        self.n = self.data.shape[0]
        self._of_family = self.families.argsort(stable=True).view(-1, n_per).to(device)  # places of each one's textures
        self._next = 0

    def _make(self, k: int) -> tuple[Tensor, Tensor]:
        """k new textures of each family."""
        made, families = make_textures(self.r, k, self.photos), FAMILIES
        if self.outdoor:
            new = make_outdoor_textures(self.r, k)
            made, families = torch.cat([made, new]), FAMILIES + len(new) // k
        return pack_mips(made), torch.arange(families).repeat_interleave(k)

    def refresh(self) -> None:
        """Replace the next one or two textures of every family by new ones."""
        places = self._of_family[:, self._next : self._next + 2]
        self.data[places.flatten()] = self._make(places.shape[1])[0]
        self._next = (self._next + 2) % self._of_family.shape[1]
