"""Published backbones as streams: each tiny one against its own parallel form, against float64, and end to end."""

import gc
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_backbones import BACKBONES, tiny_backbone
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from speed3r_ros import cli
from speed3r_ros.mapping.trajectory import read_tum
from speed3r_ros.model.backbones import registry
from speed3r_ros.model.backbones.incremental import Incremental
from speed3r_ros.model.backbones.results import invert, nearest_rotation, rigid
from speed3r_ros.model.backbones.windowed import Windowed
from speed3r_ros.model.config import EngineConfig, check
from speed3r_ros.model.engine import Engine
from speed3r_ros.model.memory import Sight, visibility
from speed3r_ros.model.types import Frame, Tracking

FAMILIES = ("pi3", "pi3x", "speed3r-pi3", "vggt", "streamvggt", "da3", "da3-nested")
UNLIKE = ("pi3x", "speed3r-pi3", "streamvggt", "da3-nested")  # what these have, the others have less of
SIZE = 56, 112
LARGE, SMALL = (8, 2, 2), (1, 2, 2)  # window, anchors, bank: all is seen; all tiers are in use


def stream(network, images, limits, keyframes, attention, rays=None, top_k=3):
    """Predictions of frames (T, 3, H, W), one by one; rays: (T, 2, H, W), of every frame but the second."""
    memory = network.new_memory(*limits, attention)
    out = []
    for t, image in enumerate(images):
        memory.admit()
        out.append(network.step(image, memory, None if rays is None or t == 1 else rays[t], attention, top_k))
        if keyframes[t]:
            memory.keep()
    return out


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("attention, limits", [("dense", LARGE), ("dense", SMALL), ("speed3r", SMALL)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_parallel_equals_recurrent(family, attention, limits):
    model, frames = tiny_backbone(family), 6
    if (
        family == "streamvggt"
    ):  # its released stream lets passes of the camera head see one another, the parallel form not
        model.camera_head.all_passes = False
    keyframes = [True, True, False, True, True, True]
    images = torch.rand(frames, 3, *SIZE)
    rays = torch.randn(frames, 2, *SIZE) if family == "pi3x" else None
    given = {}
    if rays is not None:
        given = dict(rays=rays[None], has_K=(torch.arange(frames) != 1)[None])
    sight = Sight(*(table[None] for table in visibility(keyframes, *limits)))
    expected = model(images[None], attention=attention, top_k=3, sight=sight, **given)
    T = invert(expected.T_world_cam[:, :1]) @ expected.T_world_cam
    for t, out in enumerate(stream(Incremental(model, SIZE), images, limits, keyframes, attention, rays)):
        points = expected.points[0, t].movedim(-1, 0)
        if rays is not None and t != 1:
            points = torch.cat([rays[t] * points[2:], points[2:]])
        for name, value, reference in (
            ("points", out.points[0, 0], points),
            ("confidence", out.confidence[0, 0].sigmoid(), expected.confidence[0, t]),
            ("R", out.R[0, 0], T[0, t, :3, :3]),
            ("t", torch.cat([out.t[0, 0], torch.ones(1)]), torch.cat([T[0, t, :3, 3], torch.ones(1)])),
        ):
            assert relative_error(value, reference) < 1e-4, f"{name} of frame {t}"
    assert out.log_sigma.shape == (1, 1, 2) and out.descriptor is None


@pytest.mark.parametrize("family", UNLIKE)
@torch.inference_mode()
def test_sixteen_bits_are_those_of_the_weights(family):
    """All blocks are selected, so that rounding changes no choice; but it may that of the pixels by which the nested network
    finds metres, so that points of that one are compared up to their unit."""
    model, images = tiny_backbone(family), torch.rand(3, 3, *SIZE)
    network = Incremental(model, SIZE)
    exact = {name: stream(network, images, LARGE, [True] * 3, name, top_k=64) for name in ("dense", "speed3r")}
    network.precision(torch.bfloat16)
    assert network.new_memory(*LARGE, "dense").slot(0).fine.dtype == torch.bfloat16
    for attention, expected in exact.items():
        for a, b in zip(stream(network, images, LARGE, [True] * 3, attention, top_k=64), expected):
            unit = b.points.norm() / a.points.norm() if family == "da3-nested" else 1.0
            assert a.points.dtype == torch.float32 and relative_error(unit * a.points, b.points) < 0.05


@pytest.mark.parametrize("family, attention", [*((family, "speed3r") for family in UNLIKE), ("pi3x", "spark3r")])
@torch.inference_mode()
def test_memory_is_flat_and_time_leaves_no_trace(family, attention):
    """A scene that stands still: the same frame gives the same answer however many were dropped, at the same addresses."""
    network = Incremental(tiny_backbone(family), (56, 56))
    memory = network.new_memory(1, 1, 1, attention)
    tensors = [*memory.slot(0)[:2], memory.index, memory.first, memory.fine, *memory.state.values()]
    addresses, size = [x.data_ptr() for x in tensors], memory.bytes
    opening, still = torch.rand(2, 3, 56, 56)
    kept, census = {}, []
    for t in range(25):
        memory.admit()
        out = network.step(still if t else opening, memory, None, attention, 2)
        if t % 2 == 0:
            memory.keep()
        if t in (18, 24):
            kept[t] = out.points, out.R, out.t
            del out
            gc.collect()
            census.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    for a, b in zip(kept[18], kept[24]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert census[1] - census[0] == len(kept[24])
    tensors = [*memory.slot(0)[:2], memory.index, memory.first, memory.fine, *memory.state.values()]
    assert [x.data_ptr() for x in tensors] == addresses and memory.bytes == size


class OnOneDevice(TorchFunctionMode):
    """Fails where a constant or another tensor of the CPU takes part, which a CUDA graph could not copy."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor), "a constant comes from the CPU"
        for x in tree_leaves((arguments, options)):
            assert not isinstance(x, torch.Tensor) or x.device.type == "meta", f"{function} reads {x.device}"
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("family", UNLIKE)
@torch.inference_mode()
def test_a_step_asks_nothing_of_the_host(family, monkeypatch):
    """Tensors without values stand in for those that a CUDA graph would hold: reading one raises."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # it knows no device of this kind
    network = Incremental(tiny_backbone(family), SIZE).to("meta")
    image, rays, known = (torch.empty(shape, device="meta") for shape in ((3, *SIZE), (2, *SIZE), (1,)))
    for attention in ("dense", "speed3r", "spark3r"):
        memory = network.new_memory(*SMALL, attention)
        with OnOneDevice():
            out = network.step(image, memory, rays, attention, 3, known.bool())
        assert out.points.shape == (1, 1, 3, *SIZE) and out.R.shape == (1, 1, 3, 3) and out.t.shape == (1, 1, 3)
    for forbidden in (lambda: image.new_tensor([1.0]), lambda: torch.zeros(3, device="cpu").to(image)):
        with pytest.raises(AssertionError, match="cpu|CPU"), OnOneDevice():
            forbidden()


@pytest.mark.parametrize("family", UNLIKE)
@torch.inference_mode()
def test_the_backbones_own_world_does_not_matter(family, monkeypatch):
    model, images, keyframes = tiny_backbone(family), torch.rand(4, 3, *SIZE), [True] * 4
    expected = stream(Incremental(model, SIZE), images, SMALL, keyframes, "dense")
    assert torch.equal(expected[0].R[0, 0].round(decimals=5), torch.eye(3)) and expected[0].t.abs().max() < 1e-5
    world, step = rigid(nearest_rotation(torch.randn(1, 3, 3)), torch.randn(1, 3))[0], model.step

    def elsewhere(*arguments):
        out = step(*arguments)
        return replace(out, T_world_cam=world @ out.T_world_cam)

    monkeypatch.setattr(model, "step", elsewhere)
    for a, b in zip(stream(Incremental(model, SIZE), images, SMALL, keyframes, "dense"), expected):
        torch.testing.assert_close(a.R, b.R, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.t, b.t, rtol=1e-4, atol=1e-5)


def test_nearest_rotation_equals_the_singular_value_decomposition():
    m = torch.randn(500, 3, 3, dtype=torch.float64)
    m[0] = torch.eye(3)
    m[1] = torch.diag(torch.tensor([1.0, -1, -1]))  # half a turn
    unit = torch.nn.functional.normalize(m, dim=-1)
    U, S, Vt = torch.linalg.svd(unit)
    sign = torch.linalg.det(U @ Vt)
    expected = U @ torch.diag_embed(torch.stack([torch.ones(500), torch.ones(500), sign], -1).double()) @ Vt
    clear = S[:, 1] + sign * S[:, 2] > 1e-3  # else there is no single nearest one
    assert clear.sum() > 450
    torch.testing.assert_close(nearest_rotation(unit)[clear], expected[clear], rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ the engine


def textured(count, rng):
    """Frames (96, 128, 3) uint8 that pan over a texture."""
    wall = cv2.resize(rng.integers(0, 256, (20, 60, 3), dtype=np.uint8), (480, 160), interpolation=cv2.INTER_CUBIC)
    return [np.ascontiguousarray(wall[20:116, 8 * i : 8 * i + 128]) for i in range(count)]


@pytest.mark.parametrize("family, attention", [("pi3", "spark3r"), ("vggt", "speed3r"), ("da3", "dense")])
def test_the_engine_streams_a_backbone_through_its_segments(family, attention):
    network = Incremental(tiny_backbone(family), SIZE)
    config = EngineConfig(
        model="pi3", attention=attention, refresh=6, keyframe_overlap=1.0, window=2, anchors=2, bank=2, device="cpu"
    )
    engine = Engine(config, network)
    frames = textured(14, np.random.default_rng())
    opened = id(engine._segment)
    estimates, segments = [], []
    for i, image in enumerate(frames):
        estimates.append(engine.push(Frame(image, i)))
        segments.append(id(engine._segment))
    assert engine.input_size == SIZE and engine.dtype == torch.float32 and len({opened, *segments}) > 1
    for estimate in estimates:
        assert estimate.tracking is not Tracking.LOST and estimate.depth.shape == SIZE
        assert np.isfinite(estimate.T_world_cam).all() and np.isfinite(estimate.pose_sigma).all()
        np.testing.assert_allclose(estimate.T_world_cam[:3, :3] @ estimate.T_world_cam[:3, :3].T, np.eye(3), atol=1e-9)
        assert ((estimate.confidence >= 0) & (estimate.confidence <= 1)).all()
    pixels = [torch.from_numpy(e.image).permute(2, 0, 1).float() / 255 for e in estimates]
    count = segments.index(next(s for s in segments if s != opened)) + 1  # all frames of the first segment
    with torch.inference_mode():
        alone = stream(network, pixels[:count], (2, 2, 2), [e.is_keyframe for e in estimates], attention, top_k=32)
    for estimate, out in zip(estimates, alone):
        np.testing.assert_allclose(estimate.T_world_cam[:3, :3], out.R[0, 0], atol=1e-4)
        np.testing.assert_allclose(estimate.T_world_cam[:3, 3], out.t[0, 0], atol=1e-4 * (1 + out.t.abs().max()))
        np.testing.assert_allclose(estimate.depth, out.points[0, 0, 2], rtol=1e-3)


@pytest.mark.parametrize("family, attention", [("pi3", "spark3r"), ("da3", "dense")])
def test_the_engine_streams_a_backbone_in_windows(family, attention):
    config = EngineConfig(
        model="pi3", streaming="windowed", attention=attention, refresh=6, keyframe_overlap=1.0, window=2, anchors=2
    )
    engine = Engine(config, Windowed(tiny_backbone(family), SIZE))
    opened, segments = id(engine._segment), set()
    for i, image in enumerate(textured(9, np.random.default_rng())):
        estimate = engine.push(Frame(image, i))
        segments.add(id(engine._segment))
        assert estimate.tracking is not Tracking.LOST and estimate.depth.shape == SIZE
        assert np.isfinite(estimate.T_world_cam).all() and np.isfinite(estimate.pose_sigma).all()
    assert segments > {opened}


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"height": 400}, "engine.height = 400: pi3 with dense attention needs a multiple of 14, e.g. 406, or 0"),
        ({"width": 70, "attention": "speed3r"}, "engine.width = 70: pi3 with speed3r attention needs a multiple of 56"),
        ({"model": "speed3r-pi3", "height": 14}, "needs a multiple of 56, e.g. 56, or 0"),
        (
            {"attention": "lite3r"},
            "engine.attention = 'lite3r': of backbones, it works on whole sequences; use speed3r, spark3r",
        ),
        (
            {"attention": "lite3r", "streaming": "windowed", "height": 70},
            "engine.height = 70: pi3 with lite3r attention needs a multiple of 56, e.g. 56, or 0",
        ),
        (
            {"model": "streamvggt", "attention": "spark3r", "streaming": "windowed"},
            "use dense or speed3r, or stream with engine.streaming = incremental",
        ),
        ({"precision": "int8"}, "engine.precision = 'int8': only compact runs in it; use auto, fp8, bf16 or fp32"),
        ({"model": "da3-mono"}, "choose one of compact, pi3"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, says):
    with pytest.raises(ValueError, match=says) as error:
        check(EngineConfig(**{"model": "pi3", **settings}), "engine.")
    assert "\n" not in str(error.value)


def test_auto_attention_is_what_the_model_was_trained_with():
    names = {name: EngineConfig(model=name).strategy for name in ("compact", "speed3r-pi3", "pi3", "vggt-1b")}
    assert names == {"compact": "speed3r", "speed3r-pi3": "speed3r", "pi3": "dense", "vggt-1b": "dense"}
    assert EngineConfig(model="pi3", attention="speed3r").strategy == "speed3r"


# ---------------------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def folder(tmp_path):
    """Images as the bag command reads them."""
    images = tmp_path / "images"
    images.mkdir()
    for i, image in enumerate(textured(5, np.random.default_rng())):
        cv2.imwrite(str(images / f"{i:03d}.png"), image[..., ::-1])
    return images


def test_the_bag_command_streams_a_checkpoint(folder, tmp_path, monkeypatch, capsys, caplog):
    model, path = tiny_backbone("pi3"), tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    monkeypatch.setitem(registry.BACKBONES, "pi3", BACKBONES["pi3"])
    sizes = ["--set", "engine.height=56", "--set", "engine.width=112", "--set", "odometry.features=0"]
    out = tmp_path / "out"
    given = [str(folder), "--out", str(out), "--model", "pi3", "--set", f"engine.weights={path}", *sizes]
    assert cli.main(["reconstruct", *given]) == 0, capsys.readouterr().err
    assert "CC BY-NC 4.0, non-commercial use only" in caplog.text
    poses = read_tum(out / "trajectory.tum").poses
    images = [cv2.imread(str(path))[..., ::-1] for path in sorted(folder.iterdir())]
    engine = Engine(EngineConfig(model="pi3", device="cpu"), Incremental(model, SIZE))
    expected = [engine.push(Frame(np.ascontiguousarray(image), i)).T_world_cam for i, image in enumerate(images)]
    np.testing.assert_allclose(poses, expected, atol=1e-4)


def test_absent_weights_are_said_before_torch_is_loaded(folder, tmp_path):
    script = (
        "import sys; from speed3r_ros.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "reconstruct", str(folder), "--out", str(tmp_path / "out"), "--model", "pi3"],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "weights pi3 are not on this machine; run `speed3r weights fetch pi3`" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_node_streams_a_checkpoint_and_logs_its_licence(tmp_path):
    pytest.importorskip("rclpy", reason="waits for a ROS 2 installation or the rclpy wheels")
    path = tmp_path / "model.safetensors"
    save_file(tiny_backbone("pi3").state_dict(), path)
    script = (
        "import sys; from tiny_backbones import BACKBONES; from speed3r_ros.model.backbones import registry; "
        "registry.BACKBONES['pi3'] = BACKBONES['pi3']; from speed3r_ros.recon_node import main; sys.exit(main(sys.argv))"
    )
    settings = dict(model="pi3", attention="speed3r", weights=path, height=56, width=112, device="cpu")
    parameters = [word for name, value in settings.items() for word in ("-p", f"engine.{name}:={value}")]
    tests = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", script, "--ros-args", *parameters],
        env=os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "ready:" in line:
            process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0, "".join(lines)
    notices = [line for line in lines if "CC BY-NC 4.0, non-commercial use only" in line]
    assert len(notices) == 1 and "[WARN]" in notices[0] and "[speed3r]" in notices[0]
    assert "ready: pi3 on cpu, float32, speed3r attention" in lines[-1]
