"""TF without tf2: the camera's place on the robot, the odometry of others, and the transforms that the node publishes.

`tf2_msgs` is imported here only, so that the node also runs where it is not installed (then without TF).
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile

from speed3r_ros.convert import matrix_from_transform, stamp_to_ns
from speed3r_ros.mapping.geometry import inverse, quaternion_from_matrix, transform
from speed3r_ros.outputs import parse_pose

try:
    from tf2_msgs.msg import TFMessage
except ImportError:
    TFMessage = None

STATIC = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
HISTORY = 1000  # poses kept of another node's odometry: ten seconds at 100 Hz
STALE_NS = 200_000_000  # beyond the newest of them, its pose is unknown


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


class Listener:
    """The newest transform of every frame on /tf and /tf_static, as long as somebody needs them."""

    def __init__(self, node: Node) -> None:
        self._node, self._closed = node, False
        self._edges: dict[str, tuple[str, np.ndarray]] = {}
        self._subscriptions = []
        if TFMessage is not None:
            self._subscriptions = [
                node.create_subscription(TFMessage, "/tf_static", self._store, STATIC),
                node.create_subscription(TFMessage, "/tf", self._receive, 100),
            ]

    def _receive(self, message: Any) -> None:
        self._store(message)

    def _store(self, message: Any) -> None:
        if self._closed:  # entities are destroyed in the executor's own thread
            for subscription in self._subscriptions:
                self._node.destroy_subscription(subscription)
            self._subscriptions = []
            return
        for item in message.transforms:
            try:
                self._edges[item.child_frame_id.lstrip("/")] = (
                    item.header.frame_id.lstrip("/"),
                    matrix_from_transform(item.transform),
                )
            except ValueError as error:
                self._node.get_logger().warning(f"TF {item.child_frame_id!r}: {error}", throttle_duration_sec=5.0)

    def lookup(self, target: str, source: str) -> np.ndarray | None:
        """Newest pose (4, 4) of the frame `source` in the frame `target`, or None while TF does not connect them."""
        up_source, up_target = self._ancestors(source), self._ancestors(target)
        for frame, T in up_source.items():
            if frame in up_target:
                return inverse(up_target[frame]) @ T
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
        return bool(self._subscriptions) and not self._closed

    def close(self) -> None:
        """Listen no more. Any thread may call it."""
        self._closed = True


class Extrinsics:
    """The camera's optical frame in the robot's base frame, from a parameter or from TF, looked up once."""

    def __init__(self, node: Node, base: str, given: str) -> None:
        self._base, self._given = base, parse_pose(given) if given else None
        self._listener = Listener(node) if base and self._given is None else None

    def lookup(self, camera: str) -> np.ndarray | None:
        """T_base_camera (4, 4), or None while TF does not connect the two frames."""
        if self._given is not None:
            return self._given
        if self._listener is None or camera == self._base:
            return np.eye(4)
        return self._listener.lookup(self._base, camera)

    @property
    def listening(self) -> bool:
        """Whether TF may still tell."""
        return self._listener is not None and self._listener.listening

    def finish(self) -> None:
        """Stop listening to TF."""
        if self._listener is not None:
            self._listener.close()


class ForeignOdometry(Listener):
    """odom -> base as another node publishes it, over the last seconds."""

    def __init__(self, node: Node, odom: str, base: str) -> None:
        self._odom, self._base = odom, base
        self._poses: deque[tuple[int, np.ndarray]] = deque(maxlen=HISTORY)
        super().__init__(node)

    def _receive(self, message: Any) -> None:
        self._store(message)
        chain = list(self._ancestors(self._base))
        if self._odom not in chain:
            return
        moving = chain[: chain.index(self._odom)]
        stamps = [
            stamp_to_ns(item.header.stamp) for item in message.transforms if item.child_frame_id.lstrip("/") in moving
        ]
        if not stamps:
            return
        stamp_ns, last_ns = max(stamps), self._poses[-1][0] if self._poses else 0
        if stamp_ns < last_ns - STALE_NS:
            self._poses.clear()  # the clock went back
        elif stamp_ns == last_ns:
            self._poses.pop()  # another part of the same pose
        elif stamp_ns < last_ns:
            return
        self._poses.append((stamp_ns, self.lookup(self._odom, self._base)))

    def at(self, stamp_ns: int) -> np.ndarray | None:
        """T_odom_base (4, 4) at a time, interpolated; None where it is not known."""
        poses = list(self._poses)
        after = next((i for i, (stamp, _) in enumerate(poses) if stamp >= stamp_ns), None)
        if after is None:
            return poses[-1][1] if poses and stamp_ns - poses[-1][0] <= STALE_NS else None
        if after == 0:
            return poses[0][1] if poses[0][0] == stamp_ns else None
        (t0, A), (t1, B) = poses[after - 1], poses[after]
        w = (stamp_ns - t0) / (t1 - t0)
        p, q = quaternion_from_matrix(A[:3, :3]), quaternion_from_matrix(B[:3, :3])
        return transform((1 - w) * A[:3, 3] + w * B[:3, 3], (1 - w) * p + w * (q if p @ q >= 0 else -q))
