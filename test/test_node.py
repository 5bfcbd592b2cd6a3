"""The node over real DDS: a process of its own, this process as camera, and a subscriber that knows only the standards."""

import array
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus  # noqa: E402
from geometry_msgs.msg import PoseWithCovarianceStamped  # noqa: E402
from nav_msgs.msg import Odometry  # noqa: E402
from nav_msgs.msg import Path as PathMessage  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy  # noqa: E402
from scipy.spatial.transform import Rotation  # noqa: E402
from sensor_msgs.msg import CameraInfo, Image, PointCloud2  # noqa: E402
from std_srvs.srv import SetBool, Trigger  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from doubles import DEPTH, K_UNKNOWN, SIZE, SPEED, STEP, TURN  # noqa: E402

tf2_msgs = pytest.importorskip("tf2_msgs.msg", reason="needs tf2_msgs (scripts/build_tf2_msgs.sh)")

pytestmark = pytest.mark.alone
ROOT = Path(__file__).parents[1]
FRAME = "cam_optical"
K = [200.0, 0.0, 79.5, 0.0, 210.0, 59.5, 0.0, 0.0, 1.0]
SHAPE = (120, 160)
PER_FRAME = ("pose", "odometry", "depth/image", "depth/camera_info", "confidence", "points")
STEREO = "0.2 0.0 0.5 -0.5 0.5 -0.5 0.5"  # a forward-looking camera 0.2 m ahead and 0.5 m above the base


class Rig:
    """Publishes images to a node in another process and collects all that it says."""

    def __init__(
        self,
        tmp_path: Path,
        *parameters: str,
        engine: str = "ScriptedEngine",
        best_effort: bool = False,
        namespace: str = "",
    ) -> None:
        self.log_path = tmp_path / "node.log"
        self.log = open(self.log_path, "w")
        module = [str(ROOT / "test" / "doubles.py"), engine] if engine else ["-m", "speed3r_ros.recon_node"]
        if engine == "ScriptedEngine":  # its motion is not that of its images
            parameters = (*parameters, "odometry.features:=0")
        arguments = ["--ros-args", "-r", f"__ns:=/{namespace}"] + [x for p in parameters for x in ("-p", p)]
        self.process = subprocess.Popen(
            [sys.executable, *module, *arguments],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)},
        )
        rclpy.init()
        self.node = rclpy.create_node("camera_and_witness", namespace=namespace)
        self.heard = defaultdict(list)
        for topic, kind, latched in (
            ("pose", PoseWithCovarianceStamped, False), ("odometry", Odometry, False), ("path", PathMessage, False),
            ("depth/image", Image, False), ("depth/camera_info", CameraInfo, False), ("confidence", Image, False),
            ("points", PointCloud2, False), ("map_points", PointCloud2, True), ("/diagnostics", DiagnosticArray, False),
            ("/tf", tf2_msgs.TFMessage, False), ("/tf_static", tf2_msgs.TFMessage, True),
        ):  # fmt: skip
            durability = DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE
            qos = QoSProfile(depth=500, reliability=ReliabilityPolicy.RELIABLE, durability=durability)
            self.node.create_subscription(kind, topic, lambda m, topic=topic: self.heard[topic].append(m), qos)
        self.infos = self.node.create_publisher(CameraInfo, "camera_info", 10)
        offered = ReliabilityPolicy.BEST_EFFORT if best_effort else ReliabilityPolicy.RELIABLE
        self.images = self.node.create_publisher(Image, "image", QoSProfile(depth=10, reliability=offered))
        self.sent = []
        self.rng = np.random.default_rng()
        self.wait(
            lambda: self.images.get_subscription_count() and self.infos.get_subscription_count(),
            60,
            "the node subscribes",
        )
        self.spin(0.6)

    def spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            rclpy.spin_once(self.node, timeout_sec=0.02)

    def wait(self, condition, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the node ended: {self.text()}"
            assert time.monotonic() < end, f"waited {seconds} s for: {what}; the node says:\n{self.text()}"
            rclpy.spin_once(self.node, timeout_sec=0.02)

    def text(self) -> str:
        self.log.flush()
        return self.log_path.read_text()

    def image(self, stamp_ns: int, shape=SHAPE, pixels=None, **overrides) -> Image:
        pixels = self.rng.integers(0, 255, (*shape, 3), dtype=np.uint8) if pixels is None else pixels
        message = Image(
            height=shape[0], width=shape[1], encoding="rgb8", step=3 * shape[1], data=array.array("B", pixels.tobytes())
        )
        message.header.frame_id = FRAME
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
        for name, value in overrides.items():
            setattr(message, name, value)
        return message

    def info(self, k=K, shape=SHAPE) -> CameraInfo:
        message = CameraInfo(height=shape[0], width=shape[1], distortion_model="plumb_bob", k=[float(x) for x in k])
        self.infos.publish(message)
        self.spin(0.3)
        return message

    def answered(self, stamp_ns: int, **kwargs) -> bool:
        """Send an image and wait for all messages about it; topics do not wait for one another on their way."""
        self.images.publish(self.image(stamp_ns, **kwargs))
        for topic in PER_FRAME:
            self.wait(lambda t=topic: stamp(self.last(t)) == stamp_ns, 30, f"{topic} for stamp {stamp_ns}")
        return True

    def last(self, topic: str):
        return self.heard[topic][-1] if self.heard[topic] else None

    def facts(self) -> dict[str, str]:
        """What the last message of diagnostics says of the node's work."""
        message = self.last("/diagnostics")
        return {v.key: v.value for s in message.status for v in s.values} if message else {}

    def unanswered(self, message: Image) -> None:
        before = len(self.heard["pose"])
        self.images.publish(message)
        self.spin(0.25)
        assert len(self.heard["pose"]) == before

    def call(self, kind, name, **fields):
        client = self.node.create_client(kind, name)
        assert client.wait_for_service(10)
        future = client.call_async(kind.Request(**fields))
        self.wait(future.done, 10, name)
        return future.result()

    def close(self, *signals: int) -> int:
        for number in signals or (signal.SIGTERM,):
            self.process.send_signal(number)
            time.sleep(0.15)
        code = self.process.wait(15)
        self.node.destroy_node()
        rclpy.shutdown()
        self.log.close()
        return code


@pytest.fixture
def rig(tmp_path, request):
    made = []

    def make(*parameters, **kwargs):
        made.append(Rig(tmp_path, *parameters, **kwargs))
        return made[-1]

    yield make
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        if rclpy.ok():
            one.node.destroy_node()
            rclpy.shutdown()


def stamp(message) -> int | None:
    return message and message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


def matrix(p, q) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3] = Rotation.from_quat([q.x, q.y, q.z, q.w]).as_matrix()
    T[:3, 3] = p.x, p.y, p.z
    return T


def expected_base(n: int) -> np.ndarray:
    """Pose of the base in odom at frame n, written in the robot's axes: forward x, left y, up z."""
    step = np.eye(4)  # of the camera in its link axes: STEP = (right, down, forward) -> (forward, left, up)
    step[:3, :3] = Rotation.from_rotvec([0, 0, -TURN]).as_matrix()  # to the right: negative about up
    step[:3, 3] = STEP[2], -STEP[0], -STEP[1]
    mount = np.eye(4)
    mount[:3, 3] = 0.2, 0.0, 0.5
    return mount @ np.linalg.matrix_power(step, n) @ np.linalg.inv(mount)


def test_every_message_against_its_standard(rig):
    r = rig(f"frames.base_to_camera:='{STEREO}'", "path.max_length:=4", "tf.publish_base_to_camera:=true")
    r.info()
    stamps = [1_700_000_000_123_456_789 + i * 33_333_333 for i in range(8)]  # not representable in float64 seconds
    for s in stamps:
        r.answered(s)
    for topic in PER_FRAME:
        assert [stamp(m) for m in r.heard[topic]] == stamps, topic
    r.wait(lambda: r.last("path") and stamp(r.last("path").poses[-1]) == stamps[-1], 10, "the path up to the last pose")
    r.wait(lambda: r.last("map_points"), 10, "the map")
    r.wait(lambda: stamps[-1] in {stamp(t) for m in r.heard["/tf"] for t in m.transforms}, 10, "the last transform")
    r.wait(lambda: r.facts().get("processed") == "8", 10, "the count of processed frames")

    for n, (pose, odometry) in enumerate(zip(r.heard["pose"], r.heard["odometry"])):
        assert pose.header.frame_id == "map"
        assert (odometry.header.frame_id, odometry.child_frame_id) == ("odom", "base_link")
        for message in (pose, odometry):
            q = message.pose.pose.orientation
            assert abs(np.linalg.norm([q.x, q.y, q.z, q.w]) - 1) < 1e-9
            np.testing.assert_allclose(matrix(message.pose.pose.position, q), expected_base(n), atol=1e-9)
            covariance = np.array(message.pose.covariance).reshape(6, 6)
            np.testing.assert_allclose(covariance, np.diag([1e-4] * 3 + [4e-4] * 3))
        if n:
            twist = odometry.twist.twist
            move = (np.linalg.inv(expected_base(n - 1)) @ expected_base(n))[:3, 3] / 0.033333333
            np.testing.assert_allclose([twist.linear.x, twist.linear.y, twist.linear.z], move, atol=1e-6)
            np.testing.assert_allclose(
                [twist.angular.x, twist.angular.y, twist.angular.z], [0, 0, -TURN / 0.033333333], atol=1e-6
            )
    assert r.heard["odometry"][1].pose.pose.position.x > 0.09  # along the optical axis = forward

    path = r.last("path")
    assert path.header.frame_id == "map" and len(path.poses) == 4  # bounded
    assert [stamp(p) for p in path.poses] == stamps[-4:]

    for depth, info, confidence in zip(r.heard["depth/image"], r.heard["depth/camera_info"], r.heard["confidence"]):
        for image in (depth, confidence):
            assert (image.encoding, image.height, image.width, image.step) == ("32FC1", *SIZE, 4 * SIZE[1])
            assert image.header.frame_id == info.header.frame_id == FRAME and not image.is_bigendian
            assert len(image.data) == image.step * image.height
        values = np.frombuffer(depth.data, "<f4").reshape(SIZE)
        assert np.isnan(values[:4, :4]).all() and np.isnan(values).sum() == 16  # REP-118: NaN is invalid
        assert (values[np.isfinite(values)] == DEPTH).all()
        assert (info.height, info.width, info.distortion_model) == (*SIZE, "plumb_bob")
        scale = SIZE[1] / SHAPE[1]
        expected = [K[0] * scale, 0, (K[2] + 0.5) * scale - 0.5, 0, K[4] * scale, (K[5] + 0.5) * scale - 0.5, 0, 0, 1]
        np.testing.assert_allclose(info.k, expected)
        np.testing.assert_allclose(
            np.array(info.p).reshape(3, 4), np.hstack([np.array(expected).reshape(3, 3), np.zeros((3, 1))])
        )
        np.testing.assert_allclose(info.r, np.eye(3).ravel())

    cloud = r.last("points")
    assert cloud.header.frame_id == FRAME and cloud.is_dense and not cloud.is_bigendian
    assert [(f.name, f.offset, f.datatype, f.count) for f in cloud.fields] == [
        ("x", 0, 7, 1),
        ("y", 4, 7, 1),
        ("z", 8, 7, 1),
        ("rgb", 12, 7, 1),
    ]
    assert cloud.point_step == 16 and cloud.width * cloud.height == SIZE[0] * SIZE[1] - 16
    assert len(cloud.data) == cloud.row_step * cloud.height == 16 * cloud.width and len(cloud.data) < 500_000
    x, y, z, rgb = struct.unpack_from("<fffI", bytes(cloud.data), 0)
    assert z == DEPTH and rgb == 0x000A141E
    u, v = x / z * expected[0] + expected[2], y / z * expected[4] + expected[5]
    assert abs(u - round(u)) < 1e-4 and abs(v - round(v)) < 1e-4 and 0 <= round(v) < SIZE[0]

    world = r.last("map_points")
    assert world.header.frame_id == "map" and 0 < world.width * world.height <= SIZE[0] * SIZE[1]
    x = np.frombuffer(world.data, "<f4").reshape(-1, 4)[:, 0]
    np.testing.assert_allclose(x, 0.2 + DEPTH, atol=1e-5)  # the wall, in front of the base in the z-up map

    parents = defaultdict(set)
    odom_to_base = {}
    for message in r.heard["/tf"] + r.heard["/tf_static"]:
        for t in message.transforms:
            parents[t.child_frame_id].add(t.header.frame_id)
            if t.child_frame_id == "base_link":
                odom_to_base[stamp(t)] = matrix(t.transform.translation, t.transform.rotation)
    assert dict(parents) == {"base_link": {"odom"}, "odom": {"map"}, FRAME: {"base_link"}}
    assert list(odom_to_base) == stamps
    np.testing.assert_allclose(odom_to_base[stamps[-1]], expected_base(7), atol=1e-9)

    tracking, values = r.last("/diagnostics").status[0], r.facts()
    assert tracking.level == DiagnosticStatus.OK and tracking.name == "speed3r: tracking"
    assert values["tracking"] == "tracking" and "unknown" in values["scale"]
    assert float(values["latency_p95_ms"]) < 1000 and int(values["memory_mb"]) > 10
    assert r.close() == 0


def textured_wall(rng) -> np.ndarray:
    texture = rng.integers(0, 255, (24, 60, 3), dtype=np.uint8)
    return cv2.resize(texture, None, fx=8, fy=8, interpolation=cv2.INTER_CUBIC)


def seen_after(seconds: float, wall: np.ndarray) -> np.ndarray:
    """The image of a wall at DEPTH, of a camera that moves at SPEED."""
    left = np.float32([[1, 0, -20 - seconds * SPEED[0] * K[0] / DEPTH], [0, 1, -20]])
    return cv2.warpAffine(wall, left, SHAPE[::-1])


def test_frames_that_the_network_has_no_time_for_are_followed(rig):
    """A textured wall slides by faster than a slow network takes frames: features give the poses in between."""
    r = rig("frames.base_to_camera:='0 0 0 0 0 0 1'", "odometry.between:=4", engine="SlowEngine")
    r.info()
    wall = textured_wall(r.rng)
    start, period, count = 1_700_000_000_000_000_000, 70_000_000, 40
    for i in range(count):
        r.images.publish(r.image(start + i * period, pixels=seen_after(i * period / 1e9, wall)))
        r.spin(period / 1e9)
    for topic in PER_FRAME:
        r.wait(lambda t=topic: stamp(r.last(t)) == start + (count - 1) * period, 10, f"{topic} for the last image")
    r.heard["/diagnostics"].clear()
    r.wait(lambda: r.heard["/diagnostics"], 5, "diagnostics")

    stamps = [stamp(m) for m in r.heard["pose"]]
    seen = [stamp(m) for m in r.heard["depth/image"]]
    assert stamps == sorted(set(stamps)) and set(seen) < set(stamps)
    assert len(stamps) > 2 * len(seen) and [stamp(m) for m in r.heard["points"]] == seen
    numbers = [stamps.index(s) for s in seen]
    assert max(np.diff(numbers)) <= 5  # the network's turn comes
    for message in r.heard["pose"]:
        p = message.pose.pose.position
        moved = SPEED[0] * (stamp(message) - start) / 1e9  # to the right
        np.testing.assert_allclose([p.x, p.y, p.z], [0, -moved, 0], atol=0.03)
    assert [stamp(m) for m in r.heard["odometry"]] == stamps
    values = r.facts()
    assert int(values["processed"]) + int(values["dropped"]) <= int(values["received"]) == count
    assert float(values["network_hz"]) < float(values["processed_hz"])
    assert r.close() == 0


def test_a_slow_network_survives_all_that_may_come_between(rig):
    """Dark frames, another size, a gap, a jump back, resets, a pause and bad messages, faster than the network answers."""
    r = rig("frames.base_to_camera:='0 0 0 0 0 0 1'", "odometry.between:=3", engine="SlowEngine")
    r.info()
    wall, now, period = textured_wall(r.rng), 1_700_000_000_000_000_000, 40_000_000
    for i in range(120):
        k = i % 60
        now += 20_000_000_000 if k == 30 else -5_000_000_000 if k == 40 else period
        pixels = seen_after(k * period / 1e9, wall) * (not 10 <= k < 16)
        if 20 <= k < 24:
            pixels = pixels[:90, :100].copy()
        if k == 45:
            assert r.call(Trigger, "speed3r/reset").success
        if k in (50, 52):
            assert r.call(SetBool, "speed3r/pause", data=k == 50).success
        r.images.publish(r.image(now, shape=pixels.shape[:2], pixels=pixels, **({"step": 3} if k == 34 else {})))
        r.spin(period / 1e9)
    r.spin(2.0)
    poses = len(r.heard["pose"])
    for i in range(30):
        now += period
        r.images.publish(r.image(now, pixels=seen_after(i * period / 1e9, wall)))
        r.spin(period / 1e9)
    r.wait(lambda: len(r.heard["pose"]) >= poses + 10, 10, "poses again")
    assert "Error" not in r.text() and "Traceback" not in r.text()
    assert r.close() == 0


def test_a_frame_that_is_underway_at_shutdown_is_no_trouble(rig):
    r = rig("frames.base_to_camera:='0 0 0 0 0 0 1'", "odometry.features:=0", engine="LeavingEngine")
    r.images.publish(r.image(1_700_000_000_000_000_000))
    assert r.process.wait(15) == 0
    assert "Error" not in r.text()
    r.close()


BAD_IMAGES = {
    "encoding": (dict(encoding="jpeg2000"), "image encoding 'jpeg2000' is not supported"),
    "empty": (dict(height=0, width=0, step=0, data=array.array("B")), "empty image"),
    "truncated": (dict(data=array.array("B", bytes(100))), "truncated"),
    "step": (dict(step=10), "step must be at least 480"),
}


def test_bad_input_is_said_once_and_survived(rig):
    r = rig(f"frames.base_to_camera:='{STEREO}'")
    now = 1_700_000_000_000_000_000
    tick = iter(range(now, now + 10**12, 50_000_000))
    r.answered(next(tick))
    for overrides, _ in BAD_IMAGES.values():
        r.unanswered(r.image(next(tick), **overrides))
        r.unanswered(r.image(next(tick), **overrides))
        r.answered(next(tick))
    for level in (0, 255, 128):
        flat = np.full((*SHAPE, 3), level, np.uint8)
        r.unanswered(r.image(next(tick), pixels=flat))
    r.answered(next(tick))
    r.answered(next(tick), shape=(90, 200))  # another size mid-stream

    r.info(k=np.zeros(9))  # not calibrated
    r.answered(next(tick))
    np.testing.assert_allclose(r.last("depth/camera_info").k, K_UNKNOWN.ravel())
    for k, shape in ((np.full(9, np.nan), SHAPE), (K, (480, 640))):
        r.info(k, shape)
        r.answered(next(tick))
        np.testing.assert_allclose(r.last("depth/camera_info").k, K_UNKNOWN.ravel())
        r.heard["/diagnostics"].clear()
        r.wait(lambda: r.facts().get("intrinsics") == "unknown", 5, "diagnostics say that they are unknown")
    r.info()
    r.answered(next(tick))
    assert abs(r.last("depth/camera_info").k[0] - K[0] * SIZE[1] / SHAPE[1]) < 1e-9

    repeated = next(tick)
    r.answered(repeated)
    r.unanswered(r.image(repeated))
    r.unanswered(r.image(repeated - 40_000_000))  # overtaken on its way: skipped, and nothing is lost
    r.unanswered(r.image(0))  # a stamp that the driver did not set: likewise
    before = r.last("pose").pose.pose.position.x
    assert before > 1
    r.answered(repeated + 5 * 3600 * 10**9)  # hours ahead: goes on from the last pose
    assert abs(r.last("pose").pose.pose.position.x - before) < 1e-9
    r.answered(now)  # back, as when a bag loops: starts anew
    np.testing.assert_allclose(
        matrix(r.last("pose").pose.pose.position, r.last("pose").pose.pose.orientation), np.eye(4), atol=1e-9
    )

    text = r.text()
    for words in [says for _, says in BAD_IMAGES.values()] + [
        "black frame", "saturated frame", "without contrast", "K = .nan", "camera_info is for 640 x 480", "repeats", "0.040 s older", "stamp 0 ns is not set",
        "no image for 18000.0 s", "image stamps jumped back",
    ]:  # fmt: skip
        lines = [line for line in text.splitlines() if words in line or re.search(words, line)]
        assert len(lines) == 1, f"{words!r} is said {len(lines)} times:\n{text}"
    assert "Traceback" not in text
    assert r.close(signal.SIGINT, signal.SIGINT) == 0


def test_services_and_run_time_parameters(rig, tmp_path):
    from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
    from rcl_interfaces.srv import DescribeParameters, SetParameters

    r = rig(
        f"frames.base_to_camera:='{STEREO}'",
        f"output.trajectory_path:={tmp_path}/t.tum",
        f"output.map_path:={tmp_path}/none/m.ply",
    )
    for i in range(3):
        r.answered(10**18 + i * 10**8)
    saved = r.call(Trigger, "/speed3r/save_trajectory")
    assert saved.success and "3 poses" in saved.message
    rows = [line.split() for line in (tmp_path / "t.tum").read_text().splitlines() if line[0] != "#"]
    assert [row[0] for row in rows] == ["1000000000.000000000", "1000000000.100000000", "1000000000.200000000"]
    np.testing.assert_allclose([float(x) for x in rows[1][1:4]], STEP, atol=1e-8)
    failed = r.call(Trigger, "/speed3r/save_map")
    assert not failed.success and "No such file" in failed.message and "\n" not in failed.message

    assert r.call(SetBool, "/speed3r/pause", data=True).success
    r.unanswered(r.image(10**18 + 4 * 10**8))
    assert r.call(SetBool, "/speed3r/pause", data=False).success
    r.answered(10**18 + 5 * 10**8)
    assert r.call(Trigger, "/speed3r/reset").success
    r.answered(10**18 + 6 * 10**8)
    assert abs(r.last("pose").pose.pose.position.x) < 1e-9

    def change(name, **value):
        parameter = Parameter(name=name, value=ParameterValue(**value))
        return r.call(SetParameters, "/speed3r/set_parameters", parameters=[parameter]).results[0]

    assert change("depth.min_confidence", type=ParameterType.PARAMETER_DOUBLE, double_value=0.0).successful
    r.answered(10**18 + 7 * 10**8)
    assert np.isfinite(np.frombuffer(r.last("depth/image").data, "<f4")).all()
    assert not change("depth.min_confidence", type=ParameterType.PARAMETER_DOUBLE, double_value=7.0).successful
    assert not change("frames.map", type=ParameterType.PARAMETER_STRING, string_value="world").successful  # read only
    described = r.call(DescribeParameters, "/speed3r/describe_parameters", names=["engine.window"]).descriptors[0]
    assert described.read_only and described.integer_range[0].to_value == 64 and "fine keys" in described.description
    assert r.close() == 0


def transform(parent: str, child: str, xyz, q, stamp_ns: int = 0):
    from geometry_msgs.msg import TransformStamped

    t = TransformStamped(child_frame_id=child)
    t.header.frame_id = parent
    t.header.stamp.sec, t.header.stamp.nanosec = divmod(stamp_ns, 10**9)
    t.transform.translation.x, t.transform.translation.y, t.transform.translation.z = map(float, xyz)
    t.transform.rotation.x, t.transform.rotation.y, t.transform.rotation.z, t.transform.rotation.w = map(float, q)
    return t


def test_best_effort_camera_that_is_the_base(rig):
    r = rig("frames.base:=''", best_effort=True)
    r.answered(10**18)
    r.answered(10**18 + 10**8)
    assert "subscribed, best_effort" in r.text()
    T = matrix(r.last("odometry").pose.pose.position, r.last("odometry").pose.pose.orientation)
    np.testing.assert_allclose(T[:3, 3], [STEP[2], -STEP[0], -STEP[1]], atol=1e-9)  # z-up although the base is optical
    assert r.last("odometry").child_frame_id == FRAME
    assert r.close() == 0


def test_before_and_after_the_clock(rig):
    """use_sim_time: images are answered before /clock speaks, its silence is said, and then it dates map -> odom."""
    from rosgraph_msgs.msg import Clock

    r = rig(f"frames.base_to_camera:='{STEREO}'", "use_sim_time:=true", "tf.lead:=0.0")
    start = 10**18 + int(r.rng.integers(10**9))
    r.answered(start)
    r.wait(lambda: "/clock is silent" in r.text() and r.heard["/diagnostics"], 10, "diagnostics without a clock")
    assert stamp(r.last("/diagnostics")) == 0
    clock = r.node.create_publisher(Clock, "/clock", 10)

    def tick(now_ns: int) -> None:
        message = Clock()
        message.clock.sec, message.clock.nanosec = divmod(now_ns, 10**9)
        clock.publish(message)
        r.spin(0.02)

    r.wait(clock.get_subscription_count, 10, "the node hears the clock")
    for i in range(50, 100):
        tick(start + i * 10**7)
    r.answered(start + 10**9)
    for i in range(100, 130):
        tick(start + i * 10**7)
    dated = [stamp(t) for m in r.heard["/tf"] for t in m.transforms if t.child_frame_id == "odom"]
    assert dated and all(start < s < start + 2 * 10**9 for s in dated)
    tick(start - 10**9)  # the simulation starts anew
    r.wait(lambda: "the clock jumped back by" in r.text(), 5, "a reset")
    r.answered(start - 10**9)
    np.testing.assert_allclose(
        matrix(r.last("pose").pose.pose.position, r.last("pose").pose.pose.orientation), np.eye(4), atol=1e-9
    )
    assert r.text().count("/clock is silent") == 1
    assert r.close() == 0


def test_images_of_a_camera_that_comes_later_need_no_clock():
    """The node subscribes while /clock is silent: players wait for that before they start the clock."""
    from speed3r_ros.qos import FollowingSubscription

    rclpy.init()
    try:
        simulated = [rclpy.parameter.Parameter("use_sim_time", value=True)]
        node = rclpy.create_node("waits", parameter_overrides=simulated)
        FollowingSubscription(node, Image, "late_image", lambda message: None)
        camera = rclpy.create_node("late_camera")
        publisher = camera.create_publisher(Image, "late_image", 10)
        limit = time.monotonic() + 15
        while not publisher.get_subscription_count() and time.monotonic() < limit:
            rclpy.spin_once(node, timeout_sec=0.05)
        assert publisher.get_subscription_count() == 1
        camera.destroy_node()
        node.destroy_node()
    finally:
        rclpy.shutdown()


def test_namespace_and_images_without_a_name(rig):
    """Two robots share /diagnostics. TF takes no frame whose name is empty or begins with a slash."""
    r = rig("frames.base:=''", namespace="robot1")
    for i, (named, frame) in enumerate((("", "camera_optical_frame"), ("/left", "left"), (FRAME, FRAME))):
        message = r.image(10**18 + i * 10**8)
        message.header.frame_id = named
        r.images.publish(message)
        for topic in PER_FRAME:
            r.wait(lambda t=topic: stamp(r.last(t)) == stamp(message), 10, topic)  # noqa: B023 (called at once)
        assert {r.last(t).header.frame_id for t in ("points", "depth/image", "depth/camera_info", "confidence")} == {
            frame
        }
        assert r.last("odometry").child_frame_id == frame
    r.wait(lambda: r.heard["/diagnostics"], 5, "diagnostics")
    assert [s.name for s in r.last("/diagnostics").status] == ["robot1/speed3r: tracking", "robot1/speed3r: throughput"]
    assert {t.child_frame_id for m in r.heard["/tf"] for t in m.transforms} <= {
        "camera_optical_frame",
        "left",
        FRAME,
        "odom",
    }
    assert r.text().count("no frame_id") == 1
    assert r.close() == 0


def test_a_pause_is_said_in_the_middle_of_a_frame(rig):
    r = rig("frames.base_to_camera:='0 0 0 0 0 0 1'", engine="SlowEngine")
    for i in range(4):
        r.images.publish(r.image(10**18 + i * 10**8))
        r.spin(0.05)
    assert r.call(SetBool, "speed3r/pause", data=True).success
    r.spin(1.0)  # whatever was underway has come
    r.heard["/diagnostics"].clear()
    r.wait(lambda: r.heard["/diagnostics"], 5, "diagnostics")
    assert [s.message for s in r.last("/diagnostics").status] == ["paused", "paused"]
    assert r.close() == 0


def test_odometry_of_another_node(rig):
    """REP-105: map -> odom makes up for what odom -> base lacks. The images' clock is not that of the node, as in replay."""
    r = rig(f"frames.base_to_camera:='{STEREO}'", "tf.publish_odom_to_base:=false", "tf.lead:=0.1")
    tf = r.node.create_publisher(tf2_msgs.TFMessage, "/tf", 10)
    start, step = 1_600_000_000_000_000_000, 10**8
    for i in range(3):
        r.answered(start + i * step)
    r.wait(lambda: "another node" in r.text(), 5, "a word on the missing odometry")
    assert not r.heard["/tf"]
    r.wait(lambda: tf.get_subscription_count() == 2, 5, "the node listens to TF")  # as does this process
    rng = np.random.default_rng()
    turn = Rotation.from_euler("z", rng.uniform(-1, 1))
    for k in (2.5, 3.5):  # wheels: through footprint, at times between those of the images, on a straight line
        edge = transform("odom", "footprint", (k, 2.0, 0.0), turn.as_quat(), int(start + k * step))
        tf.publish(tf2_msgs.TFMessage(transforms=[edge, transform("footprint", "base_link", (0, 0, 0.3), (0, 0, 0, 1), int(start + k * step))]))  # fmt: skip
        r.spin(0.2)
    r.answered(start + 3 * step)
    wheels = np.eye(4)
    wheels[:3, :3], wheels[:3, 3] = turn.as_matrix(), (3.0, 2.0, 0.3)
    own = []
    r.wait(lambda: own.extend(t for m in r.heard["/tf"] for t in m.transforms if t.header.frame_id == "map") or own,
           5, "map -> odom")  # fmt: skip
    assert {t.child_frame_id for m in r.heard["/tf"] for t in m.transforms} == {"odom", "footprint", "base_link"}
    T = matrix(own[0].transform.translation, own[0].transform.rotation) @ wheels
    np.testing.assert_allclose(T, expected_base(3), atol=1e-6)
    ahead = stamp(own[0]) - (start + 3 * step)
    assert (
        10**8 <= ahead < 2 * 10**9
    )  # on the images' clock, post-dated, so that consumers of the newest image do not wait
    assert r.close() == 0


def test_extrinsics_from_tf(rig):
    r = rig("frames.wait:=20.0")
    tf = r.node.create_publisher(
        tf2_msgs.TFMessage, "/tf_static", QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    )
    r.images.publish(r.image(10**18))
    r.spin(0.5)
    assert not r.heard["pose"]  # it waits for TF
    edges = [
        transform("base_link", "mast", (0.2, 0, 0.0), (0, 0, 0, 1)),
        transform("mast", FRAME, (0, 0, 0.5), (-0.5, 0.5, -0.5, 0.5)),
    ]
    tf.publish(tf2_msgs.TFMessage(transforms=edges))
    r.spin(0.5)
    for i in range(1, 4):
        r.answered(10**18 + i * 10**8)
    T = matrix(r.last("odometry").pose.pose.position, r.last("odometry").pose.pose.orientation)
    np.testing.assert_allclose(T, expected_base(2), atol=1e-9)
    assert r.close() == 0


@pytest.mark.parametrize(
    "parameter, says",
    [
        ("engine.window:=0", "engine.window = 0: must be in"),
        ("engine.attention:=flash", "choose one of auto, speed3r, dense"),
        ("engine.windw:=3", "did you mean 'engine.window'"),
        ("frames.odom:=''", "frames.odom = '': must have a name"),
        ("frames.base:=/base_link", "frames.base = '/base_link': TF takes no slash in front; use 'base_link'"),
        ("frames.base_to_camera:='1 2 3'", "expected `x y z qx qy qz qw`"),
        ("engine.weights:=nowhere", "no weights 'nowhere'"),
        ("engine.model:=pi3", "run `speed3r weights fetch pi3`"),
    ],
)
def test_wrong_parameters_end_the_node_with_one_line(parameter, says, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "speed3r_ros.recon_node", "--ros-args", "-p", parameter],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
    )
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    assert run.returncode == 1 and len(lines) == 1 and lines[0].startswith("recon_node: ") and says in lines[0], (
        run.stderr
    )
