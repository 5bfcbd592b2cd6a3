"""Rendered scenes: geometry that agrees between views, motions that do what they say, and the kernel against its reference."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from speed3r_ros.kernels import raycast
from speed3r_ros.mapping.geometry import rotation_angle
from speed3r_ros.sources import open_source
from speed3r_ros.training.losses import LossWeights, losses, project, relative_poses
from speed3r_ros.training.render import MOTIONS, SceneDataset, WorldConfig
from speed3r_ros.training.scenes import camera_table

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dataset():
    """Still worlds through ideal cameras."""
    ideal = WorldConfig(moving=0, rolling_shutter=0, distortion=0)
    return SceneDataset("cpu", int(torch.randint(2**31, ())), 28, 42, samples=1, textures_per_family=1, world=ideal)


def looking_at(place, target):
    """Camera table (B, M, 32) of one-pixel cameras at `place` whose ray goes to `target`, both (B, M, 3) float64."""
    ahead = torch.nn.functional.normalize(target - place, dim=-1)
    axis = torch.nn.functional.one_hot(ahead.abs().argmin(-1), 3).double()  # far from parallel to it
    right = torch.nn.functional.normalize(torch.linalg.cross(axis, ahead), dim=-1)
    R = torch.stack([right, torch.linalg.cross(ahead, right), ahead], -1)
    return camera_table(R, place, torch.tensor([[1.0, 1, 0, 0, 0]], dtype=torch.float64).expand(len(R), 5))


@pytest.mark.parametrize("motion", MOTIONS)
def test_views_agree_on_the_geometry(dataset, motion, monkeypatch):
    """In float64: a ray from one view's centre to a point of another view's depth meets that point, or something before it."""
    scenes = []

    def cast(scene, *arguments):
        exact = {k: v.double() if k in ("prim", "mat", "light", "cam") else v for k, v in scene.items()}
        scenes.append((exact, raycast.raycast_reference(exact, *arguments)))
        return scenes[0][1]

    monkeypatch.setattr(dataset, "cast", cast)
    batch = dataset.batch(4, 3, motion)
    depth, ray, R, t, valid = batch["depth"], *(batch[k].double() for k in ("ray", "R", "t")), batch["valid"]
    assert torch.isfinite(batch["img"]).all() and depth.dtype == torch.float64
    some = valid.flatten(1).any(1)
    mean = torch.where(valid, depth, 0).sum((1, 2, 3)) / valid.sum((1, 2, 3)).clamp_min(1)
    assert (mean[some] - 1).abs().max() < 1e-6
    points = torch.cat([ray[:, None] * depth[..., None], depth[..., None]], -1)
    pixels = torch.stack(project(points[:, 0].flatten(1, 2), batch["K"].double())[:2], -1).unflatten(1, depth.shape[2:])
    grid = torch.stack(torch.meshgrid(torch.arange(28), torch.arange(42), indexing="ij")[::-1], -1)
    assert (pixels - grid)[valid[:, 0]].abs().max() < 0.01

    scene, rendered = scenes[0]
    unit = (rendered.depth.view_as(depth) / depth).flatten(1).nanmedian(1, keepdim=True).values  # metres
    torch.testing.assert_close(t * unit[..., None], scene["t"].double(), rtol=1e-4, atol=1e-5)
    world = (R[:, :, None, None] @ points[..., None]).squeeze(-1) + t[:, :, None, None]
    chosen = torch.randint(28 * 42, (4, 3, 40))
    target = torch.gather(world.flatten(2, 3), 2, chosen[..., None].expand(-1, -1, -1, 3))
    known = torch.gather(valid.flatten(2), 2, chosen).flatten(1)
    target = torch.where(known[..., None], target.flatten(1, 2), 0.0) * unit[..., None]
    place = scene["t"].double().roll(1, 1)[:, :, None].expand(-1, -1, 40, -1).flatten(1, 2)
    one_pixel = scene | dict(prim=scene["prim"][:, :1], cam=looking_at(place, target))
    seen = raycast.raycast_reference(one_pixel, dataset.textures.data, 1, 1)
    distance = (target - place).norm(dim=-1)
    beyond = (seen.depth.view_as(distance) / distance - 1)[known]
    assert beyond.max() < 1e-4  # no surface is seen through
    assert (beyond > -1e-4).double().mean() > 0.2  # the rest is hidden behind something nearer


def test_motions_do_what_they_say():
    dataset = SceneDataset("cpu", int(torch.randint(2**31, ())), 8, 8, 1, False, 1, WorldConfig(street=0))

    def relative(name):
        batch = dataset.batch(24, 8, name)
        R, t = relative_poses(batch["R"], batch["t"])
        return torch.from_numpy(np.rad2deg(rotation_angle(R[:, 0].numpy()))), t[:, 0].norm(dim=-1), batch

    angle, distance, _ = relative("still")
    assert angle.max() < 1.0 and distance.max() < 0.05 and (distance.amax(1) == 0).any()
    angle, distance, _ = relative("spin")
    assert angle.amax(1).median() > 20
    assert (distance.amax(1) < 1e-5).any() and (distance.amax(1) > 1e-2).any()  # on the spot and while moving
    angle, distance, batch = relative("wide")
    steps = (batch["t"][:, 1:] - batch["t"][:, :-1]).norm(dim=-1)
    assert steps.median() > 0.1 and 5 < angle.median() < 70
    _, _, batch = relative("stopgo")
    steps = (batch["t"][:, 1:] - batch["t"][:, :-1]).norm(dim=-1)
    assert (steps < 1e-3).float().mean() > 0.2 and steps.max() > 0.02


def test_seeds_repeat_and_differ():
    for world in (None, WorldConfig()):
        a, b, c = (SceneDataset("cpu", seed, 56, 56, 1, False, 1, world).batch(3, 2)["img"] for seed in (5, 5, 6))
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_scenes_and_sensor_draw_from_streams_of_their_own(dataset):
    assert not torch.equal(dataset.layout.u(9), dataset.random.u(9))


def test_the_truth_has_no_loss(dataset):
    """Geometry and pose terms vanish for the true answer in another gauge and unit, and not for a wrong one."""
    from speed3r_ros.model.network import Prediction

    batch = dataset.batch(4, 3, "general")
    depth, ray = torch.where(batch["valid"], batch["depth"], 1), batch["ray"][:, None]
    points = torch.cat([ray * depth[..., None], depth[..., None]], -1).permute(0, 1, 4, 2, 3)
    Q, _ = torch.linalg.qr(torch.randn(3, 3))
    Q = Q * torch.det(Q)
    descriptor = torch.zeros(4, 3, 6, 8)

    def figures(R, t):
        out = Prediction(points * 0.4, torch.zeros_like(depth), R, t, torch.zeros(4, 3, 2), descriptor)
        return losses(out, batch, 1, weights=LossWeights())[1]

    good = figures(Q @ batch["R"], 0.4 * (batch["t"] @ Q.T + torch.tensor([1.0, 2, 3])))
    assert good["points"] < 1e-5 and good["rot_deg"] < 0.05 and good["translation"] < 5e-3 and good["absrel"] < 1e-5
    bad = figures((Q @ batch["R"]).transpose(-1, -2), 0.4 * batch["t"])
    assert bad["rot_deg"] > 0.5


def test_kernel_is_its_reference():
    """Worlds with everything in them, the kernel in float32 by Triton's interpreter, the reference in float64."""
    pytest.importorskip("triton", reason="needs Triton, whose interpreter runs the kernel on the CPU")
    code = """
import random, torch
from speed3r_ros.kernels import raycast
from speed3r_ros.training.textures import Rng, TextureBank
from speed3r_ros.training.world import WorldConfig, sample_world
r, bank = Rng("cpu", int(torch.randint(2**31, ()))), TextureBank("cpu", 1, 1, outdoor=True)
much = dict(clutter=1, moving=1, stairs=1, motion_blur=1, rolling_shutter=1, distortion=1, reflective=1)
seen = set()
for samples, size, street in ((1, (7, 33), 0.0), (4, (7, 31), 1.0)):
    config = WorldConfig(street=street, **much)
    scene = sample_world(r, random.Random(0), config, bank.families, 2, 1, *size, None)
    found = raycast.raycast_triton(scene, bank.data, *size, samples, details=True)
    exact = {k: v.double() if k in ("prim", "mat", "light", "cam") else v for k, v in scene.items()}
    right = raycast.raycast_reference(exact, bank.data, *size, samples, details=True)
    assert right.depth.dtype == torch.float64
    seen |= set(right.index.unique().tolist())
    assert (found.index != right.index).float().mean() < 5e-3
    same = (found.index == right.index) & right.depth.isfinite() & found.depth.isfinite()
    def wrong(a, b, most):
        return ((a - b).abs() > most)[same[:, None].expand_as(a)].float().mean()
    assert (found.depth.isinf() != right.depth.isinf()).float().mean() < 5e-3
    assert wrong(found.depth[:, None], right.depth[:, None], 1e-3 * right.depth[:, None]) < 5e-3
    assert wrong(found.normal, right.normal, 2e-3) < 1e-2
    assert wrong(found.texture, right.texture, 5e-3) < 1e-2
    assert ((found.rgb - right.rgb).abs() > 0.03).float().mean() < 1e-2
assert len(seen) > 8, seen
"""
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_sample_bag():
    source = open_source(ROOT / "resource" / "sample_bag")
    items = list(source)
    assert len(items) == len(source.truth) == 216
    assert [stamp for stamp, *_ in items] == source.truth.stamps_ns.tolist()
    assert items[0][1].shape == (240, 320, 3) and items[0][2] is not None
    path = np.linalg.norm(np.diff(source.truth.poses[:, :3, 3], axis=0), axis=1).sum()
    assert 3 < path < 6 and np.linalg.norm(source.truth.poses[-1, :3, 3] - source.truth.poses[0, :3, 3]) < 0.1
    size = sum(p.stat().st_size for p in (ROOT / "resource" / "sample_bag").iterdir())
    assert size <= 8 * 2**20
