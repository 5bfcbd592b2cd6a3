"""Ray caster for procedural scenes of analytic solids: a Triton kernel and its plain-torch reference.

Conventions: camera x right, y down, z forward; world y down; poses camera-to-world; pixel centres at integers. The ray of
pixel (u, v) is R @ (s (u - cx) / fx, s (v - cy) / fy, 1) with s = 1 + k1 r^2, so that the ray parameter is the z-depth.

A scene holds flat tables for B sequences of N cameras, in metres:

- `prim` (B, 1 or N, PRIMS, 20): 3 x 3 world-to-unit-shape matrix, centre, half sizes (the scale of texture coordinates),
  taper, bounding radius (0: absent), padding. A second size of N lets solids move. Primitive 0 is the enclosure, seen from
  inside; then come NB boxes, NT prisms, NS ellipsoids and NC cones. Half widths of prisms (along x) and radii of cones are
  1 at the bottom (y = 1) and 1 - taper at the top; taper 0 is a box or a cylinder, 1 a gable or a cone. Shears in the
  matrix make ramps.
- `mat` (B, PRIMS, 6, 16) per face (-x +x -y +y -z +z): texture, repeats per metre, offset, rotation, gain, bias, gloss,
  mirror (share of the enclosure's reflection), padding.
- `light` (B, 32): two point lights (the first casts shadows), ambient, fall-off; then for outdoor scenes 1, colours of
  horizon and zenith, cloud texture, repeats and strength, haze per metre. Outdoors only the enclosure's floor is a
  surface; its other faces are sky, of infinite depth, lit by itself.
- `cam` (B, N, 32): R, t, fx, fy, cx, cy, k1; residual distortion that `K` does not tell (r^2, r^4, two tangential); angular
  (camera axes) and linear velocity (world) per frame interval; exposure and read-out time in frame intervals.

Row v of H is exposed around read-out (v / (H - 1) - 1/2): the pose is that of the middle row. Textures are mip chains packed
as 0xBBGGRR int32. No CPU-GPU synchronisation. Every block of the kernel is a tile of pixels, which first drops the solids
whose bounding spheres miss the tile's cone of rays, or the way from its surfaces to the light.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # platforms without Triton use the reference
    triton = None

NB, NT, NS, NC = 34, 8, 8, 10  # boxes, prisms, ellipsoids, cones; fewer than 63 in all
P = PRIMS = 1 + NB + NT + NS + NC
BOX, PRISM, ELLIPSOID, CONE = 1, 1 + NB, 1 + NB + NT, 1 + NB + NT + NS  # the first of each kind
PS, MS, LS, CS = 20, 16, 32, 32  # row strides (floats) of the primitive, material, light and camera tables
TEX = TEXTURE_SIZE = 256
TEXN = (4**9 - 1) // 3  # texels of one mip chain (256^2 ... 1)
EPS = 1e-3  # metres: nearest hit, and a third of the shadow rays' offset
FLOOR = 0.9999  # of the enclosure's half height: below is ground
FAR = 1e9
SUB = [(-0.25, -0.25), (0.25, 0.25), (-0.25, 0.25), (0.25, -0.25)]  # shading samples in the pixel
ENVIRONMENT_LEVEL = 3  # mip level of reflections


class Rendering(NamedTuple):
    """What every camera sees; F = B * N frames.

    rgb: (F, 3, H, W) linear radiance. depth: (F, H, W) along z at the pixel's centre, infinite for sky. index: (F, H, W)
    uint8, the primitive seen. normal (F, 3, H, W), unit, world, towards the camera, and texture (F, 2, H, W), texture
    coordinates in repeats: None unless asked for; meaningless for sky.
    """

    rgb: Tensor
    depth: Tensor
    index: Tensor
    normal: Tensor | None = None
    texture: Tensor | None = None


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


def _interval(pr, o, d, i):
    """Ray parameters at which the ray o + t d (lists of three) enters and leaves primitive i with the row pr."""
    lo, ld = _local(pr, o, d)
    slope = pr[15] / 2
    width, widen = 1 - slope + slope * lo[1], slope * ld[1]  # half width or radius along the ray
    if i < ELLIPSOID:
        y, z = _slab(lo[1], ld[1]), _slab(lo[2], ld[2])
        tn, tf = torch.maximum(y[0], z[0]), torch.minimum(y[1], z[1])
        if i < PRISM:
            x = _slab(lo[0], ld[0])
            return torch.maximum(x[0], tn), torch.minimum(x[1], tf)
        for sign in (-1, 1):  # two half spaces
            rate = _nz(sign * ld[0] - widen)
            t = (width - sign * lo[0]) / rate
            tn = torch.where(rate < 0, torch.maximum(tn, t), tn)
            tf = torch.where(rate > 0, torch.minimum(tf, t), tf)
        return tn, tf
    a = ld[0] ** 2 + ld[2] ** 2
    b = lo[0] * ld[0] + lo[2] * ld[2]
    c = lo[0] ** 2 + lo[2] ** 2
    if i < CONE:
        a, b, c = a + ld[1] ** 2, b + lo[1] * ld[1], c + lo[1] ** 2 - 1
    else:
        a, b, c = a - widen**2, b - width * widen, c - width**2
        a = torch.where(a.abs() < 1e-12, torch.full_like(a, 1e-12), a)
    disc = b * b - a * c
    sq = disc.clamp_min(0).sqrt()
    tn = (-b - sq) / a
    tf = (-b + sq) / a
    if i >= CONE:  # along a steep ray the roots are on both halves of the double cone, and one half is the solid's
        steep, opening = a < 0, widen > 0
        tn, tf = (
            torch.where(steep & ~opening, torch.full_like(tn, -FAR), tn),
            torch.where(steep & opening, torch.full_like(tf, FAR), tf),
        )
        y = _slab(lo[1], ld[1])
        tn, tf = torch.maximum(tn, y[0]), torch.minimum(tf, y[1])
    return torch.where(disc > 0, tn, torch.full_like(tn, FAR)), tf


def _fetch(texd, tid, u, v, l):
    sz = torch.bitwise_right_shift(torch.full_like(l, TEX), l)
    x = u * sz - 0.5
    y = v * sz - 0.5
    x0 = x.floor()
    y0 = y.floor()
    fx, fy = x - x0, y - y0
    xi, yi = x0.to(torch.int64), y0.to(torch.int64)
    m = sz - 1
    off = tid * TEXN + (4**9 - torch.bitwise_left_shift(torch.ones_like(l), 18 - 2 * l)) // 3

    def g(a, b):
        q = texd.view(-1)[off + ((yi + b) & m) * sz + ((xi + a) & m)]
        return torch.stack([q & 255, (q >> 8) & 255, (q >> 16) & 255]).to(u.dtype) / 255

    return (g(0, 0) * (1 - fx) + g(1, 0) * fx) * (1 - fy) + (g(0, 1) * (1 - fx) + g(1, 1) * fx) * fy


def raycast_reference(
    sc: dict[str, Tensor], texd: Tensor, H: int, W: int, spp: int = 1, shadows: bool = True, details: bool = False
) -> Rendering:
    """Plain torch, in the precision of `cam`; arguments and results of `raycast`. Dropping absent solids synchronises."""
    cam = sc["cam"]
    B, N = cam.shape[:2]
    present = (sc["prim"][..., 16] > 0).flatten(0, 1).any(0).tolist()
    solids = [i for i in range(1, P) if present[i]]
    prim = sc["prim"].expand(B, N, P, PS).flatten(0, 1)
    sequence = torch.arange(B, device=cam.device).repeat_interleave(N)
    outs = [
        _render_torch_frames(
            prim[i : i + 64],
            sc["mat"].flatten(1, 2),
            sc["light"],
            cam.flatten(0, 1)[i : i + 64],
            sequence[i : i + 64],
            solids,
            texd,
            (H, W),
            spp,
            shadows,
            details,
        )
        for i in range(0, B * N, 64)
    ]
    return Rendering(*(None if x[0] is None else torch.cat(x) for x in zip(*outs)))


def _unit(a):
    il = torch.rsqrt(a[0] ** 2 + a[1] ** 2 + a[2] ** 2 + 1e-20)
    return [x * il for x in a]


def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a, b):
    return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]


def _render_torch_frames(prim, mat, light, c, fb, solids, texd, size, spp, shadows, details):
    H, W = size
    v, u = torch.meshgrid(
        torch.arange(H, device=c.device), torch.arange(W, device=c.device), indexing="ij"
    )  # integers: they also order the exposure
    u, v = u.reshape(1, -1), v.reshape(1, -1)
    a = u ^ v
    dither = (((a & 1) << 3) | ((v & 1) << 2) | (a & 2) | ((v & 2) >> 1)).to(c.dtype) / 16  # Bayer matrix
    q = [c[:, i : i + 1] for i in range(CS)]
    L = [light[fb][:, i : i + 1] for i in range(LS)]
    mirrors = bool((mat[..., 13] > 0).any())
    rows = {i: [prim[:, i, j : j + 1] for j in range(PS)] for i in [0, *solids]}

    def primary(du, dv, phase):
        """Origin, direction, depth and primitive of the rays; phase: when in the exposure, -1/2 to 1/2."""
        x = (u + du - q[14]) / q[12]
        y = (v + dv - q[15]) / q[13]
        r2 = x * x + y * y
        s = 1 + q[16] * r2 + q[17] * r2 + q[18] * r2 * r2
        tx = 2 * q[19] * x * y + q[20] * (r2 + 2 * x * x)
        ty = q[19] * (r2 + 2 * y * y) + 2 * q[20] * x * y
        e = [x * s + tx, y * s + ty, torch.ones_like(x)]
        time = q[28] * (v / max(H - 1, 1) - 0.5) + q[27] * phase
        w = q[21:24]
        turn = _cross(w, e)
        twice = _cross(w, turn)
        e = [e[k] + time * (turn[k] + 0.5 * time * twice[k]) for k in range(3)]
        o = [q[9 + k] + time * q[24 + k] for k in range(3)]
        d = [q[3 * k] * e[0] + q[3 * k + 1] * e[1] + q[3 * k + 2] * e[2] for k in range(3)]
        best = _interval(rows[0], o, d, 0)[1]
        idx = torch.zeros_like(best, dtype=torch.int64)
        for i in solids:
            tn, tf = _interval(rows[i], o, d, i)
            h = (tn < tf) & (tn > EPS) & (tn < best)
            best = torch.where(h, tn, best)
            idx = torch.where(h, torch.full_like(idx, i), idx)
        return o, d, best, idx

    def surface(o, d, t, idx):
        """Hit point, whether it is sky, unit normal towards the viewer, cosine of the view, texture coordinates, material."""
        hp = [o[k] + t * d[k] for k in range(3)]
        g = torch.gather(prim, 1, idx.unsqueeze(-1).expand(-1, -1, PS)).unbind(-1)
        r_ = [hp[k] - g[9 + k] for k in range(3)]
        p = [g[3 * k] * r_[0] + g[3 * k + 1] * r_[1] + g[3 * k + 2] * r_[2] for k in range(3)]
        sky = (L[16] > 0) & (idx == 0) & (p[1] < FLOOR)
        slope = g[15] / 2
        narrow = slope * (1 - p[1])
        ax = [p[0].abs() + narrow, p[1].abs(), p[2].abs()]
        box = idx < ELLIPSOID
        cone = idx >= CONE
        rad = (p[0] ** 2 + p[2] ** 2).sqrt()
        cap = cone & (ax[1] >= rad + narrow)
        side = cone & ~cap
        bx = (ax[0] >= ax[1]) & (ax[0] >= ax[2])
        by = ~bx & (ax[1] >= ax[2])
        bz = ~bx & ~by
        z = torch.zeros_like(t)
        n = [
            torch.where(box, torch.where(bx, torch.where(p[0] < 0, -1.0, 1.0), z), torch.where(cap, z, p[0])),
            torch.where(box, torch.where(by, p[1], torch.where(bx, -slope, z)), torch.where(side, -slope * rad, p[1])),
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
        nw = _unit([g[k] * n[0] + g[3 + k] * n[1] + g[6 + k] * n[2] for k in range(3)])
        nd = _dot(nw, _unit(d))
        fl = torch.where(nd > 0, -1.0, 1.0)
        mt = torch.gather(mat[fb], 1, (idx * 6 + face).unsqueeze(-1).expand(-1, -1, MS)).unbind(-1)
        tu = (mt[4] * uu - mt[5] * vv) * mt[1] + mt[2]
        tv = (mt[5] * uu + mt[4] * vv) * mt[1] + mt[3]
        return hp, sky, [a * fl for a in nw], nd.abs(), tu, tv, mt

    def texel(tid, tu, tv, foot):
        lod = torch.log2(foot.clamp_min(1e-6)).clamp(0, 7.99)
        l0 = lod.floor()
        fl_ = lod - l0
        l0 = l0.long()
        tc = _fetch(texd, tid, tu, tv, l0)
        return tc + (_fetch(texd, tid, tu, tv, l0 + 1) - tc) * fl_

    def albedo(mt, tc):
        return [(mt[9 + k] + mt[6 + k] * tc[k]).clamp(0.01, 1.0) for k in range(3)]

    def sky_colour(w):
        rise = (-w[1]).clamp(0, 1).sqrt()
        return [L[17 + k] + (L[20 + k] - L[17 + k]) * rise for k in range(3)]

    def shade(o, d, t, idx):
        hp, sky, nw, cosv, tu, tv, mt = surface(o, d, t, idx)
        vd = _unit(d)
        grain = TEX * (1.0 if spp == 1 else 0.6) / q[12]
        overhead = 1 / ((-vd[1]).clamp_min(0) + 0.15)  # clouds lie on a plane
        tu = torch.where(sky, vd[0] * overhead * L[24], tu)
        tv = torch.where(sky, vd[2] * overhead * L[24], tv)
        tid = torch.where(sky, L[23], mt[0]).long()
        foot = torch.where(sky, overhead * overhead * L[24], t * mt[1] * torch.rsqrt(cosv.clamp_min(0.02))) * grain
        tc = texel(tid, tu, tv, foot)
        alb = albedo(mt, tc)
        col = [L[12 + k] * (0.8 - 0.2 * nw[1]) for k in range(3)]
        sp = [torch.zeros_like(t)] * 3
        for li in range(2):
            tl_ = [L[6 * li + k] - hp[k] for k in range(3)]
            d2 = _dot(tl_, tl_)
            ir = torch.rsqrt(d2 + 1e-9)
            ndl = (_dot(nw, tl_) * ir).clamp_min(0)
            at = 1 / (0.25 + d2 * L[15])
            if li == 0 and shadows:
                so = [hp[k] + nw[k] * EPS * 3 for k in range(3)]
                sh = torch.zeros_like(t, dtype=torch.bool)
                for i in solids:
                    tn, tf = _interval(rows[i], so, tl_, i)
                    sh = sh | ((tn < tf) & (tf > 0) & (tn < 1) & (tn > 0))
                at = torch.where(sh, torch.zeros_like(at), at)
            hv = _unit([tl_[k] * ir - vd[k] for k in range(3)])
            ns = _dot(nw, hv).clamp(0, 1) ** 32
            for k in range(3):
                col[k] = col[k] + L[6 * li + 3 + k] * ndl * at
                sp[k] = sp[k] + L[6 * li + 3 + k] * ns * at * mt[12]
        col = [alb[k] * col[k] + sp[k] for k in range(3)]
        # reflection of the enclosure: its albedo in ambient light, or the sky
        if mirrors:
            share = mt[13] * (0.4 + 0.6 * (1 - cosv) ** 2)
            back = 2 * _dot(vd, nw)
            rd = [vd[k] - back * nw[k] for k in range(3)]
            away = _interval(rows[0], hp, rd, 0)[1]
            _, sky_r, _, _, tu, tv, mr = surface(hp, rd, away, torch.zeros_like(idx))
            level = torch.full_like(idx, ENVIRONMENT_LEVEL)
            env = albedo(mr, _fetch(texd, mr[0].long(), tu, tv, level))
            sk = sky_colour(rd)
            env = [torch.where(sky_r, sk[k], env[k] * (L[12 + k] + 0.3 * L[3 + k])) for k in range(3)]
            col = [col[k] + share * (env[k] - col[k]) for k in range(3)]
        # haze and sky
        haze = 1 - torch.exp(-L[26] * t)
        col = [col[k] + haze * (L[17 + k] - col[k]) for k in range(3)]
        sk = sky_colour(vd)
        sk = [sk[k] + L[25] * (tc[k] - sk[k]) for k in range(3)]
        return torch.stack([torch.where(sky, sk[k], col[k]) for k in range(3)], 1)

    o, d, t, index = primary(0.0, 0.0, 0.0)
    hp, sky, nw, _, tu, tv, _ = surface(o, d, t, index)
    depth = torch.where(sky, torch.full_like(t, float("inf")), t)
    if spp == 1:
        rgb = shade(o, d, t, index)
    else:
        rgb = sum(shade(*primary(*SUB[j], (j + dither) / spp - 0.5)) for j in range(spp)) / spp
    normal, texture = (torch.stack(nw, 1), torch.stack([tu, tv], 1)) if details else (None, None)
    out = rgb, depth, index.to(torch.uint8), normal, texture
    return tuple(None if x is None else x.unflatten(-1, (H, W)) for x in out)


if triton is not None:
    _P, _PS, _MS, _LS, _CS = (tl.constexpr(x) for x in (P, PS, MS, LS, CS))
    _PRISM, _ELLIPSOID, _CONE = (tl.constexpr(x) for x in (PRISM, ELLIPSOID, CONE))
    _EPS, _FLOOR, _FAR, _TEXN = (tl.constexpr(x) for x in (EPS, FLOOR, FAR, TEXN))
    _LEVEL = tl.constexpr(ENVIRONMENT_LEVEL)
    TILE_W, TILE_H = 32, 8
    _TILE_W, _TILE_H = tl.constexpr(TILE_W), tl.constexpr(TILE_H)

    @triton.jit
    def _k_nz(d):
        return tl.where(tl.abs(d) < 1e-8, 1e-8, d)

    @triton.jit
    def _k_slab(o, d):
        a = 1.0 / _k_nz(d)
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
    def _k_interval(q, ox, oy, oz, dx, dy, dz, KIND: tl.constexpr):
        """As `_interval`; KIND: 0 box, 1 prism, 2 ellipsoid, 3 cone."""
        lx, ly, lz, ex, ey, ez = _k_local(q, ox, oy, oz, dx, dy, dz)
        if KIND == 2:
            a = ex * ex + ey * ey + ez * ez
            b = lx * ex + ly * ey + lz * ez
            c = lx * lx + ly * ly + lz * lz - 1.0
            disc = b * b - a * c
            sq = tl.sqrt(tl.maximum(disc, 0.0))
            ia = 1.0 / a
            tn = tl.where(disc > 0, (-b - sq) * ia, _FAR)
            tf = (-b + sq) * ia
        elif KIND == 3:
            slope = 0.5 * tl.load(q + 15)
            width = 1.0 - slope + slope * ly
            widen = slope * ey
            a = ex * ex + ez * ez - widen * widen
            a = tl.where(tl.abs(a) < 1e-12, 1e-12, a)
            b = lx * ex + lz * ez - width * widen
            c = lx * lx + lz * lz - width * width
            disc = b * b - a * c
            sq = tl.sqrt(tl.maximum(disc, 0.0))
            ia = 1.0 / a
            y1, y2 = _k_slab(ly, ey)
            tn = tl.maximum(tl.where((a < 0) & (widen <= 0), -_FAR, (-b - sq) * ia), y1)
            tf = tl.minimum(tl.where((a < 0) & (widen > 0), _FAR, (-b + sq) * ia), y2)
            tn = tl.where(disc > 0, tn, _FAR)
        else:
            y1, y2 = _k_slab(ly, ey)
            z1, z2 = _k_slab(lz, ez)
            tn = tl.maximum(y1, z1)
            tf = tl.minimum(y2, z2)
            if KIND == 0:
                x1, x2 = _k_slab(lx, ex)
                tn = tl.maximum(tn, x1)
                tf = tl.minimum(tf, x2)
            else:
                slope = 0.5 * tl.load(q + 15)
                width = 1.0 - slope + slope * ly
                widen = slope * ey
                r1 = _k_nz(-ex - widen)
                t1 = (width + lx) / r1
                tn = tl.where(r1 < 0, tl.maximum(tn, t1), tn)
                tf = tl.where(r1 > 0, tl.minimum(tf, t1), tf)
                r2 = _k_nz(ex - widen)
                t2 = (width - lx) / r2
                tn = tl.where(r2 < 0, tl.maximum(tn, t2), tn)
                tf = tl.where(r2 > 0, tl.minimum(tf, t2), tf)
        return tn, tf

    @triton.jit
    def _k_nearest(pp, some, ox, oy, oz, dx, dy, dz, best, idx, LO: tl.constexpr, HI: tl.constexpr, KIND: tl.constexpr):
        for i in range(LO, HI):
            if ((some >> i) & 1) == 1:
                tn, tf = _k_interval(pp + i * _PS, ox, oy, oz, dx, dy, dz, KIND)
                h = (tn < tf) & (tn > _EPS) & (tn < best)
                best = tl.where(h, tn, best)
                idx = tl.where(h, i, idx)
        return best, idx

    @triton.jit
    def _k_primary(pp, some, ox, oy, oz, dx, dy, dz):
        """Depth and primitive of the nearest hit among those of the bit set."""
        tn, best = _k_interval(pp, ox, oy, oz, dx, dy, dz, 0)
        idx = tl.zeros_like(best).to(tl.int32)
        best, idx = _k_nearest(pp, some, ox, oy, oz, dx, dy, dz, best, idx, 1, _PRISM, 0)
        best, idx = _k_nearest(pp, some, ox, oy, oz, dx, dy, dz, best, idx, _PRISM, _ELLIPSOID, 1)
        best, idx = _k_nearest(pp, some, ox, oy, oz, dx, dy, dz, best, idx, _ELLIPSOID, _CONE, 2)
        best, idx = _k_nearest(pp, some, ox, oy, oz, dx, dy, dz, best, idx, _CONE, _P, 3)
        return best, idx

    @triton.jit
    def _k_blocked(pp, some, ox, oy, oz, dx, dy, dz, dark, LO: tl.constexpr, HI: tl.constexpr, KIND: tl.constexpr):
        for i in range(LO, HI):
            if ((some >> i) & 1) == 1:
                tn, tf = _k_interval(pp + i * _PS, ox, oy, oz, dx, dy, dz, KIND)
                dark = tl.where((tn < tf) & (tf > 0) & (tn < 1) & (tn > 0), 1.0, dark)
        return dark

    @triton.jit
    def _k_spheres(pp):
        """Bounding spheres of all primitives, as blocks of 64; radius 0 where there is nothing to test."""
        i = tl.arange(0, 64)
        there = (i > 0) & (i < _P)
        x = tl.load(pp + i * _PS + 9, mask=there, other=0.0)
        y = tl.load(pp + i * _PS + 10, mask=there, other=0.0)
        z = tl.load(pp + i * _PS + 11, mask=there, other=0.0)
        return x, y, z, tl.load(pp + i * _PS + 16, mask=there, other=0.0)

    @triton.jit
    def _k_bits(chosen):
        """Block of 64 flags -> set in an int64."""
        bit = tl.full([64], 1, tl.int64) << tl.arange(0, 64).to(tl.int64)
        return tl.sum(tl.where(chosen, bit, tl.zeros_like(bit)), 0)

    @triton.jit
    def _k_shadow(pp, lp, hx, hy, hz, tx, ty, tz, px, py, pz, lit):
        """1 where a solid is between p, the points h raised off their surfaces, and p + t, the light; lit: where it matters."""
        x1 = tl.min(tl.where(lit, hx, _FAR), 0)
        y1 = tl.min(tl.where(lit, hy, _FAR), 0)
        z1 = tl.min(tl.where(lit, hz, _FAR), 0)
        x2 = tl.max(tl.where(lit, hx, -_FAR), 0)
        y2 = tl.max(tl.where(lit, hy, -_FAR), 0)
        z2 = tl.max(tl.where(lit, hz, -_FAR), 0)
        # a capsule around the tile's surfaces and the light; the offset of the rays is inside its margin
        mx = 0.5 * (x1 + x2)
        my = 0.5 * (y1 + y2)
        mz = 0.5 * (z1 + z2)
        around = 0.5 * tl.sqrt((x2 - x1) * (x2 - x1) + (y2 - y1) * (y2 - y1) + (z2 - z1) * (z2 - z1)) + 0.01
        sx, sy, sz, radius = _k_spheres(pp)
        lx = tl.load(lp + 0) - mx
        ly = tl.load(lp + 1) - my
        lz = tl.load(lp + 2) - mz
        wx = sx - mx
        wy = sy - my
        wz = sz - mz
        along = (wx * lx + wy * ly + wz * lz) / (lx * lx + ly * ly + lz * lz + 1e-12)
        along = tl.minimum(tl.maximum(along, 0.0), 1.0)
        wx -= along * lx
        wy -= along * ly
        wz -= along * lz
        reach = (radius + around) * 1.001
        least = tl.maximum(x1 - x2, 0.0)  # none at all where nothing is lit
        some = _k_bits((radius > least) & (wx * wx + wy * wy + wz * wz < reach * reach))
        dark = tl.zeros_like(tx)
        dark = _k_blocked(pp, some, px, py, pz, tx, ty, tz, dark, 1, _PRISM, 0)
        dark = _k_blocked(pp, some, px, py, pz, tx, ty, tz, dark, _PRISM, _ELLIPSOID, 1)
        dark = _k_blocked(pp, some, px, py, pz, tx, ty, tz, dark, _ELLIPSOID, _CONE, 2)
        return _k_blocked(pp, some, px, py, pz, tx, ty, tz, dark, _CONE, _P, 3)

    @triton.jit
    def _k_bil(tp, tid, u, v, l):
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
        base = tp + tid * _TEXN + (262144 - (262144 >> (2 * l))) // 3
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
    def _k_surface(pp, mp, lp, hx, hy, hz, vx, vy, vz, idx):
        """As `surface` of the reference, from the hit point and the unit view direction; the last result is the material's row."""
        q = pp + idx * _PS
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
        sky = (idx < tl.load(lp + 16).to(tl.int32)) & (py < _FLOOR)  # only primitive 0, only outdoors
        slope = 0.5 * tl.load(q + 15)
        narrow = slope * (1.0 - py)
        axx = tl.abs(px) + narrow
        ayy = tl.abs(py)
        azz = tl.abs(pz)
        box = idx < _ELLIPSOID
        cone = idx >= _CONE
        rad = tl.sqrt(px * px + pz * pz)
        cap = cone & (ayy >= rad + narrow)
        side = cone & (ayy < rad + narrow)
        bx = (axx >= ayy) & (axx >= azz)
        by = (bx == 0) & (ayy >= azz)
        bz = (bx == 0) & (by == 0)
        nx = tl.where(box, tl.where(bx, tl.where(px < 0, -1.0, 1.0), 0.0), tl.where(cap, 0.0, px))
        ny = tl.where(box, tl.where(by, py, tl.where(bx, -slope, 0.0)), tl.where(side, -slope * rad, py))
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
        nd = (wx * vx + wy * vy + wz * vz) * il
        il = tl.where(nd > 0, -il, il)
        mq = mp + (idx * 6 + face) * _MS
        rep = tl.load(mq + 1)
        cs = tl.load(mq + 4)
        sn = tl.load(mq + 5)
        tu = (cs * uu - sn * vv) * rep + tl.load(mq + 2)
        tv = (sn * uu + cs * vv) * rep + tl.load(mq + 3)
        return sky, wx * il, wy * il, wz * il, tl.abs(nd), tu, tv, mq

    @triton.jit
    def _k_light(lp, hx, hy, hz, nx, ny, nz, vx, vy, vz, fall):
        """To the light (3), diffuse and specular terms without shadow."""
        tx = tl.load(lp) - hx
        ty = tl.load(lp + 1) - hy
        tz = tl.load(lp + 2) - hz
        d2 = tx * tx + ty * ty + tz * tz
        ir = 1.0 / tl.sqrt(d2 + 1e-9)
        ndl = tl.maximum((nx * tx + ny * ty + nz * tz) * ir, 0.0)
        at = 1.0 / (0.25 + d2 * fall)
        ax = tx * ir - vx
        ay = ty * ir - vy
        az = tz * ir - vz
        ih = 1.0 / tl.sqrt(ax * ax + ay * ay + az * az + 1e-20)
        ns = tl.minimum(tl.maximum((nx * ax + ny * ay + nz * az) * ih, 0.0), 1.0)
        ns = ns * ns
        ns = ns * ns
        ns = ns * ns
        ns = ns * ns
        ns = ns * ns
        return tx, ty, tz, ndl * at, ns * at

    @triton.jit
    def _k_albedo(mq, k: tl.constexpr, texel):
        return tl.minimum(tl.maximum(tl.load(mq + 9 + k) + tl.load(mq + 6 + k) * texel, 0.01), 1.0)

    @triton.jit
    def _k_sky(lp, k: tl.constexpr, wy):
        rise = tl.sqrt(tl.minimum(tl.maximum(-wy, 0.0), 1.0))
        horizon = tl.load(lp + 17 + k)
        return horizon + (tl.load(lp + 20 + k) - horizon) * rise

    @triton.jit
    def _k_finish(lp, k: tl.constexpr, albedo, amb, d0, d1, s0, s1, share, albedo_r, sky_r, ry, haze, texel, sky, vy):
        """Radiance of channel k: lights, reflection, haze, sky."""
        ambient = tl.load(lp + 12 + k)
        first = tl.load(lp + 3 + k)
        second = tl.load(lp + 9 + k)
        c = albedo * (ambient * amb + first * d0 + second * d1) + first * s0 + second * s1
        env = tl.where(sky_r, _k_sky(lp, k, ry), albedo_r * (ambient + 0.3 * first))
        c = c + share * (env - c)
        c = c + haze * (tl.load(lp + 17 + k) - c)
        s = _k_sky(lp, k, vy)
        return tl.where(sky, s + tl.load(lp + 25) * (texel - s), c)

    @triton.jit
    def _k_shade(pp, mp, lp, tp, ox, oy, oz, dx, dy, dz, t, idx, grain, SHADOWS: tl.constexpr):
        """Radiance; grain: texels per metre at distance 1 and 1 repeat per metre."""
        hx = ox + t * dx
        hy = oy + t * dy
        hz = oz + t * dz
        dl = 1.0 / tl.sqrt(dx * dx + dy * dy + dz * dz)
        vx = dx * dl
        vy = dy * dl
        vz = dz * dl
        sky, wx, wy, wz, cosv, tu, tv, mq = _k_surface(pp, mp, lp, hx, hy, hz, vx, vy, vz, idx)
        overhead = 1.0 / (tl.maximum(-vy, 0.0) + 0.15)
        clouds = tl.load(lp + 24)
        tu = tl.where(sky, vx * overhead * clouds, tu)
        tv = tl.where(sky, vz * overhead * clouds, tv)
        tid = tl.where(sky, tl.load(lp + 23), tl.load(mq)).to(tl.int32)
        foot = t * tl.load(mq + 1) / tl.sqrt(tl.maximum(cosv, 0.02))
        foot = tl.where(sky, overhead * overhead * clouds, foot) * grain
        lod = tl.minimum(tl.maximum(tl.log2(tl.maximum(foot, 1e-6)), 0.0), 7.99)
        l0f = tl.floor(lod)
        fl = lod - l0f
        l0 = l0f.to(tl.int32)
        r0, g0, e0 = _k_bil(tp, tid, tu, tv, l0)
        r1, g1, e1 = _k_bil(tp, tid, tu, tv, l0 + 1)
        r0 = r0 + (r1 - r0) * fl
        g0 = g0 + (g1 - g0) * fl
        e0 = e0 + (e1 - e0) * fl
        fall = tl.load(lp + 15)
        tx, ty, tz, d0, s0 = _k_light(lp, hx, hy, hz, wx, wy, wz, vx, vy, vz, fall)
        if SHADOWS:
            e3 = _EPS * 3
            px = hx + wx * e3
            py = hy + wy * e3
            pz = hz + wz * e3
            dark = _k_shadow(pp, lp, hx, hy, hz, tx, ty, tz, px, py, pz, sky == 0)
            d0 = tl.where(dark > 0.5, 0.0, d0)
            s0 = tl.where(dark > 0.5, 0.0, s0)
        tx, ty, tz, d1, s1 = _k_light(lp + 6, hx, hy, hz, wx, wy, wz, vx, vy, vz, fall)
        gloss = tl.load(mq + 12)
        s0 = s0 * gloss
        s1 = s1 * gloss
        share = tl.load(mq + 13) * (0.4 + 0.6 * (1.0 - cosv) * (1.0 - cosv))
        back = 2.0 * (vx * wx + vy * wy + vz * wz)
        rx = vx - back * wx
        ry = vy - back * wy
        rz = vz - back * wz
        sky_r = share < 0  # of the right type, and false
        ar = share * 0.0
        ag = share * 0.0
        ab = share * 0.0
        if tl.max(share, 0) > 0:
            first, away = _k_interval(pp, hx, hy, hz, rx, ry, rz, 0)
            sky_r, nx_, ny_, nz_, cos_, tu, tv, mr = _k_surface(
                pp, mp, lp, hx + away * rx, hy + away * ry, hz + away * rz, rx, ry, rz, tl.zeros_like(idx)
            )
            r2, g2, e2 = _k_bil(tp, tl.load(mr).to(tl.int32), tu, tv, tl.zeros_like(idx) + _LEVEL)
            ar = _k_albedo(mr, 0, r2)
            ag = _k_albedo(mr, 1, g2)
            ab = _k_albedo(mr, 2, e2)
        amb = 0.8 - 0.2 * wy
        haze = 1.0 - tl.exp(-tl.load(lp + 26) * t)
        cr = _k_finish(lp, 0, _k_albedo(mq, 0, r0), amb, d0, d1, s0, s1, share, ar, sky_r, ry, haze, r0, sky, vy)
        cg = _k_finish(lp, 1, _k_albedo(mq, 1, g0), amb, d0, d1, s0, s1, share, ag, sky_r, ry, haze, g0, sky, vy)
        cb = _k_finish(lp, 2, _k_albedo(mq, 2, e0), amb, d0, d1, s0, s1, share, ab, sky_r, ry, haze, e0, sky, vy)
        return cr, cg, cb

    @triton.jit
    def _k_ray(cp, u, v, time):
        """Origin and direction of the rays of pixels (u, v), `time` frame intervals off the middle of the frame."""
        x = (u - tl.load(cp + 14)) / tl.load(cp + 12)
        y = (v - tl.load(cp + 15)) / tl.load(cp + 13)
        r2 = x * x + y * y
        s = 1.0 + tl.load(cp + 16) * r2 + tl.load(cp + 17) * r2 + tl.load(cp + 18) * r2 * r2
        p1 = tl.load(cp + 19)
        p2 = tl.load(cp + 20)
        ex = x * s + 2.0 * p1 * x * y + p2 * (r2 + 2.0 * x * x)
        ey = y * s + p1 * (r2 + 2.0 * y * y) + 2.0 * p2 * x * y
        w0 = tl.load(cp + 21)
        w1 = tl.load(cp + 22)
        w2 = tl.load(cp + 23)
        a0 = w1 - w2 * ey
        a1 = w2 * ex - w0
        a2 = w0 * ey - w1 * ex
        half = 0.5 * time
        fx = ex + time * (a0 + half * (w1 * a2 - w2 * a1))
        fy = ey + time * (a1 + half * (w2 * a0 - w0 * a2))
        fz = 1.0 + time * (a2 + half * (w0 * a1 - w1 * a0))
        return (
            tl.load(cp + 9) + time * tl.load(cp + 24),
            tl.load(cp + 10) + time * tl.load(cp + 25),
            tl.load(cp + 11) + time * tl.load(cp + 26),
            tl.load(cp) * fx + tl.load(cp + 1) * fy + tl.load(cp + 2) * fz,
            tl.load(cp + 3) * fx + tl.load(cp + 4) * fy + tl.load(cp + 5) * fz,
            tl.load(cp + 6) * fx + tl.load(cp + 7) * fy + tl.load(cp + 8) * fz,
        )

    @triton.jit
    def _k_visible(pp, cp, ox, oy, oz, dx, dy, dz):
        """Set of primitives whose bounding spheres meet the cone of a tile's rays (centres of pixels, middle of exposure)."""
        il = 1.0 / tl.sqrt(dx * dx + dy * dy + dz * dz)
        vx = dx * il
        vy = dy * il
        vz = dz * il
        ax = tl.sum(vx, 0)
        ay = tl.sum(vy, 0)
        az = tl.sum(vz, 0)
        ia = 1.0 / tl.sqrt(ax * ax + ay * ay + az * az + 1e-20)
        ax *= ia
        ay *= ia
        az *= ia
        cosine = tl.minimum(tl.min(vx * ax + vy * ay + vz * az, 0), 1.0)
        sine = tl.sqrt(1.0 - cosine * cosine)
        # half a pixel, what the camera turns during the exposure, and rounding
        exposure = tl.load(cp + 27)
        w0 = tl.load(cp + 21)
        w1 = tl.load(cp + 22)
        w2 = tl.load(cp + 23)
        margin = 0.6 * exposure * tl.sqrt(w0 * w0 + w1 * w1 + w2 * w2)
        margin += 1.0 / tl.minimum(tl.load(cp + 12), tl.load(cp + 13)) + 1e-3
        m0 = tl.load(cp + 24)
        m1 = tl.load(cp + 25)
        m2 = tl.load(cp + 26)
        drift = 0.6 * (exposure + tl.load(cp + 28)) * tl.sqrt(m0 * m0 + m1 * m1 + m2 * m2)
        cx = 0.5 * (tl.min(ox, 0) + tl.max(ox, 0))
        cy = 0.5 * (tl.min(oy, 0) + tl.max(oy, 0))
        cz = 0.5 * (tl.min(oz, 0) + tl.max(oz, 0))
        wide_cosine = cosine * (1.0 - 0.5 * margin * margin) - sine * margin
        wide_sine = sine + cosine * margin
        sx, sy, sz, radius = _k_spheres(pp)
        wx = sx - cx
        wy = sy - cy
        wz = sz - cz
        grown = radius * 1.001 + drift + 1e-4
        square = wx * wx + wy * wy + wz * wz
        beyond = square - grown * grown
        edge = wide_cosine * tl.sqrt(tl.maximum(beyond, 0.0)) - wide_sine * grown
        return _k_bits((radius > 0) & ((beyond <= 0) | (wx * ax + wy * ay + wz * az >= edge)))

    @triton.jit(do_not_specialize=["N", "H", "W", "sequence_stride", "frame_stride"])  # it takes long to compile
    def _k_render(
        prim,
        mat,
        light,
        cam,
        tex,
        rgb,
        depth,
        index,
        normal,
        texture,
        N,
        H,
        W,
        sequence_stride,
        frame_stride,
        SPP: tl.constexpr,
        SHADOWS: tl.constexpr,
        DETAILS: tl.constexpr,
    ):
        f = tl.program_id(0)
        b = f // N
        across = (W + _TILE_W - 1) // _TILE_W
        lane = tl.arange(0, _TILE_W * _TILE_H)
        column = (tl.program_id(1) % across) * _TILE_W + lane % _TILE_W
        row = (tl.program_id(1) // across) * _TILE_H + lane // _TILE_W
        ok = (column < W) & (row < H)
        column = tl.minimum(column, W - 1)
        row = tl.minimum(row, H - 1)
        u = column.to(tl.float32)
        v = row.to(tl.float32)
        HW = H * W
        pix = row * W + column
        pp = prim + b * sequence_stride + (f % N) * frame_stride
        mp = mat + b * (_P * 6 * _MS)
        lp = light + b * _LS
        cp = cam + f * _CS
        readout = tl.load(cp + 28) * (v / tl.maximum(H - 1, 1).to(tl.float32) - 0.5)
        ox, oy, oz, dx, dy, dz = _k_ray(cp, u, v, readout)
        some = _k_visible(pp, cp, ox, oy, oz, dx, dy, dz)
        t, idx = _k_primary(pp, some, ox, oy, oz, dx, dy, dz)
        il = 1.0 / tl.sqrt(dx * dx + dy * dy + dz * dz)
        sky, nx, ny, nz, cosv, tu, tv, mq = _k_surface(
            pp, mp, lp, ox + t * dx, oy + t * dy, oz + t * dz, dx * il, dy * il, dz * il, idx
        )
        tl.store(depth + f * HW + pix, tl.where(sky, float("inf"), t), mask=ok)
        tl.store(index + f * HW + pix, idx.to(tl.uint8), mask=ok)
        if DETAILS:
            n = normal + f * HW * 3 + pix
            tl.store(n, nx, mask=ok)
            tl.store(n + HW, ny, mask=ok)
            tl.store(n + 2 * HW, nz, mask=ok)
            tl.store(texture + f * HW * 2 + pix, tu, mask=ok)
            tl.store(texture + f * HW * 2 + HW + pix, tv, mask=ok)
        grain = 256.0 / tl.load(cp + 12)
        if SPP == 1:
            cr, cg, cb = _k_shade(pp, mp, lp, tex, ox, oy, oz, dx, dy, dz, t, idx, grain, SHADOWS)
        else:
            a = column ^ row
            dither = (((a & 1) << 3) | ((row & 1) << 2) | (a & 2) | ((row & 2) >> 1)).to(tl.float32) * 0.0625
            cr = tl.zeros([_TILE_W * _TILE_H], tl.float32)
            cg = tl.zeros([_TILE_W * _TILE_H], tl.float32)
            cb = tl.zeros([_TILE_W * _TILE_H], tl.float32)
            for j in range(0, SPP):
                du = tl.where((j == 0) | (j == 2), -0.25, 0.25)
                dv = tl.where((j == 0) | (j == 3), -0.25, 0.25)
                time = readout + tl.load(cp + 27) * ((j + dither) * (1.0 / SPP) - 0.5)
                ox, oy, oz, dx, dy, dz = _k_ray(cp, u + du, v + dv, time)
                t, idx = _k_primary(pp, some, ox, oy, oz, dx, dy, dz)
                r1, g1, b1 = _k_shade(pp, mp, lp, tex, ox, oy, oz, dx, dy, dz, t, idx, grain * 0.6, SHADOWS)
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

    def raycast_triton(
        sc: dict[str, Tensor], texd: Tensor, H: int, W: int, spp: int = 4, shadows: bool = True, details: bool = False
    ) -> Rendering:
        """The kernel; arguments and results of `raycast`."""
        cam, prim = sc["cam"].contiguous(), sc["prim"]
        B, N = cam.shape[:2]
        Fn = B * N
        prim = prim.contiguous()
        out = Rendering(
            torch.empty(Fn, 3, H, W, device=cam.device),
            torch.empty(Fn, H, W, device=cam.device),
            torch.empty(Fn, H, W, device=cam.device, dtype=torch.uint8),
            *(torch.empty(Fn, c, H, W, device=cam.device) if details else None for c in (3, 2)),
        )
        _k_render[(Fn, triton.cdiv(W, TILE_W) * triton.cdiv(H, TILE_H))](
            prim,
            sc["mat"].contiguous(),
            sc["light"].contiguous(),
            cam,
            texd,
            *out,
            N,
            H,
            W,
            prim.stride(0),
            prim.stride(1) if prim.shape[1] > 1 else 0,
            SPP=spp,
            SHADOWS=shadows,
            DETAILS=details,
            num_warps=4,
        )
        return out


def raycast(
    scene: dict[str, Tensor], textures: Tensor, height: int, width: int, samples: int = 1, details: bool = False
) -> Rendering:
    """Image, depth and primitive seen by every camera of the scene.

    samples: 1, 2 or 4 shading samples per pixel, spread over the exposure (one: no motion blur); depth and primitive are
    those of the pixel's centre, when its row is read. details: normals and texture coordinates too.
    """
    run = raycast_triton if scene["cam"].is_cuda and triton is not None else raycast_reference
    return run(scene, textures, height, width, samples, details=details)
