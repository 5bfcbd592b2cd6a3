"""Recorded inputs: bags written here with rosbags, videos with OpenCV, folders; and everything that can be wrong with them."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from speed3r_ros.convert import array_to_image, bag_types, info_from_K
from speed3r_ros.sources import open_source

STORE = get_typestore(Stores.ROS2_JAZZY)
K = np.array([[50.0, 0, 20], [0, 55, 15], [0, 0, 1]])
RNG = np.random.default_rng()
SHARED = Path(__file__).parents[2] / "shared" / "data"


def write_bag(path, topics, storage=StoragePlugin.MCAP, frames=5):
    """A bag with random images on `topics`, a camera_info beside /cam/image and a foreign topic."""
    sent = {topic: [] for topic in topics}
    with Writer(path, version=9, storage_plugin=storage) as writer:
        connections = {t: writer.add_connection(t, "sensor_msgs/msg/Image", typestore=STORE) for t in topics}
        info = writer.add_connection("/cam/camera_info", "sensor_msgs/msg/CameraInfo", typestore=STORE)
        other = writer.add_connection("/odom", "geometry_msgs/msg/Point", typestore=STORE)
        for i in range(frames):
            stamp = 1_700_000_000_123_456_789 + i * 10**8
            point = bag_types.make("geometry_msgs/msg/Point", x=0.0, y=0.0, z=0.0)
            writer.write(other, stamp, STORE.serialize_cdr(point, "geometry_msgs/msg/Point"))
            message = info_from_K(K, 40, 30, stamp, "cam", bag_types)
            writer.write(info, stamp, STORE.serialize_cdr(message, "sensor_msgs/msg/CameraInfo"))
            for topic in topics:
                image = RNG.integers(0, 255, (30, 40, 3), dtype=np.uint8)
                sent[topic].append((stamp, image))
                message = array_to_image(image, stamp, "cam", types=bag_types)
                if i == 2:
                    message.encoding = "nonsense"
                writer.write(connections[topic], stamp, STORE.serialize_cdr(message, "sensor_msgs/msg/Image"))
    return sent


@pytest.mark.parametrize("storage", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_bag_round_trip_skips_and_names_a_bad_frame(tmp_path, storage, capsys):
    sent = write_bag(tmp_path / "bag", ["/cam/image"], storage)["/cam/image"]
    (tmp_path / "groundtruth.tum").write_text("1700000000.123456789 1 2 3 0 0 0 1\n")
    source = open_source(tmp_path / "bag")
    items = list(source)
    good = [item for i, item in enumerate(sent) if i != 2]
    assert [item[0] for item in items] == [stamp for stamp, _ in good] and len(source) == 5
    for (_, image, camera), (_, expected) in zip(items, good):
        np.testing.assert_array_equal(image, expected)
        np.testing.assert_array_equal(camera.K, K)
    assert "'nonsense' is not supported" in capsys.readouterr().err
    assert source.truth.stamps_ns.tolist() == [1_700_000_000_123_456_789] and abs(source.duration_s - 0.4) < 1e-6


def test_several_or_no_image_topics_are_listed(tmp_path):
    write_bag(tmp_path / "two", ["/cam/image", "/rear/image"])
    with pytest.raises(ValueError, match="several image topics.*/cam/image, /rear/image"):
        open_source(tmp_path / "two")
    rear = list(open_source(tmp_path / "two", "/rear/image"))
    assert len(rear) == 4 and rear[0][2] is None  # no camera_info beside it
    write_bag(tmp_path / "none", [])
    with pytest.raises(ValueError, match=r"no image topic; its topics are: /cam/camera_info .*, /odom"):
        open_source(tmp_path / "none")
    with pytest.raises(ValueError, match="'/odom' is not an image topic"):
        open_source(tmp_path / "none", "/odom")


def test_truncated_bag_ends_in_one_line(tmp_path, capsys):
    write_bag(tmp_path / "bag", ["/cam/image"], frames=60)
    data = next((tmp_path / "bag").glob("*.mcap"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    try:
        count = len(list(open_source(tmp_path / "bag")))
        assert count < 60
    except ValueError as error:
        assert "not a readable bag" in str(error) and "\n" not in str(error)


def test_video(tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 20, (64, 48))
    for i in range(7):
        writer.write(np.full((48, 64, 3), (10, 20, 30 * i), np.uint8))  # BGR
    writer.release()
    items = list(open_source(path))
    assert [stamp for stamp, *_ in items] == [i * 50_000_000 for i in range(7)] and items[0][2] is None
    for i, (_, image, _) in enumerate(items):
        assert np.abs(image.reshape(-1, 3).mean(0) - [30 * i, 20, 10]).max() < 6


def test_folder_with_timestamps(tmp_path, capsys):
    (tmp_path / "rgb").mkdir()
    image = RNG.integers(0, 255, (30, 40, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "rgb" / "b.png"), image[..., ::-1])
    (tmp_path / "rgb" / "a.png").write_bytes(b"not a picture")
    (tmp_path / "rgb.txt").write_text(
        "# timestamp file\n1305031232.861666123 rgb/a.png\n1305031233.000000001 rgb/b.png\n"
    )
    (tmp_path / "intrinsics.json").write_text('{"fx": 50, "fy": 55, "cx": 20, "cy": 15, "width": 40, "height": 30}')
    ((stamp, got, camera),) = open_source(tmp_path)
    assert stamp == 1305031233000000001 and "a.png: not a readable image" in capsys.readouterr().err
    np.testing.assert_array_equal(got, image)
    np.testing.assert_array_equal(camera.K, K)


def test_plain_folder_is_in_natural_order(tmp_path):
    for i in (1, 2, 10):
        cv2.imwrite(str(tmp_path / f"f{i}.png"), np.full((4, 4, 3), i, np.uint8))
    assert [int(image[0, 0, 0]) for _, image, _ in open_source(tmp_path)] == [1, 2, 10]


def test_the_working_directory_has_a_name(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    assert {open_source(path).name for path in (".", "below/..", tmp_path)} == {tmp_path.name}


@pytest.mark.parametrize("damaged", ["/cam/image", "/cam/camera_info"])
def test_a_message_cut_short_costs_itself_alone(tmp_path, damaged, capsys):
    bad = int(RNG.integers(1, 5))
    with Writer(tmp_path / "bag", version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        kinds = {"/cam/camera_info": "sensor_msgs/msg/CameraInfo", "/cam/image": "sensor_msgs/msg/Image"}
        connections = {topic: writer.add_connection(topic, kind, typestore=STORE) for topic, kind in kinds.items()}
        for i in range(5):
            image = array_to_image(RNG.integers(0, 255, (30, 40, 3), dtype=np.uint8), i, "cam", types=bag_types)
            for topic, message in zip(kinds, (info_from_K(K, 40, 30, i, "cam", bag_types), image)):
                data = bytes(STORE.serialize_cdr(message, kinds[topic]))
                cut = int(RNG.integers(5, 40)) if i == bad and topic == damaged else None
                writer.write(connections[topic], i, data[:cut])
    items = list(open_source(tmp_path / "bag"))
    expected = [i for i in range(5) if i != bad or damaged != "/cam/image"]
    assert [stamp for stamp, *_ in items] == expected and all(camera is not None for *_, camera in items)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{damaged}: " in error and "skipped" in error


def test_a_damaged_bag_never_gives_a_traceback(tmp_path):
    write_bag(tmp_path / "bag", ["/cam/image"])
    file = next((tmp_path / "bag").glob("*.mcap"))
    good = file.read_bytes()
    for _ in range(50):
        data = bytearray(good)
        at = int(RNG.integers(0, len(good) - 8))
        data[at : at + 8] = RNG.integers(0, 256, 8, dtype=np.uint8).tobytes()
        file.write_bytes(data[: RNG.integers(1, len(good) + 1)] if RNG.random() < 0.2 else data)
        try:
            assert len(list(open_source(tmp_path / "bag"))) <= 5
        except ValueError as error:
            assert "\n" not in str(error) and str(tmp_path / "bag") in str(error)


def test_a_video_that_does_not_say_its_length_is_read_to_its_end(tmp_path):
    count, path = int(RNG.integers(5, 30)), tmp_path / "clip.mkv"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
    for _ in range(count):
        writer.write(RNG.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    writer.release()
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89")  # Matroska's Duration becomes a Void element of the same length, as in a saved stream
    data[at : at + 2] = 0xEC, data[at + 2] + 1
    path.write_bytes(data)
    assert cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT) < 1
    source = open_source(path)
    assert len(source) == len(list(source)) == count and source.duration_s == pytest.approx((count - 1) / 25)


@pytest.mark.parametrize("storage", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_a_bag_without_metadata_is_read_from_its_files(tmp_path, storage):
    """As a recorder leaves it that was killed."""
    sent = write_bag(tmp_path / "bag", ["/cam/image"], storage)["/cam/image"]
    (tmp_path / "bag" / "metadata.yaml").unlink()
    source = open_source(tmp_path / "bag")
    items = list(source)
    assert len(source) == 5 and [item[0] for item in items] == [stamp for i, (stamp, _) in enumerate(sent) if i != 2]
    np.testing.assert_array_equal(items[-1][1], sent[-1][1])


def test_names_of_images_may_hold_spaces_and_odd_digits(tmp_path, capsys):
    shade = RNG.integers(0, 256, 2).tolist()
    for name, value in zip(("my image.png", "\u00b21.png"), shade):
        cv2.imwrite(str(tmp_path / name), np.full((4, 4, 3), value, np.uint8))
    (tmp_path / "._my image.png").write_bytes(b"what macOS leaves")
    assert sorted(int(image[0, 0, 0]) for _, image, _ in open_source(tmp_path)) == sorted(shade)
    (tmp_path / "rgb.txt").write_text("  # timestamp file\n0.5 my image.png\n")
    ((stamp, image, _),) = open_source(tmp_path)
    assert stamp == 500_000_000 and (image == shade[0]).all() and capsys.readouterr().err == ""


CAMERA = {"fx": 50, "fy": 55, "cx": 20, "cy": 15, "width": 40, "height": 30}


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("intrinsics.json", json.dumps(CAMERA | {"distortion": [0.1, 0, 0, 0]}), "distortion.coeffs"),
        ("intrinsics.json", json.dumps(CAMERA | {"distortion": {"coeffs": ["a"]}}), "distortion.coeffs"),
        ("intrinsics.json", json.dumps(CAMERA | {"distortion": {"coeffs": 0.1}}), "plumb_bob takes"),
        ("intrinsics.json", json.dumps(CAMERA | {"width": "wide"}), "expected numbers"),
        ("intrinsics.json", json.dumps(CAMERA | {"fx": -50}), "focal lengths must be positive"),
        ("intrinsics.json", b"\xff\xfe", "expected numbers"),
        ("rgb.txt", b"\xff\xfe", "expected `timestamp file` lines"),
        ("groundtruth.txt", b"\xff\xfe", "not a text file"),
    ],
)
def test_a_bad_file_of_a_folder_is_named(tmp_path, name, content, says):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((4, 4, 3), np.uint8))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says) as error:
        open_source(tmp_path)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("most", [None, "5", -1, 2.5])
def test_depth_beyond_the_given_range_is_unknown(tmp_path, most):
    depth = RNG.integers(1, 5000, (30, 40), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((30, 40, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "d.png"), depth)
    (tmp_path / "rgb.txt").write_text("0.5 a.png\n")
    (tmp_path / "depth.txt").write_text("0.5 d.png\n")
    (tmp_path / "intrinsics.json").write_text(json.dumps(CAMERA | {"depth_scale_m": 0.001, "depth_max_m": most}))
    source = open_source(tmp_path)
    if most == 2.5:
        np.testing.assert_allclose(source.true_depth(500_000_000), np.where(depth > 2500, 0, depth / 1000), rtol=1e-6)
        return
    with pytest.raises(ValueError, match="depth_max_m in intrinsics.json is .*; give metres"):
        source.true_depth(500_000_000)


@pytest.mark.parametrize("case, says", [("nowhere", "does not exist"), ("empty", "no images"), ("clip.mp4", "not a video"),
                                        ("notes.txt", "neither a bag"), ("intrinsics", "expected numbers fx, fy"), ("bag.mcap", "not a readable bag")])  # fmt: skip
def test_unreadable_inputs_are_said_in_one_line(tmp_path, case, says):
    path = tmp_path / case
    if case == "empty":
        path.mkdir()
    elif case == "intrinsics":
        path.mkdir()
        cv2.imwrite(str(path / "a.png"), np.zeros((4, 4, 3), np.uint8))
        (path / "intrinsics.json").write_text('{"fx": 3}')
    elif case != "nowhere":
        path.write_bytes(b"garbage" * 100)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        open_source(path)
    assert "\n" not in str(error.value)


def test_real_sequence():
    if not (SHARED / "tum_fr1_rpy_200").is_dir():
        pytest.skip("needs the real sequences")
    source = open_source(SHARED / "tum_fr1_rpy_200")
    stamp, image, camera = next(iter(source))
    assert stamp == 1305031232861666000 and image.shape == (480, 640, 3) and len(source) == len(source.truth) == 200
    assert camera.rectify(image)[0].shape == image.shape
