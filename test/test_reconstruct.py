"""The bag command as its user runs it: a process of its own on a small folder, with a tiny network of random weights."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import cv2
import numpy as np
import pytest
import torch
from rosbags.highlevel import AnyReader
from terminal import messages

from speed3r_ros import reconstruct
from speed3r_ros.camera import Camera
from speed3r_ros.config import Config, load_yaml, with_values
from speed3r_ros.convert import stamp_to_ns
from speed3r_ros.mapping.odometry import Odometry
from speed3r_ros.mapping.trajectory import read_tum
from speed3r_ros.model import weights
from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.engine import Engine
from speed3r_ros.model.network import Network, NetworkConfig
from speed3r_ros.model.types import Estimate, Frame, Tracking
from speed3r_ros.pipeline import Pipeline
from speed3r_ros.reconstruct import Run

TINY = NetworkConfig(height=56, width=56, channels=64, encoder_blocks=1, alternating_blocks=1, stem=4, decoder=2)
COUNT, BLACK = 9, 4
START_NS = 1_700_000_000_000_000_123


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(int(np.random.default_rng().integers(2**31)))
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    weights.save(Network(TINY), folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder in the documented layout: a moving random texture, one black frame, intrinsics and true poses."""
    rng = np.random.default_rng()
    folder = tmp_path_factory.mktemp("input") / "sequence"
    (folder / "rgb").mkdir(parents=True)
    texture = cv2.resize(rng.integers(0, 256, (20, 40, 3), dtype=np.uint8), (320, 160), interpolation=cv2.INTER_CUBIC)
    names, poses = [], []
    for index in range(COUNT):
        image = texture[20:116, 8 * index : 8 * index + 128] * (index != BLACK)
        assert cv2.imwrite(str(folder / "rgb" / f"{index}.png"), image)
        stamp = START_NS + index * 100_000_000
        text = f"{stamp // 10**9}.{stamp % 10**9:09d}"
        names.append(f"{text} rgb/{index}.png")
        poses.append(f"{text} {0.1 * index:.3f} {0.02 * index**2:.3f} 0 0 0 0 1")
    (folder / "rgb.txt").write_text("# timestamp filename\n" + "\n".join(names) + "\n")
    (folder / "poses.txt").write_text("\n".join(poses) + "\n")
    camera = {"width": 128, "height": 96, "fx": 110.0, "fy": 111.0, "cx": 63.0, "cy": 47.5}
    (folder / "intrinsics.json").write_text(json.dumps(camera))
    return folder


def command(*arguments):
    return [sys.executable, "-m", "speed3r_ros.cli", "reconstruct", *map(str, arguments)]


@pytest.fixture
def speed3r(checkpoint):
    def run(*arguments, **options):
        full = command(*arguments, "--set", f"engine.weights={checkpoint}", "--set", "engine.threads=1")
        return subprocess.run(full, capture_output=True, text=True, timeout=120, **options)

    return run


def expected_poses(folder, checkpoint, indices):
    """Camera-to-world of an engine and an odometry driven by hand on the same images."""
    engine, odometry = Engine(EngineConfig(weights=str(checkpoint), threads=1)), Odometry()
    K = np.array([[110.0, 0, 63.0], [0, 111.0, 47.5], [0, 0, 1]])
    found = {}
    for index in indices:
        image = cv2.imread(str(folder / "rgb" / f"{index}.png"))[..., ::-1]
        stamp = START_NS + index * 100_000_000
        image = np.ascontiguousarray(image)
        estimate = odometry.refine(image, engine.push(Frame(image, stamp, K)), True)
        if estimate.T_world_cam is not None:
            found[stamp] = estimate.T_world_cam
    return found


def one_line(text):
    """The only line of an error output that is not a progress bar."""
    lines = messages(text)
    assert len(lines) == 1, text
    return lines[0]


def test_the_outputs_hold_what_the_engine_says(speed3r, images, checkpoint, tmp_path):
    done = speed3r(images, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"trajectory.tum", "map.ply", "report.html", "bag"}
    expected = expected_poses(images, checkpoint, range(COUNT))
    assert len(expected) == COUNT - 1
    trajectory = read_tum(tmp_path / "out" / "trajectory.tum")
    assert trajectory.stamps_ns.tolist() == list(expected)
    np.testing.assert_allclose(trajectory.poses, list(expected.values()), atol=1e-5)
    assert f"frames     {COUNT - 1} of {COUNT} have a pose" in done.stdout
    assert "1: black frame: check the lens cap and the exposure" in done.stdout
    assert f"coverage {(COUNT - 1) / COUNT:.1%}" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f'<data id="poses" value="{COUNT - 1}.0">' in page and "engine.window" in page
    assert (tmp_path / "out" / "map.ply").read_bytes().startswith(b"ply\nformat binary_little_endian 1.0\n")
    with AnyReader([tmp_path / "out" / "bag"]) as reader:
        messages = [(c.topic, reader.deserialize(data, c.msgtype)) for c, _, data in reader.messages()]
    for topic in ("/pose", "/odometry"):
        found = {stamp_to_ns(m.header.stamp): m.pose.pose.position for name, m in messages if name == topic}
        assert list(found) == list(expected)
        # a level camera at the base's origin: its right, down, forward are the base's -y, -z, x
        xyz = np.array([[-p.y, -p.z, p.x] for p in found.values()])
        np.testing.assert_allclose(xyz, [T[:3, 3] for T in expected.values()], atol=1e-5)
    depths = [m for name, m in messages if name == "/depth/image"]
    assert len(depths) == COUNT - 1 and {(m.height, m.width, m.encoding) for m in depths} == {(56, 56, "32FC1")}


def test_stride_and_limit_choose_the_frames(speed3r, images, checkpoint, tmp_path):
    done = speed3r(images, "--out", tmp_path / "out", "--stride", 2, "--max-frames", 2, "--no-bag")
    assert done.returncode == 0, done.stderr
    expected = expected_poses(images, checkpoint, [0, 2])
    trajectory = read_tum(tmp_path / "out" / "trajectory.tum")
    np.testing.assert_allclose(trajectory.poses, list(expected.values()), atol=1e-5)
    assert not (tmp_path / "out" / "bag").exists()


def test_results_are_replaced_and_other_files_kept(speed3r, images, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused = speed3r(images, "--out", out)
    assert refused.returncode == 2 and "holds other files (notes.txt)" in one_line(refused.stderr)
    assert os.listdir(out) == ["notes.txt"]
    assert speed3r(images, "--out", out, "--overwrite", "--max-frames", 3).returncode == 0
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    again = speed3r(images, "--out", out, "--no-bag", "--max-frames", 2)  # its own results need no permission
    assert again.returncode == 0, again.stderr
    assert sorted(os.listdir(out)) == ["map.ply", "report.html", "trajectory.tum"]
    assert len(read_tum(out / "trajectory.tum")) == 2


def test_the_input_is_never_replaced(speed3r, images, tmp_path):
    shutil.copytree(images, tmp_path / "bag")
    for more in ([], ["--overwrite"]):
        refused = speed3r(tmp_path / "bag", "--out", tmp_path, *more)
        assert refused.returncode == 2 and "would be replaced" in one_line(refused.stderr)
    (tmp_path / "bag").rename(tmp_path / "map.ply")  # a folder of this name is not a result either
    refused = speed3r(images, "--out", tmp_path)
    assert refused.returncode == 2 and "holds other files (map.ply)" in one_line(refused.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_the_old_result(images, checkpoint, tmp_path, number):
    long = tmp_path / "long"
    long.mkdir()
    (long / "rgb").symlink_to(images / "rgb")
    rows = [f"{0.1 * index:.3f} rgb/{index % 3}.png" for index in range(20_000)]
    (long / "rgb.txt").write_text("\n".join(rows) + "\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("old")
    process = subprocess.Popen(
        command(long, "--out", out, "--set", f"engine.weights={checkpoint}"), stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 60
    while not any(path.is_file() for path in out.glob(".*/new/**/*")):  # the bag has begun
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in one_line(errors)
    assert os.listdir(out) == ["report.html"] and (out / "report.html").read_text() == "old"


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_an_interrupt_waits_until_torch_is_loaded(monkeypatch, handler):
    loaded = []

    def load(name):
        os.kill(os.getpid(), signal.SIGINT)
        loaded.append(name)

    monkeypatch.setattr(reconstruct.importlib, "import_module", load)
    usual = signal.signal(signal.SIGINT, handler)
    try:
        with nullcontext() if handler is signal.SIG_IGN else pytest.raises(KeyboardInterrupt):
            reconstruct.load_torch()
        assert loaded == ["torch"] and signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, usual)


def test_a_full_disk_gives_one_line_and_leaves_nothing(speed3r, images, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = speed3r(images, "--out", tmp_path / "out", preexec_fn=limit)
    assert done.returncode == 1 and "File too large" in one_line(done.stderr)
    assert os.listdir(tmp_path) == []


def test_a_run_without_any_pose_fails_and_leaves_the_old_result(speed3r, images, tmp_path):
    out, dark = tmp_path / "out", tmp_path / "dark"
    assert speed3r(images, "--out", out, "--no-bag", "--max-frames", 2).returncode == 0
    before = (out / "trajectory.tum").read_bytes()
    dark.mkdir()
    for index in range(3):
        assert cv2.imwrite(str(dark / f"{index}.png"), np.zeros((96, 128, 3), np.uint8))
    done = speed3r(dark, "--out", out)
    assert done.returncode == 1 and "dark: none of 3 frames got a pose; 3: " in one_line(done.stderr)
    assert (out / "trajectory.tum").read_bytes() == before
    assert sorted(os.listdir(out)) == ["map.ply", "report.html", "trajectory.tum"]


def test_an_impossible_folder_is_named(speed3r, images, tmp_path):
    (tmp_path / "file").touch()
    done = speed3r(images, "--out", tmp_path / "file" / "out")
    assert done.returncode == 1 and str(tmp_path / "file") in one_line(done.stderr)
    done = speed3r(images, "--out", tmp_path / "file")
    assert done.returncode == 2 and "is a file; name a folder" in one_line(done.stderr)


def test_an_input_without_images_is_named(speed3r, tmp_path):
    for name in ("absent", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        done = speed3r(tmp_path / name, "--out", tmp_path / "out")
        assert done.returncode == 1 and str(tmp_path / name) in one_line(done.stderr)
    assert os.listdir(tmp_path) == ["empty"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--set", "engine.windows=8"], "engine.windows"),
        (["--set", "engine.window=many"], "engine.window = 'many'"),
        (["--set", "engine.window=0"], "engine.window = 0"),
        (["--set", "engine.window"], "expected NAME=VALUE"),
        (["--set", "engine.window=[1"], "engine.window = '[1': not a value"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--stride", "0"], "must be a positive integer"),
    ],
)
def test_wrong_settings_are_named(images, tmp_path, arguments, says):
    done = subprocess.run(command(images, "--out", tmp_path / "out", *arguments), capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and os.listdir(tmp_path) == []


def test_a_settings_file_is_read_and_the_command_line_wins(speed3r, images, tmp_path):
    settings = {"/**": {"ros__parameters": {"engine": {"window": 3, "anchors": 5}}}}
    (tmp_path / "settings.yaml").write_text(json.dumps(settings))  # JSON is YAML
    done = speed3r(
        images, "--out", tmp_path / "out", "--max-frames", 2, "--config", tmp_path / "settings.yaml",
        "--set", "engine.window=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for name, value in (("engine.window", 2), ("engine.anchors", 5)):
        assert f'<th scope="row">{name}</th><td class="number">{value}</td>' in page


def test_the_printed_parameter_file_holds_the_defaults(tmp_path):
    done = subprocess.run([sys.executable, "-m", "speed3r_ros.cli", "config"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "recon.yaml").write_text(done.stdout)
    assert load_yaml(tmp_path / "recon.yaml") == Config()


class Scripted:
    """An engine whose camera advances by one unit per frame since its last reset."""

    def __init__(self):
        self.frames, self.resets = [], 0
        self.reset()

    def reset(self):
        self.resets += 1
        self.step = 0

    def push(self, frame):
        self.frames.append(frame)
        T = np.eye(4)
        T[2, 3] = self.step
        self.step += 1
        plane = np.ones((4, 5), np.float32)
        image = np.zeros((4, 5, 3), np.uint8)
        return Estimate(frame.stamp_ns, Tracking.TRACKING, T, plane, plane, np.eye(3), image, False, np.ones(2))


class Named:
    """All that a run asks of its source."""

    name, truth = "scripted", None


@pytest.fixture
def scripted():
    engine = Scripted()
    return engine, Run(Pipeline(Config(), engine), Named(), 100)


def feed(run, seconds, camera=None):
    for second in seconds:
        run.add(int(second * 10**9), np.zeros((48, 64, 3), np.uint8), camera)
    return run.finish()


def test_a_repeated_stamp_is_skipped(scripted):
    engine, run = scripted
    results = feed(run, [1, 2, 2, 3])
    assert len(engine.frames) == 3 and results.lost == {"the stamp repeats": 1}


def test_late_and_unset_stamps_cost_their_frames_alone(scripted):
    engine, run = scripted
    results = feed(run, [1e9, 1e9 + 1, 1e9 + 2, 1e9 + 1.5, 0, 1e9 + 3])
    assert results.trajectory.stamps_ns.tolist() == [10**18 + i * 10**9 for i in range(4)] and engine.resets == 1
    assert results.lost == {"the stamp is older than the one before": 1, "the stamp is not set": 1}


def test_a_recording_may_start_at_zero(scripted):
    engine, run = scripted
    results = feed(run, [0, 1, 2, 3, 0, 1])
    assert results.trajectory.stamps_ns.tolist() == [0, 10**9] and engine.resets == 2


def test_the_bag_begins_anew_where_the_reconstruction_does(tmp_path):
    """After a jump back, /path and the twist know the new world alone; the twist is the mean velocity of the body."""

    class Played(list):
        name, truth = "played", None

    rng = np.random.default_rng()
    seconds = [100.0, 100.5, 102.5, 7.0, 7.25, 7.5 + rng.uniform(0.1, 0.5)]
    frames = [(round(s * 1e9), np.zeros((48, 64, 3), np.uint8), None) for s in seconds]
    config = with_values(Config(), {"odometry.features": 0})
    reconstruct.reconstruct(Played(frames), Pipeline(config, Scripted()), tmp_path)
    with AnyReader([tmp_path / "bag"]) as reader:
        read = [(c.topic, reader.deserialize(raw, c.msgtype)) for c, _, raw in reader.messages()]
    (path,) = (message for topic, message in read if topic == "/path")
    assert [stamp_to_ns(pose.header.stamp) for pose in path.poses] == [stamp for stamp, _, _ in frames[3:]]
    speeds = {stamp_to_ns(m.header.stamp): m.twist.twist.linear for topic, m in read if topic == "/odometry"}
    steps = [0, 0.5, 2.0, 0, 0.25, seconds[5] - seconds[4]]  # one unit forward in each
    expected = [1 / step if step else 0.0 for step in steps]
    np.testing.assert_allclose([speeds[stamp].x for stamp, _, _ in frames], expected, rtol=1e-6)
    np.testing.assert_allclose([(s.y, s.z) for s in speeds.values()], 0, atol=1e-9)


def test_a_backward_jump_starts_anew(scripted, capsys):
    engine, run = scripted
    results = feed(run, [100, 101, 5, 6, 7])
    assert engine.resets == 2 and "jump back by 96.000 s" in capsys.readouterr().err
    assert results.trajectory.stamps_ns.tolist() == [5 * 10**9, 6 * 10**9, 7 * 10**9]
    np.testing.assert_array_equal(results.trajectory.poses[:, 2, 3], [0, 1, 2])


def test_a_long_gap_goes_on_from_the_last_pose(scripted, capsys):
    engine, run = scripted
    results = feed(run, [1, 2, 3, 5000, 5001])
    assert engine.resets == 2 and "no image for 4997.0 s" in capsys.readouterr().err
    np.testing.assert_array_equal(results.trajectory.poses[:, 2, 3], [0, 1, 2, 2, 3])


def test_intrinsics_of_another_resolution_count_as_unknown(scripted, capsys):
    engine, run = scripted
    feed(run, [1, 2], Camera(np.diag([50.0, 50.0, 1.0]), np.zeros(0), "plumb_bob", 640, 480))
    feed(run, [3], Camera(np.diag([50.0, 50.0, 1.0]), np.zeros(0), "plumb_bob", 64, 48))
    assert [frame.K is None for frame in engine.frames] == [True, True, False]
    assert capsys.readouterr().err.count("640 x 480") == 1
