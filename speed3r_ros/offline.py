"""A recording's views reconstructed all at once by an official backbone: `speed3r reconstruct --offline`. No ROS."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from speed3r_ros.clouds import to_world, valid_depth
from speed3r_ros.config import Config, settings
from speed3r_ros.mapping.geometry import inverse
from speed3r_ros.mapping.point_map import PointMap
from speed3r_ros.mapping.trajectory import Trajectory
from speed3r_ros.model.backbones.blocks import PATCH, SIDE
from speed3r_ros.model.backbones.heads import Heads
from speed3r_ros.model.backbones.pi3 import Pi3X
from speed3r_ros.model.backbones.results import Reconstruction
from speed3r_ros.model.backbones.vggt import Vggt
from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.engine import select_device, unusable
from speed3r_ros.model.strategies import strategy_for
from speed3r_ros.model.streaming import load_trained
from speed3r_ros.model.types import Estimate, Tracking, resize_intrinsics
from speed3r_ros.report import write_report
from speed3r_ros.results import Results, Strip, evenly
from speed3r_ros.sources import Source, warn

NOT_FINITE = "the network's {} of a view is not finite; try --set engine.precision=fp32, or fetch the weights again"
USED = ("engine.model", "engine.weights", "engine.device", "engine.threads", "engine.top_k", "depth.", "map.", "scale.")


@dataclass(frozen=True)
class Options:
    """Which frames, and how large.

    stride: use every Nth frame. limit: of these, the first N. views: of these, at most N, spread evenly. pixels: of a view,
    at most.
    """

    stride: int = 1
    limit: int | None = None
    views: int = 1000
    pixels: int = 200_000


@dataclass
class Views:
    """What the backbone sees, on the host.

    images: (h, w, 3) uint8 RGB, all of one size. K: (3, 3) of them in pixels with centres at integers, or None. aspect: width
    over height of the recorded images. lost: frames left out, by reason.
    """

    stamps_ns: list[int]
    images: list[np.ndarray]
    K: list[np.ndarray | None]
    aspect: float
    lost: Counter[str]

    @property
    def size(self) -> tuple[int, int]:
        """(h, w)."""
        return self.images[0].shape[:2]


def working_size(height: int, width: int, pixels: int, step: int) -> tuple[int, int]:
    """Height and width, multiples of `step`, of at most so many pixels, in nearly the given ratio.

    The rule of the official Pi3: sides of the wanted area are rounded, and while that is too much, the side that is too long
    shrinks. Small images are enlarged. ValueError where one step has more pixels.
    """
    if pixels < step**2:
        raise ValueError(f"--pixels {pixels}: the smallest image that this attention takes has {step**2}")
    scale = (pixels / (height * width)) ** 0.5 / step
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    while rows * columns * step**2 > pixels:
        if rows == 1 or (columns > 1 and columns * height > rows * width):
            columns -= 1
        else:
            rows -= 1
    return rows * step, columns * step


def read_views(source: Source, options: Options, step: int) -> Views:
    """The chosen frames, rectified where the camera is known, and resized. ValueError when fewer than two can be used."""
    frames = range(0, len(source), options.stride)[: options.limit]
    chosen = {frames[i] for i in evenly(len(frames), options.views)}
    items = (item for number, item in enumerate(islice(source, max(chosen, default=0) + 1)) if number in chosen)
    views, told = Views([], [], [], 1.0, Counter()), set()
    shape = size = None
    unread = len(chosen)
    for stamp_ns, image, camera in tqdm(items, desc="reading", total=len(chosen), unit="frame"):
        unread -= 1
        K = None
        if camera is not None:
            try:
                image, K = camera.rectify(image)
            except ValueError as error:
                if str(error) not in told:
                    told.add(str(error))
                    warn(f"{error}; intrinsics count as unknown")
        if shape is None:
            shape, size = image.shape[:2], working_size(*image.shape[:2], options.pixels, step)
            views.aspect = shape[1] / shape[0]
        if image.shape[:2] != shape:
            views.lost[f"not {shape[1]} x {shape[0]} pixels as the first"] += 1
            continue
        if views.stamps_ns and stamp_ns <= views.stamps_ns[-1]:
            views.lost["the stamp repeats or goes back"] += 1
            continue
        shrinks = size[0] * size[1] < shape[0] * shape[1]
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        if reason := unusable(image):
            views.lost[re.sub(r" \(.*?\)", "", reason)] += 1  # without the numbers of the single frame
            continue
        views.stamps_ns.append(stamp_ns)
        views.images.append(image)
        views.K.append(None if K is None else resize_intrinsics(K, shape, size))
    if unread:
        views.lost["not readable"] = unread
    if len(views.images) < 2:
        why = "".join(f", {count}: {reason}" for reason, count in views.lost.items())
        raise ValueError(
            f"{len(views.images)} of {len(source)} frames can be used{why}; at least 2 are needed: "
            "check the input, --views, --stride and --max-frames"
        )
    return views


def load_model(engine: EngineConfig) -> tuple[nn.Module, torch.device, torch.dtype | str]:
    """The backbone on its device in its precision, and both.

    ValueError with one line about the device, or weights that are missing, foreign, or not for this attention.
    """
    device, dtype = select_device(engine)
    if engine.threads:
        torch.set_num_threads(engine.threads)
    return load_trained(engine).to(device).precision(dtype), device, dtype


def step_of(attention: str) -> int:
    """Pixels of which an image's sides are multiples."""
    return PATCH * SIDE if strategy_for(attention).in_blocks else PATCH


@contextmanager
def layers_shown(model: nn.Module) -> Iterator[None]:
    """A progress bar of the layers across views, which take nearly all the time where views are many."""
    layers = [block.attn.qkv for block in model.across_views]
    with tqdm(desc="computing", total=len(layers), unit="layer") as bar:

        def count(*_: object) -> None:  # what a hook returns would replace the layer's output
            bar.update()

        hooks = [layer.register_forward_hook(count) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def run_trunk(model: nn.Module, views: Views, attention: str, top_k: int) -> Heads:
    """All of the network but its heads; images stay on the host, from where chunks of them go to the GPU."""
    images = torch.empty(1, len(views.images), 3, *views.size)
    for view, image in zip(images[0], views.images):  # one by one: no second copy of all
        torch.div(torch.from_numpy(image).movedim(-1, 0), 255, out=view)
    given = {}
    if isinstance(model, Pi3X):
        known = torch.tensor([[K is not None for K in views.K]])
        K = torch.tensor(np.array([np.eye(3) if K is None else K for K in views.K]), dtype=torch.float32)[None]
        K[..., :2, 2] += 0.5  # its pixel centres are at half integers
        given = dict(K=K, has_K=known)
    elif isinstance(model, Vggt):
        given = dict(point_head=False)  # its points are not used
    with layers_shown(model):
        return model.trunk(images, attention=attention, top_k=top_k, **given)


class Collector:
    """Takes geometry part by part, and keeps the trajectory, the map of points and a few instants.

    World is the first view's optical frame. Lengths are metres times `scale.factor` from metric backbones, else in units of
    the median depth of the first view times that factor.
    """

    def __init__(self, config: Config, views: Views, results: Results) -> None:
        self._config, self._views, self._results = config, views, results
        self.point_map = PointMap(config.map.voxel, config.map.max_points)
        self._shown = set(evenly(len(views.images)))
        self._number = 0

    def add(self, part: Reconstruction) -> None:
        """The next views (f, ...). ValueError where the network's output is not finite."""
        if self._number == 0:
            unit = 1.0 if part.metric else float(part.depth[0].median())
            if not 0 < unit < np.inf:
                raise ValueError(NOT_FINITE.format("depth"))
            self._factor = self._config.scale.factor / unit
            self._T_world_model = inverse(part.T_world_cam[0].double().cpu().numpy())
            self._results.settings["unit of length"] = "metre" if part.metric else "median depth of the first view"
        T_world_cam = self._T_world_model @ part.T_world_cam.double().cpu().numpy()
        T_world_cam[:, :3, 3] *= self._factor
        maps = (x.cpu().numpy() for x in (part.points, part.depth * self._factor, part.confidence))
        for T, xyz, z, confidence in zip(T_world_cam, *maps):
            if not np.isfinite(T).all():
                raise ValueError(NOT_FINITE.format("pose"))
            self._add_view(T, xyz, z, confidence)
            self._number += 1

    def _add_view(self, T: np.ndarray, points: np.ndarray, depth: np.ndarray, confidence: np.ndarray) -> None:
        """Pose (4, 4) and maps (h, w, ...) of the next view; points in the model's unit, depth in that of the pose."""
        stamp_ns, image = self._views.stamps_ns[self._number], self._views.images[self._number]
        estimate = Estimate(stamp_ns, Tracking.TRACKING, T, depth, confidence, image=image)
        depth = valid_depth(estimate, self._config)
        good = np.flatnonzero(np.isfinite(depth) & (confidence >= self._config.map.min_confidence))
        points = self._factor * points.reshape(-1, 3).take(good, axis=0)
        self.point_map.insert(to_world(T, points), image.reshape(-1, 3).take(good, axis=0), confidence.take(good))
        self._results.trajectory.append(stamp_ns, T)
        if self._number in self._shown:
            self._results.strips.append(Strip(stamp_ns, image, depth, confidence, self._views.aspect))


@contextmanager
def advised(of_what: str) -> Iterator[None]:
    """Turn a lack of memory into ValueError with one line of advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        if not on_host and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"out of memory with {of_what}: use fewer views (--views), smaller images (--pixels) or "
            "--set engine.attention=spark3r"
        ) from error


@torch.inference_mode()
def reconstruct_offline(source: Source, config: Config, options: Options, folder: Path) -> Results:
    """Reconstruct the chosen views at once and write all results into `folder`.

    Raises OSError when writing fails; ValueError with one line for weights, attention, frames or memory that do not do.
    """
    attention = config.engine.strategy
    with advised(f"the weights of {config.engine.model}"):
        model, device, dtype = load_model(config.engine)
    precision = str(dtype).removeprefix("torch.")
    views = read_views(source, options, step_of(attention))
    count, (height, width) = len(views.images), views.size
    print(
        f"views      {count} of {len(source)} frames, {width} x {height} pixels; "
        f"{config.engine.model}, {attention} attention, {precision} on {device.type}"
    )
    values = {name: value for name, _, value in settings(config) if name.startswith(USED)}
    values |= dict(attention=attention, precision=precision, views=count, size=f"{width} x {height}")
    results = Results(
        source.name, count + views.lost.total(), Trajectory(), source.truth, settings=values, at_once=True
    )
    collector, started = Collector(config, views, results), time.monotonic()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with advised(f"{count} views of {width} x {height} pixels and {attention} attention"):
        heads = run_trunk(model, views, attention, config.engine.top_k)
        with tqdm(desc="mapping", total=count, unit="view") as bar:
            for part in heads.parts():
                collector.add(part)
                bar.update(len(part.depth))
    values["computed"] = f"in {time.monotonic() - started:.1f} s"
    if device.type == "cuda":
        values["computed"] += f", at most {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory"
    print(f"computed   {values['computed']}")
    results.points, results.colors, _ = collector.point_map.snapshot()
    results.lost = dict(views.lost)
    results.trajectory.write_tum(folder / "trajectory.tum")
    collector.point_map.write_ply(folder / "map.ply")
    write_report(results, folder / "report.html")
    return results
