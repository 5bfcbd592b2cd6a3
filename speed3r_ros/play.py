"""Plays a bag, a video or a folder of images over DDS in real time, from a process of its own.

    python -m speed3r_ros.play INPUT [--rate 1.0] [--loop] [--clock] [--log sent.csv]

Images keep their stamps. `--log` writes stamp_ns, monotonic_ns of each sent image: the report's latencies start there.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import rclpy
from geometry_msgs.msg import PoseWithCovarianceStamped
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from tqdm import tqdm

from speed3r_ros.camera import Camera
from speed3r_ros.convert import array_to_image, info_from_camera, ns_to_stamp, stamp_to_ns
from speed3r_ros.mapping.files import written_whole
from speed3r_ros.outputs import CAMERA_FRAME
from speed3r_ros.sources import Source, open_source

CLOCK_PERIOD = 0.01  # seconds between messages on /clock
SETTLE = 0.5  # seconds after the node subscribed to the images, for its other subscriptions to follow


class Player(Node):
    """Publishes images with their CameraInfo, RELIABLE, and on request the time of the recording.

    With lockstep > 0, each image waits for the pose of the one before, at most so many seconds: no frame is dropped.
    """

    def __init__(self, namespace: str, frame_id: str, compressed: bool, clock: bool, lockstep: float) -> None:
        super().__init__("speed3r_player", namespace=namespace)
        self.frame_id, self.compressed, self.lockstep = frame_id, compressed, lockstep
        qos = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
        kind, topic = (CompressedImage, "image/compressed") if compressed else (Image, "image")
        self.images = self.create_publisher(kind, topic, qos)
        self.infos = self.create_publisher(CameraInfo, "camera_info", qos)
        self.clock = self.create_publisher(Clock, "/clock", 10) if clock else None
        self._calibrated = False
        self._answered: int | None = None
        if lockstep:
            self.create_subscription(PoseWithCovarianceStamped, "pose", self._on_pose, qos)

    def _on_pose(self, message: PoseWithCovarianceStamped) -> None:
        self._answered = stamp_to_ns(message.header.stamp)

    def wait_for_pose(self, stamp_ns: int) -> None:
        """Return when the node has answered the image of this stamp, or after `lockstep` seconds."""
        limit = time.monotonic() + self.lockstep
        while self._answered != stamp_ns and time.monotonic() < limit:
            rclpy.spin_once(self, timeout_sec=0.05)

    def wait_for_subscriber(self, seconds: float) -> None:
        """Return when someone receives the images. Raises TimeoutError."""
        limit = time.monotonic() + seconds
        while not self.images.get_subscription_count():
            if time.monotonic() > limit:
                raise TimeoutError(
                    f"nobody subscribed to {self.images.topic_name} within {seconds:g} s: "
                    "is the node running, in the same ROS_DOMAIN_ID, with its image topic remapped to this one?"
                )
            time.sleep(0.05)
        time.sleep(SETTLE)

    def sleep_until(self, due: float, stamp_ns: int, rate: float) -> None:
        """Sleep until a monotonic time, at which the recording's time is stamp_ns; the clock runs on meanwhile."""
        while True:
            left = due - time.monotonic()
            if self.clock:
                self.clock.publish(Clock(clock=ns_to_stamp(stamp_ns - int(max(left, 0) * rate * 1e9))))
            if left <= 0:
                return
            time.sleep(min(left, CLOCK_PERIOD) if self.clock else left)

    def send(self, stamp_ns: int, image: np.ndarray, camera: Camera | None) -> int:
        """Publish one image (H, W, 3) RGB, after its CameraInfo where there is one; the monotonic time in ns."""
        message = self._message(stamp_ns, image)
        if camera is not None:
            self.infos.publish(info_from_camera(camera, stamp_ns, self.frame_id))
            if not self._calibrated:  # across topics order is not kept, and no image should precede the first info
                time.sleep(SETTLE)
                self._calibrated = True
        now = time.monotonic_ns()
        self.images.publish(message)
        return now

    def _message(self, stamp_ns: int, image: np.ndarray) -> Image | CompressedImage:
        if not self.compressed:
            return array_to_image(image, stamp_ns, self.frame_id)
        message = CompressedImage(format="rgb8; jpeg compressed bgr8")
        message.header.stamp, message.header.frame_id = ns_to_stamp(stamp_ns), self.frame_id
        message.data.frombytes(cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
        return message


def play(player: Player, source: Source, rate: float, sent: list[tuple[int, int]]) -> None:
    """Send all frames at their times; appends (stamp_ns, monotonic_ns) of each to `sent`."""
    first: tuple[int, int] | None = None  # stamp and time of sending that the others are measured from
    for stamp, image, camera in tqdm(source, desc="playing", unit="frame"):
        if first is not None and stamp < first[0]:
            first = None
        if first is not None:
            player.sleep_until((first[1] + (stamp - first[0]) / rate) / 1e9, stamp, rate)
        elif player.clock:
            player.clock.publish(Clock(clock=ns_to_stamp(stamp)))
        sent.append((stamp, player.send(stamp, image, camera)))
        first = first or sent[-1]
        if player.lockstep:
            player.wait_for_pose(stamp)


def write_log(path: Path, sent: list[tuple[int, int]]) -> None:
    """Write the times of sending. Raises OSError."""
    with written_whole(path) as partial:
        partial.write_text("stamp_ns,monotonic_ns\n" + "".join(f"{stamp},{when}\n" for stamp, when in sent))


def positive(text: str) -> float:
    """An argument that must be a positive number."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a positive number")
    return value


def main() -> int:
    """Command line; 0, 1 with one line when the input cannot be read or nobody listens, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m speed3r_ros.play", description="Play images over ROS 2.")
    parser.add_argument("input", help="bag, video file or folder of images")
    parser.add_argument("--topic", default="", help="image topic of the bag, where it has several")
    parser.add_argument("--rate", type=positive, default=1.0, help="speed, 1 = real time")
    parser.add_argument("--loop", action="store_true", help="start again at the end; the stamps jump back")
    parser.add_argument("--clock", action="store_true", help="publish /clock, for nodes with use_sim_time")
    parser.add_argument("--compressed", action="store_true", help="publish image/compressed (JPEG) instead of image")
    parser.add_argument(
        "--lockstep",
        type=positive,
        default=0.0,
        metavar="SECONDS",
        help="send an image only when the pose of the one before has come, or after so long; the node drops none",
    )
    parser.add_argument("--namespace", default="", help="of the topics image and camera_info")
    parser.add_argument("--frame-id", default=CAMERA_FRAME, help="of the messages' headers")
    parser.add_argument("--wait", type=positive, default=60.0, metavar="SECONDS", help="for a subscriber")
    parser.add_argument("--log", type=Path, help="CSV of the times at which images were sent")
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sent: list[tuple[int, int]] = []
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    player = Player(options.namespace, options.frame_id, options.compressed, options.clock, options.lockstep)
    try:
        source = open_source(options.input, options.topic)
        player.wait_for_subscriber(options.wait)
        while True:
            play(player, source, options.rate, sent)
            if not options.loop:
                break
        player.images.wait_for_all_acked(Duration(seconds=10))
        return 0
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if options.log and sent:
            write_log(options.log, sent)
        player.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
