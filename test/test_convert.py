"""Message conversion against constructions of its own, with fresh random pixels; for rclpy's and for rosbags' messages."""

import struct

import cv2
import numpy as np
import pytest

from speed3r_ros import convert
from speed3r_ros.clouds import make_rows
from speed3r_ros.convert import bag_types, image_to_array, ros_types

try:
    import sensor_msgs.msg  # noqa: F401

    FAMILIES = [bag_types, ros_types]
except ImportError:
    FAMILIES = [bag_types]

RNG = np.random.default_rng()


@pytest.fixture(params=FAMILIES, ids=lambda family: family.__name__)
def types(request):
    return request.param


def message(types, data: np.ndarray, encoding: str, width: int, padding: int = 0, bigendian: int = 0):
    """An Image of rows `data` (H, bytes), with random padding after each."""
    rows = np.hstack([data, RNG.integers(0, 255, (len(data), padding), dtype=np.uint8)])
    return types.make(
        "sensor_msgs/msg/Image",
        header=convert._header(5, "cam", types),
        height=len(data),
        width=width,
        encoding=encoding,
        is_bigendian=bigendian,
        step=rows.shape[1],
        data=types.octets(rows),
    )


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "mono8", "8UC1", "8UC3", "8UC4"])
def test_8_bit_encodings(types, encoding, padding):
    height, width = RNG.integers(1, 30, 2)
    order = {"rgb8": "rgb", "bgr8": "bgr", "8UC3": "bgr", "rgba8": "rgba", "bgra8": "bgra", "8UC4": "bgra"}.get(
        encoding, "m"
    )
    pixels = RNG.integers(0, 255, (height, width, len(order)), dtype=np.uint8)
    expected = pixels[..., [0, 0, 0]] if order == "m" else np.stack([pixels[..., order.index(c)] for c in "rgb"], -1)
    got = image_to_array(message(types, pixels.reshape(height, -1), encoding, int(width), padding))
    assert got.dtype == np.uint8 and got.flags.c_contiguous
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bigendian", [0, 1])
@pytest.mark.parametrize("encoding", ["mono16", "16UC1", "rgb16", "bgr16"])
def test_16_bit_encodings_keep_the_high_byte(types, encoding, bigendian):
    channels = 3 if "gb" in encoding or "gr" in encoding else 1
    values = RNG.integers(0, 65536, (5, 9, channels))
    data = b"".join(struct.pack(">H" if bigendian else "<H", v) for v in values.ravel())
    rows = np.frombuffer(data, np.uint8).reshape(5, -1)
    expected = (values // 256).astype(np.uint8)
    expected = expected[..., [0, 0, 0]] if channels == 1 else expected[..., ::-1] if encoding == "bgr16" else expected
    np.testing.assert_array_equal(image_to_array(message(types, rows, encoding, 9, 4, bigendian)), expected)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_patterns(types, pattern, bits):
    """A plain coloured image, sampled by the pattern's definition, comes back with its colour."""
    color = dict(zip("rgb", RNG.integers(30, 220, 3)))
    mosaic = np.zeros((16, 20), np.uint8)
    for i, c in enumerate(pattern):
        mosaic[i // 2 :: 2, i % 2 :: 2] = color[c]
    data = mosaic if bits == 8 else (mosaic.astype("<u2") << 8).view(np.uint8)
    got = image_to_array(message(types, data.reshape(16, -1), f"bayer_{pattern}{bits}", 20))
    np.testing.assert_array_equal(got[4:-4, 4:-4].reshape(-1, 3), np.tile([color[c] for c in "rgb"], (8 * 12, 1)))


@pytest.mark.parametrize(
    "encoding, order", [("yuv422", "uyvy"), ("yuv422_yuy2", "yuyv"), ("uyvy", "uyvy"), ("yuyv", "yuyv")]
)
def test_yuv_by_the_bt601_formula(types, encoding, order):
    y, u, v = RNG.integers(60, 190, 3)
    row = np.array([{"y": y, "u": u, "v": v}[c] for c in order] * 4, dtype=np.uint8)
    c, d, e = 1.164 * (y - 16.0), u - 128.0, v - 128.0
    expected = np.clip([c + 1.596 * e, c - 0.392 * d - 0.813 * e, c + 2.017 * d], 0, 255)
    got = image_to_array(message(types, np.tile(row, (4, 1)), encoding, 8))
    assert np.abs(got.reshape(-1, 3) - expected).max() < 3


@pytest.mark.parametrize(
    "form, suffix",
    [("rgb8; jpeg compressed bgr8", ".jpg"), ("png", ".png"), ("", ".jpg"), ("mono8; jpeg compressed ", ".jpg")],
)
def test_compressed_images(types, form, suffix):
    ramp = np.mgrid[0:48, 0:64].sum(0)
    pixels = np.stack([ramp, 255 - ramp, ramp // 2], -1).astype(np.uint8)
    data = cv2.imencode(suffix, pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1].reshape(-1)
    compressed = types.make(
        "sensor_msgs/msg/CompressedImage", header=convert._header(1, "", types), format=form, data=types.octets(data)
    )
    assert np.abs(image_to_array(compressed).astype(int) - pixels).mean() < 2


PIXELS = RNG.integers(0, 255, (4, 18), dtype=np.uint8)
BAD = {
    "unknown": (dict(encoding="rgb9"), "'rgb9' is not supported.*rgb8"),
    "depth": (dict(encoding="32FC1"), "'32FC1' is not supported"),
    "empty": (dict(height=0), "empty image"),
    "truncated": (dict(height=40), "truncated, 720 bytes are needed"),
    "step": (dict(step=17), "step must be at least 18"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_refused_in_one_line(types, case):
    overrides, says = BAD[case]
    bad = message(types, PIXELS, "rgb8", 6)
    for name, value in overrides.items():
        object.__setattr__(bad, name, value) if types is bag_types else setattr(bad, name, value)
    with pytest.raises(ValueError, match=says) as error:
        image_to_array(bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "form, data, says",
    [
        ("jpeg", b"\xff\xd8 no", "does not decode"),
        ("jpeg", b"", "0 bytes"),
        ("16UC1; compressedDepth png", b"x", "is depth"),
    ],
)
def test_bad_compressed_images(types, form, data, says):
    bad = types.make(
        "sensor_msgs/msg/CompressedImage",
        header=convert._header(1, "", types),
        format=form,
        data=types.octets(np.frombuffer(data, np.uint8)),
    )
    with pytest.raises(ValueError, match=says):
        image_to_array(bad)


def test_cv_bridge_gives_the_same_pixels():
    if ros_types not in FAMILIES or convert.cv_bridge() is None:
        pytest.skip("needs a cv_bridge that works with this NumPy")
    for encoding in convert.BRIDGED:
        channels = convert.COLOR[encoding][1]
        pixels = RNG.integers(0, 255, (6, 8 * channels), dtype=np.uint8)
        padded = image_to_array(message(ros_types, pixels, encoding, 8, padding=3))  # our own path
        np.testing.assert_array_equal(image_to_array(message(ros_types, pixels, encoding, 8)), padded)


def test_stamps_are_exact(types):
    for ns in [0, 1, 999_999_999, 1_700_000_000_123_456_789, *RNG.integers(0, 2**60, 50).tolist()]:
        stamp = convert.ns_to_stamp(ns, types)
        assert convert.stamp_to_ns(stamp) == ns and 0 <= stamp.nanosec < 10**9


def test_cloud_layout_by_struct(types):
    points = RNG.standard_normal((50, 3)).astype(np.float32)
    colors = RNG.integers(0, 255, (50, 3), dtype=np.uint8)
    cloud = convert.points_message(make_rows(points, colors), 7, "cam", types)
    assert (cloud.point_step, cloud.row_step, cloud.width, cloud.height) == (16, 16 * 50, 50, 1)
    for i, row in enumerate(struct.iter_unpack("<fffI", bytes(cloud.data))):
        assert row[:3] == tuple(points[i].tolist())
        assert row[3] == int(colors[i, 0]) << 16 | int(colors[i, 1]) << 8 | int(colors[i, 2])
    assert convert.points_message(make_rows(points[:0], colors[:0]), 7, "cam", types).width == 0


def test_camera_info_round_trip_and_regions(types):
    K = np.array([[400.0, 0, 320.5], [0, 410.0, 241.0], [0, 0, 1]])
    info = convert.info_from_K(K, 640, 480, 3, "cam", types)
    camera = convert.camera_from_info(info)
    np.testing.assert_array_equal(camera.K, K)
    assert (camera.width, camera.height) == (640, 480)
    info.roi.x_offset, info.roi.y_offset, info.roi.width, info.roi.height = 100, 40, 400, 200
    info.binning_x = info.binning_y = 2
    camera = convert.camera_from_info(info)
    np.testing.assert_allclose(camera.K, [[200, 0, 110.25], [0, 205, 100.5], [0, 0, 1]])
    assert (camera.width, camera.height) == (200, 100)
    info.k[0] = 0.0
    assert convert.camera_from_info(info) is None
    info.k[0] = float("nan")
    with pytest.raises(ValueError, match="calibrate"):
        convert.camera_from_info(info)


def test_covariance_is_never_zero():
    matrix = convert.covariance(np.zeros(2)).reshape(6, 6)
    assert (np.diag(matrix) > 0).all() and np.count_nonzero(matrix) == 6
