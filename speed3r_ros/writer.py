"""The bag command's messages: what the node would have published, as an mcap bag, without ROS."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from speed3r_ros import convert
from speed3r_ros.clouds import cloud, valid_depth
from speed3r_ros.config import Config
from speed3r_ros.convert import bag_types
from speed3r_ros.mapping.geometry import T_link_optical
from speed3r_ros.model.types import Estimate
from speed3r_ros.outputs import CAMERA_FRAME, WorldFrame, parse_pose, twist_between


class OutputBag:
    """Context manager that writes estimates to a new bag folder `path`; `path` must not exist."""

    def __init__(self, path: Path, config: Config) -> None:
        self._config = config
        self._types = get_typestore(Stores.ROS2_JAZZY)
        self._writer = Writer(path, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        self._connections: dict[str, Any] = {}
        self._camera = config.frames.camera or CAMERA_FRAME
        given, base = config.frames.base_to_camera, config.frames.base
        level = T_link_optical if base and base != self._camera else np.eye(4)
        self._world = WorldFrame(parse_pose(given) if given else level)
        self._path: deque[Any] = deque(maxlen=config.path.max_length)
        self._last: tuple[int, np.ndarray] | None = None  # stamp and T_odom_base of the last frame
        self._static_sent = False

    def __enter__(self) -> OutputBag:
        self._writer.open()
        return self

    def __exit__(self, *_: object) -> None:
        if self._path:
            message = convert.path_message(list(self._path), types=bag_types)
            self._send("/path", "nav_msgs/msg/Path", message, convert.stamp_to_ns(message.header.stamp))
        self._writer.close()

    def _send(self, topic: str, kind: str, message: Any, stamp_ns: int) -> None:
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, kind, typestore=self._types)
        self._writer.write(self._connections[topic], stamp_ns, self._types.serialize_cdr(message, kind))

    def _transforms(self, topic: str, stamp_ns: int, *edges: tuple[np.ndarray, str, str]) -> None:
        items = [
            convert.transform_message(convert.pose_from_matrix(T, bag_types), stamp_ns, parent, child, types=bag_types)
            for T, parent, child in edges
        ]
        self._send(
            topic, "tf2_msgs/msg/TFMessage", bag_types.make("tf2_msgs/msg/TFMessage", transforms=items), stamp_ns
        )

    def write(self, estimate: Estimate, begins: bool = False) -> None:
        """Append the messages of one tracked frame, which `begins` a new world after a reset."""
        if begins:
            self._path.clear()
            self._last = None
        config, stamp, sigma = self._config, estimate.stamp_ns, estimate.pose_sigma
        frames, base = config.frames, config.frames.base or self._camera
        T = self._world.base(estimate.T_world_cam)
        before, T_before = self._last or (stamp, T)
        twist, self._last = twist_between(T_before, T, (stamp - before) / 1e9), (stamp, T)
        pose = convert.pose_from_matrix(T, bag_types)
        self._path.append(convert.stamped_pose_message(pose, stamp, frames.map, types=bag_types))
        if not self._static_sent and base != self._camera:
            self._transforms("/tf_static", stamp, (self._world.T_base_cam, base, self._camera))
            self._static_sent = True
        self._transforms("/tf", stamp, (np.eye(4), frames.map, frames.odom), (T, frames.odom, base))
        uncertain = convert.pose_message(pose, sigma, stamp, frames.map, types=bag_types)
        self._send("/pose", "geometry_msgs/msg/PoseWithCovarianceStamped", uncertain, stamp)
        odometry = convert.odometry_message(pose, sigma, twist, stamp, frames.odom, base, types=bag_types)
        self._send("/odometry", "nav_msgs/msg/Odometry", odometry, stamp)
        height, width = estimate.depth.shape
        info = convert.info_from_K(estimate.K, width, height, stamp, self._camera, types=bag_types)
        self._send("/depth/camera_info", "sensor_msgs/msg/CameraInfo", info, stamp)
        depth = valid_depth(estimate, config)
        message = convert.array_to_image(depth, stamp, self._camera, types=bag_types)
        self._send("/depth/image", "sensor_msgs/msg/Image", message, stamp)
        confidence = convert.array_to_image(estimate.confidence, stamp, self._camera, types=bag_types)
        self._send("/confidence", "sensor_msgs/msg/Image", confidence, stamp)
        rows, _ = cloud(estimate, depth, config.points.max)
        message = convert.points_message(rows, stamp, self._camera, types=bag_types)
        self._send("/points", "sensor_msgs/msg/PointCloud2", message, stamp)
