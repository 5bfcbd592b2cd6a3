"""Streaming in windows: equal to the offline run, whatever the gauge, bounded, exact with an exact backbone."""

import gc

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from tiny_backbones import ACROSS_VIEWS, tiny_backbone
from torch import nn

from speed3r_ros.model.backbones.alignment import Views
from speed3r_ros.model.backbones.results import Reconstruction, invert, rigid
from speed3r_ros.model.backbones.windowed import ImageMemory, Windowed, intrinsics, sampled
from speed3r_ros.model.engine import ray_map
from speed3r_ros.model.lite3r import add_linear_branch

SIZE = (56, 112)
RANDOM = np.random.default_rng()


def random_similarity():
    """Scale, and R and t as (4, 4) float64."""
    T = torch.eye(4, dtype=torch.float64)
    T[:3, :3] = torch.from_numpy(Rotation.random().as_matrix())
    T[:3, 3] = 3 * torch.randn(3)
    return float(np.exp(RANDOM.normal())), T


def changed_gauge(out, scale, S):
    """The reconstruction after x -> scale R x + t in the world."""
    T = S.to(out.T_world_cam) @ rigid(out.T_world_cam[..., :3, :3], scale * out.T_world_cam[..., :3, 3])
    return Reconstruction(scale * out.depth, scale * out.points, out.confidence, T, out.K, out.metric)


class OtherGauge(nn.Module):
    """A backbone whose world is another one at every call, and of another scale unless it is in metres."""

    def __init__(self, model):
        super().__init__()
        self.model, self.across_views = model, model.across_views

    def forward(self, images, **options):
        out = self.model(images, **options)
        scale, S = random_similarity()
        return changed_gauge(out, 1.0 if out.metric else scale, S)


class Ellipsoid(nn.Module):
    """An exact backbone: views inside an ellipsoid, in a gauge of their own at every call.

    Pixels hold the number of the frame, over 2048. `T` are the true poses.
    """

    across_views, semiaxes = (), (9.0, 5.0, 14.0)

    def __init__(self, T):
        super().__init__()
        self.T, self.anywhere, self.counts = T, nn.Parameter(torch.zeros(())), []
        self.rays = torch.from_numpy(ray_map(np.array([[60.0, 0, 55], [0, 60.0, 27], [0, 0, 1]]), *SIZE)).double()

    def depth(self, T):
        """(N, H, W): the positive root of |(c + z d) / semiaxes| = 1."""
        direction = torch.cat([self.rays, torch.ones(1, *SIZE, dtype=torch.float64)]).flatten(1)
        axes = torch.tensor(self.semiaxes, dtype=torch.float64)[:, None]
        d, c = T[:, :3, :3] @ direction / axes, T[:, :3, 3:] / axes
        a, b, c = (d * d).sum(1), (c * d).sum(1), (c * c).sum(1) - 1
        return ((-b + (b * b - a * c).sqrt()) / a).view(-1, *SIZE)

    def forward(self, images, attention, top_k):
        self.counts.append(images.shape[1])
        T = self.T[(images[0, :, 0, 0, 0] * 2048).round().long()]
        z = self.depth(T)
        points = torch.cat([self.rays * z[:, None], z[:, None]], 1).permute(0, 2, 3, 1)
        scale, S = random_similarity()
        out = Reconstruction(z[None], points[None], torch.full_like(z, 0.75)[None], T[None])
        return changed_gauge(out, scale, S)


def wander(count):
    """A smooth path that stays inside the ellipsoid, with stops and turns on the spot: (count, 4, 4)."""
    time = torch.linspace(0, 6 * np.pi, count).double().unfold(0, 1, 1)[:, 0]
    time = torch.where((time % 3) < 0.5, time - time % 3, time)  # stops
    T = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    T[:, :3, 3] = torch.stack([4 * time.sin(), 0.7 * (2 * time).cos(), 6 * (0.7 * time).sin()], 1)
    turns = np.stack([0.3 * np.sin(np.arange(count) / 9), np.arange(count) / 15, 0.2 * np.cos(np.arange(count) / 7)], 1)
    T[:, :3, :3] = torch.from_numpy(Rotation.from_rotvec(turns).as_matrix())
    return T


def image_of(frame):
    return torch.full((3, *SIZE), frame / 2048)


def poses(prediction):
    return rigid(prediction.R[0, 0], prediction.t[0, 0])


def median_of(x, weight):
    """Value below and above which lies half of the weight."""
    total = 0.0
    for value, share in sorted(zip(x.tolist(), (weight / weight.sum()).tolist())):
        total += share
        if total >= 0.5:
            return value


def stream(network, frames, memory, keyframe=lambda t: t % 3 == 0, **options):
    for t, image in enumerate(frames):
        memory.admit()
        yield network.step(image, memory, **options)
        if keyframe(t):
            memory.keep()


def test_a_long_path_through_many_windows_is_recovered():
    count = 300
    model = Ellipsoid(wander(count))
    network = Windowed(model, SIZE)
    out = list(stream(network, map(image_of, range(count)), network.new_memory(3, 4), lambda t: t % 7 == 0))
    true = invert(model.T[:1]) @ model.T
    true_depth = model.depth(model.T)
    depth = torch.cat([x.points[0, :, 2] for x in out])
    unit = (true_depth[0] / depth[0]).mean()
    torch.testing.assert_close(depth * unit, true_depth, rtol=1e-5, atol=0)
    np.testing.assert_allclose(np.median(depth[0, 7::14, 7::14]), 1.0, rtol=1e-6)  # the unit
    R, t = (torch.cat([getattr(x, name)[0] for x in out]) for name in ("R", "t"))
    torch.testing.assert_close(R, true[:, :3, :3], rtol=0, atol=1e-5)
    torch.testing.assert_close(t * unit, true[:, :3, 3], rtol=0, atol=1e-5)
    assert max(model.counts) == 3 + 4 + 1 and model.counts[-1] == 8
    points = out[-1].points[0, 0]
    torch.testing.assert_close(points[:2] / points[2:], model.rays, rtol=0, atol=1e-6)
    expected = torch.tensor([0.01, 0.005]).double().log() - np.log(0.75)
    torch.testing.assert_close(out[-1].log_sigma[0, 0], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", [*ACROSS_VIEWS, "streamvggt"])
@torch.inference_mode()
def test_with_all_frames_and_no_drift_a_step_is_the_offline_run(name):
    """The frames before are given the offline run's geometry, in a random gauge: there must the new one land."""
    model, count = tiny_backbone(name), 5
    network = Windowed(model, SIZE)
    images = torch.rand(count, 3, *SIZE)
    options = {"reference": "first"} if name.startswith("da3") else {}
    offline = model(images[None], attention="dense", **options)
    scale, S = random_similarity()
    expected = changed_gauge(offline, 1.0 if offline.metric else scale, S)
    truth = sampled(expected)
    memory = network.new_memory(window=count, anchors=1)
    for t in range(count - 1):
        memory.admit()
        memory.put(images[t], None, None)
        memory.put_geometry(Views(truth.T[t : t + 1], truth.depth[t : t + 1], truth.confidence[t : t + 1]))
    memory.admit()
    out = network.step(images[-1], memory)

    def close(found, wanted):
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max().clamp(min=1), name

    close(out.points[0, 0].permute(1, 2, 0), expected.points[0, -1])
    close(out.confidence.sigmoid()[0, 0], offline.confidence[0, -1])
    close(poses(out), expected.T_world_cam[0, -1].double())


@pytest.mark.parametrize("name", ["vggt", "pi3", "pi3x", "da3"])
def test_the_gauge_of_the_backbone_does_not_matter(name):
    model = tiny_backbone(name)
    images = torch.rand(7, 3, *SIZE)
    plain, other = Windowed(model, SIZE), Windowed(OtherGauge(model), SIZE)
    if name == "da3":
        other._options = plain._options
    pairs = zip(*(stream(x, images, x.new_memory(2, 2)) for x in (plain, other)))
    for t, (a, b) in enumerate(pairs):
        for field in ("points", "confidence", "R", "t", "log_sigma"):
            x, y = getattr(a, field), getattr(b, field)
            assert (x - y).abs().max() < 1e-3 * y.abs().max().clamp(min=1), f"{field} of frame {t}"
        assert t > 0 or (poses(a) - torch.eye(4)).abs().max() < 1e-6


def test_the_second_frame_is_relative_to_the_first():
    """One shared frame: scale from its depths, pose by composition, in closed form."""
    model = tiny_backbone("pi3")
    network, images = Windowed(model, SIZE), torch.rand(2, 3, *SIZE)
    first, second = stream(network, images, network.new_memory(1, 1))
    with torch.inference_mode():
        alone, both = sampled(model(images[None, :1])), sampled(model(images[None]))
    unit = median_of(alone.depth[0], alone.confidence[0])
    scale = median_of(alone.depth[0] / unit / both.depth[0], alone.confidence[0] * both.confidence[0])
    torch.testing.assert_close(
        second.points[0, 0, 2, 7::14, 7::14].double().flatten(), scale * both.depth[1], rtol=1e-5, atol=0
    )
    expected = invert(both.T[:1]) @ both.T[1:]
    torch.testing.assert_close(second.R[0], expected[:, :3, :3], rtol=0, atol=1e-5)
    torch.testing.assert_close(second.t[0], scale * expected[:, :3, 3], rtol=1e-4, atol=1e-5)
    assert (poses(first) - torch.eye(4)).abs().max() < 1e-6


@pytest.mark.parametrize("attention", ["dense", "speed3r", "spark3r", "lite3r"])
def test_all_strategies_run(attention):
    model = tiny_backbone("vggt")
    if attention == "lite3r":
        add_linear_branch(model)
    network, images = Windowed(model, SIZE), torch.rand(4, 3, *SIZE)
    *_, last = stream(network, images, network.new_memory(5, 1), attention=attention, top_k=2)
    with torch.inference_mode():
        offline = model(images[None], attention=attention, top_k=2)
    ratio = last.points[0, 0, 2] / offline.depth[0, -1]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)


def test_memory_is_bounded_and_clears():
    network = Windowed(Ellipsoid(wander(150)), SIZE)
    memory = network.new_memory(2, 2)
    size, census = memory.bytes, {}
    expected = 5 * (3 * 56 * 112 * 4 + 16 * 8 + 2 * 4 * 8 * 8 + 9 * 4 + 1)
    assert size == expected
    for t, out in enumerate(stream(network, map(image_of, range(150)), memory)):
        assert len(memory.slots) <= 5 and len(set(memory.slots.tolist())) == len(memory.slots)
        if t in (30, 149):
            del out
            gc.collect()
            census[t] = sorted(tuple(x.shape) for x in gc.get_objects() if issubclass(type(x), torch.Tensor))
    assert census[30] == census[149] and memory.bytes == size
    assert memory.schedule.resident[0][0] == 0  # the first frame
    memory.clear()
    (again,) = stream(network, [image_of(7)], memory)
    torch.testing.assert_close(poses(again), torch.eye(4).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["vggt", "pi3x"])
def test_known_rays_are_the_points_rays(name):
    """And Pi3X reads the intrinsics of the frames that have them."""
    model = tiny_backbone(name)
    network, images = Windowed(model, SIZE), torch.rand(3, 3, *SIZE)
    K = np.array([[70.0 + 20 * RANDOM.random(), 0, 54], [0, 80.0, 29], [0, 0, 1]])
    rays = torch.from_numpy(ray_map(K, *SIZE))
    torch.testing.assert_close(intrinsics(rays), torch.from_numpy(K).float(), rtol=1e-4, atol=1e-4)
    memory = network.new_memory(3, 1)
    for t in range(2):
        memory.admit()
        network.step(images[t], memory, None if t == 0 else rays)
    memory.admit()
    out = network.step(images[2], memory, rays, known=torch.tensor([True])).points[0, 0]
    torch.testing.assert_close(out[:2] / out[2:], rays, rtol=1e-4, atol=1e-4)
    options = {}
    if name == "pi3x":
        given = torch.from_numpy(K).float()
        given[:2, 2] += 0.5
        options = dict(K=given.repeat(1, 3, 1, 1), has_K=torch.tensor([[False, True, True]]))
    with torch.inference_mode():
        offline = model(images[None], **options)
    ratio = out[2] / offline.depth[0, -1]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)
    memory = network.new_memory(3, 1)
    memory.admit()
    unknown = network.step(images[0], memory, torch.zeros(2, *SIZE), known=torch.tensor([False]))
    memory.clear()
    memory.admit()
    torch.testing.assert_close(unknown.points, network.step(images[0], memory).points)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="Da3Mono finds no poses: choose a backbone for several views"):
        Windowed(tiny_backbone("da3-mono"), SIZE)
    with pytest.raises(ValueError, match="images are 56 x 100: sides must be multiples of 14"):
        Windowed(tiny_backbone("pi3"), (56, 100))
    network = Windowed(tiny_backbone("speed3r-pi3"), (60, 100))  # resizes by itself
    with pytest.raises(ValueError, match="precision torch.int8: backbones run in float32"):
        network.precision(torch.int8)
    assert network.precision(torch.bfloat16).model.point_decoder.projects.weight.dtype == torch.bfloat16
    memory = ImageMemory((60, 100), 1, 1)
    memory.admit()
    with pytest.raises(ValueError, match=r"image is \(3, 56, 112\): expected \(3, 60, 100\)"):
        network.step(torch.rand(3, *SIZE), memory)
    with pytest.raises(ValueError, match=r"rays is \(2, 56, 112\): expected \(2, 60, 100\)"):
        network.step(torch.rand(3, 60, 100), memory, torch.rand(2, *SIZE))
