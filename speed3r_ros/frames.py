"""TF without tf2: the camera's place on the robot, and the transforms that the node publishes.

`tf2_msgs` is imported here only, so that the node also runs where it is not installed (then without TF).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile

from speed3r_ros.convert import matrix_from_transform
from speed3r_ros.mapping.geometry import inverse
from speed3r_ros.outputs import parse_pose

try:
    from tf2_msgs.msg import TFMessage
except ImportError:
    TFMessage = None

STATIC = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class Broadcaster:
    """Sends transforms on /tf and /tf_static; silent where tf2_msgs is missing."""

    def __init__(self, node: Node) -> None:
        self._dynamic = self._static = None
        if TFMessage is None:
            node.get_logger().warning("TF is off: tf2_msgs is not installed; install ros-$ROS_DISTRO-tf2-msgs")
            return
        self._dynamic = node.create_publisher(TFMessage, "/tf", 100)
        self._node = node

    def send(self, *transforms: Any) -> None:
        """Publish TransformStamped messages on /tf."""
        if self._dynamic and transforms:
            self._dynamic.publish(TFMessage(transforms=list(transforms)))

    def send_static(self, message: Any) -> None:
        """Publish one TransformStamped on /tf_static."""
        if self._dynamic is None:
            return
        if self._static is None:
            self._static = self._node.create_publisher(TFMessage, "/tf_static", STATIC)
        self._static.publish(TFMessage(transforms=[message]))


class Extrinsics:
    """The camera's optical frame in the robot's base frame, from a parameter or from TF, looked up once."""

    def __init__(self, node: Node, base: str, given: str) -> None:
        self._base, self._given = base, parse_pose(given) if given else None
        self._edges: dict[str, tuple[str, np.ndarray]] = {}
        self._subscriptions = []
        self._node = node
        if self._given is None and base and TFMessage is not None:
            self._subscriptions = [
                node.create_subscription(TFMessage, "/tf_static", self._store, STATIC),
                node.create_subscription(TFMessage, "/tf", self._store, 100),
            ]

    def _store(self, message: Any) -> None:
        for item in message.transforms:
            try:
                self._edges[item.child_frame_id.lstrip("/")] = (
                    item.header.frame_id.lstrip("/"),
                    matrix_from_transform(item.transform),
                )
            except ValueError as error:
                self._node.get_logger().warning(f"TF {item.child_frame_id!r}: {error}", throttle_duration_sec=5.0)

    def lookup(self, camera: str) -> np.ndarray | None:
        """T_base_camera (4, 4), or None while TF does not connect the two frames."""
        if self._given is not None:
            return self._given
        if not self._base or camera == self._base:
            return np.eye(4)
        up_camera, up_base = self._ancestors(camera), self._ancestors(self._base)
        for frame, T in up_camera.items():
            if frame in up_base:
                return inverse(up_base[frame]) @ T
        return None

    def _ancestors(self, frame: str) -> dict[str, np.ndarray]:
        """Pose of the frame in itself and in each of its ancestors, nearest first."""
        T, found = np.eye(4), {frame: np.eye(4)}
        edges = dict(self._edges)
        while frame in edges and len(found) < 100:
            frame, step = edges[frame]
            if frame in found:
                break
            T = step @ T
            found[frame] = T
        return found

    @property
    def listening(self) -> bool:
        """Whether TF may still tell."""
        return bool(self._subscriptions)

    def finish(self) -> None:
        """Stop listening to TF."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions = []
