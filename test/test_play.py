"""The player, as a process of its own, heard by an independent subscriber in this process."""

import json
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="waits for a ROS 2 installation or the rclpy wheels")

from geometry_msgs.msg import PoseWithCovarianceStamped  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.qos import QoSProfile, ReliabilityPolicy  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from sensor_msgs.msg import CameraInfo, CompressedImage, Image  # noqa: E402

START_NS, STEP_NS, COUNT = 1_700_000_000_123_456_789, 50_000_001, 6
RELIABLE = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    rng = np.random.default_rng()
    folder = tmp_path_factory.mktemp("input") / "sequence"
    (folder / "rgb").mkdir(parents=True)
    rows = []
    for index in range(COUNT):
        smooth = cv2.resize(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), (70, 50), interpolation=cv2.INTER_LINEAR)
        assert cv2.imwrite(str(folder / "rgb" / f"{index}.png"), smooth)
        stamp = START_NS + index * STEP_NS
        rows.append(f"{stamp // 10**9}.{stamp % 10**9:09d} rgb/{index}.png")
    (folder / "rgb.txt").write_text("\n".join(rows) + "\n")
    camera = {"width": 70, "height": 50, "fx": 60.0, "fy": 61.0, "cx": 34.0, "cy": 25.0}
    camera["distortion"] = {"coeffs": [0.1, -0.01, 0.001, 0.002, 0.0]}
    (folder / "intrinsics.json").write_text(json.dumps(camera))
    return folder


def start_player(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "speed3r_ros.play", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Listener:
    """Subscribes and keeps what comes, with the monotonic time of reception."""

    def __init__(self, node, executor):
        self.node, self.executor, self.heard = node, executor, {}

    def subscribe(self, kind, topic):
        self.heard[topic] = []
        self.node.create_subscription(
            kind, topic, lambda m: self.heard[topic].append((time.monotonic_ns(), m)), RELIABLE
        )

    def listen(self, until, seconds=40):
        limit = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < limit, {topic: len(found) for topic, found in self.heard.items()}
            self.executor.spin_once(timeout_sec=0.05)

    def messages(self, topic):
        return [message for _, message in self.heard[topic]]


@pytest.fixture
def listener():
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("listener", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    yield Listener(node, executor)
    executor.shutdown()
    node.destroy_node()
    context.try_shutdown()


def stamps(messages):
    return [message.header.stamp.sec * 10**9 + message.header.stamp.nanosec for message in messages]


EXPECTED_STAMPS = [START_NS + index * STEP_NS for index in range(COUNT)]


def test_every_image_arrives_unchanged_with_its_stamp_and_camera(listener, images, tmp_path):
    listener.subscribe(Image, "image")
    listener.subscribe(CameraInfo, "camera_info")
    player = start_player(images, "--log", tmp_path / "sent.csv")
    listener.listen(lambda: player.poll() is not None)
    assert player.returncode == 0, player.stderr.read()
    found, infos = listener.messages("image"), listener.messages("camera_info")
    assert stamps(found) == stamps(infos) == EXPECTED_STAMPS
    for index, message in enumerate(found):
        expected = cv2.imread(str(images / "rgb" / f"{index}.png"))[..., ::-1]
        assert (message.encoding, message.step) == ("rgb8", 210)
        np.testing.assert_array_equal(np.frombuffer(message.data, np.uint8).reshape(50, 70, 3), expected)
    assert {m.header.frame_id for m in found + infos} == {"camera_optical_frame"}
    for info in infos:
        assert list(info.k) == [60, 0, 34, 0, 61, 25, 0, 0, 1] and (info.width, info.height) == (70, 50)
        np.testing.assert_allclose(info.d, [0.1, -0.01, 0.001, 0.002, 0.0])
    rows = np.loadtxt(tmp_path / "sent.csv", delimiter=",", skiprows=1, dtype=np.int64)
    assert rows[:, 0].tolist() == EXPECTED_STAMPS
    received = [when for when, _ in listener.heard["image"]]
    assert (rows[:, 1] < received).all() and (np.diff(rows[:, 1]) > 0).all()


def test_compressed_images_decode_to_nearly_the_same(listener, images):
    listener.subscribe(CompressedImage, "image/compressed")
    player = start_player(images, "--compressed", "--rate", 5)
    listener.listen(lambda: player.poll() is not None)
    found = listener.messages("image/compressed")
    assert stamps(found) == EXPECTED_STAMPS
    for index, message in enumerate(found):
        decoded = cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_COLOR)
        expected = cv2.imread(str(images / "rgb" / f"{index}.png"))
        assert "jpeg" in message.format and np.abs(decoded.astype(int) - expected).mean() < 4


def test_a_loop_starts_again_and_the_clock_follows_the_stamps(listener, images, tmp_path):
    listener.subscribe(Image, "ns/image")
    listener.subscribe(Clock, "/clock")
    log = tmp_path / "sent.csv"
    player = start_player(images, "--loop", "--clock", "--rate", 2, "--namespace", "ns", "--log", log)
    listener.listen(lambda: len(listener.heard["ns/image"]) > 2 * COUNT)
    player.terminate()
    player.communicate(timeout=20)
    assert player.returncode == 130
    assert stamps(listener.messages("ns/image"))[: 2 * COUNT] == 2 * EXPECTED_STAMPS
    clock = np.array([m.clock.sec * 10**9 + m.clock.nanosec for m in listener.messages("/clock")])
    assert set(EXPECTED_STAMPS) <= set(clock.tolist())
    assert (np.diff(clock) < 0).sum() in (1, 2)  # it jumps back where the recording starts again, and only there
    assert len(log.read_text().splitlines()) > 2 * COUNT  # the log survives an interruption


def test_in_lockstep_an_image_waits_for_the_pose_of_the_last(listener, images):
    """Every pose is given late; the next image has never been sent before it."""
    listener.subscribe(Image, "image")
    poses = listener.node.create_publisher(PoseWithCovarianceStamped, "pose", RELIABLE)
    player = start_player(images, "--rate", 1000, "--lockstep", 30)
    for index in range(COUNT):
        listener.listen(lambda: len(listener.heard["image"]) > index)  # noqa: B023 (called at once)
        quiet = time.monotonic() + 0.2
        listener.listen(lambda: time.monotonic() > quiet)  # noqa: B023
        assert len(listener.heard["image"]) == index + 1
        answer = PoseWithCovarianceStamped()
        answer.header.stamp = listener.messages("image")[-1].header.stamp
        poses.publish(answer)
    listener.listen(lambda: player.poll() is not None)
    assert player.returncode == 0


def test_nobody_listening_is_one_clear_line(images):
    player = start_player(images, "--wait", 1)
    _, errors = player.communicate(timeout=30)
    assert player.returncode == 1 and errors.strip().count("\n") == 0
    assert "nobody subscribed to /image within 1 s" in errors


def test_an_unreadable_input_is_one_clear_line(tmp_path):
    player = start_player(tmp_path / "absent")
    _, errors = player.communicate(timeout=30)
    assert player.returncode == 1 and errors.strip().count("\n") == 0 and str(tmp_path / "absent") in errors
