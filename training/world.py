"""The world that the compact model is trained in: rooms, corridors and streets, with clutter, stairs and things that move,
seen by the cameras of robots. Conventions and table layout: `kernels.raycast`. Metres; world y is down.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.kernels import raycast
from speed3r_ros.kernels.raycast import BOX, CONE, ELLIPSOID, NB, NC, NS, NT, PRISM
from speed3r_ros.training.motions import CIRCLE as CIRCLING
from speed3r_ros.training.motions import CLIMB as CLIMBING
from speed3r_ros.training.motions import STEPS, sample_motions, sample_paths, velocities
from speed3r_ros.training.scenes import (
    camera_table,
    clearance,
    eul,
    place_in_view,
    primitives,
    sample_materials,
    sample_scene,
)
from speed3r_ros.training.textures import FACADE, FOLIAGE, PAVING, SMOOTH, TILES, Rng, _color

STAIRS = BOX + 24  # the first of the boxes that steps use; those before are the place's
SPARE = (BOX + 24 + STEPS, PRISM + 6, ELLIPSOID + 6, *range(CONE + 6, CONE + 9))  # clutter's own
MOVERS = (BOX + NB - 1, PRISM + NT - 1, ELLIPSOID + NS - 1, CONE + NC - 1)  # a vehicle of two, a person of two solids
TARGETS = (SPARE[0], SPARE[1], CONE + 6)  # what a camera circles: one box, prism or cone, instead of that clutter
TARGET_ODDS = (0.6, 0.15, 0.25)
TARGET_SHARE = 0.8  # of the sequences that circle; the others circle a place on the floor
UPON = ((BOX + 21, BOX + 18, 3), (ELLIPSOID, CONE, 4))  # in streets: cabins on cars, crowns on trunks, and how many
BARE_SOLIDS = 5  # at most, beside the target
BARE_CONTRAST = 0.05  # of the texture's, at most
ASPECTS = (4 / 3, 3 / 2, 16 / 10, 16 / 9, 1.0)  # of sensors
LARGEST_SPEED = 0.05  # image widths per frame interval that exposure and read-out may smear
RESIDUAL = 0.6 / 224  # of the image's width that each term of the residual distortion moves a corner, at most
DISTANT = 1e3  # metres to the sun


@dataclass(frozen=True)
class WorldConfig:
    """How often each option is drawn, per sequence, in [0, 1]. Raises ValueError otherwise.

    street, corridor: share of streets; of corridors among the rooms. stairs, clutter, moving: a flight of stairs, more solids
    (gables, ramps, cones, boxes, ellipsoids), a vehicle and a person. textureless, reflective, tiles, contrast: materials of
    a part of all faces. bare: hardly any texture on any face, and few solids; drawn twice as often where the camera circles.
    motion_blur, rolling_shutter, exposure_steps, vignetting, dark, noise: the sensor. distortion: left over by rectification.
    anisotropic: images of another aspect ratio, squeezed into the network's as the engine does. field_of_view: horizontal,
    degrees; half of all lenses are usual ones, around 64.
    """

    street: float = 0.4
    corridor: float = 0.35
    stairs: float = 0.1
    clutter: float = 0.6
    moving: float = 0.3
    textureless: float = 0.2
    reflective: float = 0.2
    tiles: float = 0.15
    contrast: float = 0.15
    bare: float = 0.12
    motion_blur: float = 0.35
    rolling_shutter: float = 0.35
    exposure_steps: float = 0.2
    vignetting: float = 0.3
    dark: float = 0.15
    noise: float = 0.2
    distortion: float = 0.5
    anisotropic: float = 0.5
    field_of_view: tuple[float, float] = (40.0, 110.0)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "field_of_view":
                if not 10 <= value[0] <= value[1] <= 150:
                    raise ValueError(f"field_of_view is {value}: give (lowest, highest) within 10 to 150 degrees")
            elif not 0 <= value <= 1:
                raise ValueError(f"{field.name} is {value}: give a probability from 0 to 1")


def pick(r: Rng, families: Tensor, wanted: tuple[int, ...], *shape: int) -> Tensor:
    """Random textures (*shape) of the wanted families, as floats; families (M,) tells that of each texture."""
    odds = (families[:, None] == torch.tensor(wanted, device=r.d)).any(1).float() + 1e-6
    return torch.multinomial(odds, math.prod(shape), True, generator=r.g).view(shape).float()


def sample_world(
    r: Rng,
    coin: random.Random,
    config: WorldConfig,
    families: Tensor,
    B: int,
    N: int,
    H: int,
    W: int,
    motion: int | None,
) -> dict[str, Tensor]:
    """Tables of `kernels.raycast` for B sequences of N frames, and R, t, K, motion and outdoor (B,).

    coin: draws that the CPU needs to know: how many of the B are streets, which come last. motion: index into
    `motions.MOTIONS`, or None for random ones.
    """
    streets = sum(coin.random() < config.street for _ in range(B))
    outdoor = torch.arange(B, device=r.d) >= B - streets
    path = sample_paths(r, sample_motions(r, B, motion), N, H, W, outdoor)
    path["K"] = sample_lens(r, config, path["K"], H, W)
    circling = path["motion"] == CIRCLING
    bare = r.u(B) < config.bare * (1 + circling.float())
    path |= sample_site(r, path, H)
    parts = []
    for chosen, make in ((slice(0, B - streets), _room), (slice(B - streets, B), _street)):
        if B - streets if make is _room else streets:
            parts.append(make(r, config, families, {k: v[chosen] for k, v in path.items()}, H, W))
    scene = {k: torch.cat([part[k] for part in parts]) for k in ("prim", "mat", "light")}
    prim = scene["prim"][:, 0]
    floor = prim[:, 0, 10] + prim[:, 0, 13]
    thin(r, prim, bare, outdoor)
    add_stairs(r, config, path, prim, floor)
    add_clutter(r, config, path, prim, floor, bare, H, W)
    add_target(r, path, prim, floor, outdoor)
    scene["mat"] = change_materials(r, config, families, scene["mat"], bare)
    scene["prim"] = add_movers(r, config, path, prim, floor, outdoor, H, W)
    scene["cam"] = sample_shutter(r, config, path, H, W)
    return scene | dict(R=path["R"], t=path["t"], K=path["K"], motion=path["motion"], outdoor=outdoor)


def sample_lens(r: Rng, config: WorldConfig, K: Tensor, H: int, W: int) -> Tensor:
    """K (B, 5) with other focal lengths; its principal point and distortion stay."""
    B, (lo, hi) = len(K), config.field_of_view
    usual = (64 + 8 * r.n(B)).clamp(lo, hi)
    fov = torch.where(r.b(0.5, B), usual, r.u(B, lo=lo, hi=hi)) * math.pi / 180
    fx = W / 2 / torch.tan(fov / 2)
    aspect = torch.tensor(ASPECTS, device=r.d)[r.i(len(ASPECTS), B)]
    squeeze = torch.where(r.b(config.anisotropic, B), aspect * H / W, 1.0)
    return torch.cat([torch.stack([fx, fx * squeeze * (1 + 0.005 * r.n(B))], -1), K[:, 2:]], -1)


def sample_site(r: Rng, path: dict[str, Tensor], H: int) -> dict[str, Tensor]:
    """What a circling camera asks of its place: half sizes (B, 3) of the solid around the target, which fills 10 to 60 % of
    the view's height and stays clear of the cameras; the floor's height (B,) at its foot, NaN for the other motions; and points
    held (B, N + 2, 3) that the place surrounds: the cameras and the solid.
    """
    t, target, fy = path["t"], path["target"], path["K"][:, 1]
    B, circling = len(t), path["motion"] == CIRCLING
    away = t - target[:, None]
    tall = r.lu(B, lo=0.1, hi=0.6) * H / 2 / fy * away.norm(dim=-1).mean(1)
    widest = 0.4 * away[..., ::2].norm(dim=-1).amin(1)  # a box's edge is then at 0.57 of the nearest camera's distance
    broad = torch.minimum(tall[:, None] * r.lu(B, 2, lo=0.4, hi=2.0), widest[:, None])
    floor = torch.maximum(target[:, 1] + tall, t[..., 1].amax(1) + r.lu(B, lo=0.15, hi=0.6))
    reach = 1.5 * broad.amax(1, keepdim=True) * circling[:, None] * torch.tensor([1.0, 0.0, 1.0], device=r.d)
    held = torch.cat([t, torch.stack([target - reach, target + reach], 1)], 1)
    size = torch.stack([broad[:, 0], tall, broad[:, 1]], -1)
    return dict(size=size, floor=torch.where(circling, floor, torch.nan), held=held)


def sample_shutter(r: Rng, config: WorldConfig, path: dict[str, Tensor], H: int, W: int) -> Tensor:
    """The ray caster's `cam`: residual distortion, and exposure and read-out of cameras that move as their path does."""
    R, t, K = path["R"], path["t"], path["K"]
    B, N = t.shape[:2]
    table = camera_table(R, t, K)
    fx = K[:, 0]
    corner = ((W / 2 / fx) ** 2 + (H / 2 / K[:, 1]) ** 2).sqrt()
    terms = torch.stack([fx * corner**3, fx * corner**5, 3 * fx * corner**2, 3 * fx * corner**2], -1)
    left = RESIDUAL * W * r.u(B, 4, lo=-1, hi=1) / terms * r.b(config.distortion, B, 1)
    turn, go = velocities(R, t)
    most = (LARGEST_SPEED * W / fx)[:, None, None]

    def limited(x: Tensor, most: Tensor) -> Tensor:
        return x * (most / x.norm(dim=-1, keepdim=True).clamp_min(1e-9)).clamp(max=1)

    exposure = r.u(B, 1, 1, lo=0.1, hi=0.7) * r.b(config.motion_blur, B, 1, 1)
    readout = r.u(B, 1, 1, lo=0.1, hi=0.8) * r.b(config.rolling_shutter, B, 1, 1)
    table[..., 17:21] = left[:, None]
    table[..., 21:24] = limited(turn, most)
    table[..., 24:27] = limited(go, 2 * most)  # at 2 m
    table[..., 27:29] = torch.cat([exposure, readout], -1)
    return table


def _room(r: Rng, config: WorldConfig, families: Tensor, path: dict[str, Tensor], H: int, W: int) -> dict[str, Tensor]:
    cameras = path["R"], path["t"], path["K"], path["motion"]
    B, N = path["t"].shape[:2]
    scene = sample_scene(
        r, B, N, H, W, len(families), corridors=config.corridor, cameras=cameras, held=path["held"], floor=path["floor"]
    )
    furniture = (scene["prim"][:, 0, :, 16] > 0)[..., None, None]
    others = sample_materials(r, torch.ones_like(scene["prim"][:, 0, :, 12:15]), len(families))
    return scene | dict(mat=torch.where(furniture, scene["mat"], others))


def _street(
    r: Rng, config: WorldConfig, families: Tensor, path: dict[str, Tensor], H: int, W: int
) -> dict[str, Tensor]:
    """Two rows of houses along the path, pavements, parked cars, trees, bushes and a pole, under sun or clouds."""
    R, t = path["R"], path["t"]
    B, N = t.shape[:2]
    dev = r.d
    way = t[:, -1] - t[:, 0] + 0.2 * R[:, 0, :, 2]
    yaw = torch.atan2(way[:, 0], way[:, 2]) + r.b(0.15, B) * math.pi / 2
    Q = eul(yaw, 0 * yaw, 0 * yaw)  # from the street's axes (right, down, along) to the world's
    p = (Q.transpose(-1, -2)[:, None] @ path["held"][..., None]).squeeze(-1)
    floor = torch.where(path["floor"].isnan(), t[..., 1].amax(1) + r.lu(B, lo=0.3, hi=2.0), path["floor"])
    first, last = p[..., 2].amin(1), p[..., 2].amax(1)
    walls = torch.stack([p[..., 0].amin(1) - r.lu(B, lo=1.2, hi=9), p[..., 0].amax(1) + r.lu(B, lo=1.2, hi=9)], 1)
    side = torch.tensor([-1.0, 1.0], device=dev)
    c, s = torch.zeros(B, raycast.P, 3, device=dev), torch.full((B, raycast.P, 3), 0.01, device=dev)
    taper, there = torch.zeros(B, raycast.P, device=dev), torch.zeros(B, raycast.P, dtype=torch.bool, device=dev)

    def put(at: int, place: Tensor, size: Tensor, here: Tensor, narrowing: Tensor | float = 0.0) -> None:
        n = place.shape[1]
        c[:, at : at + n], s[:, at : at + n], there[:, at : at + n], taper[:, at : at + n] = (
            place,
            size,
            here,
            narrowing,
        )

    def near_wall(n: int, lo: float, hi: float) -> tuple[Tensor, Tensor]:
        """Across and along (B, n) of things at a facade's foot, lo to hi away from it."""
        which = r.i(2, B, n)
        across = torch.gather(walls, 1, which) - side[which] * r.u(B, n, lo=lo, hi=hi)
        ahead = first[:, None] - 3 + r.u(B, n) * (last - first + 35)[:, None]
        return across, ahead

    # houses: six on each side, from behind the first camera to beyond the last
    length = r.lu(B, 2, 6, lo=5, hi=18)
    length = length * ((last - first + 60)[:, None, None] / length.sum(-1, keepdim=True)).clamp_min(1)
    start = (first - 12)[:, None, None] + torch.cumsum(length, -1) - length
    deep = r.lu(B, 2, 6, lo=2, hi=6)
    height = r.lu(B, 1, 1, lo=3, hi=14) * r.lu(B, 2, 6, lo=0.6, hi=1.7)
    across = walls[..., None] + side[:, None] * (deep + r.u(B, 2, 6, hi=1.2) * r.b(0.5, B, 2, 1))
    house = torch.stack([across, floor[:, None, None] - height / 2, start + length / 2], -1)
    width = length / 2 - 0.5 * r.u(B, 2, 6) * r.b(0.3, B, 2, 1)
    stands = r.b(0.9, B, 2, 6)
    put(BOX, house.flatten(1, 2), torch.stack([deep, height / 2, width], -1).flatten(1, 2), stands.flatten(1))
    gable = r.lu(B, 2, 3, lo=0.4, hi=1.8)
    above = torch.stack([across[..., :3], floor[:, None, None] - height[..., :3] - gable, house[..., :3, 2]], -1)
    tops = torch.stack([deep[..., :3] + 0.2, gable, width[..., :3]], -1)
    roofed = stands[..., :3] & r.b(0.7, B, 2, 1)
    put(PRISM, above.flatten(1, 2), tops.flatten(1, 2), roofed.flatten(1), r.u(B, 6, lo=0.6, hi=1.0))
    # a house across the far end, pavements, lane markings
    tall = r.lu(B, 1, lo=3, hi=20)
    end = torch.stack([walls.mean(1, True), floor[:, None] - tall / 2, (last + r.lu(B, lo=25, hi=150))[:, None]], -1)
    put(BOX + 12, end, torch.stack([25 + 0 * tall, tall / 2, 5 + 0 * tall], -1), r.b(0.5, B, 1))
    broad = r.u(B, 2, lo=0.5, hi=1.5)
    kerb = torch.stack([walls - side * broad, (floor - 0.06)[:, None].expand(B, 2), first[:, None].expand(B, 2)], -1)
    put(BOX + 13, kerb, torch.stack([broad, 0 * broad + 0.06, 0 * broad + 150], -1), r.b(0.6, B, 1).expand(B, 2))
    lane = walls[:, :1] + (walls[:, 1:] - walls[:, :1]) * r.u(B, 3, lo=0.2, hi=0.8)
    dashes = r.lu(B, 3, lo=1, hi=100)
    marking = torch.stack([lane, (floor - 0.004)[:, None].expand(B, 3), first[:, None] + r.u(B, 3, lo=0, hi=25)], -1)
    put(BOX + 15, marking, torch.stack([0 * lane + 0.07, 0 * lane + 0.004, dashes], -1), r.b(0.5, B, 3))
    # parked cars: body and cabin
    across, ahead = near_wall(3, 1.0, 3.0)
    body = torch.stack([across, (floor - 0.6)[:, None].expand(B, 3), ahead], -1)
    put(BOX + 18, body, torch.tensor([0.85, 0.35, 2.0], device=dev).expand(B, 3, 3), r.b(0.6, B, 3))
    cabin = body + torch.tensor([0.0, -0.62, 0.2], device=dev)
    put(BOX + 21, cabin, torch.tensor([0.75, 0.27, 1.1], device=dev).expand(B, 3, 3), there[:, BOX + 18 : BOX + 21])
    # trees, two conifers or poles, bushes
    across, ahead = near_wall(4, 0.6, 2.5)
    tall, thick = r.lu(B, 4, lo=1.5, hi=4), r.lu(B, 4, lo=0.06, hi=0.25)
    trunk = torch.stack([across, floor[:, None] - tall / 2, ahead], -1)
    put(CONE, trunk, torch.stack([thick, tall / 2, thick], -1), r.b(0.6, B, 4), r.u(B, 4, hi=0.6))
    crown = r.lu(B, 4, 3, lo=0.8, hi=1.3) * r.lu(B, 4, 1, lo=0.6, hi=2.0)
    put(ELLIPSOID, trunk - F.pad((tall / 2 + 0.6 * crown[..., 1])[..., None], (1, 1)), crown, there[:, CONE : CONE + 4])
    across, ahead = near_wall(2, 0.3, 1.5)
    tall, fir = r.lu(B, 2, lo=2, hi=7), r.b(0.5, B, 2)
    thick = torch.where(fir, 0.25 * tall, 0.06)
    place = torch.stack([across, floor[:, None] - tall / 2, ahead], -1)
    put(CONE + 4, place, torch.stack([thick, tall / 2, thick], -1), r.b(0.7, B, 2), fir.float())
    across, ahead = near_wall(2, 0.0, 0.8)
    bush = r.lu(B, 2, 3, lo=0.3, hi=1.0)
    put(ELLIPSOID + 4, torch.stack([across, floor[:, None] - 0.7 * bush[..., 1], ahead], -1), bush, r.b(0.7, B, 2))

    q = Q[:, None].expand(B, raycast.P, 3, 3)
    c = (Q[:, None] @ c[..., None]).squeeze(-1)
    there = there & (clearance(q, c, s, t[:, None]) > 0.2)
    for above, below, n in UPON:  # no cabin without a body, no crown without a trunk
        there[:, above : above + n] &= there[:, below : below + n]
    prim = primitives(c, s, q, taper) * there[..., None]
    extent = (r.lu(B, lo=150, hi=500) + last - first)[:, None].expand(B, 3).clone()
    extent[:, 1] = 200
    centre = t.mean(1)
    centre[:, 1] = floor - 200
    prim[:, 0] = primitives(centre, extent, torch.eye(3, device=dev).expand(B, 3, 3))
    mat = sample_materials(r, s, len(families))
    _dress_street(r, families, mat)
    return dict(prim=prim[:, None], mat=mat, light=_daylight(r, families, centre))


def _dress_street(r: Rng, families: Tensor, mat: Tensor) -> None:
    """Facades, paving and foliage on most of what they belong to, in place. mat: (B, P, 6, 16)."""
    B = len(mat)

    def texture(
        rows: Tensor, wanted: tuple[int, ...], odds: float, lo: float, hi: float, upright: bool = False
    ) -> None:
        """rows (B, n, faces, 16) share one texture per solid, repeated every lo to hi metres."""
        n = rows.shape[1]
        yes = r.b(odds, B, n, 1)
        rows[..., 0] = torch.where(yes, pick(r, families, wanted, B, n, 1), rows[..., 0])
        rows[..., 1] = torch.where(yes, 1 / r.lu(B, n, 1, lo=lo, hi=hi), rows[..., 1])
        rows[..., 6:9] = torch.where(yes[..., None], r.u(B, n, 1, 1, lo=0.6, hi=1.1), rows[..., 6:9])
        rows[..., 9:12] = torch.where(yes[..., None], 0.0, rows[..., 9:12])
        if upright:
            rows[..., 4:6] = torch.where(yes[..., None], torch.tensor([1.0, 0.0], device=r.d), rows[..., 4:6])

    texture(mat[:, BOX : BOX + 13], FACADE, 0.75, 5, 16, upright=True)
    texture(mat[:, :1, 3:4], PAVING, 0.7, 1, 6)
    texture(mat[:, BOX + 13 : BOX + 15], PAVING, 0.7, 0.5, 3)
    texture(mat[:, ELLIPSOID : ELLIPSOID + 6], FOLIAGE, 0.9, 0.5, 2)
    mat[:, BOX + 15 : BOX + 18, :, 6:9] = 0.1  # markings are white
    mat[:, BOX + 15 : BOX + 18, :, 9:12] = 0.8


def _daylight(r: Rng, families: Tensor, centre: Tensor) -> Tensor:
    """The ray caster's `light` (B, 32) outdoors."""
    B = len(centre)
    overcast = r.b(0.35, B, 1).float()
    azimuth, elevation = r.u(B, hi=2 * math.pi), r.u(B, lo=0.25, hi=1.2)
    to_sun = torch.stack([azimuth.cos() * elevation.cos(), -elevation.sin(), azimuth.sin() * elevation.cos()], -1)
    warm = torch.tensor([1.1, 1.0, 0.85], device=r.d)
    sun = (
        warm * r.u(B, 1, lo=0.1, hi=0.35) * (1 - 0.9 * overcast)
    )  # times 4: without fall-off, light arrives as 1 / 0.25
    ambient = r.u(B, 1, lo=0.25, hi=0.6) * (1 + 0.5 * overcast) * (1 + 0.05 * r.n(B, 3))
    blue = torch.tensor([0.35, 0.6, 1.0], device=r.d)
    bright = r.u(B, 1, lo=0.6, hi=1.4)
    horizon = bright * (0.9 + 0.1 * blue)
    zenith = bright * (overcast * 0.85 + (1 - overcast) * blue * r.u(B, 1, lo=0.5, hi=1.0))
    clouds = torch.stack(
        [
            torch.ones(B, device=r.d),
            pick(r, families, SMOOTH, B),
            r.lu(B, lo=0.15, hi=0.8),
            r.u(B, hi=0.6) * r.b(0.6, B),
        ],
        -1,
    )
    haze = r.lu(B, 1, lo=2e-4, hi=1e-2) * r.b(0.6, B, 1)
    light = torch.cat(
        [
            centre + DISTANT * to_sun,
            sun,
            torch.zeros(B, 6, device=r.d),
            ambient,
            torch.zeros(B, 1, device=r.d),
            clouds[:, :1],
            horizon,
            zenith,
            clouds[:, 1:],
            haze,
        ],
        -1,
    )
    return F.pad(light, (0, raycast.LS - light.shape[-1]))


def remove(prim: Tensor, gone: Tensor, outdoor: Tensor) -> None:
    """Take solids out of prim (B, P, 20) where gone (B, P), and in streets what stands on them."""
    for above, below, n in UPON:
        gone[:, above : above + n] |= outdoor[:, None] & gone[:, below : below + n]
    prim *= ~gone[..., None]


def thin(r: Rng, prim: Tensor, bare: Tensor, outdoor: Tensor) -> None:
    """Leave at most BARE_SOLIDS of the furniture in prim (B, P, 20) where bare (B,); houses and their roofs stay."""
    B, P = prim.shape[:2]
    furniture = prim[..., 16] > 0
    furniture[:, 0] = False
    furniture[:, BOX : BOX + 13] &= ~outdoor[:, None]
    furniture[:, PRISM : PRISM + 6] &= ~outdoor[:, None]
    order = torch.where(furniture, r.u(B, P), 1.0).argsort(1).argsort(1)
    few = order < r.i(BARE_SOLIDS + 1, B, 1)
    remove(prim, furniture & ~few & bare[:, None], outdoor)


def hiding(prim: Tensor, t: Tensor, target: Tensor) -> Tensor:
    """Solids (B, P) in the way to the target (B, 3) from two or more of twelve places along the path t (B, N, 3)."""
    t = t[:, torch.linspace(0, t.shape[1] - 1, 12, device=t.device).long(), None]
    way = t + (target[:, None, None] - t) * torch.linspace(0.15, 1.0, 10, device=t.device)[:, None]  # (B, 12, 10, 3)
    local = prim[..., :9].unflatten(-1, (3, 3)) @ (way.flatten(1, 2)[:, None] - prim[:, :, None, 9:12]).mT
    inside = (local.abs().amax(2) < 1).unflatten(-1, way.shape[1:3]) & (prim[..., 16] > 0)[..., None, None]
    inside[:, 0] = False  # the enclosure
    return inside.any(-1).sum(-1) >= 2


def add_target(r: Rng, path: dict[str, Tensor], prim: Tensor, floor: Tensor, outdoor: Tensor) -> None:
    """The solid that a camera circles into prim (B, P, 20), standing on the floor; what hides it goes."""
    circling = path["motion"] == CIRCLING
    hides = torch.zeros_like(prim[..., 0], dtype=torch.bool)
    hides[circling] = hiding(prim[circling], path["t"][circling], path["target"][circling])
    remove(prim, hides, outdoor)

    target, size = path["target"], path["size"]
    B = len(target)
    top = target[:, 1] - size[:, 1]
    c, s = target.clone(), size.clone()
    c[:, 1], s[:, 1] = (floor + top) / 2, (floor - top) / 2
    yaw = r.u(B, hi=2 * math.pi)
    kind = r.choice(TARGET_ODDS, B)
    slender = torch.stack([torch.zeros(B, device=r.d), r.u(B, lo=0.6, hi=1.0), r.u(B, hi=1.0) * r.b(0.6, B)], -1)
    row = primitives(c, s, eul(yaw, 0 * yaw, 0 * yaw), slender.gather(1, kind[:, None])[:, 0])
    there = circling & r.b(TARGET_SHARE, B)
    for number, slot in enumerate(TARGETS):
        prim[:, slot] = torch.where((there & (kind == number))[:, None], row, prim[:, slot])


def add_stairs(r: Rng, config: WorldConfig, path: dict[str, Tensor], prim: Tensor, floor: Tensor) -> None:
    """A flight of eight steps and a landing into prim (B, P, 20), under who climbs it or somewhere ahead of the others."""
    t, run, rise = path["t"], path["run"], path["rise"]
    B = len(t)
    climbing = path["motion"] == CLIMBING
    aside = eul(r.u(B, hi=2 * math.pi), 0 * run, 0 * run)[..., 2] * r.lu(B, 1, lo=1.0, hi=5.0)
    foot = torch.where(climbing[:, None], path["foot"], t.mean(1) + aside)
    heading = torch.where(climbing, path["heading"], r.u(B, hi=2 * math.pi))
    q = eul(heading, 0 * heading, 0 * heading)
    k = torch.arange(STEPS, device=r.d, dtype=torch.float32)
    half = (run[:, None] / 2).expand(B, STEPS).clone()
    half[:, -1] = 2.0  # the landing
    high = (k + 1) * rise[:, None] / 2
    along = k * run[:, None] + half
    wide = r.u(B, 1, lo=0.5, hi=1.5).expand(B, STEPS)
    c = (q[:, None] @ torch.stack([0 * along, 0 * along, along], -1)[..., None]).squeeze(-1) + foot[:, None]
    c[..., 1] = floor[:, None] - high
    s = torch.stack([wide, high, half], -1)
    q = q[:, None].expand(B, STEPS, 3, 3)
    clear = (clearance(q, c, s, t[:, None]) > 0.1).all(1)
    there = (climbing | r.b(config.stairs, B)) & clear
    prim[:, STAIRS : STAIRS + STEPS] = primitives(c, s, q) * there[:, None, None]


def add_clutter(
    r: Rng, config: WorldConfig, path: dict[str, Tensor], prim: Tensor, floor: Tensor, bare: Tensor, H: int, W: int
) -> None:
    """Solids of every kind into what is free of prim (B, P, 20): gables and ramps, cones, a box and an ellipsoid; none
    where bare (B,).
    """
    R, t, K = path["R"], path["t"], path["K"]
    slots = torch.tensor((*range(PRISM, PRISM + 6), *SPARE), device=r.d)
    B, n = len(t), len(slots)
    lo = torch.maximum(prim[:, 0, 9:12] - prim[:, 0, 12:15], t.amin(1) - 8)
    hi = torch.minimum(prim[:, 0, 9:12] + prim[:, 0, 12:15], t.amax(1) + 8)
    c = place_in_view(r, R, t, K, lo, hi, n, H, W)
    distance = (c - t.mean(1, keepdim=True)).norm(dim=-1, keepdim=True).clamp(0.4, 12)
    s = r.lu(B, n, 3, lo=0.4, hi=1.6) * r.lu(B, n, 1, lo=0.05, hi=0.22) * distance
    s = torch.minimum(s, 0.6 * (hi - lo)[:, None])
    on_floor = r.b(0.7, B, n)
    c[..., 1] = torch.where(on_floor, floor[:, None] - s[..., 1], c[..., 1])
    tilt = 0.7 * (~on_floor)
    q = eul(r.u(B, n, hi=2 * math.pi), tilt * r.n(B, n), tilt * r.n(B, n))
    there = r.b(0.7, B, n) & r.b(config.clutter, B, 1) & ~bare[:, None] & (clearance(q, c, s, t[:, None]) > 0.15)
    taper = torch.where(slots < PRISM, 0.0, r.u(B, n, lo=0.2, hi=1.0))
    taper = torch.where((slots >= ELLIPSOID) & (slots < CONE), 0.0, taper)
    rows = primitives(c, s, q, taper)
    # a third of the prisms lean over until one side is upright: ramps. The bounding sphere grows as the top moves.
    lean = torch.where((slots >= PRISM) & (slots < ELLIPSOID) & r.b(0.33, B, n), taper / 2, 0.0)
    rows[..., 0:3] = rows[..., 0:3] - lean[..., None] * rows[..., 3:6]
    rows[..., 16] = rows[..., 16] * (1 + lean)
    free = prim[:, slots, 16] == 0
    prim[:, slots] = torch.where((there & free)[..., None], rows, prim[:, slots])


def add_movers(
    r: Rng, config: WorldConfig, path: dict[str, Tensor], prim: Tensor, floor: Tensor, outdoor: Tensor, H: int, W: int
) -> Tensor:
    """prim (B, P, 20) -> (B, N, P, 20) with a vehicle and a person that cross the view, each in half of what moves."""
    R, t, K = path["R"], path["t"], path["K"]
    B, N = t.shape[:2]
    lo = torch.maximum(prim[:, 0, 9:12] - prim[:, 0, 12:15], t.amin(1) - 8)
    hi = torch.minimum(prim[:, 0, 9:12] + prim[:, 0, 12:15], t.amax(1) + 8)
    place = place_in_view(r, R, t, K, lo, hi, 2, H, W)
    yaw = r.u(B, 2, hi=2 * math.pi)
    q = eul(yaw, 0 * yaw, 0 * yaw)
    size = torch.where(outdoor, r.u(B, lo=0.8, hi=1.2), r.u(B, lo=0.15, hi=0.35))[:, None]  # carts indoors
    tall = torch.minimum(r.u(B, lo=1.2, hi=1.9), 0.9 * (floor - lo[:, 1]))[:, None]

    def solid(like: list[float], scale: Tensor, which: int, above: float) -> tuple[Tensor, Tensor]:
        """Centre and half sizes (B, 3); above: of the centre over the floor; lengths are in units of the scale."""
        c = place[:, which].clone()
        c[:, 1] = floor - above * scale[:, 0]
        return c, scale * torch.tensor(like, device=r.d)

    solids = (
        solid([0.85, 0.4, 2.0], size, 0, 0.65),
        solid([0.75, 0.3, 1.1], size, 0, 1.35),
        solid([0.07, 0.08, 0.08], tall, 1, 0.92),
        solid([0.16, 0.42, 0.16], tall, 1, 0.42),
    )
    c, s = (torch.stack(x, 1) for x in zip(*solids))
    who = torch.tensor([0, 0, 1, 1], device=r.d)
    q = q[:, who]
    taper = torch.tensor([0.0, 0.4, 0.0, 0.5], device=r.d).expand(B, 4)
    reach = (place - t.mean(1, keepdim=True)).norm(dim=-1)
    travel = r.lu(B, 2, lo=0.15, hi=2.0) * reach * r.sgn(B, 2)
    time = torch.linspace(-0.5, 0.5, N, device=r.d)
    offset = (q[..., 2] * travel[:, who, None])[:, :, None] * time[:, None]  # (B, 4, N, 3), forwards or backwards
    clear = clearance(q, c, s, t[:, None] - offset) > 0.25
    there = (r.b(config.moving, B, 1) & r.b(0.7, B, 2))[:, who] & clear
    there = there.unflatten(1, (2, 2)).all(-1)[:, who]
    prim = prim[:, None].repeat(1, N, 1, 1)
    rows = primitives(c, s, q, taper)[:, None].repeat(1, N, 1, 1)
    rows[..., 9:12] = rows[..., 9:12] + offset.transpose(1, 2)
    rows = rows * there[:, None, :, None]
    for number, slot in enumerate(MOVERS):
        prim[:, :, slot] = rows[:, :, number]
    return prim


def moving(index: Tensor) -> Tensor:
    """Where a primitive seen (any shape) is one that moves."""
    return torch.stack([index == solid for solid in MOVERS]).any(0)


def change_materials(r: Rng, config: WorldConfig, families: Tensor, mat: Tensor, bare: Tensor) -> Tensor:
    """mat (B, P, 6, 16) with textureless, reflective, tiled and high-contrast faces, in some sequences.

    bare (B,): where each solid has one plain colour (the enclosure: each of its faces), and a third of them gloss.
    """
    B, P = mat.shape[:2]

    def some(odds: float) -> Tensor:
        """Faces (B, P, 6, 1): of most solids of some sequences."""
        return (r.b(odds, B, 1, 1) & r.b(0.6, B, P, 1)).expand(B, P, 6)[..., None]

    gain, bias = mat[..., 6:9], mat[..., 9:12]
    tiled = torch.cat([pick(r, families, TILES, B, P, 1, 1), 1 / r.lu(B, P, 1, 1, lo=0.2, hi=2.0)], -1)
    straight = torch.tensor([1.0, 0.0], device=r.d)
    yes = some(config.tiles)
    head = torch.where(yes, tiled, mat[..., 0:2])
    turn = torch.where(yes, straight, mat[..., 4:6])
    yes = some(config.contrast)
    strong = r.u(B, P, 1, 1, lo=1.2, hi=2.2)
    gain, bias = torch.where(yes, strong, gain), torch.where(yes, 0.5 - 0.5 * strong, bias)
    yes = some(config.textureless)
    gain, bias = torch.where(yes, 0.03 * gain, gain), torch.where(yes, bias + 0.485 * gain, bias)
    yes = some(config.reflective)
    shine = r.u(B, P, 1, 2, lo=0.1, hi=0.8)
    yes = yes | bare.view(B, 1, 1, 1) & r.b(0.33, B, P, 1, 1)
    shine = torch.where(yes, shine, mat[..., 12:14])
    n = int(bare.sum())
    gain[bare], bias[bare] = BARE_CONTRAST * r.u(n, P, 1, 1), _color(r, n, P, 1)
    bias[bare, 0] = _color(r, n, 6)
    return torch.cat([head, mat[..., 2:4], turn, gain, bias, shine, mat[..., 14:]], -1)


def sample_exposure(r: Rng, config: WorldConfig, B: int, N: int, H: int, W: int) -> tuple[Tensor, Tensor]:
    """What sensors do to light: gain (B, N, 1, H, W) and standard deviation of noise (B,), for `augment`."""
    jump = r.b(0.5 / N**0.5, B, N) * 0.6 * r.n(B, N) * r.b(config.exposure_steps, B, 1)
    gain = torch.cumsum(jump, 1).clamp(-1.2, 1.0).exp()
    gain = gain * torch.where(r.b(config.dark, B, 1), r.lu(B, 1, lo=0.1, hi=0.4), 1.0)
    y = torch.linspace(-1, 1, H, device=r.d)[:, None]
    x = torch.linspace(-1, 1, W, device=r.d)
    fall = r.u(B, 1, 1, 1, 1, lo=0.2, hi=0.7) * r.b(config.vignetting, B, 1, 1, 1, 1)
    vignette = 1 - fall * (x * x + y * y) / 2
    return gain[..., None, None, None] * vignette, r.u(B, lo=0.02, hi=0.07) * r.b(config.noise, B)
