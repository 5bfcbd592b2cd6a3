"""Camera paths of robots and people: driving, walking, climbing, loops, shaking, standing, turning on the spot, and circling
what they look at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speed3r_ros.training.scenes import FEWEST_INTERVALS, ODDS, axis_angle, eul, rotation, sample_cameras
from speed3r_ros.training.scenes import MOTIONS as ROOM_MOTIONS
from speed3r_ros.training.textures import Rng

PATHS = ("drive", "walk", "climb", "loop", "shake", "stand", "turn", "circle")
MOTIONS = (*ROOM_MOTIONS, *PATHS)
DRIVE, WALK, CLIMB, LOOP, SHAKE, STAND, TURN, CIRCLE = range(len(ROOM_MOTIONS), len(MOTIONS))
PATH_SHARE = 0.6  # of sequences; the others move as in rooms
PATH_ODDS = (22, 22, 8, 14, 10, 8, 16, 14)
STEPS = 8  # of a flight of stairs
OFFSETS = (0.0, 0.0, 0.0, 0.5, -0.5, 1.0)  # where a camera on a robot looks, in half turns from the way it goes
FASTEST_CIRCLE = 30.0  # degrees per frame interval on average: views of a short sequence overlap, too


def sample_motions(r: Rng, B: int, motion: int | None) -> Tensor:
    """Index (B,) into MOTIONS: the given one for all, or random ones."""
    if motion is not None:
        return torch.full((B,), motion, device=r.d)
    rooms, paths = sum(ODDS), sum(PATH_ODDS)
    return r.choice(
        [(1 - PATH_SHARE) * odds / rooms for odds in ODDS] + [PATH_SHARE * odds / paths for odds in PATH_ODDS], B
    )


def sample_paths(r: Rng, kind: Tensor, N: int, H: int, W: int, outdoor: Tensor) -> dict[str, Tensor]:
    """Camera-to-world R (B, N, 3, 3), t (B, N, 3) in metres, K (B, 5), motion (B,), and the stairs that `climb` needs.

    kind: (B,) indices into MOTIONS. outdoor: (B,) bool, where the motions of rooms are larger. Stairs: foot (B, 3), the place
    where the first step begins at the eye's height, heading (B,), rise and run (B,) of a step. target (B, 3): what `circle`
    looks at, in metres along the world's axes (y down); the first camera's place for the other motions.
    """
    B, dev, deg = len(kind), r.d, math.pi / 180
    R0, t0, K, _ = sample_cameras(r, B, N, H, W, torch.where(kind < DRIVE, kind, 5))
    larger = torch.where(outdoor, r.lu(B, lo=1.5, hi=8.0), torch.ones(B, device=dev))[:, None, None]
    t0 = t0[:, :1] + (t0 - t0[:, :1]) * larger

    def is_(*kinds: int) -> Tensor:
        return torch.stack([kind == k for k in kinds]).any(0)[:, None]

    i = torch.arange(N, device=dev, dtype=torch.float32)[None]

    def sway(lo: float, hi: float) -> Tensor:
        """Smooth noise (B, N) of unit size with periods of lo to hi frames."""
        waves = r.n(B, 3, 1) * torch.sin(2 * math.pi * (i[:, None] / r.lu(B, 3, 1, lo=lo, hi=hi) + r.u(B, 3, 1)))
        return waves.sum(1) / 3**0.5

    # along the ground: distance, heading, place
    straight = is_(CLIMB)
    step = torch.where(is_(DRIVE), r.lu(B, 1, lo=0.05, hi=1.2) * torch.where(outdoor[:, None], 1.0, 0.3), 0.0)
    step = torch.where(is_(WALK, CLIMB), r.lu(B, 1, lo=0.03, hi=0.3), step)
    pace = (step * (1 + 0.25 * sway(10, 60))).clamp_min(0)
    distance = torch.cumsum(pace, 1) - pace[:, :1]
    psi = r.i(4, B, 1) * (math.pi / 2) + 5 * deg * r.n(B, 1)  # along the axes of rooms
    bend = torch.where(straight, 0.0, r.lu(B, 1, lo=1, hi=25) * deg)
    heading = psi + bend * (sway(30, 200) + r.n(B, 1) * i / 40)
    ahead = torch.stack([heading.sin(), torch.zeros_like(heading), heading.cos()], -1)
    place = torch.cumsum(ahead * pace[..., None], 1)
    place = place - place[:, :1]
    # loops: once around an ellipse and a little on
    turns = r.u(B, 1, lo=1.0, hi=1.25) * r.sgn(B, 1)
    angle = 2 * math.pi * turns * i / max(N - 1, FEWEST_INTERVALS)
    radii = r.lu(B, 2, 1, lo=0.4, hi=2.5) * torch.where(outdoor, 3.0, 1.0)[:, None, None]
    x, z = radii[:, 0] * angle.sin(), radii[:, 1] * (1 - angle.cos())
    tangent = torch.atan2(radii[:, 0] * angle.cos() * turns, radii[:, 1] * angle.sin() * turns)
    loop = is_(LOOP)
    heading = torch.where(loop, tangent, heading)
    place = torch.where(loop[..., None], torch.stack([x, torch.zeros_like(x), z], -1), place)
    # stairs
    rise, run = r.u(B, lo=0.14, hi=0.19), r.u(B, lo=0.26, hi=0.32)
    begin = torch.minimum(0.25 * distance[:, -1], r.u(B, lo=0.3, hi=2.0))
    climbed = (distance - begin[:, None]).clamp_min(0) / run[:, None]
    up = rise[:, None] * climbed.clamp(max=STEPS)
    place[..., 1] = place[..., 1] - torch.where(is_(CLIMB), up, 0.0)
    axis = torch.stack([psi.sin(), torch.zeros_like(psi), psi.cos()], -1)[:, 0]
    foot = axis * begin[:, None]

    # the body: steps bob and sway, wheels tremble
    walking = is_(WALK, CLIMB).float()
    stride = 2 * math.pi * (distance / 0.7 + r.u(B, 1))
    place[..., 1] = place[..., 1] + walking * r.u(B, 1, lo=0.01, hi=0.05) * torch.sin(stride)
    lateral = walking * r.u(B, 1, lo=0.005, hi=0.04) * torch.sin(0.5 * stride)
    place = place + lateral[..., None] * torch.stack([heading.cos(), torch.zeros_like(x), -heading.sin()], -1)
    tremble = r.lu(B, 1, lo=0.01, hi=0.4) * deg
    yaw = heading + walking * r.u(B, 1, hi=3) * deg * torch.sin(0.5 * stride) + tremble * r.n(B, N)
    pitch = walking * r.u(B, 1, hi=1.5) * deg * torch.sin(stride) + tremble * r.n(B, N)
    roll = walking * r.u(B, 1, hi=1.5) * deg * torch.sin(0.5 * stride) + tremble * r.n(B, N)
    # the head or the mount
    offset = torch.tensor(OFFSETS, device=dev)[r.i(len(OFFSETS), B, 1)] * math.pi * (~straight)
    look = walking * r.u(B, 1, hi=20) * deg
    yaw = yaw + offset + look * sway(15, 60)
    pitch = pitch + (r.n(B, 1) * 6 - 4) * deg + 0.3 * look * sway(15, 60)
    down = r.b(0.5, B, 1) & is_(CLIMB)  # climbing backwards in time, facing the other way
    yaw = yaw + math.pi * down
    moved = is_(DRIVE, WALK, CLIMB, LOOP)[..., None]
    R = torch.where(moved[..., None], eul(yaw, pitch, roll), R0)
    t = torch.where(moved, place, t0)
    order = torch.where(down, N - 1 - i, i).long()
    R, t = torch.gather(R, 1, order[..., None, None].expand_as(R)), torch.gather(t, 1, order[..., None].expand_as(t))

    # sudden shakes, for a few frames at a time
    burst = r.b(0.15, B, N).float()
    burst = (burst + 0.6 * burst.roll(1, 1)).clamp(max=1) * is_(SHAKE)
    R = R @ rotation(burst[..., None] * r.lu(B, 1, 1, lo=1, hi=6) * deg * r.n(B, N, 3))
    t = t + burst[..., None] * r.lu(B, 1, 1, lo=0.005, hi=0.06) * r.n(B, N, 3)
    # on the spot
    spin = r.u(B, 1, lo=20, hi=330) * deg * r.sgn(B, 1) * i / max(N - 1, FEWEST_INTERVALS)
    nod = r.u(B, 1, hi=12) * deg * sway(15, 60)
    turning = R0[:, :1] @ eul(spin + 3 * deg * sway(10, 60), nod, 0.3 * nod)
    R = torch.where(is_(TURN)[..., None, None], turning, R)
    R = torch.where(is_(STAND)[..., None, None], R0[:, :1], R)
    t = torch.where(is_(STAND, TURN)[..., None], t0[:, :1], t)
    # around a target
    total = r.lu(B, 1, lo=60, hi=400).clamp(max=FASTEST_CIRCLE * max(N - 1, 1)) * deg * r.sgn(B, 1)
    pace = (1 + 0.4 * sway(N / 4 + 3, 2 * N + 3)).clamp_min(0.2)
    gone = torch.cumsum(pace, 1) - pace[:, :1]
    angle = r.u(B, 1, hi=2 * math.pi) + total * gone / gone[:, -1:].clamp_min(1e-6)
    away = r.lu(B, 1, lo=0.7, hi=5.0) * larger[..., 0] * (1 + 0.12 * sway(N / 3 + 3, 2 * N + 3)).clamp(0.75, 1.25)
    oval = r.lu(B, 1, lo=0.85, hi=1.2)
    above = ((r.u(B, 1, hi=45) + 3 * sway(N / 3 + 3, 2 * N + 3)) * deg).clamp(0, math.pi / 4)
    out = torch.stack([oval * angle.sin(), 0 * angle, angle.cos() / oval], -1) * away[..., None]
    out[..., 1] = -out.norm(dim=-1) * above.tan()
    circle = is_(CIRCLE)
    t = torch.where(circle[..., None], out - out[:, :1], t)
    target = torch.where(circle, -out[:, 0], t[:, 0])
    miss = 1.5 * deg * (r.n(B, 3, 1) + torch.stack([sway(15, 60), sway(15, 60), sway(15, 60)], 1))
    miss = miss + r.lu(B, 1, 1, lo=0.02, hi=0.5) * deg * r.n(B, 3, N)
    yaw, pitch = torch.atan2(-out[..., 0], -out[..., 2]), torch.atan2(out[..., 1], out[..., ::2].norm(dim=-1))
    aim = eul(yaw + miss[:, 0], pitch + miss[:, 1], miss[:, 2])
    R = torch.where(circle[..., None, None], aim, R)
    return dict(R=R, t=t, K=K, motion=kind, foot=foot, heading=psi[:, 0], rise=rise, run=run, target=target)


def velocities(R: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Angular velocity in camera axes and linear velocity (B, N, 3) per frame, means of the two neighbouring differences."""
    if t.shape[1] < 2:
        return torch.zeros_like(t), torch.zeros_like(t)
    turn = axis_angle(R[:, :-1].transpose(-1, -2) @ R[:, 1:])
    go = t[:, 1:] - t[:, :-1]
    both = torch.cat([turn, go], -1)
    both = (torch.cat([both[:, :1], both], 1) + torch.cat([both, both[:, -1:]], 1)) / 2
    return both[..., :3], both[..., 3:]
