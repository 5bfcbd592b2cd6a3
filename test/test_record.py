"""The recorder, as a process of its own, against messages published over DDS by this process."""

import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="waits for a ROS 2 installation or the rclpy wheels")

from geometry_msgs.msg import PoseWithCovarianceStamped  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy  # noqa: E402
from rosbags.highlevel import AnyReader  # noqa: E402
from sensor_msgs.msg import PointCloud2  # noqa: E402

from speed3r_ros.record import header_stamp  # noqa: E402


def start_recorder(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "speed3r_ros.record", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def node():
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("publisher", context=context)
    yield node
    node.destroy_node()
    context.try_shutdown()


def wait_for_subscriber(*publishers):
    limit = time.monotonic() + 20
    while not all(publisher.get_subscription_count() for publisher in publishers):
        assert time.monotonic() < limit, "the recorder never subscribed"
        time.sleep(0.05)


def pose_message(index):
    message = PoseWithCovarianceStamped()
    message.header.frame_id = "map"
    message.header.stamp.sec, message.header.stamp.nanosec = 1_700_000_000 + index, 999_999_999 - index
    message.pose.pose.position.x = float(index)
    return message


def publish_poses(node, count):
    publisher = node.create_publisher(
        PoseWithCovarianceStamped, "pose", QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
    )
    wait_for_subscriber(publisher)
    for index in range(count):
        publisher.publish(pose_message(index))
        time.sleep(0.01)
    return publisher


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_message_is_in_the_bag_in_order_with_its_reception(node, tmp_path, number):
    recorder = start_recorder(tmp_path / "bag")
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    cloud = node.create_publisher(PointCloud2, "map_points", latched)
    cloud.publish(PointCloud2(width=0, height=1))  # before anyone listens
    before = time.monotonic_ns()
    publisher = publish_poses(node, 40)
    assert publisher.wait_for_all_acked()
    time.sleep(0.5)
    assert not (tmp_path / "bag").exists()
    recorder.send_signal(number)
    output, errors = recorder.communicate(timeout=20)
    assert recorder.returncode == 0, errors
    assert f"in {tmp_path / 'bag'}" in output
    assert [path.name for path in tmp_path.iterdir()] == ["bag"]
    with AnyReader([tmp_path / "bag"]) as reader:
        found = {}
        for connection, _, data in reader.messages():
            found.setdefault(connection.topic, []).append(reader.deserialize(data, connection.msgtype))
    assert [m.pose.pose.position.x for m in found["/pose"]] == list(range(40))
    assert len(found["/map_points"]) == 1
    rows = [row.split(",") for row in (tmp_path / "bag" / "received.csv").read_text().splitlines()[1:]]
    poses = np.array([[int(stamp), int(received)] for topic, stamp, received in rows if topic == "/pose"])
    np.testing.assert_array_equal(poses[:, 0], [(1_700_000_000 + k) * 10**9 + 999_999_999 - k for k in range(40)])
    assert (np.diff(poses[:, 1]) >= 0).all() and before <= poses[0, 1] <= poses[-1, 1] <= time.monotonic_ns()


def test_it_ends_by_itself_when_poses_stop(node, tmp_path):
    recorder = start_recorder(tmp_path / "bag", "--until-idle", "1")
    publish_poses(node, 5)
    output, errors = recorder.communicate(timeout=20)
    assert recorder.returncode == 0 and output.strip().endswith(f"5 messages in {tmp_path / 'bag'}"), errors


def test_an_existing_bag_is_refused(tmp_path):
    (tmp_path / "bag").mkdir()
    recorder = start_recorder(tmp_path / "bag")
    _, errors = recorder.communicate(timeout=20)
    assert recorder.returncode == 2 and "exists: name another bag or remove it" in errors


def test_a_full_disk_gives_one_line_and_leaves_nothing(node, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    recorder = start_recorder(tmp_path / "bag", preexec_fn=limit)
    cloud = node.create_publisher(PointCloud2, "points", 10)
    wait_for_subscriber(cloud)
    message = PointCloud2(width=1, height=1, data=bytes(50_000))
    for _ in range(40):
        cloud.publish(message)
        time.sleep(0.05)
        if recorder.poll() is not None:
            break
    recorder.send_signal(signal.SIGINT)
    _, errors = recorder.communicate(timeout=20)
    lines = [
        line for line in errors.splitlines() if not line.startswith("not recorded: /tf")
    ]  # where tf2_msgs is absent
    assert recorder.returncode == 1 and len(lines) == 1
    assert lines[0].startswith(f"cannot write {tmp_path / 'bag'}: ")
    assert list(tmp_path.iterdir()) == []


def test_stamps_are_read_from_either_byte_order():
    little = bytes([0, 1, 0, 0]) + (7).to_bytes(4, "little") + (8).to_bytes(4, "little")
    big = bytes([0, 0, 0, 0]) + (7).to_bytes(4, "big") + (8).to_bytes(4, "big")
    assert header_stamp(little) == header_stamp(big) == 7_000_000_008
