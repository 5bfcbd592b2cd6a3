"""Ray caster for procedural scenes of boxes, ellipsoids and cylinders: a Triton kernel and its plain-torch reference.

Conventions: camera x right, y down, z forward; world y down; poses camera-to-world; pixel centres at integers. The ray of
pixel (u, v) is R @ (s (u - cx) / fx, s (v - cy) / fy, 1) with s = 1 + k1 r^2, so that the ray parameter is the z-depth.

A scene holds flat float32 tables for B sequences of N cameras: `prim` (B, PRIMS, 16): 3 x 3 world-to-unit-shape matrix,
centre, half sizes; `mat` (B, PRIMS, 6, 16): texture, repeats per metre, offset, rotation, gain, bias, gloss per face;
`light` (B, 16): two point lights (the first casts shadows), ambient, fall-off; `cam` (B, N, 20): R, t, fx, fy, cx, cy, k1.
Primitive 0 is the room, seen from inside. Textures are mip chains packed as 0xBBGGRR int32. No CPU-GPU synchronisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # platforms without Triton use the reference
    triton = None

NB, NS, NC = 24, 6, 6  # boxes, ellipsoids, cylinders
P = PRIMS = 1 + NB + NS + NC
PS, MS, LS, CS = 16, 16, 16, 20  # row strides (floats) of the primitive, material, light and camera tables
TEX = TEXTURE_SIZE = 256
TEXN = (4**9 - 1) // 3  # texels of one mip chain (256^2 ... 1)


EPS = 1e-3


def _nz(d):
    return torch.where(d.abs() < 1e-8, torch.full_like(d, 1e-8), d)


def _slab(o, d):
    a = 1 / _nz(d)
    t1 = (-1 - o) * a
    t2 = (1 - o) * a
    return torch.minimum(t1, t2), torch.maximum(t1, t2)


def _local(pr, o, d):
    r0, r1, r2 = o[0] - pr[9], o[1] - pr[10], o[2] - pr[11]
    lo = [pr[3 * k] * r0 + pr[3 * k + 1] * r1 + pr[3 * k + 2] * r2 for k in range(3)]
    ld = [pr[3 * k] * d[0] + pr[3 * k + 1] * d[1] + pr[3 * k + 2] * d[2] for k in range(3)]
    return lo, ld


def _interval(pr, o, d, kind):
    lo, ld = _local(pr, o, d)
    if kind == 0:
        iv = [_slab(lo[k], ld[k]) for k in range(3)]
        return torch.maximum(torch.maximum(iv[0][0], iv[1][0]), iv[2][0]), torch.minimum(
            torch.minimum(iv[0][1], iv[1][1]), iv[2][1]
        )
    if kind == 1:
        a = ld[0] ** 2 + ld[1] ** 2 + ld[2] ** 2
        b = lo[0] * ld[0] + lo[1] * ld[1] + lo[2] * ld[2]
        c = lo[0] ** 2 + lo[1] ** 2 + lo[2] ** 2 - 1
    else:
        a = ld[0] ** 2 + ld[2] ** 2 + 1e-12
        b = lo[0] * ld[0] + lo[2] * ld[2]
        c = lo[0] ** 2 + lo[2] ** 2 - 1
    disc = b * b - a * c
    sq = disc.clamp_min(0).sqrt()
    tn = (-b - sq) / a
    tf = (-b + sq) / a
    if kind == 2:
        y1, y2 = _slab(lo[1], ld[1])
        tn = torch.maximum(tn, y1)
        tf = torch.minimum(tf, y2)
    return torch.where(disc > 0, tn, torch.full_like(tn, 1e9)), tf


def _kind(i):
    return 0 if i <= NB else (1 if i <= NB + NS else 2)


def _fetch(texd, tid, u, v, l):
    sz = torch.bitwise_right_shift(torch.full_like(l, TEX), l)
    szf = sz.float()
    x = u * szf - 0.5
    y = v * szf - 0.5
    x0 = x.floor()
    y0 = y.floor()
    fx, fy = x - x0, y - y0
    xi, yi = x0.to(torch.int64), y0.to(torch.int64)
    m = sz - 1
    off = tid * TEXN + (4**9 - torch.bitwise_left_shift(torch.ones_like(l), 18 - 2 * l)) // 3

    def g(a, b):
        q = texd.view(-1)[off + ((yi + b) & m) * sz + ((xi + a) & m)]
        return torch.stack([(q & 255).float(), ((q >> 8) & 255).float(), ((q >> 16) & 255).float()]) / 255

    return (g(0, 0) * (1 - fx) + g(1, 0) * fx) * (1 - fy) + (g(0, 1) * (1 - fx) + g(1, 1) * fx) * fy


def raycast_reference(
    sc: dict[str, Tensor], texd: Tensor, H: int, W: int, spp: int = 1, shadows: bool = True
) -> tuple[Tensor, Tensor]:
    """Plain torch; arguments and results of `raycast`."""
    cam = sc["cam"]
    B, N = cam.shape[:2]
    dev = cam.device
    outs = [
        _render_torch_frames(
            {k: sc[k] for k in ("prim", "mat", "light")},
            cam.view(B * N, CS)[i : i + 64],
            torch.arange(B, device=dev).repeat_interleave(N)[i : i + 64],
            texd,
            H,
            W,
            spp,
            shadows,
        )
        for i in range(0, B * N, 64)
    ]
    return torch.cat([o[0] for o in outs]), torch.cat([o[1] for o in outs])


def _render_torch_frames(sc, c, fb, texd, H, W, spp, shadows):
    dev = c.device
    Fn = c.shape[0]
    v, u = torch.meshgrid(
        torch.arange(H, device=dev, dtype=torch.float32),
        torch.arange(W, device=dev, dtype=torch.float32),
        indexing="ij",
    )
    u, v = u.reshape(1, -1), v.reshape(1, -1)
    q = [c[:, i : i + 1] for i in range(CS)]
    prim = sc["prim"][fb]
    L = [sc["light"][fb][:, i : i + 1] for i in range(LS)]
    o = [q[9], q[10], q[11]]

    def primary(du, dv):
        x = (u + du - q[14]) / q[12]
        y = (v + dv - q[15]) / q[13]
        s = 1 + q[16] * (x * x + y * y)
        x, y = x * s, y * s
        d = [q[3 * k] * x + q[3 * k + 1] * y + q[3 * k + 2] for k in range(3)]
        best = _interval([prim[:, 0, j : j + 1] for j in range(12)], o, d, 0)[1]
        idx = torch.zeros_like(best, dtype=torch.int64)
        for i in range(1, P):
            tn, tf = _interval([prim[:, i, j : j + 1] for j in range(12)], o, d, _kind(i))
            h = (tn < tf) & (tn > EPS) & (tn < best)
            best = torch.where(h, tn, best)
            idx = torch.where(h, torch.full_like(idx, i), idx)
        return d, best, idx

    def shade(d, t, idx):
        hp = [o[k] + t * d[k] for k in range(3)]
        g = torch.gather(prim, 1, idx.unsqueeze(-1).expand(-1, -1, PS)).unbind(-1)
        r_ = [hp[k] - g[9 + k] for k in range(3)]
        p = [g[3 * k] * r_[0] + g[3 * k + 1] * r_[1] + g[3 * k + 2] * r_[2] for k in range(3)]
        ax = [a.abs() for a in p]
        box = idx <= NB
        cyl = idx > NB + NS
        rad = (p[0] ** 2 + p[2] ** 2).sqrt()
        cap = cyl & (ax[1] >= rad)
        bx = (ax[0] >= ax[1]) & (ax[0] >= ax[2])
        by = ~bx & (ax[1] >= ax[2])
        bz = ~bx & ~by
        z = torch.zeros_like(t)
        n = [
            torch.where(box, torch.where(bx, p[0], z), torch.where(cap, z, p[0])),
            torch.where(box, torch.where(by, p[1], z), torch.where(cyl & ~cap, z, p[1])),
            torch.where(box, torch.where(bz, p[2], z), torch.where(cap, z, p[2])),
        ]
        an = [a.abs() for a in n]
        fx_ = (an[0] >= an[1]) & (an[0] >= an[2])
        fy_ = ~fx_ & (an[1] >= an[2])
        m = [p[k] * g[12 + k] for k in range(3)]
        uu = torch.where(fx_, m[2], m[0])
        vv = torch.where(fy_, m[2], m[1])
        sg = torch.where(fx_, n[0], torch.where(fy_, n[1], n[2])) > 0
        face = torch.where(fx_, 0, torch.where(fy_, 2, 4)) + sg.long()
        nw = [g[k] * n[0] + g[3 + k] * n[1] + g[6 + k] * n[2] for k in range(3)]
        il = torch.rsqrt(nw[0] ** 2 + nw[1] ** 2 + nw[2] ** 2 + 1e-20)
        nw = [a * il for a in nw]
        dl = torch.rsqrt(d[0] ** 2 + d[1] ** 2 + d[2] ** 2)
        vd = [a * dl for a in d]
        nd = nw[0] * vd[0] + nw[1] * vd[1] + nw[2] * vd[2]
        fl = torch.where(nd > 0, -1.0, 1.0)
        nw = [a * fl for a in nw]
        cosv = nd.abs()
        mt = sc["mat"].view(-1, P * 6, MS)[fb]
        mt = torch.gather(mt, 1, (idx * 6 + face).unsqueeze(-1).expand(-1, -1, MS)).unbind(-1)
        tu = (mt[4] * uu - mt[5] * vv) * mt[1] + mt[2]
        tv = (mt[5] * uu + mt[4] * vv) * mt[1] + mt[3]
        foot = t / q[12] * TEX * mt[1] * torch.rsqrt(cosv.clamp_min(0.02)) * (1.0 if spp == 1 else 0.6)
        lod = torch.log2(foot.clamp_min(1e-6)).clamp(0, 7.99)
        l0 = lod.floor()
        fl_ = lod - l0
        l0 = l0.long()
        tid = mt[0].long()
        tc = _fetch(texd, tid, tu, tv, l0)
        tc = tc + (_fetch(texd, tid, tu, tv, l0 + 1) - tc) * fl_
        alb = [(mt[9 + k] + mt[6 + k] * tc[k]).clamp(0.01, 1.0) for k in range(3)]
        col = [L[12 + k] * (0.8 - 0.2 * nw[1]) for k in range(3)]
        sp = [z, z, z]
        for li in range(2):
            tl_ = [L[6 * li + k] - hp[k] for k in range(3)]
            d2 = tl_[0] ** 2 + tl_[1] ** 2 + tl_[2] ** 2
            ir = torch.rsqrt(d2 + 1e-9)
            ndl = ((nw[0] * tl_[0] + nw[1] * tl_[1] + nw[2] * tl_[2]) * ir).clamp_min(0)
            at = 1 / (0.25 + d2 * L[15])
            if li == 0 and shadows:
                so = [hp[k] + nw[k] * EPS * 3 for k in range(3)]
                sh = torch.zeros_like(t, dtype=torch.bool)
                for i in range(1, P):
                    tn, tf = _interval([prim[:, i, j : j + 1] for j in range(12)], so, tl_, _kind(i))
                    sh = sh | ((tn < tf) & (tf > 0) & (tn < 1) & (tn > 0))
                at = torch.where(sh, z, at)
            hv = [tl_[k] * ir - vd[k] for k in range(3)]
            ih = torch.rsqrt(hv[0] ** 2 + hv[1] ** 2 + hv[2] ** 2 + 1e-9)
            ns = ((nw[0] * hv[0] + nw[1] * hv[1] + nw[2] * hv[2]) * ih).clamp(0, 1)
            ns = ns * ns
            ns = ns * ns
            ns = ns * ns
            ns = ns * ns
            ns = ns * ns
            for k in range(3):
                col[k] = col[k] + L[6 * li + 3 + k] * ndl * at
                sp[k] = sp[k] + L[6 * li + 3 + k] * ns * at * mt[12]
        return torch.stack([alb[k] * col[k] + sp[k] for k in range(3)], 1)

    d, depth, idx = primary(0.0, 0.0)
    if spp == 1:
        rgb = shade(d, depth, idx)
    else:
        rgb = 0
        for j in range(spp):
            du, dv = SUB[j]
            d, t_, i_ = primary(du, dv)
            rgb = rgb + shade(d, t_, i_) / spp
    return rgb.view(Fn, 3, H, W), depth.view(Fn, H, W)


SUB = [(-0.25, -0.25), (0.25, 0.25), (-0.25, 0.25), (0.25, -0.25)]


if triton is not None:

    @triton.jit
    def _k_slab(o, d):
        d = tl.where(tl.abs(d) < 1e-8, 1e-8, d)
        a = 1.0 / d
        t1 = (-1.0 - o) * a
        t2 = (1.0 - o) * a
        return tl.minimum(t1, t2), tl.maximum(t1, t2)

    @triton.jit
    def _k_local(q, ox, oy, oz, dx, dy, dz):
        a0 = tl.load(q)
        a1 = tl.load(q + 1)
        a2 = tl.load(q + 2)
        b0 = tl.load(q + 3)
        b1 = tl.load(q + 4)
        b2 = tl.load(q + 5)
        c0 = tl.load(q + 6)
        c1 = tl.load(q + 7)
        c2 = tl.load(q + 8)
        rx = ox - tl.load(q + 9)
        ry = oy - tl.load(q + 10)
        rz = oz - tl.load(q + 11)
        return (
            a0 * rx + a1 * ry + a2 * rz,
            b0 * rx + b1 * ry + b2 * rz,
            c0 * rx + c1 * ry + c2 * rz,
            a0 * dx + a1 * dy + a2 * dz,
            b0 * dx + b1 * dy + b2 * dz,
            c0 * dx + c1 * dy + c2 * dz,
        )

    @triton.jit
    def _k_box(q, ox, oy, oz, dx, dy, dz):
        lx, ly, lz, ex, ey, ez = _k_local(q, ox, oy, oz, dx, dy, dz)
        x1, x2 = _k_slab(lx, ex)
        y1, y2 = _k_slab(ly, ey)
        z1, z2 = _k_slab(lz, ez)
        return tl.maximum(tl.maximum(x1, y1), z1), tl.minimum(tl.minimum(x2, y2), z2)

    @triton.jit
    def _k_sph(q, ox, oy, oz, dx, dy, dz):
        lx, ly, lz, ex, ey, ez = _k_local(q, ox, oy, oz, dx, dy, dz)
        a = ex * ex + ey * ey + ez * ez
        b = lx * ex + ly * ey + lz * ez
        c = lx * lx + ly * ly + lz * lz - 1.0
        disc = b * b - a * c
        sq = tl.sqrt(tl.maximum(disc, 0.0))
        ia = 1.0 / a
        return tl.where(disc > 0, (-b - sq) * ia, 1e9), (-b + sq) * ia

    @triton.jit
    def _k_cyl(q, ox, oy, oz, dx, dy, dz):
        lx, ly, lz, ex, ey, ez = _k_local(q, ox, oy, oz, dx, dy, dz)
        a = ex * ex + ez * ez + 1e-12
        b = lx * ex + lz * ez
        c = lx * lx + lz * lz - 1.0
        disc = b * b - a * c
        sq = tl.sqrt(tl.maximum(disc, 0.0))
        ia = 1.0 / a
        y1, y2 = _k_slab(ly, ey)
        tn = tl.maximum((-b - sq) * ia, y1)
        tf = tl.minimum((-b + sq) * ia, y2)
        return tl.where(disc > 0, tn, 1e9), tf

    @triton.jit
    def _k_primary(
        pp,
        ox,
        oy,
        oz,
        dx,
        dy,
        dz,
        EPS_: tl.constexpr,
        PS_: tl.constexpr,
        NB_: tl.constexpr,
        NS_: tl.constexpr,
        NC_: tl.constexpr,
    ):
        tn, best = _k_box(pp, ox, oy, oz, dx, dy, dz)
        idx = tl.zeros_like(best).to(tl.int32)
        for i in range(1, 1 + NB_):
            tn, tf = _k_box(pp + i * PS_, ox, oy, oz, dx, dy, dz)
            h = (tn < tf) & (tn > EPS_) & (tn < best)
            best = tl.where(h, tn, best)
            idx = tl.where(h, i, idx)
        for i in range(1 + NB_, 1 + NB_ + NS_):
            tn, tf = _k_sph(pp + i * PS_, ox, oy, oz, dx, dy, dz)
            h = (tn < tf) & (tn > EPS_) & (tn < best)
            best = tl.where(h, tn, best)
            idx = tl.where(h, i, idx)
        for i in range(1 + NB_ + NS_, 1 + NB_ + NS_ + NC_):
            tn, tf = _k_cyl(pp + i * PS_, ox, oy, oz, dx, dy, dz)
            h = (tn < tf) & (tn > EPS_) & (tn < best)
            best = tl.where(h, tn, best)
            idx = tl.where(h, i, idx)
        return best, idx

    @triton.jit
    def _k_shadow(
        pp, ox, oy, oz, dx, dy, dz, PS_: tl.constexpr, NB_: tl.constexpr, NS_: tl.constexpr, NC_: tl.constexpr
    ):
        sh = tl.zeros_like(dx)
        for i in range(1, 1 + NB_):
            tn, tf = _k_box(pp + i * PS_, ox, oy, oz, dx, dy, dz)
            sh = tl.where((tn < tf) & (tf > 0) & (tn < 1) & (tn > 0), 1.0, sh)
        for i in range(1 + NB_, 1 + NB_ + NS_):
            tn, tf = _k_sph(pp + i * PS_, ox, oy, oz, dx, dy, dz)
            sh = tl.where((tn < tf) & (tf > 0) & (tn < 1) & (tn > 0), 1.0, sh)
        for i in range(1 + NB_ + NS_, 1 + NB_ + NS_ + NC_):
            tn, tf = _k_cyl(pp + i * PS_, ox, oy, oz, dx, dy, dz)
            sh = tl.where((tn < tf) & (tf > 0) & (tn < 1) & (tn > 0), 1.0, sh)
        return sh

    @triton.jit
    def _k_bil(tp, tid, u, v, l, TEXN_: tl.constexpr):
        sz = 256 >> l
        szf = sz.to(tl.float32)
        x = u * szf - 0.5
        y = v * szf - 0.5
        x0 = tl.floor(x)
        y0 = tl.floor(y)
        fx = x - x0
        fy = y - y0
        m = sz - 1
        xi = x0.to(tl.int32)
        yi = y0.to(tl.int32)
        base = tp + tid * TEXN_ + (262144 - (262144 >> (2 * l))) // 3
        xa = xi & m
        xb = (xi + 1) & m
        ya = (yi & m) * sz
        yb = ((yi + 1) & m) * sz
        q00 = tl.load(base + ya + xa)
        q10 = tl.load(base + ya + xb)
        q01 = tl.load(base + yb + xa)
        q11 = tl.load(base + yb + xb)
        w00 = (1 - fx) * (1 - fy) * 0.00392156862
        w10 = fx * (1 - fy) * 0.00392156862
        w01 = (1 - fx) * fy * 0.00392156862
        w11 = fx * fy * 0.00392156862
        r = (
            (q00 & 255).to(tl.float32) * w00
            + (q10 & 255).to(tl.float32) * w10
            + (q01 & 255).to(tl.float32) * w01
            + (q11 & 255).to(tl.float32) * w11
        )
        g = (
            ((q00 >> 8) & 255).to(tl.float32) * w00
            + ((q10 >> 8) & 255).to(tl.float32) * w10
            + ((q01 >> 8) & 255).to(tl.float32) * w01
            + ((q11 >> 8) & 255).to(tl.float32) * w11
        )
        b = (
            ((q00 >> 16) & 255).to(tl.float32) * w00
            + ((q10 >> 16) & 255).to(tl.float32) * w10
            + ((q01 >> 16) & 255).to(tl.float32) * w01
            + ((q11 >> 16) & 255).to(tl.float32) * w11
        )
        return r, g, b

    @triton.jit
    def _k_light(
        lp,
        off,
        pp,
        hx,
        hy,
        hz,
        nx,
        ny,
        nz,
        vx,
        vy,
        vz,
        fall,
        SHADOW: tl.constexpr,
        EPS_: tl.constexpr,
        PS_: tl.constexpr,
        NB_: tl.constexpr,
        NS_: tl.constexpr,
        NC_: tl.constexpr,
    ):
        tx = tl.load(lp + off) - hx
        ty = tl.load(lp + off + 1) - hy
        tz = tl.load(lp + off + 2) - hz
        d2 = tx * tx + ty * ty + tz * tz
        ir = 1.0 / tl.sqrt(d2 + 1e-9)
        ndl = tl.maximum((nx * tx + ny * ty + nz * tz) * ir, 0.0)
        at = 1.0 / (0.25 + d2 * fall)
        if SHADOW:
            e3 = EPS_ * 3
            sh = _k_shadow(pp, hx + nx * e3, hy + ny * e3, hz + nz * e3, tx, ty, tz, PS_, NB_, NS_, NC_)
            at = tl.where(sh > 0.5, 0.0, at)
        ax = tx * ir - vx
        ay = ty * ir - vy
        az = tz * ir - vz
        ih = 1.0 / tl.sqrt(ax * ax + ay * ay + az * az + 1e-9)
        ns = tl.minimum(tl.maximum((nx * ax + ny * ay + nz * az) * ih, 0.0), 1.0)
        ns = ns * ns
        ns = ns * ns
        ns = ns * ns
        ns = ns * ns
        ns = ns * ns
        return ndl * at, ns * at

    @triton.jit
    def _k_shade(
        pp,
        mp,
        lp,
        tp,
        ox,
        oy,
        oz,
        dx,
        dy,
        dz,
        t,
        idx,
        ifx,
        lodmul,
        SHADOWS: tl.constexpr,
        EPS_: tl.constexpr,
        PS_: tl.constexpr,
        MS_: tl.constexpr,
        NB_: tl.constexpr,
        NS_: tl.constexpr,
        NC_: tl.constexpr,
        TEXN_: tl.constexpr,
    ):
        hx = ox + t * dx
        hy = oy + t * dy
        hz = oz + t * dz
        q = pp + idx * PS_
        a0 = tl.load(q)
        a1 = tl.load(q + 1)
        a2 = tl.load(q + 2)
        b0 = tl.load(q + 3)
        b1 = tl.load(q + 4)
        b2 = tl.load(q + 5)
        c0 = tl.load(q + 6)
        c1 = tl.load(q + 7)
        c2 = tl.load(q + 8)
        rx = hx - tl.load(q + 9)
        ry = hy - tl.load(q + 10)
        rz = hz - tl.load(q + 11)
        px = a0 * rx + a1 * ry + a2 * rz
        py = b0 * rx + b1 * ry + b2 * rz
        pz = c0 * rx + c1 * ry + c2 * rz
        axx = tl.abs(px)
        ayy = tl.abs(py)
        azz = tl.abs(pz)
        box = idx <= NB_
        cyl = idx > NB_ + NS_
        rad = tl.sqrt(px * px + pz * pz)
        side = cyl & (ayy < rad)
        cap = cyl & (ayy >= rad)
        bx = (axx >= ayy) & (axx >= azz)
        by = (bx == 0) & (ayy >= azz)
        bz = (bx == 0) & (by == 0)
        nx = tl.where((box & (bx == 0)) | cap, 0.0, px)
        ny = tl.where((box & (by == 0)) | side, 0.0, py)
        nz = tl.where((box & (bz == 0)) | cap, 0.0, pz)
        anx = tl.abs(nx)
        any_ = tl.abs(ny)
        anz = tl.abs(nz)
        isx = (anx >= any_) & (anx >= anz)
        isy = (isx == 0) & (any_ >= anz)
        m0 = px * tl.load(q + 12)
        m1 = py * tl.load(q + 13)
        m2 = pz * tl.load(q + 14)
        uu = tl.where(isx, m2, m0)
        vv = tl.where(isy, m2, m1)
        sg = tl.where(isx, nx, tl.where(isy, ny, nz))
        face = tl.where(isx, 0, tl.where(isy, 2, 4)) + tl.where(sg > 0, 1, 0)
        wx = a0 * nx + b0 * ny + c0 * nz
        wy = a1 * nx + b1 * ny + c1 * nz
        wz = a2 * nx + b2 * ny + c2 * nz
        il = 1.0 / tl.sqrt(wx * wx + wy * wy + wz * wz + 1e-20)
        dl = 1.0 / tl.sqrt(dx * dx + dy * dy + dz * dz)
        vx = dx * dl
        vy = dy * dl
        vz = dz * dl
        nd = (wx * vx + wy * vy + wz * vz) * il
        il = tl.where(nd > 0, -il, il)
        wx = wx * il
        wy = wy * il
        wz = wz * il
        cosv = tl.maximum(tl.abs(nd), 0.02)
        mq = mp + (idx * 6 + face) * MS_
        rep = tl.load(mq + 1)
        cs = tl.load(mq + 4)
        sn = tl.load(mq + 5)
        tu = (cs * uu - sn * vv) * rep + tl.load(mq + 2)
        tv = (sn * uu + cs * vv) * rep + tl.load(mq + 3)
        foot = t * ifx * 256.0 * rep / tl.sqrt(cosv) * lodmul
        lod = tl.minimum(tl.maximum(tl.log2(tl.maximum(foot, 1e-6)), 0.0), 7.99)
        l0f = tl.floor(lod)
        fl = lod - l0f
        l0 = l0f.to(tl.int32)
        tid = tl.load(mq).to(tl.int32)
        r0, g0, e0 = _k_bil(tp, tid, tu, tv, l0, TEXN_)
        r1, g1, e1 = _k_bil(tp, tid, tu, tv, l0 + 1, TEXN_)
        r0 = r0 + (r1 - r0) * fl
        g0 = g0 + (g1 - g0) * fl
        e0 = e0 + (e1 - e0) * fl
        ar = tl.minimum(tl.maximum(tl.load(mq + 9) + tl.load(mq + 6) * r0, 0.01), 1.0)
        ag = tl.minimum(tl.maximum(tl.load(mq + 10) + tl.load(mq + 7) * g0, 0.01), 1.0)
        ab = tl.minimum(tl.maximum(tl.load(mq + 11) + tl.load(mq + 8) * e0, 0.01), 1.0)
        spec = tl.load(mq + 12)
        amb = 0.8 - 0.2 * wy
        fall = tl.load(lp + 15)
        d0, s0 = _k_light(lp, 0, pp, hx, hy, hz, wx, wy, wz, vx, vy, vz, fall, SHADOWS, EPS_, PS_, NB_, NS_, NC_)
        d1, s1 = _k_light(lp, 6, pp, hx, hy, hz, wx, wy, wz, vx, vy, vz, fall, False, EPS_, PS_, NB_, NS_, NC_)
        s0 = s0 * spec
        s1 = s1 * spec
        cr = (
            ar * (tl.load(lp + 12) * amb + tl.load(lp + 3) * d0 + tl.load(lp + 9) * d1)
            + tl.load(lp + 3) * s0
            + tl.load(lp + 9) * s1
        )
        cg = (
            ag * (tl.load(lp + 13) * amb + tl.load(lp + 4) * d0 + tl.load(lp + 10) * d1)
            + tl.load(lp + 4) * s0
            + tl.load(lp + 10) * s1
        )
        cb = (
            ab * (tl.load(lp + 14) * amb + tl.load(lp + 5) * d0 + tl.load(lp + 11) * d1)
            + tl.load(lp + 5) * s0
            + tl.load(lp + 11) * s1
        )
        return cr, cg, cb

    @triton.jit
    def _k_ray(cp, u, v):
        x = (u - tl.load(cp + 14)) / tl.load(cp + 12)
        y = (v - tl.load(cp + 15)) / tl.load(cp + 13)
        s = 1.0 + tl.load(cp + 16) * (x * x + y * y)
        x = x * s
        y = y * s
        return (
            tl.load(cp) * x + tl.load(cp + 1) * y + tl.load(cp + 2),
            tl.load(cp + 3) * x + tl.load(cp + 4) * y + tl.load(cp + 5),
            tl.load(cp + 6) * x + tl.load(cp + 7) * y + tl.load(cp + 8),
        )

    @triton.jit
    def _k_render(
        prim,
        mat,
        light,
        cam,
        tex,
        rgb,
        depth,
        N,
        H,
        W,
        SPP: tl.constexpr,
        SHADOWS: tl.constexpr,
        BLOCK: tl.constexpr,
        EPS_: tl.constexpr,
        P_: tl.constexpr,
        PS_: tl.constexpr,
        MS_: tl.constexpr,
        LS_: tl.constexpr,
        CS_: tl.constexpr,
        NB_: tl.constexpr,
        NS_: tl.constexpr,
        NC_: tl.constexpr,
        TEXN_: tl.constexpr,
    ):
        f = tl.program_id(0)
        b = f // N
        pix = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        HW = H * W
        ok = pix < HW
        pc = tl.minimum(pix, HW - 1)
        v = (pc // W).to(tl.float32)
        u = (pc % W).to(tl.float32)
        pp = prim + b * (P_ * PS_)
        mp = mat + b * (P_ * 6 * MS_)
        lp = light + b * LS_
        cp = cam + f * CS_
        ox = tl.load(cp + 9)
        oy = tl.load(cp + 10)
        oz = tl.load(cp + 11)
        ifx = 1.0 / tl.load(cp + 12)
        dx, dy, dz = _k_ray(cp, u, v)
        t, idx = _k_primary(pp, ox, oy, oz, dx, dy, dz, EPS_, PS_, NB_, NS_, NC_)
        tl.store(depth + f * HW + pix, t, mask=ok)
        if SPP == 1:
            cr, cg, cb = _k_shade(
                pp, mp, lp, tex, ox, oy, oz, dx, dy, dz, t, idx, ifx, 1.0, SHADOWS, EPS_, PS_, MS_, NB_, NS_, NC_, TEXN_
            )
        else:
            cr = tl.zeros([BLOCK], tl.float32)
            cg = tl.zeros([BLOCK], tl.float32)
            cb = tl.zeros([BLOCK], tl.float32)
            for j in range(0, SPP):
                du = tl.where((j == 0) | (j == 2), -0.25, 0.25)
                dv = tl.where((j == 0) | (j == 3), -0.25, 0.25)
                dx, dy, dz = _k_ray(cp, u + du, v + dv)
                t, idx = _k_primary(pp, ox, oy, oz, dx, dy, dz, EPS_, PS_, NB_, NS_, NC_)
                r1, g1, b1 = _k_shade(
                    pp,
                    mp,
                    lp,
                    tex,
                    ox,
                    oy,
                    oz,
                    dx,
                    dy,
                    dz,
                    t,
                    idx,
                    ifx,
                    0.6,
                    SHADOWS,
                    EPS_,
                    PS_,
                    MS_,
                    NB_,
                    NS_,
                    NC_,
                    TEXN_,
                )
                cr += r1
                cg += g1
                cb += b1
            cr = cr * (1.0 / SPP)
            cg = cg * (1.0 / SPP)
            cb = cb * (1.0 / SPP)
        o = rgb + f * HW * 3 + pix
        tl.store(o, cr, mask=ok)
        tl.store(o + HW, cg, mask=ok)
        tl.store(o + 2 * HW, cb, mask=ok)

    KCONST = dict(EPS_=EPS, P_=P, PS_=PS, MS_=MS, LS_=LS, CS_=CS, NB_=NB, NS_=NS, NC_=NC, TEXN_=TEXN)

    def raycast_triton(
        sc: dict[str, Tensor],
        texd: Tensor,
        H: int,
        W: int,
        spp: int = 4,
        shadows: bool = True,
        block: int = 256,
        warps: int = 4,
    ) -> tuple[Tensor, Tensor]:
        """The kernel; arguments and results of `raycast`."""
        cam = sc["cam"]
        B, N = cam.shape[:2]
        Fn = B * N
        rgb = torch.empty(Fn, 3, H, W, device=cam.device)
        depth = torch.empty(Fn, H, W, device=cam.device)
        grid = (Fn, triton.cdiv(H * W, block))
        _k_render[grid](
            sc["prim"],
            sc["mat"],
            sc["light"],
            cam,
            texd,
            rgb,
            depth,
            N,
            H,
            W,
            SPP=spp,
            SHADOWS=shadows,
            BLOCK=block,
            num_warps=warps,
            **KCONST,
        )
        return rgb, depth


def raycast(
    scene: dict[str, Tensor], textures: Tensor, height: int, width: int, samples: int = 1
) -> tuple[Tensor, Tensor]:
    """Linear radiance (B * N, 3, H, W) and z-depth (B * N, H, W) of every camera of the scene.

    samples: 1, 2 or 4 shading samples per pixel; depth is that of the pixel's centre.
    """
    run = raycast_triton if scene["cam"].is_cuda and triton is not None else raycast_reference
    return run(scene, textures, height, width, samples)
