"""Recorded sequences with poses, and depth where there is any, as training batches.

Layouts, told apart by what lies in the folder:

- TUM RGB-D: `rgb.txt`, `groundtruth.txt`, `depth.txt` if there is depth (1/5000 m). Intrinsics by the camera's name in
  the folder's (freiburg1 to 3), or from `intrinsics.json`.
- the same with `poses.txt` and `intrinsics.json`: fx, fy, cx, cy, width, height, distortion.coeffs (OpenCV's order),
  and depth_scale_m (metres per unit of the depth images), depth_max_m.
- 7-Scenes: `frame-000000.color.png`, `.pose.txt` (4 x 4 camera-to-world) and `.depth.proj.png` (registered to the
  colour camera) or `.depth.png` (mm, 65535 = none; of the depth camera, taken to look along the colour camera from its
  place, as the data set gives no extrinsics).
- ScanNet++, iPhone: `pose_intrinsic_imu.json` (aligned_pose, camera-to-world; intrinsic), `rgb/*.jpg`, `depth/*.png`
  (mm).

Lens distortion is removed and images are resized as the engine does, the whole image to the network's size.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from speed3r_ros.mapping.geometry import inverse
from speed3r_ros.mapping.trajectory import associate, parse_stamp
from speed3r_ros.model.types import resize_intrinsics
from speed3r_ros.sources import FolderSource
from speed3r_ros.training.scenes import rays_of

TOLERANCE_NS = 20_000_000  # between the stamps of an image, its pose and its depth, as in the tools of TUM RGB-D
NEAREST = 0.1  # m; depth below is none
FARTHEST = 10.0  # m; depth beyond is none, unless the folder says otherwise
UNPOSED_UNIT = 0.5  # mean distance between the views of a sequence without depth, whose unit nothing else fixes
PUBLISHED_SIZE = 480, 640  # (h, w) of the images of TUM RGB-D and 7-Scenes, which published intrinsics are for
TUM_CAMERAS = {  # fx, fy, cx, cy and distortion, as published with the benchmark
    "freiburg1": (517.3, 516.5, 318.6, 255.3, (0.2624, -0.9531, -0.0054, 0.0026, 1.1633)),
    "freiburg2": (520.9, 521.0, 325.1, 249.7, (0.2312, -0.7849, -0.0033, -0.0001, 0.9172)),
    "freiburg3": (535.4, 539.2, 320.1, 247.6, ()),
}
SEVEN_SCENES_COLOUR, SEVEN_SCENES_DEPTH = 525.0, 585.0  # focal lengths in pixels; both centres at (320, 240)


@dataclass(frozen=True, eq=False)
class Recording:
    """Posed frames of one camera, as files.

    images, depths (None = no depth): N paths each. poses: (N, 4, 4) float64 camera-to-world, OpenCV axes. K: (N, 3, 3)
    of the images. K_depth: (3, 3) of the depth images, or None if they have the images' view. D: distortion in OpenCV's
    order. depth_scale: metres per unit. farthest: m, depth beyond is none.
    """

    name: str
    images: list[Path]
    depths: list[Path | None]
    poses: np.ndarray
    K: np.ndarray
    K_depth: np.ndarray | None = None
    D: tuple[float, ...] = ()
    depth_scale: float = 0.001
    farthest: float = FARTHEST

    def __post_init__(self) -> None:
        if len(self.images) < 2:
            raise ValueError(f"{self.name}: {len(self.images)} images with a pose; at least 2 are needed")
        missing = [path for path in (*self.images, *self.depths) if path is not None and not path.is_file()]
        if missing:
            raise ValueError(
                f"{missing[0]}: missing, as {len(missing)} files of {self.name}; copy them, or drop their lines"
            )
        finite = np.isfinite(self.poses).all((1, 2))
        R = np.where(finite[:, None, None], self.poses[:, :3, :3], 0)
        off = np.abs(R @ R.swapaxes(1, 2) - np.eye(3)).max((1, 2)) + np.abs(np.linalg.det(R) - 1)
        if off.max() > 1e-2:
            worst = self.images[int(off.argmax())]
            raise ValueError(
                f"{self.name}: the pose of {worst.name} is not a rotation and a translation; drop the frame"
            )
        if not (np.isfinite(self.K).all() and (self.K[:, 0, 0] > 0).all() and (self.K[:, 1, 1] > 0).all()):
            raise ValueError(f"{self.name}: K = {self.K[0].tolist()}: focal lengths must be positive and finite")
        if not (0 < self.depth_scale < 1 and self.farthest > NEAREST):
            raise ValueError(
                f"{self.name}: depth_scale_m = {self.depth_scale} and depth_max_m = {self.farthest}: expected metres per "
                f"unit, such as 0.001, and metres above {NEAREST}"
            )
        for path in [path for path in self.depths if path][:1]:
            read_depth(path)

    def __len__(self) -> int:
        return len(self.images)


def read_image(path: Path) -> np.ndarray:
    """(h, w, 3) uint8 RGB. ValueError if the file is no image."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"{path}: not a readable image; copy it again")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_depth(path: Path) -> np.ndarray:
    """(h, w) uint16 in the file's unit. ValueError if the file is something else."""
    depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if depth is None or depth.dtype != np.uint16 or depth.ndim != 2:
        found = "unreadable" if depth is None else f"{depth.dtype} {depth.shape}"
        raise ValueError(f"{path}: {found}; expected a depth image of 16 bits and one channel")
    return depth


def _numbers(text: str, count: int, where: Path) -> np.ndarray:
    try:
        values = np.array([float(word) for word in text.split()])
    except ValueError:
        values = np.zeros(0)
    if len(values) != count:
        raise ValueError(f"{where}: expected {count} numbers, found {text.strip()[:60]!r}")
    return values


def _pinhole(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def _require_size(images: list[Path], size: tuple[int, int], intrinsics: str) -> None:
    """ValueError if the first image, where it is there, has not the size (h, w) that intrinsics are for."""
    if images and images[0].is_file() and read_image(images[0]).shape[:2] != size:
        raise ValueError(f"{intrinsics} for {size[1]} x {size[0]} pixels, and {images[0].name} has others")


def _listed(path: Path, listing: str) -> tuple[np.ndarray, list[Path]]:
    """Stamps in ns (N,) and files of `timestamp file` lines. ValueError."""
    rows = [line.split() for line in (path / listing).read_text().splitlines() if line.strip() and line[0] != "#"]
    try:
        return np.array([parse_stamp(row[0]) for row in rows], np.int64), [path / row[1] for row in rows]
    except (ValueError, IndexError, OverflowError) as error:
        raise ValueError(f"{path / listing}: expected `timestamp file` lines ({error})") from error


def from_listing(path: Path) -> Recording:
    """TUM RGB-D, or `rgb.txt`, `poses.txt` and `intrinsics.json`. ValueError."""
    source = FolderSource(path)
    if source.truth is None:
        raise ValueError(f"{path}: no poses; expected groundtruth.txt (TUM RGB-D) or poses.txt, camera-to-world")
    stamps = np.array([stamp for stamp, _ in source.items], np.int64)
    mine, theirs = associate(stamps, source.truth.stamps_ns, TOLERANCE_NS)
    images = [source.items[i][1] for i in mine]
    settings = json.loads((path / "intrinsics.json").read_text()) if source.camera else {}
    try:
        unit, farthest = float(settings.get("depth_scale_m", 1 / 5000)), float(settings.get("depth_max_m", FARTHEST))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}/intrinsics.json: depth_scale_m and depth_max_m must be numbers ({error})") from error
    if source.camera:
        K, D = source.camera.K, tuple(source.camera.D.tolist())
        _require_size(images, (source.camera.height, source.camera.width), f"{path}/intrinsics.json: is")
    else:
        names = [name for name in TUM_CAMERAS if name in path.name]
        if not names:
            raise ValueError(f"{path}: no intrinsics; add intrinsics.json, or name the TUM camera in the folder's name")
        _require_size(
            images, PUBLISHED_SIZE, f"{path}: without intrinsics.json, those of {names[0]} are taken, which are"
        )
        *values, D = TUM_CAMERAS[names[0]]
        K = _pinhole(*values)
    depths: list[Path | None] = [None] * len(mine)
    if (path / "depth.txt").is_file():
        depth_stamps, files = _listed(path, "depth.txt")
        for i, j in zip(*associate(stamps[mine], depth_stamps, TOLERANCE_NS)):
            depths[i] = files[j]
    return Recording(
        path.name,
        images,
        depths,
        source.truth.poses[theirs],
        np.broadcast_to(K, (len(mine), 3, 3)),
        D=D,
        depth_scale=unit,
        farthest=farthest,
    )


def from_seven_scenes(path: Path) -> Recording:
    """One `seq-XX` folder. ValueError."""
    images = sorted(path.glob("frame-*.color.png"))
    _require_size(images, PUBLISHED_SIZE, f"{path}: the intrinsics of 7-Scenes are")
    stems = [str(image).removesuffix(".color.png") for image in images]
    poses = []
    for stem in stems:
        file = Path(f"{stem}.pose.txt")
        if not file.is_file():
            raise ValueError(f"{file}: missing; copy it, or drop the frame")
        poses.append(_numbers(file.read_text(), 16, file).reshape(4, 4))
    registered = bool(stems) and Path(f"{stems[0]}.depth.proj.png").is_file()
    depths = [Path(f"{stem}.depth{'.proj' if registered else ''}.png") for stem in stems]
    return Recording(
        path.name,
        images,
        depths if any(file.is_file() for file in depths) else [None] * len(images),
        np.array(poses),
        np.broadcast_to(_pinhole(SEVEN_SCENES_COLOUR, SEVEN_SCENES_COLOUR, 320, 240), (len(images), 3, 3)),
        None if registered else _pinhole(SEVEN_SCENES_DEPTH, SEVEN_SCENES_DEPTH, 320, 240),
    )


def from_scannetpp(path: Path) -> Recording:
    """The iPhone folder of a ScanNet++ scene, less frames whose pose is not finite or whose image was not extracted.

    ValueError.
    """
    file = path / "pose_intrinsic_imu.json"
    try:
        frames = json.loads(file.read_text())
        names = [name for name in sorted(frames) if (path / "rgb" / f"{name}.jpg").is_file()]
        poses = np.array([frames[name]["aligned_pose"] for name in names], np.float64).reshape(-1, 4, 4)
        K = np.array([frames[name]["intrinsic"] for name in names], np.float64).reshape(-1, 3, 3)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: expected aligned_pose (4 x 4) and intrinsic (3 x 3) of each frame ({error!r})"
        ) from error
    if not names:
        raise ValueError(f"{path}: no rgb/frame_*.jpg that {file.name} names; extract them with the data set's toolkit")
    good = np.flatnonzero(np.isfinite(poses).all((1, 2)))
    depths = [path / "depth" / f"{names[i]}.png" for i in good]
    return Recording(
        path.parent.name if path.name == "iphone" else path.name,
        [path / "rgb" / f"{names[i]}.jpg" for i in good],
        [depth if depth.is_file() else None for depth in depths],
        poses[good],
        K[good],
    )


def open_recording(path: str | Path) -> Recording:
    """The sequence in a folder, whatever its layout. ValueError with one line that says what is wrong."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(f"{path}: not a folder; give folders of recorded sequences")
    for folder in (path, path / "iphone"):
        if (folder / "pose_intrinsic_imu.json").is_file():
            return from_scannetpp(folder)
    if next(path.glob("frame-*.color.png"), None):
        return from_seven_scenes(path)
    if (path / "rgb.txt").is_file():
        return from_listing(path)
    raise ValueError(
        f"{path}: no sequence; expected rgb.txt (TUM RGB-D), frame-*.color.png (7-Scenes) or pose_intrinsic_imu.json (ScanNet++)"
    )


def rectified(
    image: np.ndarray, K: np.ndarray, D: tuple[float, ...], K_to: np.ndarray, size: tuple[int, int], interpolation: int
) -> np.ndarray:
    """What a camera with K_to, no distortion and `size` (h, w) sees of `image`; 0 outside of it."""
    maps = cv2.initUndistortRectifyMap(K, np.array(D), None, K_to, size[::-1], cv2.CV_32FC1)
    return cv2.remap(image, *maps, interpolation)


class SequenceDataset:
    """Random windows of recordings: a random start, a random step between views, in either direction of time.

    longest: views of the longest window; ValueError if a recording is shorter. stride: largest step in frames. Every
    sample depends on its seed alone, so that runs repeat, stop and go on, and split over processes.
    """

    def __init__(self, recordings: Iterable[Recording], device: torch.device | str, longest: int, stride: int) -> None:
        self.recordings = list(recordings)
        self.device, self.stride = torch.device(device), stride
        for recording in self.recordings:
            if len(recording) < longest:
                raise ValueError(
                    f"{recording.name}: {len(recording)} images with a pose, fewer than the longest training sequence; "
                    f"leave it out, or --set longest={len(recording)}"
                )
        self._threads = ThreadPoolExecutor(os.cpu_count())

    def window(self, seed: str, views: int) -> tuple[Recording, list[int]]:
        """A recording, by its share of frames, and the indices of `views` of its frames."""
        draw = random.Random(seed)
        recording = draw.choices(self.recordings, [len(r) for r in self.recordings])[0]
        step = draw.randint(1, min(self.stride, (len(recording) - 1) // (views - 1)))
        first = draw.randrange(len(recording) - step * (views - 1))
        index = list(range(first, first + step * views, step))
        return recording, index if draw.random() < 0.5 else index[::-1]

    def sample(self, seed: str, views: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """One window, on the CPU; as `batch` without its first axis."""
        recording, index = self.window(seed, views)
        images, depths = [], []
        for i in index:
            image, K = read_image(recording.images[i]), recording.K[i]
            full = image.shape[:2]
            K_full = recording.K[
                index[0]
            ]  # one pinhole for the window: intrinsics of phones change from frame to frame
            if any(recording.D) or not np.array_equal(K, K_full):
                image = rectified(image, K, recording.D, K_full, full, cv2.INTER_LINEAR)
            shrink = full[0] >= size[0] and full[1] >= size[1]
            images.append(cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR))
            K_to = resize_intrinsics(K_full, full, size)
            depth = np.zeros(size, np.float32)
            if recording.depths[i] is not None:
                raw = read_depth(recording.depths[i])
                K_depth = resize_intrinsics(K, full, raw.shape) if recording.K_depth is None else recording.K_depth
                depth = rectified(raw, K_depth, recording.D, K_to, size, cv2.INTER_NEAREST).astype(np.float32)
                depth *= recording.depth_scale
            depths.append(depth)
        depth = torch.from_numpy(np.stack(depths))
        valid = (depth >= NEAREST) & (depth <= recording.farthest)
        T = inverse(recording.poses[index[:1]]) @ recording.poses[index]
        T = torch.from_numpy(T).float()
        R, t = T[:, :3, :3], T[:, :3, 3]
        unit = depth[valid].mean() if valid.any() else torch.pdist(t).mean() / UNPOSED_UNIT
        unit = unit if unit > 1e-6 else torch.tensor(1.0)  # a camera that stands still, without depth
        return dict(
            img=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255,
            depth=torch.where(valid, depth / unit, 1.0),
            valid=valid,
            judged=valid,
            R=R,
            t=t / unit,
            K=torch.tensor([K_to[0, 0], K_to[1, 1], K_to[0, 2], K_to[1, 2], 0.0], dtype=torch.float32),
        )

    def begin(self, seeds: list[str], views: int, size: tuple[int, int]) -> list[Future[dict[str, Tensor]]]:
        """Start to read a window per seed, beside whatever follows."""
        return [self._threads.submit(self.sample, seed, views, size) for seed in seeds]

    def batch(self, begun: list[Future[dict[str, Tensor]]]) -> dict[str, Tensor]:
        """What `begin` began. As `SceneDataset.render`, without `motion`, `sky` and `moving`; `valid` and `judged` are where
        depth is known.

        Elsewhere depth is 1. The unit is the mean of the known depth; without any, twice the mean distance of views.
        """
        samples = [window.result() for window in begun]
        batch = {name: torch.stack([sample[name] for sample in samples]).to(self.device) for name in samples[0]}
        return batch | dict(ray=rays_of(batch["K"], *batch["img"].shape[-2:]))
