"""Results of a live run, read back from the recorded outputs of the node and the input that was played to it."""

from __future__ import annotations

import csv
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from speed3r_ros.clouds import split_rows
from speed3r_ros.convert import matrix_from_transform, stamp_to_ns
from speed3r_ros.mapping.geometry import T_link_optical, inverse, transform
from speed3r_ros.mapping.trajectory import NANO, Trajectory
from speed3r_ros.outputs import WorldFrame
from speed3r_ros.results import Results, Strip, evenly
from speed3r_ros.sources import Source, open_bag


def results_of_recording(bag: Path, source: Source, sent: Path | None = None) -> Results:
    """Results from the node's recorded outputs.

    Latency is the reception of a pose minus the sending of its image (`sent`, as play.py logs it). Poses are turned
    from base frame in map to camera in the world of the first optical frame with the recorded static transform.
    Raises ValueError for a bag that cannot be read or is without the node's poses, OSError for a missing log.
    """
    reader = open_bag(bag)

    def messages(ending: str) -> Iterator[Any]:
        chosen = [connection for connection in reader.connections if connection.topic.endswith(f"/{ending}")]
        try:
            for connection, _, data in reader.messages(connections=chosen) if chosen else ():
                yield reader.deserialize(data, connection.msgtype)
        except Exception as error:  # a damaged bag fails in its reader's own ways
            raise ValueError(f"{bag}: damaged ({' '.join(str(error).split())}); record again") from error

    with closing(reader):
        poses = list(messages("pose"))
        if not poses:
            topics = ", ".join(sorted(connection.topic for connection in reader.connections)) or "none"
            raise ValueError(f"{bag}: no pose of the node was recorded; topics: {topics}")
        stamps = [stamp_of(message) for message in messages("depth/image")]
        shown = {stamps[k] for k in evenly(len(stamps))}
        depths = {stamp_of(m): m for m in messages("depth/image") if stamp_of(m) in shown}
        confidences = {stamp_of(m): m for m in messages("confidence") if stamp_of(m) in shown}
        base = next((m.child_frame_id for m in messages("odometry")), "")
        optical = next((m.header.frame_id for m in depths.values()), "")
        T_base_cam = static_transform(messages("tf_static"), base, optical)
        last_map = deque(messages("map_points"), maxlen=1)
        status = last_diagnostics(messages("diagnostics"))

    world = WorldFrame(T_base_cam)
    to_world = inverse(world.T_map_world)
    trajectory = Trajectory()
    for message in poses:
        T_map_base = matrix_of(message.pose.pose)
        trajectory.append(stamp_of(message), to_world @ T_map_base @ T_base_cam)
    points, colors = points_of(last_map[0]) if last_map else (np.zeros((0, 3)), np.zeros((0, 3), np.uint8))
    log = bag / "received.csv"  # other recorders write none: then there are no latencies
    received, depth_received = (read_times(log, topic) if log.exists() else [] for topic in ("/pose", "/depth/image"))
    started = read_times(sent) if sent else []
    return Results(
        source.name,
        len(started) or len(source),
        trajectory,
        source.truth,
        strips_of(source, depths, confidences),
        (points @ to_world[:3, :3].T + to_world[:3, 3]).astype(np.float32),
        colors,
        latencies(started, received),
        np.array([monotonic for _, monotonic in received]) / NANO,
        np.array([monotonic for _, monotonic in depth_received]) / NANO,
        live=True,
        lost=lost_frames(status),
        settings=status,
    )


def stamp_of(message: Any) -> int:
    """Stamp in nanoseconds of a message with a header."""
    return stamp_to_ns(message.header.stamp)


def matrix_of(pose: Any) -> np.ndarray:
    """(4, 4) of a geometry_msgs/Pose."""
    p, q = pose.position, pose.orientation
    return transform(np.array([p.x, p.y, p.z]), np.array([q.x, q.y, q.z, q.w]))


def static_transform(messages: Iterable[Any], base: str, optical: str) -> np.ndarray:
    """Camera in base frame (4, 4) from /tf_static; without one, a level camera at the base's origin, as in the node."""
    parents = {
        t.child_frame_id.lstrip("/"): (t.header.frame_id.lstrip("/"), matrix_from_transform(t.transform))
        for message in messages
        for t in message.transforms
    }
    T, frame = np.eye(4), optical
    while frame != base:
        if frame not in parents:
            return T_link_optical
        frame, T_parent_child = parents.pop(frame)
        T = T_parent_child @ T
    return T


def last_diagnostics(messages: Iterable[Any]) -> dict[str, str]:
    """The node's last words about itself."""
    values = {}
    for message in messages:
        for status in message.status:
            values |= {f"{status.name}: {item.key}": item.value for item in status.values}
    return values


def lost_frames(status: dict[str, str]) -> dict[str, int]:
    """Frames that the node refused, from its last diagnostics."""
    kinds = {
        "lost_frames": "tracking lost (dark, saturated or empty frames)",
        "bad_frames": "unusable message (see the node's log)",
    }
    return {
        text: int(value)
        for name, value in status.items()
        for key, text in kinds.items()
        if name.endswith(f": {key}") and int(value)
    }


def points_of(cloud: Any) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 3) float32 and colours (N, 3) uint8 of a PointCloud2 with x, y, z and rgb packed in a float."""
    offset = {field.name: field.offset for field in cloud.fields}
    names = ["x", "y", "z", "rgb"]
    row = np.dtype(
        {
            "names": names,
            "formats": ["<f4"] * 4,
            "offsets": [offset[name] for name in names],
            "itemsize": cloud.point_step,
        }
    )
    rows = np.frombuffer(cloud.data, dtype=row, count=cloud.width * cloud.height)
    points, colors = split_rows(np.stack([rows[name] for name in names], axis=1))
    valid = np.isfinite(points).all(1)
    return points[valid], colors[valid]


def strips_of(source: Source, depths: dict[int, Any], confidences: dict[int, Any]) -> list[Strip]:
    """Instants that have an image, a depth and a confidence; images by stamp."""
    strips = []
    for stamp, image, camera in source:
        if stamp not in depths or stamp not in confidences:
            continue
        depth, confidence = float_image(depths.pop(stamp)), float_image(confidences[stamp])
        rectified = image if camera is None else camera.rectify(image)[0]
        small = cv2.resize(rectified, depth.shape[::-1], interpolation=cv2.INTER_AREA)
        strips.append(Strip(stamp, small, depth, confidence, rectified.shape[1] / rectified.shape[0]))
    return strips


def float_image(message: Any) -> np.ndarray:
    """(h, w) float32 of a 32FC1 image."""
    rows = np.frombuffer(message.data, dtype=np.uint8).reshape(message.height, message.step)
    return rows[:, : 4 * message.width].copy().view(">f4" if message.is_bigendian else "<f4").astype(np.float32)


def read_times(path: Path, topic_ending: str = "") -> list[tuple[int, int]]:
    """Pairs (stamp_ns, monotonic_ns) of a log, in its order. Raises OSError; ValueError for another file."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        return [
            (int(row["stamp_ns"]), int(row["monotonic_ns"]))
            for row in rows
            if row.get("topic", "").endswith(topic_ending)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected the columns stamp_ns and monotonic_ns, as the player writes them"
        ) from error


def latencies(sent: list[tuple[int, int]], received: list[tuple[int, int]]) -> np.ndarray:
    """Seconds from the last sending of a stamp to its reception, (N,), for the stamps in both."""
    starts = defaultdict(list)
    for stamp, monotonic in sent:
        starts[stamp].append(monotonic)
    found = []
    for stamp, monotonic in received:
        before = [start for start in starts[stamp] if start <= monotonic]
        if before:
            found.append((monotonic - max(before)) / NANO)
    return np.array(found)
