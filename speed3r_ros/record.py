"""Records the node's outputs over DDS into an mcap bag, from a process of its own.

    python -m speed3r_ros.record OUT_BAG [--until-idle SECONDS]

Ends on SIGINT or SIGTERM, or when no pose has come for a while; the bag appears whole at the end. Beside its messages it
holds `received.csv` (topic, stamp in ns, monotonic time of reception in ns), from which the report takes latencies.
"""

from __future__ import annotations

import argparse
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TextIO

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from speed3r_ros.mapping.files import folder_written_whole

TOPICS = {
    "pose": "geometry_msgs/msg/PoseWithCovarianceStamped",
    "odometry": "nav_msgs/msg/Odometry",
    "path": "nav_msgs/msg/Path",
    "depth/image": "sensor_msgs/msg/Image",
    "depth/camera_info": "sensor_msgs/msg/CameraInfo",
    "confidence": "sensor_msgs/msg/Image",
    "points": "sensor_msgs/msg/PointCloud2",
    "map_points": "sensor_msgs/msg/PointCloud2",
    "/diagnostics": "diagnostic_msgs/msg/DiagnosticArray",
    "/tf": "tf2_msgs/msg/TFMessage",
    "/tf_static": "tf2_msgs/msg/TFMessage",
}
LATCHED = ("map_points", "/tf_static")
DEPTH = 1000  # messages that may wait while the disk is slow


class Bag:
    """Raw messages and their times of reception, in an open writer and a log."""

    def __init__(self, writer: Writer, log: TextIO) -> None:
        self.count = 0
        self._writer, self._log = writer, log
        self._types = get_typestore(Stores.LATEST)
        self._connections = {}

    def add_topic(self, topic: str, msgtype: str, latched: bool) -> None:
        """Declare a topic by its full name; `latched` ones are replayed for late subscribers."""
        ever = QosTime(2147483647, 4294967295)
        durability = QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE
        qos = Qos(
            QosHistory.KEEP_LAST,
            1 if latched else 10,
            QosReliability.RELIABLE,
            durability,
            ever,
            ever,
            QosLiveliness.AUTOMATIC,
            ever,
            False,
        )
        self._connections[topic] = self._writer.add_connection(
            topic, msgtype, typestore=self._types, offered_qos_profiles=[qos]
        )

    def write(self, topic: str, data: bytes) -> None:
        """Append one serialized message, received now."""
        now = time.monotonic_ns()
        self._writer.write(self._connections[topic], time.time_ns(), data)
        if not self._connections[topic].msgtype.startswith("tf2_msgs"):
            self._log.write(f"{topic},{header_stamp(data)},{now}\n")
        self.count += 1


def header_stamp(data: bytes) -> int:
    """Stamp in nanoseconds of a serialized message that begins with a std_msgs/Header."""
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return seconds * 1_000_000_000 + nanoseconds


@contextmanager
def new_bag(path: Path) -> Iterator[Bag]:
    """A bag that appears at `path` when the block ends without an exception. Raises OSError."""
    with folder_written_whole(path) as folder:
        folder.rmdir()  # the writer makes it
        with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
            with open(folder / "received.csv", "w") as log:
                log.write("topic,stamp_ns,monotonic_ns\n")
                yield Bag(writer, log)


def record(path: Path, namespace: str = "", until_idle: float = 0.0) -> int:
    """Record until a signal, or until no pose came for `until_idle` seconds after the first; the number of messages."""
    stop = False

    def on_signal(*_: object) -> None:
        nonlocal stop
        stop = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    node = Node("speed3r_recorder", namespace=namespace)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    last_pose: float | None = None

    def subscribe(bag: Bag, topic: str, msgtype: str) -> None:
        package, _, name = msgtype.split("/")
        try:
            message = getattr(import_module(f"{package}.msg"), name)
        except ImportError:
            print(f"not recorded: {topic}, because {package} is not installed", file=sys.stderr)
            return
        full = node.resolve_topic_name(topic)
        bag.add_topic(full, msgtype, topic in LATCHED)

        def on_message(data: bytes) -> None:
            nonlocal last_pose
            if topic == "pose":
                last_pose = time.monotonic()
            bag.write(full, data)

        durability = DurabilityPolicy.TRANSIENT_LOCAL if topic in LATCHED else DurabilityPolicy.VOLATILE
        profile = QoSProfile(depth=DEPTH, reliability=ReliabilityPolicy.RELIABLE, durability=durability)
        node.create_subscription(message, full, on_message, profile, raw=True)

    try:
        with new_bag(path) as bag:
            for topic, msgtype in TOPICS.items():
                subscribe(bag, topic, msgtype)
            print(f"recording to {path}", flush=True)
            while not stop:
                executor.spin_once(timeout_sec=0.2)
                if until_idle and last_pose is not None and time.monotonic() - last_pose > until_idle:
                    break
        return bag.count
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()


def main() -> int:
    """Command line; 0, or 1 with one line when the bag cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m speed3r_ros.record", description="Record the node's outputs.")
    parser.add_argument("bag", type=Path, help="folder of the new mcap bag")
    parser.add_argument("--namespace", default="", help="of the node")
    parser.add_argument(
        "--until-idle", type=float, default=0.0, metavar="SECONDS", help="end when no pose came for so long"
    )
    options = parser.parse_args()
    if options.bag.exists():
        parser.error(f"{options.bag} exists: name another bag or remove it")
    try:
        count = record(options.bag, options.namespace, options.until_idle)
    except OSError as error:
        print(f"cannot write {options.bag}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"{count} messages in {options.bag}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
