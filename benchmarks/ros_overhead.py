"""What the node adds to the network: time from an image's arrival to the last message out, and memory over a long run.

    python benchmarks/ros_overhead.py                          # 640 x 480 at 30 Hz, all topics subscribed
    python benchmarks/ros_overhead.py --frames 10000 --rate 60 # resident memory of the live node

The node runs as its own process with an engine that answers at once, at the network's resolution, so that conversion,
rectification, point clouds, the map and the messages remain. Another process (this one) publishes distorted camera images
over DDS and subscribes to every output. Two figures: inside the node, from the image callback to the return of the last
publish call; and from this process's publish call to its last callback, which adds transport and rclpy on both sides.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil

HEIGHT, WIDTH = 168, 224  # of the network
PROFILE = Path(__file__).parents[1] / "config" / "fastdds.xml"


def serve(result: str) -> int:
    """The node's process: run until interrupted, then write the times and the memory."""
    import torch

    from speed3r_ros import recon_node
    from speed3r_ros.model.config import EngineConfig
    from speed3r_ros.model.types import Estimate, Frame, Tracking

    class InstantEngine:
        """Answers without a network: a camera that moves forward before a noisy wall; every tenth frame is a keyframe."""

        device, dtype, input_size = torch.device("cpu"), torch.float32, (HEIGHT, WIDTH)

        def __init__(self) -> None:
            self.config = EngineConfig()
            rng = np.random.default_rng(0)
            self.depth = rng.uniform(1, 4, (HEIGHT, WIDTH)).astype(np.float32)
            self.confidence = rng.uniform(0, 1, (HEIGHT, WIDTH)).astype(np.float32)
            self.image = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            self.K = np.array([[180.0, 0, 111.5], [0, 180.0, 83.5], [0, 0, 1]])
            self.reset()

        def reset(self) -> None:
            self.count = 0

        def push(self, frame: Frame) -> Estimate:
            T = np.eye(4)
            T[2, 3] = 0.01 * self.count
            self.count += 1
            key, sigma = self.count % 10 == 1, np.array([0.01, 0.01])
            return Estimate(
                frame.stamp_ns, Tracking.TRACKING, T, self.depth, self.confidence, self.K, self.image, key, sigma
            )

    arrived: dict[int, float] = {}
    seconds: list[float] = []
    memory: dict[int, float] = {}
    process = psutil.Process()

    class TimedNode(recon_node.ReconNode):
        def _receive(self, message: Any) -> None:
            stamp = message.header.stamp
            arrived[stamp.sec * 1_000_000_000 + stamp.nanosec] = time.perf_counter()
            super()._receive(message)

        def _publish(self, answer: recon_node.Answer) -> None:
            super()._publish(answer)
            seconds.append(time.perf_counter() - arrived.pop(answer.estimate.stamp_ns))
            if len(seconds) in (100, 1000) or len(seconds) % 2500 == 0:
                memory[len(seconds)] = process.memory_info().rss / 2**20

    recon_node.ReconNode = TimedNode
    code = recon_node.main(
        args=["--ros-args", "-p", "odometry.features:=0", "-p", "frames.wait:=0.0"], engine=InstantEngine()
    )
    memory[len(seconds)] = process.memory_info().rss / 2**20
    Path(result).write_text(json.dumps(dict(seconds=seconds, memory=memory)))
    return code


def drive(frames: int, rate: float, log: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Publish images to the node's process; its result, and the seconds from each image to its last message here."""
    import rclpy
    from geometry_msgs.msg import PoseWithCovarianceStamped
    from nav_msgs.msg import Odometry
    from rclpy.executors import SingleThreadedExecutor
    from sensor_msgs.msg import CameraInfo, Image, PointCloud2

    outputs = {
        "pose": PoseWithCovarianceStamped, "odometry": Odometry, "depth/image": Image,
        "depth/camera_info": CameraInfo, "confidence": Image, "points": PointCloud2,
    }  # fmt: skip
    result = log.with_suffix(".json")
    with open(log, "w") as out:
        server = subprocess.Popen([sys.executable, __file__, "--serve", str(result)], stdout=out, stderr=out)
    rclpy.init()
    node = rclpy.create_node("camera")
    sent: dict[int, float] = {}
    heard: dict[int, dict[str, float]] = defaultdict(dict)

    def listen(topic: str) -> Any:
        def hear(message: Any) -> None:
            stamp = message.header.stamp
            heard[stamp.sec * 1_000_000_000 + stamp.nanosec][topic] = time.perf_counter()

        return hear

    for topic, kind in outputs.items():
        node.create_subscription(kind, topic, listen(topic), 10)
    images, infos = node.create_publisher(Image, "image", 5), node.create_publisher(CameraInfo, "camera_info", 5)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    deadline = time.monotonic() + 60
    while images.get_subscription_count() == 0 or node.count_publishers("points") == 0:
        executor.spin_once(timeout_sec=0.1)
        if time.monotonic() > deadline or server.poll() is not None:
            raise SystemExit(f"the node did not start: {log.read_text()}")
    time.sleep(1)
    rng = np.random.default_rng(1)
    pixels = [rng.integers(0, 255, 480 * 640 * 3, dtype=np.uint8).tobytes() for _ in range(4)]
    info = CameraInfo(width=640, height=480, distortion_model="plumb_bob", d=[0.1, -0.05, 0.001, 0.001, 0.0])
    info.k = [525.0, 0.0, 319.5, 0.0, 525.0, 239.5, 0.0, 0.0, 1.0]
    message = Image(width=640, height=480, encoding="rgb8", step=1920)
    message.header.frame_id = info.header.frame_id = "camera"
    start = time.perf_counter()
    for i in range(frames):
        while (left := start + i / rate - time.perf_counter()) > 0:
            executor.spin_once(timeout_sec=left)
        stamp = node.get_clock().now().to_msg()
        message.header.stamp = info.header.stamp = stamp
        message.data = pixels[i % 4]
        if i % 30 == 0:
            infos.publish(info)
        sent[stamp.sec * 1_000_000_000 + stamp.nanosec] = time.perf_counter()
        images.publish(message)
    end = time.perf_counter() + 2
    while (left := end - time.perf_counter()) > 0:
        executor.spin_once(timeout_sec=left)
    server.send_signal(signal.SIGINT)
    server.wait(60)
    rclpy.shutdown()
    whole = [max(times.values()) - sent[stamp] for stamp, times in heard.items() if len(times) == len(outputs)]
    return json.loads(result.read_text()), np.array(whole)


def main() -> int:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=900)
    parser.add_argument("--rate", type=float, default=30.0, help="images per second")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    os.environ.setdefault("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
    os.environ.setdefault("FASTRTPS_DEFAULT_PROFILES_FILE", str(PROFILE))
    with tempfile.TemporaryDirectory() as folder:
        served, whole = drive(args.frames, args.rate, Path(folder) / "node.log")
    inside = np.array(served["seconds"])[len(served["seconds"]) // 10 :] * 1e3
    whole = whole[len(whole) // 10 :] * 1e3
    memory = ", ".join(f"{value:.0f} @ {frame}" for frame, value in served["memory"].items())
    print(
        "| machine | images | answered | in the node p50 / p95 / max, ms | over DDS and back p50 / p95, ms | resident, MiB, at frame |"
    )
    print("|---|---|---|---|---|---|")
    figures = (
        f"{np.percentile(inside, 50):.1f} / {np.percentile(inside, 95):.1f} / {inside.max():.1f} | "
        f"{np.percentile(whole, 50):.1f} / {np.percentile(whole, 95):.1f}"
    )
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    print(f"| {machine} | {args.frames} at {args.rate:g} Hz | {len(served['seconds'])} | {figures} | {memory} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
