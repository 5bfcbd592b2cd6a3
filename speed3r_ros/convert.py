"""Messages to arrays and back. Works on rclpy's message classes and on those that `rosbags` gives without ROS.

Builders take `types`, the family of message classes to build: `ros_types` (default) or `bag_types`. Stamps are integer
nanoseconds throughout. Byte arrays go through `array.array` + `frombytes`, which is fast on every distribution (assigning
`bytes` to a message field costs 40 ms per MB on Humble).
"""

from __future__ import annotations

import array
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import cv2
import numpy as np

from speed3r_ros.camera import Camera
from speed3r_ros.mapping.geometry import quaternion_from_matrix

NANO = 1_000_000_000


# ------------------------------------------------------------------------------------------------- message families


@cache
def _ros_class(name: str) -> type:
    package, _, kind = name.split("/")
    return getattr(import_module(f"{package}.msg"), kind)


class ros_types:
    """Message classes of rclpy."""

    @staticmethod
    def make(name: str, /, **fields: Any) -> Any:
        """A message of type `name`, e.g. `sensor_msgs/msg/Image`."""
        return _ros_class(name)(**fields)

    @staticmethod
    def octets(data: np.ndarray) -> array.array:
        """Contents of a `uint8[]` field."""
        out = array.array("B")
        out.frombytes(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        return out

    @staticmethod
    def floats(values: Any) -> list[float]:
        """Contents of a `float64[]` field of any length."""
        return np.asarray(values, dtype=np.float64).reshape(-1).tolist()


@cache
def _bag_class(name: str) -> type:
    from rosbags.typesys import Stores, get_typestore

    return get_typestore(Stores.ROS2_JAZZY).types[name]


class bag_types:
    """Message classes of rosbags, for machines without ROS."""

    @staticmethod
    def make(name: str, /, **fields: Any) -> Any:
        """A message of type `name`; every field must be given."""
        return _bag_class(name)(**fields)

    @staticmethod
    def octets(data: np.ndarray) -> np.ndarray:
        """Contents of a `uint8[]` field."""
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)

    @staticmethod
    def floats(values: Any) -> np.ndarray:
        """Contents of a `float64[]` field of any length."""
        return np.asarray(values, dtype=np.float64).reshape(-1)


# ---------------------------------------------------------------------------------------------------------- stamps


def stamp_to_ns(stamp: Any) -> int:
    """builtin_interfaces/Time -> integer nanoseconds."""
    return int(stamp.sec) * NANO + int(stamp.nanosec)


def ns_to_stamp(stamp_ns: int, types: Any = ros_types) -> Any:
    """Integer nanoseconds -> builtin_interfaces/Time."""
    sec, nanosec = divmod(int(stamp_ns), NANO)
    return types.make("builtin_interfaces/msg/Time", sec=sec, nanosec=nanosec)


def _header(stamp_ns: int, frame_id: str, types: Any) -> Any:
    return types.make("std_msgs/msg/Header", stamp=ns_to_stamp(stamp_ns, types), frame_id=frame_id)


# ---------------------------------------------------------------------------------------------------- images, inwards

# encoding -> (dtype, channels, OpenCV conversion to RGB or None)
COLOR = {
    "rgb8": (np.uint8, 3, None),
    "bgr8": (np.uint8, 3, cv2.COLOR_BGR2RGB),
    "rgba8": (np.uint8, 4, cv2.COLOR_RGBA2RGB),
    "bgra8": (np.uint8, 4, cv2.COLOR_BGRA2RGB),
    "rgb16": (np.uint16, 3, None),
    "bgr16": (np.uint16, 3, cv2.COLOR_BGR2RGB),
    "mono8": (np.uint8, 1, cv2.COLOR_GRAY2RGB),
    "mono16": (np.uint16, 1, cv2.COLOR_GRAY2RGB),
    "8UC1": (np.uint8, 1, cv2.COLOR_GRAY2RGB),
    "8UC3": (np.uint8, 3, cv2.COLOR_BGR2RGB),
    "8UC4": (np.uint8, 4, cv2.COLOR_BGRA2RGB),
    "16UC1": (np.uint16, 1, cv2.COLOR_GRAY2RGB),
    # OpenCV names a Bayer pattern by its second row's second and third pixel, ROS by its first two
    "bayer_rggb8": (np.uint8, 1, cv2.COLOR_BayerBG2RGB),
    "bayer_bggr8": (np.uint8, 1, cv2.COLOR_BayerRG2RGB),
    "bayer_gbrg8": (np.uint8, 1, cv2.COLOR_BayerGR2RGB),
    "bayer_grbg8": (np.uint8, 1, cv2.COLOR_BayerGB2RGB),
    "bayer_rggb16": (np.uint16, 1, cv2.COLOR_BayerBG2RGB),
    "bayer_bggr16": (np.uint16, 1, cv2.COLOR_BayerRG2RGB),
    "bayer_gbrg16": (np.uint16, 1, cv2.COLOR_BayerGR2RGB),
    "bayer_grbg16": (np.uint16, 1, cv2.COLOR_BayerGB2RGB),
    "yuv422": (np.uint8, 2, cv2.COLOR_YUV2RGB_UYVY),
    "uyvy": (np.uint8, 2, cv2.COLOR_YUV2RGB_UYVY),
    "yuv422_yuy2": (np.uint8, 2, cv2.COLOR_YUV2RGB_YUY2),
    "yuyv": (np.uint8, 2, cv2.COLOR_YUV2RGB_YUY2),
}
BRIDGED = ("rgb8", "bgr8", "rgba8", "bgra8", "mono8")  # where cv_bridge and the table agree by definition


@lru_cache(maxsize=1)
def cv_bridge() -> Any:
    """A CvBridge that has proved itself on a small image, or None: its binary breaks with NumPy 2 on some distributions."""
    try:
        from cv_bridge import CvBridge

        bridge = CvBridge()
        picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
        message = array_to_image(picture, 0, "", "rgb8")
        return bridge if np.array_equal(bridge.imgmsg_to_cv2(message, "rgb8"), picture) else None
    except Exception:  # whatever a binary built against another NumPy raises
        return None


def image_to_array(message: Any) -> np.ndarray:
    """sensor_msgs Image or CompressedImage -> (H, W, 3) uint8 RGB. 16-bit values keep their high byte.

    Raises ValueError with one line for an unknown encoding, an empty or truncated image, a wrong step, or data that
    does not decode.
    """
    if hasattr(message, "format"):
        return _decompress(message)
    encoding, height, width, step = message.encoding, int(message.height), int(message.width), int(message.step)
    if encoding not in COLOR:
        raise ValueError(f"image encoding {encoding!r} is not supported: publish one of {', '.join(COLOR)}")
    dtype, channels, conversion = COLOR[encoding]
    data = np.frombuffer(message.data, dtype=np.uint8)
    what = f"image {width} x {height} {encoding}, step {step}, {len(data)} bytes"
    row = width * channels * np.dtype(dtype).itemsize
    if not height or not width:
        raise ValueError(f"{what}: empty image")
    if step < row:
        raise ValueError(f"{what}: step must be at least {row}")
    if len(data) < step * (height - 1) + row:
        raise ValueError(f"{what}: truncated, {step * height} bytes are needed")
    if (
        encoding in BRIDGED
        and len(data) == step * height
        and (bridge := cv_bridge())
        and isinstance(message, _ros_class("sensor_msgs/msg/Image"))
    ):
        return bridge.imgmsg_to_cv2(message, "rgb8")
    rows = np.lib.stride_tricks.as_strided(data, (height, row), (step, 1))  # drops the padding without a copy
    pixels = np.ascontiguousarray(rows)
    if dtype is np.uint16:
        pixels = pixels.view(">u2" if message.is_bigendian else "<u2")
    pixels = pixels.reshape(height, width, channels)
    if dtype is np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if conversion is None:
        return pixels
    if channels == 2 and width % 2:
        raise ValueError(f"{what}: width must be even")
    return cv2.cvtColor(pixels[..., 0] if channels == 1 else pixels, conversion)


def _decompress(message: Any) -> np.ndarray:
    data, form = np.frombuffer(message.data, dtype=np.uint8), message.format
    if "compressedDepth" in form:
        raise ValueError(f"compressed image format {form!r} is depth: subscribe to a colour image")
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if image is None:
        raise ValueError(f"compressed image, format {form!r}, {len(data)} bytes: does not decode as JPEG or PNG")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def camera_from_info(message: Any) -> Camera | None:
    """sensor_msgs/CameraInfo -> Camera, or None when it says that the camera is not calibrated (K[0] = 0).

    Binning and the region of interest are applied. Raises ValueError for intrinsics that no camera can have.
    """
    K = np.array(getattr(message, "k", getattr(message, "K", None)), dtype=np.float64).reshape(3, 3)
    D = np.array(getattr(message, "d", getattr(message, "D", None)), dtype=np.float64).reshape(-1)
    if K[0, 0] == 0:
        return None
    width, height = int(message.width), int(message.height)
    roi = message.roi
    if roi.width and roi.height:
        K[:2, 2] -= roi.x_offset, roi.y_offset
        width, height = int(roi.width), int(roi.height)
    bins = np.array([max(int(message.binning_x), 1), max(int(message.binning_y), 1)])
    K[:2] /= bins[:, None]
    return Camera(K, D, message.distortion_model or "plumb_bob", int(width // bins[0]), int(height // bins[1]))


# ------------------------------------------------------------------------------------------------- builders, outwards


def array_to_image(pixels: np.ndarray, stamp_ns: int, frame_id: str, encoding: str = "", types: Any = ros_types) -> Any:
    """(H, W, 3) uint8 -> rgb8, (H, W) float32 -> 32FC1, (H, W) uint8 -> mono8, unless `encoding` names another."""
    encoding = (
        encoding
        or {("uint8", 3): "rgb8", ("float32", 2): "32FC1", ("uint8", 2): "mono8"}[pixels.dtype.name, pixels.ndim]
    )
    return types.make(
        "sensor_msgs/msg/Image",
        header=_header(stamp_ns, frame_id, types),
        height=pixels.shape[0],
        width=pixels.shape[1],
        encoding=encoding,
        is_bigendian=0,
        step=pixels[0].nbytes,
        data=types.octets(pixels),
    )


def info_from_camera(camera: Camera, stamp_ns: int, frame_id: str, types: Any = ros_types) -> Any:
    """Camera -> sensor_msgs/CameraInfo with P = [K | 0] and R = identity."""
    K = np.asarray(camera.K, dtype=np.float64)
    region = types.make("sensor_msgs/msg/RegionOfInterest", x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
    return types.make(
        "sensor_msgs/msg/CameraInfo",
        header=_header(stamp_ns, frame_id, types),
        height=camera.height,
        width=camera.width,
        distortion_model=camera.model,
        d=types.floats(camera.D),
        k=K.reshape(9),
        r=np.eye(3).reshape(9),
        p=np.hstack([K, np.zeros((3, 1))]).reshape(12),
        binning_x=0,
        binning_y=0,
        roi=region,
    )


def info_from_K(K: np.ndarray, width: int, height: int, stamp_ns: int, frame_id: str, types: Any = ros_types) -> Any:
    """Pinhole intrinsics (3, 3) of a rectified image -> CameraInfo."""
    return info_from_camera(Camera(K, np.zeros(0), "plumb_bob", width, height), stamp_ns, frame_id, types)


def points_message(rows: np.ndarray, stamp_ns: int, frame_id: str, types: Any = ros_types) -> Any:
    """Rows (N, 4) of finite points, see `clouds` -> PointCloud2 with x y z rgb, 16 bytes a point."""
    fields = [
        types.make("sensor_msgs/msg/PointField", name=name, offset=4 * i, datatype=7, count=1)
        for i, name in enumerate(("x", "y", "z", "rgb"))
    ]
    return types.make(
        "sensor_msgs/msg/PointCloud2",
        header=_header(stamp_ns, frame_id, types),
        height=1,
        width=len(rows),
        fields=fields,
        is_bigendian=False,
        point_step=16,
        row_step=16 * len(rows),
        data=types.octets(rows.astype("<f4", copy=False)),
        is_dense=True,
    )


def _point(kind: str, xyz: np.ndarray, types: Any) -> Any:
    x, y, z = xyz.tolist()
    return types.make(f"geometry_msgs/msg/{kind}", x=x, y=y, z=z)


def pose_from_matrix(T: np.ndarray, types: Any = ros_types) -> Any:
    """Transform (4, 4) -> geometry_msgs/Pose, which may serve several messages."""
    x, y, z, w = quaternion_from_matrix(T[:3, :3]).tolist()
    orientation = types.make("geometry_msgs/msg/Quaternion", x=x, y=y, z=z, w=w)
    return types.make("geometry_msgs/msg/Pose", position=_point("Point", T[:3, 3], types), orientation=orientation)


def covariance(sigma: np.ndarray) -> np.ndarray:
    """One-sigma of translation (m) and of rotation (rad) -> row-major 6 x 6 diagonal (36,), never zero (REP-103 order)."""
    translation, rotation = np.maximum(np.asarray(sigma, dtype=np.float64), 1e-4) ** 2
    return np.diag([translation] * 3 + [rotation] * 3).reshape(36)


def pose_message(pose: Any, sigma: np.ndarray, stamp_ns: int, frame_id: str, types: Any = ros_types) -> Any:
    """Pose with one-sigma (2,) -> PoseWithCovarianceStamped."""
    uncertain = types.make("geometry_msgs/msg/PoseWithCovariance", pose=pose, covariance=covariance(sigma))
    return types.make(
        "geometry_msgs/msg/PoseWithCovarianceStamped", header=_header(stamp_ns, frame_id, types), pose=uncertain
    )


def odometry_message(
    pose: Any,
    sigma: np.ndarray,
    twist: np.ndarray,
    stamp_ns: int,
    frame_id: str,
    child_frame_id: str,
    types: Any = ros_types,
) -> Any:
    """Pose of the child in the frame and twist (6,) in the child (m/s, rad/s) -> Odometry."""
    motion = types.make(
        "geometry_msgs/msg/Twist",
        linear=_point("Vector3", twist[:3], types),
        angular=_point("Vector3", twist[3:], types),
    )
    return types.make(
        "nav_msgs/msg/Odometry",
        header=_header(stamp_ns, frame_id, types),
        child_frame_id=child_frame_id,
        pose=types.make("geometry_msgs/msg/PoseWithCovariance", pose=pose, covariance=covariance(sigma)),
        twist=types.make(
            "geometry_msgs/msg/TwistWithCovariance", twist=motion, covariance=covariance(np.asarray(sigma) * 10)
        ),
    )


def stamped_pose_message(pose: Any, stamp_ns: int, frame_id: str, types: Any = ros_types) -> Any:
    """Pose -> PoseStamped, of which paths are made."""
    return types.make("geometry_msgs/msg/PoseStamped", header=_header(stamp_ns, frame_id, types), pose=pose)


def path_message(poses: list[Any], types: Any = ros_types) -> Any:
    """PoseStamped messages, one at least -> Path, with the header of the last."""
    return types.make("nav_msgs/msg/Path", header=poses[-1].header, poses=poses)


def transform_message(pose: Any, stamp_ns: int, frame_id: str, child_frame_id: str, types: Any = ros_types) -> Any:
    """Pose of the child in the frame -> TransformStamped."""
    p = pose.position
    move = types.make(
        "geometry_msgs/msg/Transform",
        translation=types.make("geometry_msgs/msg/Vector3", x=p.x, y=p.y, z=p.z),
        rotation=pose.orientation,
    )
    return types.make(
        "geometry_msgs/msg/TransformStamped",
        header=_header(stamp_ns, frame_id, types),
        child_frame_id=child_frame_id,
        transform=move,
    )


def matrix_from_transform(transform: Any) -> np.ndarray:
    """geometry_msgs/Transform -> (4, 4). Raises ValueError when it is not a rigid transform."""
    from speed3r_ros.mapping.geometry import transform as build

    p, q = transform.translation, transform.rotation
    values = np.array([p.x, p.y, p.z, q.x, q.y, q.z, q.w])
    if not np.isfinite(values).all() or not np.any(values[3:]):
        raise ValueError(f"transform {values.tolist()} is not rigid: its rotation must be a non-zero quaternion")
    return build(values[:3], values[3:])
