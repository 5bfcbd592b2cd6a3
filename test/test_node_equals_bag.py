"""The node, fed and recorded over DDS by processes of their own, and the bag command give the same results."""

import json
import re
import signal
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("rclpy", reason="waits for a ROS 2 installation or the rclpy wheels")

from rosbags.highlevel import AnyReader

from speed3r_ros.convert import stamp_to_ns
from speed3r_ros.mapping.trajectory import read_tum
from speed3r_ros.model import weights
from speed3r_ros.model.network import Network, NetworkConfig

TINY = NetworkConfig(height=56, width=56, channels=64, encoder_blocks=1, alternating_blocks=1, stem=4, decoder=2)
COUNT = 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Images of a distorted camera that pans over a texture, true poses, and a network of random weights."""
    rng = np.random.default_rng()
    torch.manual_seed(int(rng.integers(2**31)))
    root = tmp_path_factory.mktemp("node_equals_bag")
    weights.save(Network(TINY), root / "weights")
    images = root / "sequence"
    (images / "rgb").mkdir(parents=True)
    texture = cv2.resize(rng.integers(0, 256, (20, 50, 3), dtype=np.uint8), (400, 160), interpolation=cv2.INTER_CUBIC)
    rows, poses = [], []
    for index in range(COUNT):
        assert cv2.imwrite(str(images / "rgb" / f"{index}.png"), texture[20:116, 12 * index : 12 * index + 128])
        stamp = f"{1_700_000_000 + index // 10}.{index % 10}00000007"
        rows.append(f"{stamp} rgb/{index}.png")
        poses.append(f"{stamp} {index} {0.1 * index**2} {np.sin(index)} 0 0 0 1")
    (images / "rgb.txt").write_text("\n".join(rows) + "\n")
    (images / "poses.txt").write_text("\n".join(poses) + "\n")
    camera = {"width": 128, "height": 96, "fx": 110.0, "fy": 111.0, "cx": 63.0, "cy": 47.5}
    camera["distortion"] = {"coeffs": [0.1, -0.02, 0.001, 0.002, 0.0]}
    (images / "intrinsics.json").write_text(json.dumps(camera))
    return root


def run(*arguments):
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


SETTINGS = {"engine.threads": 1, "engine.precision": "fp32", "scale.factor": 2.5, "depth.min_confidence": 0.0}


@pytest.fixture(scope="module")
def results(folders):
    """Folder of the report on the node's recorded run, and folder of the bag command's."""
    images, live, offline = folders / "sequence", folders / "live", folders / "offline"
    values = {**SETTINGS, "engine.weights": folders / "weights"}
    node_values = {**values, "frames.wait": 0.0, "map.rate": 5.0}
    parameters = [part for name, value in node_values.items() for part in ("-p", f"{name}:={value}")]
    recorder = start("speed3r_ros.record", folders / "recorded", "--until-idle", 3)
    begun = recorder.stdout.readline()  # else all poses may be out before it listens
    assert begun.startswith("recording to"), begun
    node = start("speed3r_ros.recon_node", "--ros-args", *parameters)
    try:
        run("speed3r_ros.play", images, "--lockstep", 20, "--log", folders / "sent.csv")
        told, _ = recorder.communicate(timeout=30)
        assert recorder.returncode == 0, told
    finally:
        recorder.kill()
        node.send_signal(signal.SIGINT)
        told, _ = node.communicate(timeout=20)
    assert node.returncode == 0, told
    log = ["--sent", folders / "sent.csv"]
    run("speed3r_ros.cli", "report", "--recorded", folders / "recorded", "--source", images, "--out", live, *log)
    settings = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    run("speed3r_ros.cli", "reconstruct", images, "--out", offline, *settings)
    return live, offline


def messages(bag, topic):
    with AnyReader([bag]) as reader:
        chosen = [connection for connection in reader.connections if connection.topic == topic]
        found = [reader.deserialize(data, c.msgtype) for c, _, data in reader.messages(connections=chosen)]
    return {stamp_to_ns(message.header.stamp): message for message in found}


def test_trajectories_are_equal(results):
    live, offline = (read_tum(folder / "trajectory.tum") for folder in results)
    assert len(live) == COUNT
    np.testing.assert_array_equal(live.stamps_ns, offline.stamps_ns)
    np.testing.assert_allclose(live.poses, offline.poses, atol=1e-5)
    assert np.ptp(live.poses[:, :3, 3], axis=0).max() > 1e-3  # there is motion to compare


@pytest.mark.parametrize("topic", ["/pose", "/odometry"])
def test_messages_carry_the_same_poses(folders, results, topic):
    live, offline = messages(folders / "recorded", topic), messages(results[1] / "bag", topic)
    assert list(live) == list(offline) and len(live) == COUNT
    for one, other in zip(live.values(), offline.values()):
        assert one.header.frame_id == other.header.frame_id
        for part in ("position", "orientation"):
            a, b = (vars(getattr(message.pose.pose, part)) for message in (one, other))
            np.testing.assert_allclose(*([values[k] for k in "xyzw" if k in values] for values in (a, b)), atol=1e-5)
        np.testing.assert_allclose(one.pose.covariance, other.pose.covariance, rtol=1e-4)
        if topic == "/odometry":
            for part in ("linear", "angular"):
                a, b = (vars(getattr(message.twist.twist, part)) for message in (one, other))
                np.testing.assert_allclose(*([values[k] for k in "xyz"] for values in (a, b)), atol=1e-3)


@pytest.mark.parametrize("topic", ["/depth/image", "/confidence"])
def test_depth_and_confidence_are_equal(folders, results, topic):
    live, offline = messages(folders / "recorded", topic), messages(results[1] / "bag", topic)
    assert list(live) == list(offline) and len(live) == COUNT
    for one, other in zip(live.values(), offline.values()):
        assert (one.encoding, one.width, one.height) == (other.encoding, other.width, other.height)
        a, b = (np.frombuffer(message.data, np.float32) for message in (one, other))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_reports_show_the_same_accuracy_and_an_honest_latency(results):
    pages = [(folder / "report.html").read_text(encoding="utf-8") for folder in results]
    live, offline = ({k: float(v) for k, v in re.findall(r'<data id="(\w+)" value="([^"]+)"', page)} for page in pages)
    for name in ("poses", "ate", "ate_metric", "scale", "coverage", "ate_line", "ate_still"):
        assert live[name] == pytest.approx(offline[name], rel=1e-4), name
    assert live["dropped"] == 0 and live["coverage"] == 1
    # over the network, a pose takes longer than its computation, and less than the patience of the player
    assert 0 < live["latency_p50_ms"] <= live["latency_p95_ms"] < 20_000


def test_map_files_hold_points_in_the_same_place(results):
    clouds = []
    for folder in results:
        plyfile = pytest.importorskip("plyfile", reason="waits for `pip install plyfile`")
        vertex = plyfile.PlyData.read(folder / "map.ply")["vertex"]
        clouds.append(np.stack([vertex[axis] for axis in "xyz"], 1))
    live, offline = clouds
    assert len(live) == len(offline)
    np.testing.assert_allclose(np.sort(live, axis=0), np.sort(offline, axis=0), atol=1e-4)
