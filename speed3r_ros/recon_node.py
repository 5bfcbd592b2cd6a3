"""The ROS 2 node: images in, poses, TF, depth, confidence and points out.

Threads that never wait for one another: the executor receives and answers, one computes, one publishes each frame's
messages, one adds keyframes to the map, one publishes the path and the map. Nothing is built for a topic without
subscribers. Where frames come faster than the network can take them, it gets the newest, and the features of those before
it give their poses.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped
from nav_msgs.msg import Odometry, Path
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy._rclpy_pybind11 import RCLError
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.task import Future
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from std_srvs.srv import SetBool, Trigger

from speed3r_ros import convert
from speed3r_ros.clouds import cloud, make_rows, valid_depth
from speed3r_ros.config import Config, settings, with_values
from speed3r_ros.convert import camera_from_info, image_to_array, ns_to_stamp, stamp_to_ns
from speed3r_ros.diagnostics import Statistics, diagnostics_message
from speed3r_ros.frames import Broadcaster, Extrinsics, ForeignOdometry
from speed3r_ros.mapping.geometry import T_link_optical, inverse
from speed3r_ros.mapping.point_map import write_ply
from speed3r_ros.model.engine import Engine
from speed3r_ros.model.types import Estimate, Frame, Tracking
from speed3r_ros.outputs import CAMERA_FRAME, WorldFrame, twist_between
from speed3r_ros.pipeline import DISORDER_NS, SKIPPED, Pipeline, Step, step_in_time
from speed3r_ros.qos import FollowingSubscription
from speed3r_ros.worker import Mailbox, Worker

OUTPUT_DEPTH = 5
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
FOREIGN_PARAMETERS = ("use_sim_time", "start_type_description_service", "qos_overrides.")
OTHER_CLOCK_NS = 5_000_000_000  # images stamped further than this from the node's clock follow another one
SILENCE_NS = 1_000_000_000
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
HAND_OVER = 5e-5  # seconds that the executor lets go of Python, so that the computing thread starts at once
SWITCH_INTERVAL = 0.0005  # seconds that a computing thread may keep Python from the publishing one; 5 ms by default


@dataclass
class Received:
    """An image message and when it arrived: monotonic seconds, and nanoseconds of the node's clock."""

    message: Any
    info: CameraInfo | None
    arrived: float
    clock_ns: int


@dataclass
class Answer:
    """An estimate on its way out."""

    estimate: Estimate
    frame_id: str
    T_odom_base: np.ndarray
    twist: np.ndarray
    epoch: int  # resets before it


class RosLog(logging.Handler):
    """Passes warnings of this package, such as the notice of a licence, on to the log of the node."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logging.WARNING)
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        self._logger.warning(record.getMessage())


def descriptor(item: Any) -> ParameterDescriptor:
    """Description, range and mutability of a setting."""
    meta, out = (
        item.metadata,
        ParameterDescriptor(description=item.metadata["help"], read_only=not item.metadata["live"]),
    )
    if meta["choices"]:
        out.additional_constraints = f"one of: {', '.join(meta['choices'])}"
    low, high = meta["low"], meta["high"]
    if low is not None and high is not None and type(item.default) is int:
        out.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=0)]
    elif low is not None and high is not None and type(item.default) is float:
        out.floating_point_range = [FloatingPointRange(from_value=float(low), to_value=float(high), step=0.0)]
    return out


def calibration(info: CameraInfo) -> tuple:
    """What of a CameraInfo decides rectification and intrinsics; its stamp does not."""
    region = info.roi.x_offset, info.roi.y_offset, info.roi.width, info.roi.height
    sizes = info.width, info.height, info.binning_x, info.binning_y
    return *sizes, *region, info.distortion_model, info.k.tobytes(), info.d.tobytes()


class ReconNode(Node):
    """Topics, frames and services: see the README. Raises ValueError for parameters or weights that cannot work."""

    def __init__(self, engine: Engine | None = None, **node_options: Any) -> None:
        super().__init__("speed3r", **node_options)
        logging.getLogger("speed3r_ros").addHandler(RosLog(self.get_logger()))
        self.config = self._declare()
        self.pipeline = Pipeline(self.config, engine)
        self.statistics = Statistics()
        self._lock = threading.Lock()  # one frame or one reset at a time
        self._map_lock = threading.Lock()  # taken after `_lock`
        self._epoch = 0  # number of resets
        self._path_lock = threading.Lock()
        self._world: WorldFrame | None = None
        self._camera = (None, None)  # calibration and the camera that it means
        self._calibrated = False  # whether the last image went with its camera
        self._info: CameraInfo | None = None
        self._last_stamp: int | None = None
        self._last_pose: tuple[int, np.ndarray] | None = None
        self._image_clock = 0, 0  # node's clock at the last image, and how far the image's stamp was ahead of it, ns
        self._frame_id = ""
        self._odometry: ForeignOdometry | None = None
        self._correction: np.ndarray | None = None  # T_map_odom where another node publishes odom -> base
        self._first_image = 0.0
        self._map_version = 0
        self._told: set[str] = set()
        self._path: deque[PoseStamped] = deque(maxlen=self.config.path.max_length)
        self.extrinsics = Extrinsics(self, self.config.frames.base, self.config.frames.base_to_camera)
        self.broadcaster = Broadcaster(self)
        self._create_outputs()
        self._publisher = Worker("publish", Mailbox(16), self._publish, self._report)
        self._mapper = Worker("map", Mailbox(16), self._integrate, self._report)
        self._slow_publisher = Worker("publish slow", Mailbox(2), lambda publish: publish(), self._report)
        self._between = 0  # frames that were only followed since the network's last
        self._most_between = self.config.odometry.between if self.pipeline.odometry else 0
        waiting = Mailbox(1 + self._most_between, spread=True)
        self._computer = Worker("compute", waiting, self._compute, self._report)
        self._create_inputs()
        engine = self.pipeline.engine
        self.get_logger().info(
            f"ready: {self.config.engine.model} on {engine.device}, {str(engine.dtype).removeprefix('torch.')}, "
            f"{self.config.engine.strategy} attention; scale factor {self.config.scale.factor:g}"
            + ("" if self.config.scale.factor != 1 else " (monocular: lengths are in units of the model, not metres)")
        )

    # ------------------------------------------------------------------------------------------------- construction

    def _declare(self) -> Config:
        given = {
            name: parameter.value
            for name, parameter in self._parameter_overrides.items()
            if not name.startswith(FOREIGN_PARAMETERS)
        }
        config = with_values(Config(), given)
        for name, item, value in settings(config):
            self.declare_parameter(name, value, descriptor(item), ignore_override=True)
        self.add_on_set_parameters_callback(self._set_parameters)
        return config

    def _set_parameters(self, parameters: list[Any]) -> SetParametersResult:
        known = {name for name, _, _ in settings(self.config)}
        try:
            config = with_values(self.config, {p.name: p.value for p in parameters if p.name in known})
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self.config = self.pipeline.config = config
        self.pipeline.engine.config = config.engine
        return SetParametersResult(successful=True)

    def _create_outputs(self) -> None:
        def output(kind: type, topic: str, qos: Any = OUTPUT_DEPTH) -> Any:
            return self.create_publisher(kind, topic, qos)

        self.pose_pub = output(PoseWithCovarianceStamped, "pose")
        self.odometry_pub = output(Odometry, "odometry")
        self.path_pub = output(Path, "path")
        self.depth_pub = output(Image, "depth/image")
        self.depth_info_pub = output(CameraInfo, "depth/camera_info")
        self.confidence_pub = output(Image, "confidence")
        self.points_pub = output(PointCloud2, "points")
        self.map_pub = output(PointCloud2, "map_points", LATCHED)
        self.diagnostics_pub = output(DiagnosticArray, "/diagnostics", 10)

    def _create_inputs(self) -> None:
        raw = self.config.input.image_transport == "raw"
        kind, topic = (Image, "image") if raw else (CompressedImage, "image/compressed")
        self.images = FollowingSubscription(self, kind, topic, self._receive, self.config.input.reliability)
        self.infos = FollowingSubscription(
            self, CameraInfo, "camera_info", self._receive_info, self.config.input.reliability
        )
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.create_service(SetBool, "~/pause", self._on_pause)
        self.create_service(Trigger, "~/save_trajectory", self._on_save_trajectory)
        self.create_service(Trigger, "~/save_map", self._on_save_map)
        self.create_timer(1 / self.config.tf.rate, self._send_map_to_odom)
        self.create_timer(1 / self.config.path.rate, self._send_path)
        self.create_timer(1 / self.config.map.rate, self._send_map)
        self.create_timer(1.0, self._send_diagnostics, clock=Clock(clock_type=ClockType.STEADY_TIME))
        backward = JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=False)
        self._jump_handle = self.get_clock().create_jump_callback(backward, post_callback=self._on_clock_jump)

    # ------------------------------------------------------------------------------------------- executor: callbacks

    def _receive(self, message: Any) -> None:
        self.statistics.received()
        if not self.statistics.paused:
            now_ns = self.get_clock().now().nanoseconds
            self._computer.mailbox.put(Received(message, self._info, time.monotonic(), now_ns))
            time.sleep(HAND_OVER)

    def _receive_info(self, message: CameraInfo) -> None:
        self._info = message

    def _on_clock_jump(self, jump: Any) -> None:
        if self.config.input.reset_on_time_jump:
            self._apart(lambda: self._follow_clock(f"the clock jumped back by {-jump.delta.nanoseconds / 1e9:.3f} s"))

    def _follow_clock(self, why: str) -> None:
        ahead = self._last_stamp is not None and self._last_stamp - self.get_clock().now().nanoseconds > DISORDER_NS
        if ahead:  # otherwise the images are already on the new time
            self._reset(why)

    async def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        await self._apart(lambda: self._reset("on request"))
        response.success, response.message = True, "reset"
        return response

    def _apart(self, work: Callable[[], Any]) -> Future:
        """Run something slow in a thread of its own, while the executor goes on."""
        future = Future(executor=self.executor)

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)
            if executor := self.executor:
                executor.wake()

        threading.Thread(target=run, name="service", daemon=True).start()
        return future

    def _on_pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self.statistics.paused = request.data
        if request.data:
            self._computer.mailbox.clear()
        response.success, response.message = True, "paused" if request.data else "running"
        return response

    async def _on_save_trajectory(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        def write(path: str) -> str:
            trajectory = self.pipeline.recorded()
            trajectory.write_tum(path)
            return f"{len(trajectory)} poses"

        return await self._save(response, self.config.output.trajectory_path, write)

    async def _on_save_map(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        def write(path: str) -> str:
            points, colors, confidence = self.pipeline.point_map.snapshot()
            write_ply(path, points, colors, confidence)
            return f"{len(points)} points"

        return await self._save(response, self.config.output.map_path, write)

    async def _save(self, response: Trigger.Response, path: str, write: Callable[[str], str]) -> Trigger.Response:
        try:
            written = await self._apart(lambda: write(path))
            response.success, response.message = True, f"{written} written to {path}"
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            response.success, response.message = False, f"{path} not written: {reason}; set another path"
            self.get_logger().error(response.message)
        return response

    # ------------------------------------------------------------------------------------------------ compute thread

    def _compute(self, received: Received) -> None:
        message = received.message
        stamp_ns = stamp_to_ns(message.header.stamp)
        if not self._continues(stamp_ns):
            return
        frame = self._frame(message, received.info, stamp_ns)
        frame_id = self._camera_frame(message)
        if not self._find_extrinsics(frame_id):
            self.statistics.tracking = "waiting for TF"
            return
        with self._lock:
            estimate = self._estimate(frame)
            if estimate is None:
                self.statistics.count("unfollowed")
                return
            latency = time.monotonic() - received.arrived
            self.statistics.processed(
                latency, estimate.tracking.value, estimate.lost_reason, by_network=self._between == 0
            )
            if estimate.tracking is Tracking.LOST:
                self.statistics.count("lost")
                self._tell(estimate.lost_reason)
                self._last_pose = None
                return
            if estimate.tracking is Tracking.WEAK:
                self.statistics.count("weak")
            T = self._world.base(estimate.T_world_cam)
            seconds = (stamp_ns - self._last_pose[0]) / 1e9 if self._last_pose else 0.0
            twist = twist_between(self._last_pose[1], T, seconds) if self._last_pose else np.zeros(6)
            if self._odometry and (T_odom_base := self._odometry.at(stamp_ns)) is not None:
                self._correction = T @ inverse(T_odom_base)
            self._frame_id, self._image_clock = frame_id, (received.clock_ns, stamp_ns - received.clock_ns)
            self._last_pose = stamp_ns, T
            self._publisher.mailbox.put(Answer(estimate, frame_id, T, twist, self._epoch))

    def _estimate(self, frame: Frame) -> Estimate | None:
        """Of the frames that wait, the network gets the newest; poses of the others come from features, or not at all."""
        if len(self._computer.mailbox) and self._between < self._most_between:
            self._between += 1
            return self.pipeline.follow(frame)
        self._between = 0
        return self.pipeline.process(frame)

    def _continues(self, stamp_ns: int) -> bool:
        """Whether a frame with this stamp is to be used; a jump in time starts a new segment, or all anew."""
        last_ns = self._last_stamp
        step = step_in_time(last_ns, stamp_ns, self.config.input)
        if step in SKIPPED:
            self.statistics.count("bad")
            late = f"is {(last_ns - stamp_ns) / 1e9:.3f} s older than the one before"
            why = late if step is Step.LATE else step.value
            self._tell(f"image stamp {stamp_ns} ns {why}: the frame is skipped; check the camera driver's clock")
            return False
        if step is Step.BACK:
            self._reset(f"image stamps jumped back by {(last_ns - stamp_ns) / 1e9:.3f} s")
        elif step is Step.GAP:
            gap = (stamp_ns - last_ns) / 1e9
            self.get_logger().warning(f"no image for {gap:.1f} s: a new segment starts at the last pose")
            with self._lock:
                self.pipeline.restart()
                self._last_pose = None
        self._last_stamp = stamp_ns
        return True

    def _frame(self, message: Any, info: CameraInfo | None, stamp_ns: int) -> Frame:
        image, K = image_to_array(message), None
        try:
            if info is not None and (known := calibration(info)) != self._camera[0]:
                self._camera = known, None
                self._camera = known, camera_from_info(info)
            if info is not None and self._camera[1] is not None:
                image, K = self._camera[1].rectify(image)
        except ValueError as error:
            self._tell(f"{error}; until then intrinsics count as unknown")
        self._calibrated = K is not None
        return Frame(image, stamp_ns, K)

    def _camera_frame(self, message: Any) -> str:
        """Name of the camera's optical frame: one that TF takes, without a slash in front."""
        frame_id = (self.config.frames.camera or message.header.frame_id).lstrip("/")
        if not frame_id:
            self._tell(
                f"images carry no frame_id: {CAMERA_FRAME!r} stands for it; set it in the camera driver or frames.camera"
            )
        return frame_id or CAMERA_FRAME

    def _find_extrinsics(self, frame_id: str) -> bool:
        if self._world is not None:
            return True
        self._first_image = self._first_image or time.monotonic()
        T = self.extrinsics.lookup(frame_id)
        base = self.config.frames.base
        if T is None:
            if self.extrinsics.listening and time.monotonic() - self._first_image < self.config.frames.wait:
                return False
            T = T_link_optical
            self.get_logger().warning(
                f"TF does not connect {base!r} to {frame_id!r}: a level, forward-looking camera at the base's origin is "
                "assumed; publish the transform, or set frames.base_to_camera and, so that others can place its depth and "
                "points, tf.publish_base_to_camera"
            )
        self.extrinsics.finish()
        self._world = WorldFrame(T)
        if self.config.tf.publish and self.config.tf.publish_base_to_camera and base and base != frame_id:
            self.broadcaster.send_static(
                convert.transform_message(
                    convert.pose_from_matrix(T), self.get_clock().now().nanoseconds, base, frame_id
                )
            )
        return True

    def _reset(self, why: str) -> None:
        self.get_logger().info(f"reset: {why}")
        self._computer.mailbox.clear()
        with self._lock, self._map_lock:
            self._epoch += 1
            self.pipeline.reset()
            with self._path_lock:
                self._path.clear()
            self._last_pose = self._last_stamp = self._correction = None
            self._publisher.mailbox.clear()
        self.statistics.count("resets")

    def _report(self, error: Exception) -> None:
        if not self.context.ok():  # nobody listens any more
            return
        self.statistics.count("bad")
        self._tell(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")

    def _tell(self, text: str) -> None:
        """Say each kind of trouble once; numbers do not make a new kind."""
        kind = "".join(c for c in text if not c.isdigit())
        if kind not in self._told and len(self._told) < 1000:
            self._told.add(kind)
            self.get_logger().warning(" ".join(text.split()))

    # ------------------------------------------------------------------------------------------------ publish thread

    def _publish(self, answer: Answer) -> None:
        config, estimate, stamp = self.config, answer.estimate, answer.estimate.stamp_ns
        base = config.frames.base or answer.frame_id
        pose = convert.pose_from_matrix(answer.T_odom_base)
        if config.tf.publish and config.tf.publish_odom_to_base:
            self.broadcaster.send(convert.transform_message(pose, stamp, config.frames.odom, base))
        if self.pose_pub.get_subscription_count():
            self.pose_pub.publish(convert.pose_message(pose, estimate.pose_sigma, stamp, config.frames.map))
        stamped = convert.stamped_pose_message(pose, stamp, config.frames.map)
        with self._path_lock:
            if answer.epoch == self._epoch:
                self._path.append(stamped)
        if self.odometry_pub.get_subscription_count():
            self.odometry_pub.publish(
                convert.odometry_message(pose, estimate.pose_sigma, answer.twist, stamp, config.frames.odom, base)
            )
        if estimate.depth is None:
            return
        height, width = estimate.depth.shape
        if self.depth_info_pub.get_subscription_count():
            self.depth_info_pub.publish(convert.info_from_K(estimate.K, width, height, stamp, answer.frame_id))
        to_depth, to_points = (pub.get_subscription_count() for pub in (self.depth_pub, self.points_pub))
        depth = valid_depth(estimate, config) if to_depth or to_points else None
        if to_depth:
            self.depth_pub.publish(convert.array_to_image(depth, stamp, answer.frame_id))
        if self.confidence_pub.get_subscription_count():
            self.confidence_pub.publish(convert.array_to_image(estimate.confidence, stamp, answer.frame_id))
        if to_points:
            rows, _ = cloud(estimate, depth, config.points.max)
            self.points_pub.publish(convert.points_message(rows, stamp, answer.frame_id))
        if estimate.is_keyframe:
            self._mapper.mailbox.put(answer)

    def _integrate(self, answer: Answer) -> None:
        with self._map_lock:
            if answer.epoch == self._epoch:
                self.pipeline.integrate(answer.estimate)

    def _publish_path(self) -> None:
        with self._path_lock:
            poses = list(self._path)
        if poses:
            self.path_pub.publish(convert.path_message(poses))

    def _publish_map(self) -> None:
        version, last = self.pipeline.map_version, self._last_pose
        if self._world is None or version == self._map_version:
            return
        points, colors, _ = self.pipeline.point_map.snapshot()
        stamp_ns = last[0] if last else self.get_clock().now().nanoseconds
        rows = make_rows(self._world.points(points), colors)
        self.map_pub.publish(convert.points_message(rows, stamp_ns, self.config.frames.map))
        self._map_version = version

    # ---------------------------------------------------------------------------------------------- executor: timers

    def _send_map_to_odom(self) -> None:
        config, tf = self.config, self.config.tf
        if not (tf.publish and tf.publish_map_to_odom):
            return
        if tf.publish_odom_to_base:
            T = np.eye(4) if self._last_pose else None
        else:
            T = self._correction
            if self._odometry is None and self._frame_id:
                self._odometry = ForeignOdometry(self, config.frames.odom, config.frames.base or self._frame_id)
            elif T is None and self._last_pose:
                self.get_logger().warning(
                    f"map -> odom waits for {config.frames.odom} -> {config.frames.base or self._frame_id} from another "
                    "node, because tf.publish_odom_to_base is off",
                    throttle_duration_sec=10.0,
                )
        if T is None or (stamp_ns := self._now_ns()) is None:
            return
        stamp_ns += int(tf.lead * 1e9)
        pose = convert.pose_from_matrix(T)
        self.broadcaster.send(convert.transform_message(pose, stamp_ns, config.frames.map, config.frames.odom))

    def _now_ns(self) -> int | None:
        """The present on the clock of the images. Where it is not the node's, as when a bag is played without --clock, it
        is known only while they come."""
        now_ns = self.get_clock().now().nanoseconds
        arrived_ns, ahead_ns = self._image_clock
        if abs(ahead_ns) < OTHER_CLOCK_NS:
            return now_ns
        return now_ns + ahead_ns if 0 <= now_ns - arrived_ns < SILENCE_NS else None

    def _send_path(self) -> None:
        if self.path_pub.get_subscription_count():
            self._slow_publisher.mailbox.put(self._publish_path)

    def _send_map(self) -> None:
        if self.map_pub.get_subscription_count():
            self._slow_publisher.mailbox.put(self._publish_map)

    def _send_diagnostics(self) -> None:
        now_ns = self.get_clock().now().nanoseconds
        if now_ns == 0 and self.statistics.counts["received"]:
            self._tell(
                "use_sim_time is true and /clock is silent: map -> odom, path and map wait for it; publish /clock (ros2 bag "
                "play --clock) or set use_sim_time to false"
            )
        if not self.diagnostics_pub.get_subscription_count():
            return
        factor = self.config.scale.factor
        facts = {
            "scale": "unknown (monocular)" if factor == 1 else f"fixed factor {factor:g}",
            "map_points": len(self.pipeline.point_map),
            "intrinsics": "known" if self._calibrated else "unknown",
            "model": self.config.engine.model,
            "device": str(self.pipeline.engine.device),
        }
        stamp = ns_to_stamp(now_ns)
        name = self.get_fully_qualified_name().lstrip("/")  # nodes of several robots share /diagnostics
        dropped = (
            self._computer.mailbox.dropped + self._publisher.mailbox.dropped + self.statistics.counts["unfollowed"]
        )
        self.diagnostics_pub.publish(diagnostics_message(stamp, name, self.statistics, dropped, facts))

    def stop(self) -> None:
        """End the threads; call before destroy_node."""
        for worker in (self._computer, self._publisher, self._mapper, self._slow_publisher):
            worker.stop()


def spare_the_allocator() -> None:
    """Keep the memory that one frame frees for the next, and let the garbage collector pass over what is there to stay.

    By default glibc returns large arrays to the system and gets them again, page by page: building a cloud took 1.8 ms
    instead of 0.4.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc only
        mallopt(M_TRIM_THRESHOLD, 2**28)
        mallopt(M_MMAP_THRESHOLD, 2**25)  # its greatest
    gc.collect()
    gc.freeze()


def main(args: list[str] | None = None, engine: Engine | None = None) -> int:
    """Run the node until it is interrupted. Returns the exit code: 0, or 1 after one line when it cannot start."""
    rclpy.init(args=args)
    sys.setswitchinterval(SWITCH_INTERVAL)
    node = None
    try:
        node = ReconNode(engine)
        spare_the_allocator()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except RCLError:  # a signal can invalidate the context just before the executor waits on it
        if rclpy.ok():
            raise
    except ValueError as error:
        print(f"recon_node: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # ros2 launch sends a second one while the node shuts down
        if node is not None:
            node.stop()
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
