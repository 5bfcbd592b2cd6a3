"""Random rooms and camera paths. Conventions and table layout: `kernels.raycast`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.kernels import raycast
from speed3r_ros.training.textures import Rng, _color

BASIC_MOTIONS = ("forward", "lateral", "orbit", "handheld", "rotation", "general")
MOTIONS = (*BASIC_MOTIONS, "still", "stopgo", "wide", "spin")
BASE_OF = (0, 1, 2, 3, 4, 5, 3, 5, 5, 4)  # the basic motion that each motion starts from
NB, NS, NC = 24, 6, 6  # boxes, ellipsoids and cylinders of a furnished room
P = 1 + NB + NS + NC
ODDS = (12, 12, 12, 12, 10, 14, 4, 6, 6, 12)  # how often each motion is drawn
FEWEST_INTERVALS = 7  # that a whole turn takes; shorter sequences have a part of it, so that views overlap


def eul(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """R = Ry(yaw) Rx(pitch) Rz(roll); returns (...,3,3)"""
    cy, sy, cp, sp, cr, sr = yaw.cos(), yaw.sin(), pitch.cos(), pitch.sin(), roll.cos(), roll.sin()
    r = [
        cy * cr + sy * sp * sr,
        -cy * sr + sy * sp * cr,
        sy * cp,
        cp * sr,
        cp * cr,
        -sp,
        -sy * cr + cy * sp * sr,
        sy * sr + cy * sp * cr,
        cy * cp,
    ]
    return torch.stack(r, -1).unflatten(-1, (3, 3))


def sample_cameras(
    r: Rng, B: int, N: int, H: int, W: int, motion: int | Tensor | None = None, basic: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Smooth random camera-to-world paths: R (B, N, 3, 3), t (B, N, 3), K (B, 5) = fx, fy, cx, cy, k1, motion (B,).

    motion: index into MOTIONS for all or (B,), or None for a random one each; basic: six motions, square pixels, usual speeds.
    """
    dev = r.d
    deg = math.pi / 180
    if motion is not None:
        kind = torch.as_tensor(motion, device=dev).expand(B)
    elif basic:
        kind = r.i(len(BASIC_MOTIONS), B)
    else:
        kind = r.choice(ODDS, B)
    mt = torch.tensor(BASE_OF, device=dev)[kind]
    is_ = [(mt == k).float().view(B, 1) for k in range(len(BASIC_MOTIONS))]
    tt = torch.linspace(0, 1, N, device=dev).view(1, N) + (r.u(B, N) - 0.5) * (0.8 / max(N - 1, 1)) * r.b(0.5, B, 1)
    tt = tt - 0.5  # centred time
    # translation magnitude (metres, total) and rotation magnitude (radians, total)
    L = r.lu(B, 1, lo=0.06, hi=2.5)
    L = L * (1 - is_[4] * 0.93) * (1 - is_[3] * 0.7)
    rot = r.lu(B, 1, lo=2, hi=45) * deg
    rot = rot * (1 + is_[4] * 0.8)
    dirn = (
        torch.stack([r.n(B) * 0.25, r.n(B) * 0.15, r.sgn(B)], -1) * is_[0]
        + torch.stack([r.sgn(B), r.n(B) * 0.2, r.n(B) * 0.3], -1) * is_[1]
        + r.n(B, 3) * (is_[3] + is_[4] + is_[5])
        + 1e-4
    )
    dirn = dirn / dirn.norm(dim=-1, keepdim=True)

    def wob(fmax=1.5, k=3):
        f = r.u(B, k, 1, lo=0.3, hi=fmax)
        ph = r.u(B, k, 1, hi=2 * math.pi)
        a = r.n(B, k, 1)
        return (a * torch.sin(2 * math.pi * f * tt.unsqueeze(1) + ph)).sum(1) / k**0.5

    rs = torch.where(r.b(0.5, B, 1), torch.ones(B, 1, device=dev), 0.3 * torch.ones(B, 1, device=dev))
    lin = 1 - 0.8 * is_[3]
    yaw = rot * (lin * r.sgn(B, 1) * tt + 0.3 * wob()) * (1 - is_[0] * 0.6)
    pitch = rot * 0.45 * rs * (lin * r.n(B, 1) * tt + 0.5 * wob()) * (1 - is_[0] * 0.6)
    roll = rot * 0.3 * rs * (lin * r.n(B, 1) * tt + 0.5 * wob()) * (1 - is_[0] * 0.6)
    pos = L.unsqueeze(-1) * (
        dirn.unsqueeze(1) * (tt * lin.view(B, 1)).unsqueeze(-1) + 0.22 * torch.stack([wob(), wob() * 0.6, wob()], -1)
    )
    # hand jitter on everything
    ja = r.lu(B, 1, lo=0.001, hi=0.02) * r.b(0.7, B, 1)
    jr = r.lu(B, 1, lo=0.05, hi=1.2) * deg * r.b(0.7, B, 1)
    yaw, pitch, roll = [a + jr * r.n(B, N) for a in (yaw, pitch, roll)]
    pos = pos + ja.unsqueeze(-1) * r.n(B, N, 3)
    yaw0 = r.u(B, 1, hi=2 * math.pi)
    pitch0 = ((r.n(B, 1) * 14 - 8) * deg).clamp(-1.1, 1.1)
    roll0 = r.n(B, 1) * 3 * deg + r.b(0.12, B, 1) * r.n(B, 1) * 25 * deg
    R0 = eul(yaw0, pitch0, roll0)  # (B,1,3,3)
    t = (R0 @ pos.unsqueeze(-1)).squeeze(-1)  # path directions live in the mean camera frame
    # orbit: rotate about a target at distance rad in front
    rad = r.lu(B, 1, lo=1.0, hi=4.0)
    arc = r.lu(B, 1, lo=4, hi=75) * deg * r.sgn(B, 1)
    oy = arc * tt + 0.05 * rot * wob()
    Ro = eul(yaw0 + oy, pitch0 + 0.15 * oy * r.n(B, 1), roll0 * torch.ones_like(oy))
    fw = Ro[..., :, 2]
    tor = -rad.unsqueeze(-1) * fw + rad.unsqueeze(-1) * R0[..., :, 2] + 0.15 * pos
    o = is_[2].unsqueeze(-1)
    t = t * (1 - o) + tor * o
    dR = eul(yaw, pitch, roll)
    R = torch.where(o.unsqueeze(-1) > 0, Ro @ eul(0.25 * yaw, 0.25 * pitch, 0.25 * roll), R0 @ dR)
    fov = r.u(B, lo=38, hi=92)
    if not basic:  # half of them as cameras on robots are: without motion, the network then guesses a usual lens
        fov = torch.where(r.b(0.5, B), (64 + 8 * r.n(B)).clamp(45, 95), fov)
    fov = fov * deg
    fx = W / 2 / torch.tan(fov / 2)
    fy = fx * (1 + 0.01 * r.n(B))
    K = torch.stack(
        [fx, fy, (W - 1) / 2 + r.n(B) * 0.012 * W, (H - 1) / 2 + r.n(B) * 0.012 * H, r.n(B) * 0.02 * r.b(0.5, B)], -1
    )
    if not basic:
        R, t = special_motions(r, R, t, kind)
        stretched = r.b(0.4, B)  # images are resized anisotropically at run time
        K[:, 1] = torch.where(stretched, K[:, 0] * r.lu(B, lo=0.72, hi=1.4), K[:, 1])
    return R, t, K, kind


def special_motions(r: Rng, R: Tensor, t: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """Turn basic paths R (B, N, 3, 3), t (B, N, 3) into the special motions of `kind` (B,); others stay, some slowed down.

    still: one pose for all frames, up to 2 mm and 0.1 degrees of jitter. stopgo: frames repeat poses of the path.
    wide: unordered views of a common target, tens of degrees and up to a scene depth apart. spin: a large turn, half of
    them on the spot and half while moving.
    """
    B, N = t.shape[:2]
    dev, deg = r.d, math.pi / 180
    first = torch.zeros(B, N, dtype=torch.long, device=dev)
    moving = torch.cumsum(r.b(0.6, B, N).long(), 1).clamp(max=N - 1)
    slow = r.b(0.25, B, 1)
    pace = torch.where(slow, r.lu(B, 1, lo=0.02, hi=0.4), torch.ones(B, 1, device=dev))
    index = torch.where(
        (kind == 6)[:, None], first, torch.where((kind == 7)[:, None], moving, torch.arange(N, device=dev))
    )
    R = torch.gather(R, 1, index[..., None, None].expand(-1, -1, 3, 3))
    t = torch.gather(t, 1, index[..., None].expand(-1, -1, 3))

    # slow paths: interpolate towards the first pose (rotations through their small axis-angle)
    angle = axis_angle(R[:, :1].transpose(-1, -2) @ R)
    total = torch.where(
        (kind == 9)[:, None], r.u(B, 1, lo=15, hi=140) * deg * r.sgn(B, 1), torch.zeros(B, 1, device=dev)
    )
    angle = angle * pace[..., None]
    angle[..., 1] = angle[..., 1] + total * torch.arange(N, device=dev) / max(N - 1, FEWEST_INTERVALS)
    travel = r.lu(B, 1, 1, lo=1.0, hi=30.0) * r.b(0.5, B, 1, 1)  # of a spin; its base hardly moves
    t = t[:, :1] + (t - t[:, :1]) * torch.where((kind == 9)[:, None, None], travel, pace[..., None])

    # jitter of a camera that is held still
    hand = ((kind == 6) | (kind == 7))[:, None, None] & r.b(0.7, B, 1, 1)
    angle = angle + hand * r.lu(B, 1, 1, lo=1e-3, hi=0.1) * deg * r.n(B, N, 3)
    t = t + hand * r.lu(B, 1, 1, lo=1e-5, hi=2e-3) * r.n(B, N, 3)
    R = R[:, :1] @ rotation(angle)

    # wide baselines: random places around a target, all looking at it
    reach = r.lu(B, 1, lo=1.0, hi=3.5)
    spread = r.u(B, 1, lo=10, hi=38) * deg
    yaw, pitch = spread * r.u(B, N, lo=-1, hi=1), 0.35 * spread * r.u(B, N, lo=-1, hi=1)
    look = R[:, :1] @ eul(yaw, pitch, 0.2 * spread * r.n(B, N))
    target = t[:, :1] + reach[..., None] * R[:, :1, :, 2]
    away = reach * r.u(B, N, lo=0.75, hi=1.25)
    place = target - away[..., None] * look[..., :, 2]
    aim = look @ eul(6 * deg * r.n(B, N), 4 * deg * r.n(B, N), 3 * deg * r.n(B, N))
    wide = kind == 8
    return torch.where(wide[:, None, None, None], aim, R), torch.where(wide[:, None, None], place, t)


def axis_angle(R: Tensor) -> Tensor:
    """Logarithm of rotations (..., 3, 3) below 180 degrees: (..., 3)."""
    vector = (
        torch.stack([R[..., 2, 1] - R[..., 1, 2], R[..., 0, 2] - R[..., 2, 0], R[..., 1, 0] - R[..., 0, 1]], -1) / 2
    )
    sine = vector.norm(dim=-1, keepdim=True)
    cosine = (R.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - 1) / 2
    return vector * torch.atan2(sine, cosine) / sine.clamp_min(1e-9)


def rotation(vector: Tensor) -> Tensor:
    """Exponential of axis-angle vectors (..., 3): (..., 3, 3)."""
    zero = torch.zeros_like(vector[..., 0])
    x, y, z = vector.unbind(-1)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    return torch.linalg.matrix_exp(skew)


def place_in_view(r: Rng, R: Tensor, t: Tensor, K: Tensor, lo: Tensor, hi: Tensor, n: int, H: int, W: int) -> Tensor:
    """Points (B, n, 3) in the box lo..hi (B, 3): three quarters in view of a random frame, the others anywhere."""
    dev = r.d
    B, N = t.shape[:2]
    fi = r.i(N, B, n)
    Rf = torch.gather(R, 1, fi.view(B, n, 1, 1).expand(-1, -1, 3, 3))
    tf = torch.gather(t, 1, fi.view(B, n, 1).expand(-1, -1, 3))
    d = torch.stack(
        [
            r.u(B, n, lo=-1, hi=1) * (W / 2) / K[:, None, 0],
            r.u(B, n, lo=-1, hi=1) * (H / 2) / K[:, None, 1],
            torch.ones(B, n, device=dev),
        ],
        -1,
    )
    d = (Rf @ d.unsqueeze(-1)).squeeze(-1)
    d = torch.where(d.abs() < 1e-6, torch.full_like(d, 1e-6), d)
    tex_ = torch.maximum((lo[:, None] - tf) / d, (hi[:, None] - tf) / d).amin(-1)  # room exit along that ray
    dist = tex_ * r.u(B, n, lo=0.18, hi=1.0)
    pv = tf + d * dist.unsqueeze(-1)
    pu = lo[:, None] + (hi - lo)[:, None] * r.u(B, n, 3)
    return torch.where(r.b(0.75, B, n, 1), pv, pu)


def clearance(q: Tensor, c: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Least distance (B, n), along a box's axes, of a path t (B, 1 or n, N, 3) to boxes q (B, n, 3, 3), c, s (B, n, 3)."""
    local = (q.transpose(-1, -2).unsqueeze(2) @ (t - c[:, :, None]).unsqueeze(-1)).squeeze(-1).abs()
    return (local - s.unsqueeze(2)).amax(-1).amin(-1)


def sample_materials(r: Rng, s: Tensor, n_tex: int) -> Tensor:
    """Random rows of the ray caster's `mat` (B, n, 6, 16) for solids of half sizes s (B, n, 3); the first is the enclosure."""
    dev = r.d
    B, P = s.shape[:2]
    share = r.b(0.7, B, P, 1)
    share[:, 0] = r.b(0.25, B, 1)  # the room seldom shares one texture over all faces

    def pf(x):  # per-face value, or face 0's on shared prims
        sh = share.view(B, P, 1, *([1] * (x.dim() - 3)))
        return torch.where(sh, x[:, :, :1], x)

    tex = pf(r.i(n_tex, B, P, 6).float())
    rep = pf(1 / r.lu(B, P, 6, lo=0.35, hi=5.0))  # texture repeats per metre
    small = s.amax(-1, keepdim=True).clamp(max=2.5)
    fit = r.b(0.5, B, P, 1)
    fit[:, 0] = False
    rep = torch.where(
        fit, 0.5 / small * r.lu(B, P, 1, lo=0.5, hi=1.5), rep
    )  # half the objects: texture spans the object
    ang = pf(torch.where(r.b(0.7, B, P, 6), r.i(4, B, P, 6).float() * (math.pi / 2), r.u(B, P, 6, hi=2 * math.pi)))
    con = pf(
        torch.where(r.b(0.25, B, P, 6), r.lu(B, P, 6, lo=0.02, hi=0.3), r.u(B, P, 6, lo=0.3, hi=1.0))
    )  # contrast; a quarter nearly plain
    base = pf(_color(r, B, P, 6))
    tint = pf(1 + 0.25 * r.n(B, P, 6, 3)).clamp(0.4, 1.4)
    gain = con.unsqueeze(-1) * tint
    bias = base * (1 - con.unsqueeze(-1))
    spec = pf(r.b(0.25, B, P, 6).float() * r.u(B, P, 6, lo=0.05, hi=0.6))
    return torch.cat(
        [
            tex.unsqueeze(-1),
            rep.unsqueeze(-1),
            r.u(B, P, 6, 2),
            ang.cos().unsqueeze(-1),
            ang.sin().unsqueeze(-1),
            gain,
            bias,
            spec.unsqueeze(-1),
            torch.zeros(B, P, 6, 3, device=dev),
        ],
        -1,
    )


def sample_scene(
    r: Rng,
    B: int,
    N: int,
    H: int,
    W: int,
    n_tex: int,
    motion: int | None = None,
    basic: bool = False,
    corridors: float = 0.2,
    cameras: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    held: Tensor | None = None,
    floor: Tensor | None = None,
) -> dict[str, Tensor]:
    """A furnished room and a camera path for each of B sequences: the tables of `kernels.raycast`, and R, t, K, motion.

    corridors: share of corridors (none if basic). cameras: R, t, K and motion as from `sample_cameras`, to furnish a room around a given path.
    held (B, n, 3): points that the room holds, the cameras among them (the cameras alone if None). floor (B,): height of the
    floor in metres, y down, NaN or None for a random one below the cameras.
    """
    dev = r.d
    R, t, K, mt = cameras or sample_cameras(r, B, N, H, W, motion, basic)
    held = t if held is None else held
    tmin, tmax = held.amin(1), held.amax(1)
    big = 1 + r.b(0.3, B, 1).float() * r.lu(B, 1, lo=0.5, hi=5.0)
    asym = r.lu(B, 6, lo=0.7, hi=5.0)
    if not basic:  # corridors: close walls on one horizontal axis, a far end on the other
        along, far = r.i(2, B, 1) * 2, r.lu(B, 6, lo=1.0, hi=6.0)
        across = torch.arange(6, device=dev) % 3 == 2 - along
        stretched = torch.where(torch.arange(6, device=dev) % 3 == along, asym * far, asym)
        corridor = torch.where(across, 0.5 + 0.2 * asym, stretched)
        asym = torch.where(r.b(corridors, B, 1), corridor, asym)
    lo = tmin - 0.35 - asym[:, :3] * big
    hi = tmax + 0.35 + asym[:, 3:] * big
    hi[:, 1] = tmax[:, 1] + r.u(B, lo=0.4, hi=1.9) * big[:, 0].sqrt()  # floor (y down)
    if floor is not None:
        hi[:, 1] = torch.where(floor.isnan(), hi[:, 1], floor)
    lo[:, 1] = tmin[:, 1] - r.u(B, lo=0.4, hi=2.3) * big[:, 0]  # ceiling
    rc, rh = (lo + hi) / 2, (hi - lo) / 2
    eye = torch.eye(3, device=dev)
    n = P - 1
    c = place_in_view(r, R, t, K, lo, hi, n, H, W)
    dcam = (c - t.mean(1, keepdim=True)).norm(dim=-1, keepdim=True)
    s = r.lu(B, n, 3, lo=0.4, hi=1.6) * r.lu(B, n, 1, lo=0.04, hi=0.24) * dcam.clamp_min(0.4)
    q = eul(r.u(B, n, hi=2 * math.pi), r.n(B, n) * 0.8, r.n(B, n) * 0.8)  # free orientation
    align = r.b(0.5, B, 1)
    ry = torch.where(align.expand(B, n), (r.i(4, B, n).float()) * (math.pi / 2), r.u(B, n, hi=2 * math.pi))
    up = eul(ry, torch.zeros_like(ry), torch.zeros_like(ry))  # upright orientation
    upr = torch.zeros(n, dtype=torch.bool, device=dev)
    upr[0:19] = True
    upr[NB + NS : NB + NS + 4] = True
    upr[NB : NB + 2] = True
    q = torch.where(upr.view(1, n, 1, 1), up, q)
    # 6..9 floor-standing boxes, 10..13 stacked on 6..9
    s[:, 6:10, 1] = s[:, 6:10, 1] * r.lu(B, 4, lo=0.6, hi=2.0)
    c[:, 6:10, 1] = hi[:, None, 1] - s[:, 6:10, 1]
    s[:, 10:14] = s[:, 6:10] * r.u(B, 4, 3, lo=0.3, hi=0.95)
    c[:, 10:14] = c[:, 6:10] + s[:, 6:10] * r.u(B, 4, 3, lo=-0.3, hi=0.3)
    c[:, 10:14, 1] = c[:, 6:10, 1] - s[:, 6:10, 1] - s[:, 10:14, 1]
    q[:, 10:14] = torch.where(r.b(0.6, B, 4, 1, 1), q[:, 6:10], q[:, 10:14])
    # 14..18 table: top + 4 legs
    th = r.u(B, lo=0.35, hi=0.8) * torch.minimum(rh[:, 1], r.u(B, lo=0.6, hi=1.4))
    tw = r.u(B, 2, lo=0.3, hi=0.9) * r.u(B, 1, lo=0.6, hi=1.6)
    q[:, 14:19] = q[:, 14:15]
    top = c[:, 14].clone()
    top[:, 1] = hi[:, 1] - th
    leg = r.u(B, lo=0.015, hi=0.05)
    c[:, 14] = top
    s[:, 14] = torch.stack([tw[:, 0], 0.012 + leg * 0.5, tw[:, 1]], -1)
    for k, (sx, sz) in enumerate([(-1, -1), (-1, 1), (1, -1), (1, 1)]):
        off = torch.stack([sx * (tw[:, 0] - leg), torch.zeros_like(leg), sz * (tw[:, 1] - leg)], -1)
        pc = top + (q[:, 14] @ off.unsqueeze(-1)).squeeze(-1)
        pc[:, 1] = hi[:, 1] - th / 2
        c[:, 15 + k] = pc
        s[:, 15 + k] = torch.stack([leg, th / 2, leg], -1)
    # 0..5 wall / floor attached slabs (posters, doors, windows, cabinets, rugs)
    ax = torch.where(r.b(0.8, B, 6), r.i(2, B, 6) * 2, torch.ones(B, 6, dtype=torch.long, device=dev))
    sg = r.sgn(B, 6)
    one = F.one_hot(ax, 3).bool()
    wc = rc[:, None] + rh[:, None] * r.u(B, 6, 3, lo=-0.95, hi=0.95)
    wc = torch.where(one, rc[:, None] + sg.unsqueeze(-1) * rh[:, None], wc)
    wd = r.lu(B, 6, 1, lo=0.008, hi=0.3)
    ws = r.lu(B, 6, 3, lo=0.12, hi=0.55) * rh[:, None]
    ws = torch.where(one, wd.expand(-1, -1, 3), ws)
    c[:, :6] = wc
    s[:, :6] = ws
    q[:, :6] = eye
    # upright cylinders stand on the floor (lamps, bins, columns), two upright ellipsoids rest on it
    k0 = NB + NS
    s[:, k0 : k0 + 4, 2] = s[:, k0 : k0 + 4, 0]
    s[:, k0 : k0 + 4, 1] = s[:, k0 : k0 + 4, 1] * r.lu(B, 4, lo=0.7, hi=4.0)
    fl = r.b(0.75, B, 4)
    c[:, k0 : k0 + 4, 1] = torch.where(fl, hi[:, None, 1] - s[:, k0 : k0 + 4, 1], c[:, k0 : k0 + 4, 1])
    c[:, NB : NB + 2, 1] = hi[:, None, 1] - s[:, NB : NB + 2, 1]
    s = torch.minimum(s, rh[:, None] * 1.2).clamp_min(0.004)
    # density + camera clearance: switched-off prims go far away with zero-ish size
    keep = r.b(1.0, B, n) & (r.u(B, n) < r.u(B, 1, lo=0.25, hi=1.1))
    clear = clearance(q, c, s, t[:, None]) > r.u(B, 1, lo=0.12, hi=0.35)
    ok = keep & clear
    tk = ok[:, 14:19].all(-1, keepdim=True)
    ok = torch.cat([ok[:, :14], tk.expand(-1, 5), ok[:, 19:]], 1)
    ok = torch.cat([ok[:, :10], ok[:, 10:14] & ok[:, 6:10], ok[:, 14:]], 1)
    c = torch.where(ok.unsqueeze(-1), c, torch.full_like(c, 1e4))
    s = torch.where(ok.unsqueeze(-1), s, torch.full_like(s, 0.01))
    c = torch.cat([rc[:, None], c], 1)
    s = torch.cat([rh[:, None], s], 1)
    q = torch.cat([eye.expand(B, 1, 3, 3), q], 1)
    prim = primitives(c, s, q)
    # ---- materials: one row per (prim, face)
    mat = sample_materials(r, s, n_tex)
    # ---- lights: two point lights (first casts shadows) + ambient
    lp = rc[:, None] + rh[:, None] * r.u(B, 2, 3, lo=-0.85, hi=0.85)
    lp[:, :, 1] = rc[:, None, 1] - rh[:, None, 1] * r.u(B, 2, lo=0.3, hi=0.95)
    warm = 1 + 0.15 * r.n(B, 2, 3)
    li = r.lu(B, 2, 1, lo=0.3, hi=1.6)
    am = r.lu(B, 1, lo=0.2, hi=1.0) * (1 + 0.08 * r.n(B, 3))
    fall = 1 / (rh.norm(dim=-1, keepdim=True) * r.u(B, 1, lo=0.3, hi=2.0)) ** 2
    light = torch.cat([lp[:, 0], (warm * li)[:, 0], lp[:, 1], (warm * li)[:, 1] * r.b(0.7, B, 1), am, fall], -1)
    prim_all, mat_all = prim.new_zeros(B, 1, raycast.P, raycast.PS), mat.new_zeros(B, raycast.P, 6, raycast.MS)
    starts = (0, 1 + NB), (raycast.ELLIPSOID, NS), (raycast.CONE, NC)  # where they stand among the ray caster's
    for (start, count), a, b in zip(starts, prim.split((1 + NB, NS, NC), 1), mat.split((1 + NB, NS, NC), 1)):
        prim_all[:, 0, start : start + count], mat_all[:, start : start + count] = a, b
    light = F.pad(light, (0, raycast.LS - light.shape[-1]))
    return dict(prim=prim_all, mat=mat_all, light=light, cam=camera_table(R, t, K), R=R, t=t, K=K, motion=mt)


def primitives(c: Tensor, s: Tensor, q: Tensor, taper: Tensor | float = 0.0) -> Tensor:
    """Rows of the ray caster's `prim` (..., 20) from centres (..., 3), half sizes (..., 3), rotations (..., 3, 3), taper (...)."""
    A = q.transpose(-1, -2) / s.unsqueeze(-1)
    taper = torch.as_tensor(taper, device=c.device, dtype=c.dtype).expand(c.shape[:-1])
    extra = torch.stack([taper, s.norm(dim=-1)], -1)  # the bounding sphere of a box holds the other solids
    return F.pad(torch.cat([A.flatten(-2), c, s, extra], -1), (0, raycast.PS - 17))


def camera_table(R: Tensor, t: Tensor, K: Tensor) -> Tensor:
    """The ray caster's `cam` (B, N, 32) of ideal cameras: R (B, N, 3, 3), t (B, N, 3), K (B, 5)."""
    table = torch.cat([R.flatten(2), t, K.unsqueeze(1).expand(-1, t.shape[1], -1)], -1)
    return F.pad(table, (0, raycast.CS - table.shape[-1]))


def rays_of(K: Tensor, H: int, W: int) -> Tensor:
    """z=1 ray directions (B,H,W,2) of the pixel centres"""
    v, u = torch.meshgrid(
        torch.arange(H, device=K.device, dtype=torch.float32),
        torch.arange(W, device=K.device, dtype=torch.float32),
        indexing="ij",
    )
    k = K.view(-1, 5, 1, 1)
    x = (u - k[:, 2]) / k[:, 0]
    y = (v - k[:, 3]) / k[:, 1]
    s = 1 + k[:, 4] * (x * x + y * y)
    return torch.stack([x * s, y * s], -1)
