"""From linear radiance to what a camera delivers: exposure, colour, blur, noise and compression."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.training.textures import Rng

_DCT = {}


def _dct(dev):
    if dev not in _DCT:
        k = np.arange(8)[:, None]
        n = np.arange(8)[None]
        D = np.cos((2 * n + 1) * k * np.pi / 16) * np.where(k == 0, math.sqrt(1 / 8), math.sqrt(2 / 8))
        q = (8 + 9 * (np.arange(8)[:, None] + np.arange(8)[None])) / 255.0
        _DCT[dev] = (
            torch.tensor(np.kron(D, D), dtype=torch.float32, device=dev),
            torch.tensor(q.reshape(64), dtype=torch.float32, device=dev),
        )
    return _DCT[dev]


def _blur(x, s):
    """separable 5-tap Gaussian, per-sample sigmas (F,1,1,1) along x and y"""
    for dim, pad, sigma in ((3, (2, 2, 0, 0), s[0]), (2, (0, 0, 2, 2), s[1])):
        w = [torch.exp(-0.5 * (k / sigma) ** 2) for k in range(3)]
        z = w[0] + 2 * w[1] + 2 * w[2]
        w = [a / z for a in w]
        p = F.pad(x, pad, mode="replicate")
        L = x.shape[dim]
        x = sum(w[abs(k)] * p.narrow(dim, 2 + k, L) for k in range(-2, 3))
    return x


def augment(
    rgb: Tensor,
    B: int,
    N: int,
    r: Rng,
    strength: float = 1.0,
    motion_blur: bool = True,
    gain: Tensor | None = None,
    grain: Tensor | None = None,
) -> Tensor:
    """Linear radiance (B*N, 3, H, W) -> display image in [0, 1].

    motion_blur: of single frames in a quarter of the sequences. gain: factor (B, N, 1, H, W) on the exposed radiance.
    grain: more noise, standard deviation (B,).
    """
    Fn, _, H, W = rgb.shape
    dev = rgb.device
    a = strength
    x = rgb.view(B, N, 3, H, W)
    ex = r.u(B, 1, 1, 1, 1, lo=0.16, hi=0.5) / x.mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-4)
    ex = ex * torch.exp(0.12 * a * r.n(B, N, 1, 1, 1) * r.b(0.5, B, 1, 1, 1, 1))  # per-frame exposure drift
    wb = torch.exp(0.08 * a * r.n(B, 1, 3, 1, 1) + 0.02 * a * r.n(B, N, 3, 1, 1))
    x = x * (ex * wb)
    x = x if gain is None else x * gain
    x = x / (1 + 0.35 * x * r.b(0.5, B, 1, 1, 1, 1))  # soft shoulder on half
    x = x.clamp(1e-4, 1.0).pow(r.lu(B, 1, 1, 1, 1, lo=0.42, hi=0.95))  # display gamma
    yy = torch.linspace(-1, 1, H, device=dev).view(1, 1, 1, H, 1)
    xx = torch.linspace(-1, 1, W, device=dev).view(1, 1, 1, 1, W)
    x = x * (1 - r.u(B, 1, 1, 1, 1, hi=0.25 * a) * r.b(0.4, B, 1, 1, 1, 1) * (xx * xx + yy * yy))
    x = (x - 0.5) * torch.exp(0.15 * a * r.n(B, 1, 1, 1, 1)) + 0.5 + 0.03 * a * r.n(B, 1, 1, 1, 1)
    g = x.mean(2, keepdim=True)
    x = g + (x - g) * torch.where(
        r.b(0.08, B, 1, 1, 1, 1), torch.zeros(B, 1, 1, 1, 1, device=dev), r.u(B, 1, 1, 1, 1, lo=0.5, hi=1.3)
    )
    x = x.reshape(Fn, 3, H, W)
    s = (
        r.u(B, 1, 1, 1, 1, lo=0.25, hi=0.25 + 0.9 * a) * r.b(0.7, B, 1, 1, 1, 1) + 0.2 + r.u(B, N, 1, 1, 1, hi=0.3 * a)
    ).reshape(Fn, 1, 1, 1)
    sigmas = [s, s]
    if motion_blur:
        smear = r.u(B, N, 1, 1, 1, hi=2.2 * a) * r.b(0.5, B, N, 1, 1, 1) * r.b(0.25, B, 1, 1, 1, 1)
        sideways = r.b(0.5, B, N, 1, 1, 1).float()
        sigmas = [(s**2 + (smear * k).reshape(Fn, 1, 1, 1) ** 2).sqrt() for k in (sideways, 1 - sideways)]
    x = _blur(x, sigmas)
    noise = r.lu(B, 1, 1, 1, 1, lo=0.002, hi=0.002 + 0.04 * a)
    noise = noise if grain is None else noise + grain.view(B, 1, 1, 1, 1)
    x = x + noise.expand(B, N, 1, 1, 1).reshape(Fn, 1, 1, 1) * r.n(Fn, 3, H, W)
    if H % 8 == 0 and W % 8 == 0:  # jpeg-like block DCT quantisation
        D, q = _dct(dev)
        bl = x.view(Fn, 3, H // 8, 8, W // 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(Fn, -1, 64)
        qs = (r.lu(B, 1, 1, lo=0.05, hi=1.2).expand(B, N, 1).reshape(Fn, 1, 1)) * q
        y = torch.round((bl @ D.t()) / qs) * qs @ D
        y = y.view(Fn, 3, H // 8, W // 8, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(Fn, 3, H, W)
        x = torch.where(r.b(0.35, B, 1).expand(B, N).reshape(Fn, 1, 1, 1), y, x)
    return x.clamp(0, 1)
