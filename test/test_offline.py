"""`speed3r reconstruct --offline` as its user runs it, on tiny backbones with random weights in checkpoint files."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import plyfile
import pytest
import tiny_backbones
import torch
from safetensors.torch import save_file
from terminal import messages

from speed3r_ros import offline
from speed3r_ros.cli import main
from speed3r_ros.mapping.trajectory import absolute_trajectory_error, read_tum
from speed3r_ros.model.backbones import checkpoints, registry
from speed3r_ros.model.backbones.heads import Heads
from speed3r_ros.offline import Options, working_size
from speed3r_ros.sources import open_source

SAMPLE_BAG = Path(__file__).parents[1] / "speed3r_ros" / "resource" / "sample_bag"
TINY = {"pi3": "pi3", "pi3x": "pi3x", "speed3r-pi3": "speed3r-pi3", "vggt-1b": "vggt", "streamvggt": "streamvggt",
        "da3-small": "da3", "da3-nested": "da3-nested"}  # fmt: skip
COUNT, BLACK = 7, 4
START_NS = 1_700_000_000_000_000_123
WIDTH, HEIGHT = 128, 97
K = np.array([[110.0, 0, 63.0], [0, 111.0, 47.5], [0, 0, 1]])
LIMITS = ("--pixels", 8000)  # 98 x 70, or 112 x 56 for attention in blocks


@pytest.fixture(autouse=True)
def tiny_registry(monkeypatch):
    """The published names build tiny networks."""
    for name, tiny in TINY.items():
        monkeypatch.setitem(registry.BACKBONES, name, tiny_backbones.BACKBONES[tiny])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """name -> checkpoint file."""
    folder = tmp_path_factory.mktemp("weights")
    made = {}

    def file(name):
        if name not in made:
            path, model = folder / f"{name}.safetensors", tiny_backbones.tiny_backbone(TINY[name])
            if name == "da3-nested":  # without sky, which has no points
                torch.nn.init.constant_(model.model.da3_metric.head.scratch.sky_output_conv2[-1].bias, -10)
                torch.nn.init.constant_(model.model.da3.cam_dec.fc_fov[0].bias, 1)  # rad, lest metres be millions
            # a clone of each: safetensors stores no tensor that several keys share
            save_file({key: value.clone() for key, value in model.state_dict().items()}, path)
            made[name] = path
        return made[name]

    return file


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder in the documented layout: a moving random texture, one black frame, intrinsics and true poses."""
    rng = np.random.default_rng()
    folder = tmp_path_factory.mktemp("input") / "sequence"
    (folder / "rgb").mkdir(parents=True)
    texture = cv2.resize(rng.integers(0, 256, (20, 40, 3), dtype=np.uint8), (320, 160), interpolation=cv2.INTER_CUBIC)
    names, poses = [], []
    for index in range(COUNT):
        image = texture[20 : 20 + HEIGHT, 8 * index : 8 * index + WIDTH] * (index != BLACK)
        assert cv2.imwrite(str(folder / "rgb" / f"{index}.png"), image)
        stamp = START_NS + index * 100_000_000
        text = f"{stamp // 10**9}.{stamp % 10**9:09d}"
        names.append(f"{text} rgb/{index}.png")
        poses.append(f"{text} {0.1 * index:.3f} {0.02 * index**2:.3f} 0 0 0 0 1")
    (folder / "rgb.txt").write_text("\n".join(names) + "\n")
    (folder / "poses.txt").write_text("\n".join(poses) + "\n")
    camera = {"width": WIDTH, "height": HEIGHT, "fx": K[0, 0], "fy": K[1, 1], "cx": K[0, 2], "cy": K[1, 2]}
    (folder / "intrinsics.json").write_text(json.dumps(camera))
    return folder


@pytest.fixture
def speed3r(weights):
    def run(given, out, *more, name="pi3"):
        flags = ("--model", name, "--set", f"engine.weights={weights(name)}", "--set", "engine.device=cpu")
        return main(["reconstruct", str(given), "--out", str(out), "--offline", *flags, *map(str, more)])

    return run


def one_error(capsys):
    """The only line of an error that is not a progress bar or the licence."""
    lines = messages(capsys.readouterr().err)
    assert len(lines) == 1 and lines[0].startswith("speed3r reconstruct: "), lines
    return lines[0].removeprefix("speed3r reconstruct: ")


def seen(folder, indices, size):
    """What the network is to see: (1, N, 3, h, w) in [0, 1]."""
    images = [cv2.imread(str(folder / "rgb" / f"{i}.png"))[..., ::-1] for i in indices]
    images = [cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA) for image in images]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)[None].float() / 255


def all_near(points, others, voxel):
    """Whether each of points (N, 3) lies in a voxel of one of `others`, or in its 26 neighbours."""

    def keys(xyz, shift=0):
        return ((np.floor(xyz / voxel).astype(np.int64) + shift + 2**20) * [2**42, 2**21, 1]).sum(1)

    around = np.array(np.meshgrid(*3 * [[-1, 0, 1]])).reshape(3, -1).T
    return np.isin(keys(points), np.concatenate([keys(others, shift) for shift in around])).all()


@pytest.mark.parametrize("name", TINY)
@torch.inference_mode()
def test_results_are_the_networks(speed3r, weights, images, tmp_path, capsys, name):
    used = [i for i in range(COUNT) if i != BLACK]
    size = (56, 112) if name == "speed3r-pi3" else (70, 98)
    model, given = registry.load_backbone(name, weights(name)), {}
    if name == "pi3x":  # the camera's rays, with pixel centres at half integers on both scales
        scaled = np.diag([size[1] / WIDTH, size[0] / HEIGHT, 1]) @ (K + [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
        given = dict(K=torch.tensor(scaled, dtype=torch.float32).expand(1, len(used), 3, 3))
    expected = model(seen(images, used, size), **given)
    confidence = expected.confidence[0].numpy()
    least = round(float(np.median(confidence)), 4)

    out = tmp_path / "out"
    more = ("--set", "engine.precision=fp32", "--set", f"map.min_confidence={least}", "--set", "depth.min_confidence=0")
    assert speed3r(images, out, *LIMITS, *more, name=name) == 0
    assert {path.name for path in out.iterdir()} == {"trajectory.tum", "map.ply", "report.html"}
    said = capsys.readouterr().out
    assert f"views      {len(used)} of {COUNT} frames, {size[1]} x {size[0]} pixels; {name}, " in said
    assert f"frames     {len(used)} of {COUNT} have a pose" in said and "1: black frame" in said

    unit = 1.0 if name in ("pi3x", "da3-nested") else float(expected.depth[0, 0].median())
    T = expected.T_world_cam[0].double().numpy()
    T = np.linalg.inv(T[0]) @ T
    T[:, :3, 3] /= unit
    found = read_tum(out / "trajectory.tum")
    assert found.stamps_ns.tolist() == [START_NS + i * 100_000_000 for i in used]
    np.testing.assert_allclose(found.poses, T, atol=2e-5 * max(1, np.abs(T).max()))

    points = expected.points[0].double().numpy() / unit
    world = np.einsum("nij,nhwj->nhwi", T[:, :3, :3], points) + T[:, None, None, :3, 3]
    kept = world[(confidence >= np.float32(least)) & (points[..., 2] <= 100)]
    vertex = plyfile.PlyData.read(out / "map.ply")["vertex"]
    mapped = np.stack([vertex[axis] for axis in "xyz"], 1)
    assert len(kept) > 1000 and all_near(mapped, kept, 0.02) and all_near(kept, mapped, 0.02)

    ate = absolute_trajectory_error(found, open_source(images).truth).rmse
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"ATE        {ate:.4f} after Sim(3) alignment" in said
    assert "Reconstruction of all views at once" in page and page.count("<figcaption>") >= len(used)


def test_a_bag_is_thinned_evenly(speed3r, tmp_path, capsys):
    source = open_source(SAMPLE_BAG)
    stamps = [stamp for stamp, _, _ in source]
    assert speed3r(SAMPLE_BAG, tmp_path / "out", *LIMITS, "--views", 5, "--stride", 3, "--max-frames", 13) == 0
    found = read_tum(tmp_path / "out" / "trajectory.tum").stamps_ns.tolist()
    assert found == [stamps[i] for i in (0, 9, 18, 27, 36)]
    assert f"views      5 of {len(stamps)} frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    "attention, precision", [("dense", "bf16"), ("speed3r", "bf16"), ("spark3r", "bf16"), ("speed3r", "fp8")]
)
def test_attention_and_precision_are_the_chosen_ones(
    speed3r, weights, images, tmp_path, capsys, fp8_by_definition, attention, precision
):
    settings = (f"engine.attention={attention}", f"engine.precision={precision}")
    more = (*(part for setting in settings for part in ("--set", setting)), "--max-frames", 3, *LIMITS)
    assert speed3r(images, tmp_path / "out", *more) == 0
    size = (56, 112) if attention == "speed3r" else (70, 98)
    named = {"bf16": torch.bfloat16, "fp8": "fp8"}[precision]
    shown = str(named).removeprefix("torch.")
    assert f"{size[1]} x {size[0]} pixels; pi3, {attention} attention, {shown} on cpu" in capsys.readouterr().out
    with torch.inference_mode():
        model = registry.load_backbone("pi3", weights("pi3")).precision(named)
        expected = model(seen(images, range(3), size), attention=attention)
    T = expected.T_world_cam[0].double().numpy()
    T = np.linalg.inv(T[0]) @ T
    T[:, :3, 3] /= float(expected.depth[0, 0].median())
    found = read_tum(tmp_path / "out" / "trajectory.tum").poses
    np.testing.assert_allclose(found, T, atol=2e-5 * max(1, np.abs(T).max()))


@pytest.mark.parametrize(
    "name, more, says",
    [
        ("pi3", ["--max-frames", 1], "1 of 7 frames can be used; at least 2 are needed"),
        ("pi3", ["--pixels", 100], "--pixels 100: the smallest image that this attention takes has 196"),
        ("speed3r-pi3", ["--pixels", 3000], "--pixels 3000: the smallest image that this attention takes has 3136"),
        (
            "pi3",
            ["--set", "engine.attention=lite3r"],
            "pi3.safetensors' have no linear branch; give engine.weights of a",
        ),
        ("pi3", ["--set", "engine.precision=fp8"], "engine.precision = 'fp8': device 'cpu' has no FP8 units"),
    ],
)
def test_what_cannot_work_is_named(speed3r, images, tmp_path, capsys, name, more, says):
    assert speed3r(images, tmp_path / "out", *more, name=name) == 1
    error = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert error.startswith("speed3r reconstruct: ") and says in error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--offline"], "the compact model streams only; name a backbone, e.g. --model pi3"),
        (["--offline", "--model", "da3-mono"], "engine.model = 'da3-mono': choose one of"),
        (
            ["--offline", "--model", "pi3", "--set", "engine.attention=flash"],
            "engine.attention = 'flash': choose one of",
        ),
        (["--offline", "--model", "pi3", "--set", "engine.precision=int8"], "only compact runs in it"),
        (["--model", "pi3", "--set", "engine.attention=lite3r"], "works on whole sequences"),
        (
            ["--offline", "--model", "streamvggt", "--set", "engine.attention=spark3r"],
            "engine.attention = 'spark3r' works where all frames see all, and of streamvggt a frame sees only earlier",
        ),
        (["--views", "5"], "--views: goes with --offline only"),
    ],
)
def test_wrong_usage_is_named(images, tmp_path, capsys, arguments, says):
    assert main(["reconstruct", str(images), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert says in one_error(capsys) and os.listdir(tmp_path) == []


def test_missing_weights_are_named(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["--offline", "--model", "pi3", "--set", "engine.device=cpu"]
    assert main(["reconstruct", str(images), "--out", str(tmp_path / "out"), *arguments]) == 1
    assert "run `speed3r weights fetch pi3`" in one_error(capsys) and os.listdir(tmp_path) == []


def test_the_licence_is_shown(speed3r, images, tmp_path, caplog):
    assert speed3r(images, tmp_path / "out", "--max-frames", 2, *LIMITS) == 0
    assert [record.getMessage() for record in caplog.records] == [checkpoints.notice("pi3")]


def test_a_folder_that_cannot_be_written_is_named(speed3r, images, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert speed3r(images, tmp_path / "file" / "out", *LIMITS) == 1
    assert str(tmp_path / "file") in one_error(capsys)


@pytest.mark.parametrize("when", ["load", "trunk", "heads", "heads on the CPU"])
def test_too_little_memory_gives_advice_and_leaves_nothing(speed3r, images, tmp_path, capsys, monkeypatch, when):
    def fail(*_, **__):
        if when.endswith("CPU"):
            torch.empty(2**50)  # a PiB, which torch's allocator refuses in its own words
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.\nAnd more lines.")

    if when.startswith("heads"):
        monkeypatch.setattr(Heads, "parts", fail)
    else:
        monkeypatch.setattr(offline, {"load": "load_model", "trunk": "run_trunk"}[when], fail)
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("old")
    assert speed3r(images, out, *LIMITS) == 1
    error = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    what = "the weights of pi3" if when == "load" else "6 views of 98 x 70 pixels and dense attention"
    assert f"out of memory with {what}: use fewer views (--views), smaller images (--pixels)" in error
    assert os.listdir(out) == ["report.html"] and (out / "report.html").read_text() == "old"


@pytest.mark.parametrize("field", ["fc_t", "fc_rot"])
def test_numbers_that_are_none_are_refused(speed3r, images, tmp_path, capsys, monkeypatch, field):
    load = offline.load_trained

    def spoilt(engine):
        model = load(engine)
        torch.nn.init.constant_(getattr(model.camera_head, field).weight, torch.nan)
        return model

    monkeypatch.setattr(offline, "load_trained", spoilt)
    assert speed3r(images, tmp_path / "out", *LIMITS) == 1
    assert "the network's pose of a view is not finite" in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir(tmp_path) == []


def test_frames_that_do_not_fit_are_left_out(speed3r, images, tmp_path, capsys):
    folder = tmp_path / "mixed"
    shutil.copytree(images, folder)
    assert cv2.imwrite(str(folder / "rgb" / "2.png"), np.full((20, 30, 3), 90, np.uint8))
    (folder / "rgb" / "3.png").write_bytes(b"text")
    rows = (folder / "rgb.txt").read_text().splitlines()
    (folder / "rgb.txt").write_text("\n".join([*rows, rows[-1]]) + "\n")
    assert speed3r(folder, tmp_path / "out", *LIMITS) == 0
    said = capsys.readouterr()
    assert f"views      4 of {COUNT + 1} frames" in said.out and f"frames     4 of {COUNT + 1} have a pose" in said.out
    assert "1: not readable" in said.out and f"\rwarning: {folder / 'rgb' / '3.png'}: not a readable image" in said.err
    assert f"1: not {WIDTH} x {HEIGHT} pixels as the first" in said.out and "1: the stamp repeats" in said.out
    assert f"camera_info is for {WIDTH} x {HEIGHT} pixels, the image has 30 x 20" in said.err


def test_working_sizes_fill_the_budget_and_keep_the_ratio():
    assert working_size(480, 640, 200_000, 56) == (392, 504)
    rng = np.random.default_rng()
    for step in (14, 56):
        for _ in range(50):
            height, width = rng.integers(30, 3000, 2).tolist()
            pixels = int(rng.integers(step**2, 400_000))
            h, w = working_size(height, width, pixels, step)
            assert h % step == w % step == 0 and h * w <= pixels
            exact = np.sqrt(pixels * np.array([height / width, width / height]))
            if min(exact) > 3 * step:  # else a side of few steps cannot follow
                assert (np.abs(np.array([h, w]) - exact) <= 1.5 * step).all()
    assert working_size(10, 3000, 14 * 14 * 5, 14) == (14, 70)


def test_defaults_are_those_that_the_help_states(capsys):
    with pytest.raises(SystemExit):
        main(["reconstruct", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"(default {Options.views})" in text and f"(default {Options.pixels})" in text
