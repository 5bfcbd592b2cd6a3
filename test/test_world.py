"""The world of training: solids against their inequalities, sky, what moves, shutters, motions and options."""

import random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from speed3r_ros.kernels import raycast
from speed3r_ros.mapping.geometry import rotation_angle
from speed3r_ros.model.network import Network, NetworkConfig, Prediction
from speed3r_ros.training.evaluate import evaluate_rendered
from speed3r_ros.training.losses import losses
from speed3r_ros.training.motions import CIRCLE, MOTIONS, STEPS, sample_paths
from speed3r_ros.training.render import SPLITS, SceneDataset, WorldConfig
from speed3r_ros.training.scenes import camera_table, primitives
from speed3r_ros.training.textures import Rng, TextureBank
from speed3r_ros.training.world import (
    BARE_CONTRAST,
    BARE_SOLIDS,
    MOVERS,
    RESIDUAL,
    TARGETS,
    moving,
    sample_lens,
    sample_shutter,
    sample_world,
)

NOTHING = replace(WorldConfig(), **{field.name: 0.0 for field in fields(WorldConfig) if field.name != "field_of_view"})
SIZE = 40, 56
TABLES = "prim", "mat", "light", "cam"


@pytest.fixture(scope="module")
def bank():
    return TextureBank("cpu", int(torch.randint(2**31, ())), 1, outdoor=True)


def sample(bank, config, sequences, views, motion=None, size=SIZE):
    """A random scene in float64."""
    code = None if motion is None else MOTIONS.index(motion)
    r = Rng("cpu", int(torch.randint(2**31, ())))
    scene = sample_world(r, random.Random(0), config, bank.families, sequences, views, *size, code)
    return scene | {k: scene[k].double() for k in (*TABLES, "R", "t", "K")}


def degrees_between(A, B):
    """Angles (...) of A^T B for rotations (..., 3, 3)."""
    return torch.from_numpy(np.rad2deg(rotation_angle((A.transpose(-1, -2) @ B).numpy())))


def random_rotation():
    Q, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    return Q * torch.det(Q)


@pytest.mark.parametrize(
    ("slot", "taper"),
    [(raycast.BOX, 0.0), (raycast.PRISM, 0.7), (raycast.PRISM, 1.0), (raycast.ELLIPSOID, 0.0)]
    + [(raycast.CONE, taper) for taper in (0.0, 0.6, 1.0)],
)
def test_solids_are_where_their_inequalities_hold(bank, slot, taper):
    """Depth by stepping along the rays; normals by differences of neighbouring points."""
    size = 25, 31
    scene = sample(bank, NOTHING, 1, 1, "stand", size)
    Q, s = random_rotation(), 0.5 + torch.rand(3, dtype=torch.float64)
    row = primitives(torch.tensor([0.0, 0, 4], dtype=torch.float64), s, Q, taper)
    shear = torch.eye(3, dtype=torch.float64)
    if slot == raycast.PRISM:
        shear[0, 1] = taper / 2
    row[:9] = (shear @ row[:9].view(3, 3)).flatten()
    row[16] *= 2
    scene["prim"] = torch.zeros_like(scene["prim"][:, :1])
    scene["prim"][0, 0, 0] = primitives(torch.zeros(3), torch.full((3,), 9.0), torch.eye(3))
    scene["prim"][0, 0, slot] = row
    K = torch.tensor([[40.0, 40, 15, 12, 0]], dtype=torch.float64)
    scene["cam"] = camera_table(torch.eye(3, dtype=torch.float64)[None, None], torch.zeros(1, 1, 3).double(), K)
    seen = raycast.raycast_reference(scene, bank.data, *size, details=True)
    v, u = np.mgrid[: size[0], : size[1]]
    ray = torch.from_numpy(np.stack([(u - 15) / 40, (v - 12) / 40, np.ones_like(u)], -1)).double()
    z = torch.arange(0, 9, 0.004, dtype=torch.float64)
    local = ((ray[..., None, :] * z[:, None]) - row[9:12]) @ row[:9].view(3, 3).T
    x, y, w = local.unbind(-1)
    width = 1 - taper * (1 - y) / 2
    if slot == raycast.ELLIPSOID:
        inside = (local**2).sum(-1) < 1
    elif slot == raycast.CONE:
        inside = (x**2 + w**2 < width**2) & (y.abs() < 1)
    else:
        inside = (x.abs() < width) & (y.abs() < 1) & (w.abs() < 1)
    hit = inside.any(-1)
    first = z[inside.int().argmax(-1)]
    on = seen.index[0] == slot
    assert hit.sum() > 20 and (hit & ~on).sum() == 0 and (on & ~hit).float().mean() < 0.02  # thin edges between steps
    assert ((seen.depth[0] - first)[hit & on].abs() < 0.0041).all()
    points = ray * seen.depth[0, ..., None]
    a, b = (points[1:-1, 2:] - points[1:-1, :-2]), (points[2:, 1:-1] - points[:-2, 1:-1])
    normal = torch.linalg.cross(b, a)
    normal = normal / normal.norm(dim=-1, keepdim=True)
    cosine = (normal * seen.normal[0].permute(1, 2, 0)[1:-1, 1:-1]).sum(-1)
    inner = torch.ones_like(on[1:-1, 1:-1])
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            inner &= on[1 + i : size[0] - 1 + i, 1 + j : size[1] - 1 + j]
    for axis in (1, 2):  # nor on both sides of an edge
        before, after = (seen.normal[0].narrow(axis, i, size[axis - 1] - 2) for i in (0, 2))
        inner &= ((before * after).sum(0) > 0.8).narrow(2 - axis, 1, size[2 - axis] - 2)
    assert cosine[inner].median() > 0.99 and (cosine[inner] > 0).float().mean() > 0.9
    if slot == raycast.BOX:  # texture coordinates measure metres on flat faces
        repeats = scene["mat"][0, slot, :, 1].unique()
        one = (cosine > 1 - 1e-9) & inner
        step = (seen.texture[0, :, 1:-1, 2:] - seen.texture[0, :, 1:-1, :-2]).norm(dim=0)
        ratio = (step / a.norm(dim=-1))[one]
        assert len(ratio) and (ratio[:, None] / repeats - 1).abs().amin(1).max() < 1e-7  # stored as float32


def test_sky_is_where_nothing_is(bank):
    scene = sample(bank, replace(NOTHING, street=1.0), 4, 2)
    seen = raycast.raycast_reference(scene, bank.data, *SIZE)
    sky = seen.depth.isinf()
    assert (seen.index[sky] == 0).all() and torch.isfinite(seen.rgb).all()
    ground = ~sky & (seen.index == 0)
    v, u = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    K, R, t = scene["K"].repeat_interleave(2, 0)[..., None, None], scene["R"].flatten(0, 1), scene["t"].flatten(0, 1)
    x, y = (u - K[:, 2]) / K[:, 0], (v - K[:, 3]) / K[:, 1]
    s = 1 + K[:, 4] * (x * x + y * y)
    ray = (R[:, None, None] @ torch.stack([x * s, y * s, torch.ones_like(x)], -1)[..., None]).squeeze(-1)
    floor = (scene["prim"][:, 0, 0, 10] + scene["prim"][:, 0, 0, 13]).repeat_interleave(2)[:, None, None]
    above = (floor - t[:, None, None, 1] - seen.depth * ray[..., 1])[ground]  # metres; the tables were drawn in float32
    rim = (1 - raycast.FLOOR) * scene["prim"][:, 0, 0, 13].max()  # where the enclosure's sides count as floor
    assert ground.any() and above.min() > -1e-3 and above.max() < rim + 1e-3
    # below the horizon, sky is only beyond the enclosure's sides
    down = (floor - t[:, None, None, 1]) / ray[..., 1]
    centre, half = (scene["prim"][:, 0, 0, i : i + 3].repeat_interleave(2, 0)[:, None, None] for i in (9, 12))
    outside = (t[:, None, None] + ray * down[..., None] - centre).abs() / half > 0.999
    assert outside[..., ::2].any(-1)[sky & (down > 0)].all()


def test_what_moves_is_masked(bank):
    scene = sample(bank, replace(NOTHING, street=0.5, moving=1.0), 16, 3)
    seen = raycast.raycast_reference(scene, bank.data, *SIZE)
    still = dict(scene, prim=scene["prim"].clone())
    still["prim"][:, :, list(MOVERS)] = 0
    behind = raycast.raycast_reference(still, bank.data, *SIZE)
    mask = moving(seen.index)
    assert mask.any() and not mask.all()
    assert torch.equal(seen.depth[~mask], behind.depth[~mask]) and (seen.depth[mask] < behind.depth[mask]).all()
    place = scene["prim"][:, :, list(MOVERS), 9:12]
    there = scene["prim"][:, 0, list(MOVERS), 16] > 0
    steps = (place[:, 1:] - place[:, :-1]).norm(dim=-1).amin(1)
    assert (steps[there] > 0).all() and (place[:, :, :, 1].diff(dim=1) == 0).all()  # along the ground


def test_colours_of_points_agree(bank):
    """Without gloss, a surface that two views see has one colour."""
    scene = sample(bank, replace(NOTHING, street=0.5, clutter=1.0), 6, 2, "turn")
    scene["mat"][..., 12:14] = 0
    near = sample(bank, NOTHING, 1, 2)["cam"][..., 17:].mul(0)  # an ideal shutter
    scene["cam"][..., 17:] = near[:, :1]
    turn = torch.linalg.matrix_exp(torch.tensor([[0, 0, 0.05], [0, 0, 0], [-0.05, 0, 0]], dtype=torch.float64))
    scene["cam"][:, 1, :9] = (scene["R"][:, 0] @ turn).flatten(1)
    scene["cam"][:, 1, 9:12] = scene["cam"][:, 0, 9:12]
    scene["cam"][..., 16] = 0
    seen = raycast.raycast_reference(scene, bank.data, *SIZE, 4)
    rgb, depth = (x.unflatten(0, (6, 2)) for x in (seen.rgb, seen.depth))
    v, u = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    K = scene["K"][..., None, None]
    ray = torch.stack([(u - K[:, 2]) / K[:, 0], (v - K[:, 3]) / K[:, 1], torch.ones(6, *SIZE)], -1) @ turn
    x, y = ray[..., 0] / ray[..., 2] * K[:, 0] + K[:, 2], ray[..., 1] / ray[..., 2] * K[:, 1] + K[:, 3]
    grid = torch.stack([2 * x / (SIZE[1] - 1) - 1, 2 * y / (SIZE[0] - 1) - 1], -1)
    moved = torch.nn.functional.grid_sample(rgb[:, 1], grid, align_corners=True)
    inside = (grid.abs() < 1).all(-1) & depth[:, 0].isfinite()
    error = ((moved - rgb[:, 0]).abs().amax(1) / (rgb[:, 0].amax(1) + 0.05))[inside]
    other = ((rgb[:, 1] - rgb[:, 0]).abs().amax(1) / (rgb[:, 0].amax(1) + 0.05))[inside]
    assert error.median() < 0.05 and error.mean() < other.mean()


def test_rolling_shutter_is_a_camera_for_each_row(bank):
    scene = sample(bank, replace(NOTHING, street=0.5, rolling_shutter=1.0), 3, 4, "drive")
    rolled = raycast.raycast_reference(scene, bank.data, *SIZE)
    row = int(torch.randint(SIZE[0], ()))
    cam = scene["cam"].clone()
    time = cam[..., 28:29] * (row / (SIZE[0] - 1) - 0.5)
    skew = torch.zeros(*cam.shape[:2], 3, 3, dtype=torch.float64)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        skew[..., i, j], skew[..., j, i] = -cam[..., 21 + k], cam[..., 21 + k]
    R = scene["R"] @ torch.linalg.matrix_exp(time[..., None] * skew)
    cam[..., :9], cam[..., 9:12] = R.flatten(2), cam[..., 9:12] + time * cam[..., 24:27]
    cam[..., 17:] = 0
    then = raycast.raycast_reference(dict(scene, cam=cam), bank.data, *SIZE)
    a, b = rolled.depth[:, row], then.depth[:, row]
    assert scene["cam"][..., 21:29].abs().amax() > 0
    assert torch.isclose(a, b, rtol=2e-3).float().mean() > 0.99  # to second order of the angle; silhouettes differ


def test_residual_distortion_stays_small():
    height, width = 168, 224
    r = Rng("cpu", int(torch.randint(2**31, ())))
    config = replace(NOTHING, distortion=1.0, anisotropic=1.0)
    K = sample_lens(
        r, config, torch.tensor([[0.0, 0, (width - 1) / 2, (height - 1) / 2, 0]]).repeat(50, 1), height, width
    )
    fov = 2 * torch.rad2deg(torch.atan(width / 2 / K[:, 0]))
    assert fov.min() >= 39.9 and fov.max() <= 110.1 and fov.max() > 85
    assert 0.7 < (K[:, 1] / K[:, 0]).min() < 0.8 and 1.25 < (K[:, 1] / K[:, 0]).max() < 1.4  # 1:1 to 16:9 into 4:3
    path = dict(R=torch.eye(3).expand(50, 2, 3, 3), t=torch.zeros(50, 2, 3), K=K)
    k1, k2, p1, p2 = sample_shutter(r, config, path, height, width)[:, 0, 17:21, None, None].unbind(1)
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    K = K[..., None, None]
    x, y = (u - K[:, 2]) / K[:, 0], (v - K[:, 3]) / K[:, 1]
    r2 = x * x + y * y
    dx = x * (k1 * r2 + k2 * r2 * r2) + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    dy = y * (k1 * r2 + k2 * r2 * r2) + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
    moved = torch.hypot(dx * K[:, 0], dy * K[:, 1])
    moved = moved / width
    assert 0.05 / 224 < moved.amax((1, 2)).median() and moved.max() < 4 * 1.4 * RESIDUAL  # the squeeze stretches rows


def test_motions_of_robots():
    dataset = SceneDataset("cpu", int(torch.randint(2**31, ())), 24, 32, 1, False, 1, NOTHING)
    for name in ("stand", "turn"):
        batch = dataset.batch(4, 5, name)
        assert torch.equal(batch["t"], batch["t"][:, :1].expand_as(batch["t"]))
        same = torch.equal(batch["R"], batch["R"][:, :1].expand_as(batch["R"]))
        assert same == (name == "stand")
    batch = dataset.batch(2, 2, "stand")
    assert torch.equal(batch["depth"][:, 0], batch["depth"][:, 1])
    r = Rng("cpu", int(torch.randint(2**31, ())))
    families = dataset.textures.families

    def path(name, views, count=6):
        scene = sample_world(r, random.Random(0), NOTHING, families, count, views, 24, 32, MOTIONS.index(name))
        return scene["R"].double(), scene["t"].double()

    R, t = path("loop", 64)
    assert ((t[:, 1:] - t[:, :1]).norm(dim=-1).amin(1) < 0.15 * (t[:, 1:] - t[:, :1]).norm(dim=-1).amax(1)).all()
    revisit = (t[:, 8:] - t[:, :1]).norm(dim=-1).argmin(1) + 8
    again = degrees_between(R[:, 0], R[torch.arange(6), revisit])
    assert again.median() < 25
    R, t = path("drive", 256)
    assert torch.isfinite(R).all() and (t[..., 1].std(1) < 0.01).all()
    assert t.diff(dim=1).norm(dim=-1).sum(1).min() > 2  # along the way, which may lead back
    R, t = path("walk", 64)
    height = t[..., 1] - t[..., 1].mean(1, keepdim=True)
    assert (height.abs().amax(1) > 0.005).all() and (height.abs().amax(1) < 0.12).all()
    R, t = path("climb", 64)
    assert (t[..., 1].amax(1) - t[..., 1].amin(1)).median() > 0.5
    R, t = path("shake", 64, 60)
    step = degrees_between(R[:, 1:], R[:, :-1])
    assert (step.amax(1) / step.median(1).values).quantile(0.05) > 2  # the weakest shake of the fastest turn may hide


@pytest.mark.parametrize("name, most", [("spin", 140), ("turn", 330)])
def test_two_views_of_a_turn_overlap(name, most):
    """They have a part of it: opposite views share nothing to learn from. most: degrees that a long sequence turns."""
    r = Rng("cpu", int(torch.randint(2**31, ())))

    def turned(views):
        R = sample_paths(r, torch.full((200,), MOTIONS.index(name)), views, 24, 32, torch.zeros(200).bool())[
            "R"
        ].double()
        return degrees_between(R[:, 1:], R[:, :-1])

    assert turned(40).sum(1).max() > 0.8 * most  # one step after another, some of them more than half a turn
    assert turned(2).median() < most / 4


def seen_from(R, t, target):
    """Places (B, 3) of targets in the axes of cameras (B, N), float64: (B, N, 3)."""
    return ((target[:, None] - t)[..., None, :] @ R).squeeze(-2)


def test_circling_cameras_look_at_their_target():
    B, N, H, W = 40, 24, 84, 112
    r = Rng("cpu", int(torch.randint(2**31, ())))
    path = sample_paths(r, torch.full((B,), CIRCLE), N, H, W, torch.arange(B) % 2 == 1)
    R, t, K, target = (path[k].double() for k in ("R", "t", "K", "target"))
    x, y, z = seen_from(R, t, target).unbind(-1)
    u, v = x / z * K[:, :1] + K[:, 2:3], y / z * K[:, 1:2] + K[:, 3:4]
    assert ((z > 0) & (u > 0) & (u < W - 1) & (v > 0) & (v < H - 1)).double().mean() > 0.9
    away = t - target[:, None]
    radius = away[..., ::2].norm(dim=-1)
    height = torch.rad2deg(torch.atan2(-away[..., 1], radius))
    assert height.min() > -0.01 and height.max() < 45.01
    assert radius[::2].min() > 0.7 * 0.75 / 1.2 and radius[::2].max() < 5 * 1.25 * 1.2  # indoors, metres
    steps = torch.from_numpy(np.diff(np.rad2deg(np.unwrap(torch.atan2(away[..., 0], away[..., 2]).numpy()))))
    assert 38 < steps.sum(1).abs().min() and steps.sum(1).abs().max() < 422  # 60 to 400 before the circle is an oval
    assert (steps.sign() == steps[:, :1].sign()).all() and (steps.std(1) / steps.mean(1).abs()).median() > 0.02


def test_circled_solids_are_seen_and_no_camera_is_inside_a_solid(bank):
    B, N, seed = 24, 24, int(torch.randint(2**31, ()))
    config = replace(NOTHING, street=0.5, clutter=1.0)
    scene = sample_world(Rng("cpu", seed), random.Random(0), config, bank.families, B, N, *SIZE, CIRCLE)
    path = sample_paths(Rng("cpu", seed), torch.full((B,), CIRCLE), N, *SIZE, scene["outdoor"])
    scene |= {k: scene[k].double() for k in (*TABLES, "R", "t")}
    assert torch.equal(path["t"].double(), scene["t"])  # the same draws
    place = seen_from(scene["R"], scene["t"], path["target"].double())
    cam = scene["cam"].clone()
    cam[..., 12:14], cam[..., 14:16], cam[..., 16:] = 1, -place[..., :2] / place[..., 2:], 0  # one pixel, at the target
    seen = raycast.raycast_reference(dict(scene, cam=cam), bank.data, 1, 1)
    index, depth = seen.index.view(B, N), seen.depth.view(B, N)
    solid = torch.stack([index == slot for slot in TARGETS]).any(0)

    def inside(points):
        """Whether points (B, M, 3) are in the boxes around solids: (B, M, P)."""
        prim = scene["prim"][:, :1]
        local = prim[..., :9].unflatten(-1, (3, 3)) @ (points[:, :, None] - prim[..., 9:12])[..., None]
        return (local.abs().amax((-2, -1)) < 1) & (prim[..., 16] > 0)

    stands = inside(path["target"].double()[:, None])[:, 0, list(TARGETS)].any(1)
    assert stands.double().mean() > 0.4
    assert (solid & (depth < place[..., 2]))[stands].double().mean() > 0.85  # hardly anything hides it
    cameras = inside(scene["t"])
    assert cameras[..., 0].all() and not cameras[..., 1:].any()


def test_bare_places_have_hardly_any_texture(bank):
    def contrast(config):
        """Relative difference of neighbouring pixels of one face, which a tenth of them exceed; the scene."""
        scene = sample(bank, config, 16, 2)
        seen = raycast.raycast_reference(scene, bank.data, *SIZE, details=True)
        same = (seen.index[..., 1:] == seen.index[..., :-1]) & seen.depth[..., 1:].isfinite()
        same &= (seen.normal[..., 1:] * seen.normal[..., :-1]).sum(1) > 0.999
        grey = seen.rgb.mean(1)
        return ((grey[..., 1:] - grey[..., :-1]).abs() / (grey[..., 1:] + grey[..., :-1]))[same].quantile(0.9), scene

    config = replace(NOTHING, street=0.5)
    usual, _ = contrast(config)
    bare, scene = contrast(replace(config, bare=1.0))
    assert bare < 0.4 * usual
    assert scene["mat"][..., 6:9].max() <= BARE_CONTRAST
    indoors = scene["prim"][~scene["outdoor"], 0, 1:, 16] > 0
    assert indoors.any() and indoors.sum(1).max() <= BARE_SOLIDS + STEPS + 1  # a climb, and the target

    def share(motion):
        mat = sample(bank, replace(NOTHING, bare=0.3), 300, 1, motion)["mat"]
        return (mat[..., 6:9].amax((1, 2, 3)) <= BARE_CONTRAST).double().mean()

    assert 0.15 < share("stand") < 0.45 < share("circle") < 0.75


@pytest.fixture(scope="module")
def make():
    """Batches of one seed from different worlds, on the same textures."""
    dataset = SceneDataset("cpu", int(torch.randint(2**31, ())), 24, 32, 2, False, 1, NOTHING)
    seed = int(torch.randint(2**31, ()))

    def batch(config):
        dataset.world, dataset.coin = config, random.Random(seed)
        dataset.layout, dataset.random = Rng("cpu", seed), Rng("cpu", seed)
        return dataset.batch(20, 3)

    return batch, batch(NOTHING)


@pytest.mark.parametrize("option", [field.name for field in fields(WorldConfig) if field.name != "field_of_view"])
def test_every_option_shows_and_stays_finite(make, option):
    batch, without = make
    batch = batch(replace(NOTHING, **{option: 1.0}))
    for name in ("img", "R", "t", "K", "ray"):
        assert torch.isfinite(batch[name]).all()
    assert torch.isfinite(batch["depth"][~batch["sky"]]).all() and (batch["depth"] > 0).all()
    assert torch.equal(batch["valid"], ~batch["sky"] & ~batch["moving"])
    assert batch["img"].min() >= 0 and batch["img"].max() <= 1
    assert not torch.equal(without["img"], batch["img"])
    assert batch["sky"].any() == (option == "street") and batch["moving"].any() == (option == "moving")


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="moving is 1.5: give a probability from 0 to 1"):
        WorldConfig(moving=1.5)
    with pytest.raises(ValueError, match="field_of_view"):
        WorldConfig(field_of_view=(100, 90))


def test_losses_leave_out_sky_and_what_moves():
    """Gradients of depth vanish there, of confidence they ask for less; everything is finite."""
    dataset = SceneDataset(
        "cpu", int(torch.randint(2**31, ())), 28, 56, 1, False, 1, WorldConfig(street=1.0, moving=1.0)
    )
    batch = dataset.batch(8, 3)
    out_of_it = ~batch["valid"]
    assert batch["sky"].any()
    rays = batch["ray"].permute(0, 3, 1, 2)[:, None].expand(-1, 3, -1, -1, -1)
    z = torch.rand(8, 3, 28, 56).add(0.5).requires_grad_()
    confidence = torch.zeros_like(z, requires_grad=True)
    points = torch.cat([rays * z[:, :, None], z[:, :, None]], 2)
    descriptor = torch.zeros(8, 3, 8, 4, requires_grad=True)
    out = Prediction(points, confidence, batch["R"], batch["t"], torch.zeros(8, 3, 2), descriptor)
    total, figures = losses(out, batch, 1)
    total.backward()
    assert all(torch.isfinite(x).all() for x in (total, z.grad, confidence.grad, *figures.values()))
    assert z.grad[out_of_it].abs().max() < 1e-7 < z.grad[~out_of_it].abs().max()
    assert (confidence.grad[out_of_it] > 0).all()


def test_held_out_splits_by_name():
    network = Network(NetworkConfig(channels=64, encoder_blocks=1, alternating_blocks=1, stem=16, decoder=8)).eval()
    for split in SPLITS:
        row = evaluate_rendered(network, 1, 2, torch.device("cpu"), split=split)
        assert np.isfinite(row["absrel"]) and np.isfinite(row["rotation"])
    with pytest.raises(ValueError, match="split is 'street': use one of rooms, world"):
        evaluate_rendered(network, 1, 2, torch.device("cpu"), split="street")
