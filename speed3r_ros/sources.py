"""Recorded input without ROS: bags (sqlite3, mcap), videos and folders of images, as one kind of iterable."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from speed3r_ros.camera import Camera
from speed3r_ros.convert import camera_from_info, image_to_array, stamp_to_ns
from speed3r_ros.mapping.metrics import TOLERANCE_NS
from speed3r_ros.mapping.trajectory import NANO, associate, parse_stamp, read_tum

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}
IMAGE_TYPES = {"sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"}
TRUTH_FILES = ("poses.txt", "groundtruth.tum", "groundtruth.txt")
FOLDER_RATE = 10  # images per second of a folder without timestamps

Item = tuple[int, np.ndarray, Camera | None]


def warn(text: str) -> None:
    """One line for the user that does not stop the work, beside a progress bar if there is one."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


class Source:
    """Images in the order of time: (stamp in ns, (H, W, 3) uint8 RGB, Camera or None). A bad frame is said and skipped.

    name: for titles. truth: camera-to-world ground truth, or None.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = Path(os.path.abspath(path)).name  # that of ., too
        file = truth_file(path)
        self.truth = read_tum(file) if file else None

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Item]:
        raise NotImplementedError

    @property
    def duration_s(self) -> float:
        """Seconds from the first to the last image."""
        raise NotImplementedError

    def true_depth(self, stamp_ns: int) -> np.ndarray | None:
        """Depth (H, W) float32 along the optical axis, pixel-aligned with the image of this stamp, in the truth's unit.

        0 where unknown. None where there is none. Raises ValueError when it cannot be read.
        """
        return None


def truth_file(path: Path) -> Path | None:
    """Ground truth inside or beside the input, if there is any."""
    for folder in (path, path.parent) if path.is_dir() else (path.parent,):
        for name in TRUTH_FILES:
            if (folder / name).is_file() and (folder == path or name == "groundtruth.tum"):
                return folder / name
    return None


class FolderSource(Source):
    """Images listed in `rgb.txt` (`timestamp file` lines, TUM), or all images of the folder in natural order."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        listing = path / "rgb.txt"
        if listing.is_file():
            self.items = read_listing(listing)
        else:
            files = [
                p
                for p in (path / "rgb" if (path / "rgb").is_dir() else path).iterdir()
                if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")  # macOS leaves ._name beside name
            ]
            files.sort(key=lambda p: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", p.name)])
            self.items = [(i * NANO // FOLDER_RATE, p) for i, p in enumerate(files)]
        if not self.items:
            raise ValueError(f"{path}: no images; expected rgb.txt or {', '.join(sorted(IMAGE_SUFFIXES))} files")
        self.camera = read_intrinsics(path / "intrinsics.json")
        self._depth_files: dict[int, Path] | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def duration_s(self) -> float:
        return (self.items[-1][0] - self.items[0][0]) / NANO

    def __iter__(self) -> Iterator[Item]:
        for stamp, path in self.items:
            image = cv2.imread(str(path), cv2.IMREAD_COLOR)
            if image is None:
                warn(f"{path}: not a readable image, skipped")
                continue
            yield stamp, cv2.cvtColor(image, cv2.COLOR_BGR2RGB), self.camera

    def true_depth(self, stamp_ns: int) -> np.ndarray | None:
        """From the images of `depth.txt`, in depth_scale_m of `intrinsics.json`, or 1/5000 m in TUM's layout."""
        listing = self.path / "depth.txt"
        if self._depth_files is None:
            files = read_listing(listing) if listing.is_file() else []
            stamps = np.array([stamp for stamp, _ in self.items]), np.array([stamp for stamp, _ in files])
            pairs = zip(*(index.tolist() for index in associate(*stamps, TOLERANCE_NS)))
            self._depth_files = {self.items[i][0]: files[j][1] for i, j in pairs}
        if stamp_ns not in self._depth_files:
            return None
        file, values = self._depth_files[stamp_ns], {}
        if (self.path / "intrinsics.json").is_file():
            values = json.loads((self.path / "intrinsics.json").read_text())
        scale = values.get("depth_scale_m", 1 / 5000 if (self.path / "groundtruth.txt").is_file() else None)
        if not isinstance(scale, (int, float)) or not scale > 0:
            raise ValueError(
                f"{listing}: the unit is {scale!r}; set depth_scale_m, metres per count, in intrinsics.json"
            )
        most = values.get("depth_max_m", np.inf)
        if not isinstance(most, (int, float)) or not most > 0:
            raise ValueError(f"{listing}: depth_max_m in intrinsics.json is {most!r}; give metres, or leave it out")
        image = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        if image is None or image.dtype != np.uint16 or image.ndim != 2:
            raise ValueError(f"{file}: not a readable depth image; expected one channel of 16 bits")
        depth = image.astype(np.float32) * np.float32(scale)
        depth[depth > most] = 0
        return depth


def read_listing(path: Path) -> list[tuple[int, Path]]:
    """Stamps in ns and files of `timestamp file` lines (TUM), in the order of time. Raises ValueError, OSError."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
        rows = [line.split(maxsplit=1) for line in lines if line and line[0] != "#"]  # names may hold spaces
        return sorted((parse_stamp(row[0]), path.parent / row[1]) for row in rows)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: expected `timestamp file` lines ({error})") from error


def read_intrinsics(path: Path) -> Camera | None:
    """Camera of an `intrinsics.json` (fx, fy, cx, cy, width, height, distortion.coeffs), or None without the file."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        K = np.array([[values["fx"], 0, values["cx"]], [0, values["fy"], values["cy"]], [0, 0, 1]], dtype=np.float64)
        D = np.array((values.get("distortion") or {}).get("coeffs", []), dtype=np.float64, ndmin=1)
        width, height = int(values["width"]), int(values["height"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected numbers fx, fy, cx, cy, width and height, and distortion.coeffs if any ({error!r})"
        ) from error
    try:
        return Camera(K, D, "plumb_bob", width, height)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class VideoSource(Source):
    """A video file; stamps start at zero."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        capture = cv2.VideoCapture(str(path))
        self.rate, self.count = capture.get(cv2.CAP_PROP_FPS), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        readable = capture.isOpened() and capture.read()[0]
        if readable and self.count < 1:  # a stream that was saved as it came does not say its length
            self.count = 1
            while capture.grab():
                self.count += 1
        capture.release()
        if not readable:
            raise ValueError(f"{path}: not a video that OpenCV can read; convert it, e.g. with ffmpeg, to H.264 mp4")
        self.rate = self.rate if 0 < self.rate < 1000 else 30.0

    def __len__(self) -> int:
        return self.count

    @property
    def duration_s(self) -> float:
        return (len(self) - 1) / self.rate

    def __iter__(self) -> Iterator[Item]:
        capture = cv2.VideoCapture(str(self.path))
        number = 0
        while True:
            good, image = capture.read()
            if not good:
                break
            yield round(number / self.rate * NANO), cv2.cvtColor(image, cv2.COLOR_BGR2RGB), None
            number += 1
        capture.release()


class BagSource(Source):
    """One image topic of a ROS 2 bag, with the camera_info beside it."""

    def __init__(self, path: Path, topic: str) -> None:
        super().__init__(path)
        with closing(open_bag(path)) as reader:
            topics = {connection.topic: connection.msgtype for connection in reader.connections}
            images = sorted(
                name for name, kind in topics.items() if kind in IMAGE_TYPES and "depth" not in name.lower()
            )
            listing = ", ".join(f"{name} ({kind})" for name, kind in sorted(topics.items())) or "none"
            if topic and topics.get(topic) not in IMAGE_TYPES:
                raise ValueError(f"{path}: {topic!r} is not an image topic of this bag; its topics are: {listing}")
            if not topic and not images:
                raise ValueError(f"{path}: no image topic; its topics are: {listing}")
            if not topic and len(images) > 1:
                raise ValueError(f"{path}: several image topics, choose one with --topic: {', '.join(images)}")
            self.topic = topic or images[0]
            base = self.topic.removesuffix("/compressed").rsplit("/", 1)[0]
            infos = [name for name, kind in topics.items() if kind == "sensor_msgs/msg/CameraInfo"]
            beside = [name for name in infos if name.rsplit("/", 1)[0] == base]
            self.info_topic = beside[0] if beside else ""
            self.count = sum(c.msgcount for c in reader.connections if c.topic == self.topic)
            self._duration = reader.duration / NANO

    def __len__(self) -> int:
        return self.count

    @property
    def duration_s(self) -> float:
        return self._duration

    def __iter__(self) -> Iterator[Item]:
        from rosbags.highlevel import AnyReaderError
        from rosbags.serde import SerdeError

        camera, told = None, set()
        with closing(open_bag(self.path)) as reader:
            wanted = [c for c in reader.connections if c.topic in (self.topic, self.info_topic)]
            messages = reader.messages(wanted)
            while True:
                try:
                    connection, _, raw = next(messages)
                except StopIteration:
                    return
                except Exception as error:  # a truncated bag fails in its reader's own ways
                    warn(f"{self.path}: ends early ({' '.join(str(error).split())}); the frames before are used")
                    return
                try:
                    message = reader.deserialize(raw, connection.msgtype)
                    if connection.topic == self.info_topic:
                        camera = camera_from_info(message)
                        continue
                    stamp = stamp_to_ns(message.header.stamp)
                    image = image_to_array(message)
                except (ValueError, SerdeError, AnyReaderError) as error:  # by rosbags' version
                    if str(error) not in told:
                        told.add(str(error))
                        warn(f"{self.path} {connection.topic}: {error}, skipped")
                    continue
                yield stamp, image, camera


def open_bag(path: Path) -> Any:
    """An open rosbags reader of a bag's folder or of one file of it. Raises ValueError.

    A recorder that was killed leaves no metadata.yaml: then the files in the folder are read by themselves.
    """
    from rosbags.highlevel import AnyReader
    from rosbags.typesys import Stores, get_typestore

    paths = [path]
    if path.is_dir() and not (path / "metadata.yaml").exists():
        paths = sorted(p for suffix in ("mcap", "db3") for p in path.glob(f"*.{suffix}")) or paths
    try:
        reader = AnyReader(paths, default_typestore=get_typestore(Stores.ROS2_JAZZY))
        reader.open()
    except Exception as error:  # a damaged bag fails in its reader's own ways
        raise ValueError(
            f"{path}: not a readable bag ({' '.join(str(error).split())}); try `ros2 bag reindex`, "
            "or `mcap recover` for an .mcap that ends early"
        ) from error
    return reader


def open_source(path: str | Path, topic: str = "") -> Source:
    """The input at `path`. Raises ValueError or FileNotFoundError with one line that says what is wrong and what to do.

    A folder with `metadata.yaml` or bag files is a bag; another folder holds images; a file is a bag or a video by its
    suffix. `topic` chooses among several image topics of a bag.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist; give a ROS 2 bag, a video file or a folder of images")
    if path.is_dir():
        is_bag = (path / "metadata.yaml").exists() or any(path.glob("*.mcap")) or any(path.glob("*.db3"))
        return BagSource(path, topic) if is_bag else FolderSource(path)
    if path.suffix in {".mcap", ".db3", ".bag"}:
        return BagSource(path, topic)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return VideoSource(path)
    raise ValueError(
        f"{path}: neither a bag (.mcap, .db3) nor a video ({', '.join(sorted(VIDEO_SUFFIXES))}) nor a folder"
    )
