"""Reading a recorded run back: frames, times and points, and one clear line for recordings that cannot be read."""

import signal
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from scipy.spatial.transform import Rotation

from speed3r_ros.cli import main
from speed3r_ros.clouds import make_rows
from speed3r_ros.convert import (
    array_to_image,
    bag_types,
    points_message,
    pose_from_matrix,
    pose_message,
    transform_message,
)
from speed3r_ros.mapping.geometry import T_link_optical
from speed3r_ros.recording import float_image, latencies, points_of, read_times, static_transform


@pytest.fixture
def rng():
    return np.random.default_rng()


def random_transform(rng):
    T = np.eye(4)
    T[:3, :3] = Rotation.random(random_state=int(rng.integers(2**31))).as_matrix()
    T[:3, 3] = rng.normal(size=3)
    return T


def test_the_camera_is_found_through_a_chain_of_static_transforms(rng):
    A, B, C = (random_transform(rng) for _ in range(3))
    edges = [(B, "mast", "camera"), (A, "base_link", "mast"), (C, "camera", "optical"), (A, "base_link", "wheel")]
    messages = [
        SimpleNamespace(
            transforms=[transform_message(pose_from_matrix(T, bag_types), 0, parent, child, types=bag_types)]
        )
        for T, parent, child in edges
    ]
    np.testing.assert_allclose(static_transform(messages, "base_link", "optical"), A @ B @ C, atol=1e-12)
    np.testing.assert_array_equal(static_transform(messages, "optical", "optical"), np.eye(4))
    np.testing.assert_array_equal(static_transform(messages, "base_link", "unknown"), T_link_optical)


def test_latency_counts_from_the_last_sending_of_a_stamp():
    sent = [(1, 1_000_000_000), (2, 2_000_000_000), (1, 5_000_000_000), (3, 6_000_000_000)]
    received = [(1, 1_500_000_000), (2, 2_250_000_000), (1, 5_125_000_000), (9, 7_000_000_000)]
    np.testing.assert_allclose(latencies(sent, received), [0.5, 0.25, 0.125])


def test_clouds_and_images_round_trip(rng):
    points, colors = rng.normal(size=(50, 3)).astype(np.float32), rng.integers(0, 256, (50, 3), dtype=np.uint8)
    message = points_message(make_rows(points, colors), 0, "map", types=bag_types)
    found = points_of(message)
    np.testing.assert_array_equal(found[0], points)
    np.testing.assert_array_equal(found[1], colors)
    wider = np.zeros((50, 24), np.uint8)  # fields in another order, with room between them
    rows = message.data.reshape(50, 16)
    wider[:, 4:8], wider[:, 8:20] = rows[:, 12:], rows[:, :12]
    fields = [replace(field, offset=4 if field.name == "rgb" else field.offset + 8) for field in message.fields]
    found = points_of(replace(message, point_step=24, data=wider.reshape(-1), fields=fields[::-1]))
    np.testing.assert_array_equal(found[0], points)
    np.testing.assert_array_equal(found[1], colors)
    depth = rng.random((6, 9)).astype(np.float32)
    np.testing.assert_array_equal(float_image(array_to_image(depth, 0, "", types=bag_types)), depth)


def test_times_of_one_topic_are_read_in_order(tmp_path):
    (tmp_path / "r.csv").write_text("topic,stamp_ns,monotonic_ns\n/a/pose,5,10\n/tf,6,11\n/a/pose,4,12\n")
    assert read_times(tmp_path / "r.csv", "/pose") == [(5, 10), (4, 12)]


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("speed3r report: ") and error.count("\n") == 1
    return error


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    assert cv2.imwrite(str(tmp_path / "images" / "0.png"), np.zeros((40, 40, 3), np.uint8))
    return tmp_path / "images"


def report(bag, images, out, *more):
    return main(["report", "--recorded", str(bag), "--source", str(images), "--out", str(out), *map(str, more)])


def write_bag(path):
    types = get_typestore(Stores.ROS2_JAZZY)
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connection = writer.add_connection("/clouds", "std_msgs/msg/Empty", typestore=types)
        writer.write(connection, 0, types.serialize_cdr(bag_types.make("std_msgs/msg/Empty"), "std_msgs/msg/Empty"))


def test_a_recording_without_poses_lists_its_topics(images, tmp_path, capsys):
    write_bag(tmp_path / "bag")
    assert report(tmp_path / "bag", images, tmp_path / "out") == 1
    assert "no pose of the node was recorded; topics: /clouds" in one_line(capsys)


def test_a_truncated_or_missing_recording_is_named(images, tmp_path, capsys):
    write_bag(tmp_path / "bag")
    file = next((tmp_path / "bag").glob("*.mcap"))
    file.write_bytes(file.read_bytes()[:200])
    for bag in ("bag", "absent"):
        assert report(tmp_path / bag, images, tmp_path / "out") == 1
        assert str(tmp_path / bag) in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_recording_with_a_damaged_part_is_named(images, tmp_path, capsys):
    types, rng = get_typestore(Stores.ROS2_JAZZY), np.random.default_rng()
    kind = "geometry_msgs/msg/PoseWithCovarianceStamped"
    writer = Writer(tmp_path / "bag", version=9, storage_plugin=StoragePlugin.MCAP)
    writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
    with writer:
        connection = writer.add_connection("/pose", kind, typestore=types)
        for number in range(200):
            pose = pose_from_matrix(np.eye(4), bag_types)
            message = pose_message(pose, rng.uniform(0, 1, 2), number, "map", types=bag_types)
            writer.write(connection, number, types.serialize_cdr(message, kind))
    file = next((tmp_path / "bag").glob("*.mcap"))
    data = bytearray(file.read_bytes())
    at = data.index(b"\x28\xb5\x2f\xfd")  # a frame of zstd
    data[at : at + 100] = bytes(100)
    file.write_bytes(data)
    assert report(tmp_path / "bag", images, tmp_path / "out") == 1
    assert f"{tmp_path / 'bag'}: damaged" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_report_ends_in_one_line(images, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("speed3r_ros.recording.results_of_recording", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert report(tmp_path / "bag", images, tmp_path / "out") == 130
    except KeyboardInterrupt:
        pytest.fail("the interrupt came through")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert "interrupted" in one_line(capsys)


def test_a_foreign_or_missing_log_is_named(tmp_path):
    for path, text in (
        (tmp_path / "x.csv", "a,b\n1,2\n"),
        (tmp_path / "y.csv", "stamp_ns,monotonic_ns\n1\n"),
        (tmp_path / "z.csv", "stamp_ns,monotonic_ns\n1,2\n3,4x\n"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="expected the columns stamp_ns and monotonic_ns"):
            read_times(path)
    with pytest.raises(FileNotFoundError):
        read_times(tmp_path / "absent.csv")
