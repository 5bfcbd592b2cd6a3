"""The bag command: the node's work on recorded images, without ROS.

Writes `trajectory.tum`, `map.ply`, `report.html` and, as an mcap bag, the messages that the node would have published.
With --offline an official backbone reconstructs all views at once (`offline.py`), without the bag.
"""

from __future__ import annotations

import argparse
import importlib
import re
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from speed3r_ros.camera import Camera
from speed3r_ros.config import Config, load_yaml, parse_value, settings, with_values
from speed3r_ros.mapping.files import folder_written_whole
from speed3r_ros.mapping.trajectory import Trajectory
from speed3r_ros.model.backbones.checkpoints import checkpoint_file
from speed3r_ros.model.types import Estimate, Frame, Tracking
from speed3r_ros.report import write_report
from speed3r_ros.results import Results, Strip, evenly, summary
from speed3r_ros.sources import Source, open_source, warn

if TYPE_CHECKING:  # importing torch takes seconds: not for --help, nor for a wrong setting
    from speed3r_ros.pipeline import Pipeline

HELP = "reconstruct a bag, a video or a folder of images"
OUTPUTS = {"trajectory.tum", "map.ply", "report.html", "bag"}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Arguments for `read_settings`."""
    parser.add_argument("--model", metavar="NAME", help="the network, short for --set engine.model=NAME")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings, as for the node")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="one setting, e.g. engine.window=8; repeatable"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the sub-command."""
    parser.add_argument("input", help="ROS 2 bag (sqlite3 or mcap), video file, or folder of images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--overwrite", action="store_true", help="write into a DIR that holds other files; they stay")
    parser.add_argument("--topic", default="", help="image topic, where a bag has several")
    parser.add_argument("--stride", type=positive, default=1, metavar="N", help="use every Nth frame")
    parser.add_argument("--max-frames", type=positive, metavar="N", help="stop after N frames")
    parser.add_argument("--no-bag", dest="bag", action="store_false", help="do not write the messages to DIR/bag")
    add_settings(parser)
    together = parser.add_argument_group(
        "all views at once", "with an official backbone, e.g. --offline --model pi3; writes no bag"
    )
    together.add_argument("--offline", action="store_true", help="reconstruct all views together, not frame by frame")
    together.add_argument("--views", type=positive, metavar="N", help="at most N views, spread evenly (default 1000)")
    together.add_argument(
        "--pixels",
        type=positive,
        metavar="N",
        help="at most N pixels per view (default 200000); sides become multiples of 14, or of 56 for attention in blocks",
    )


def positive(text: str) -> int:
    """An argument that must be a positive integer."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a positive integer")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """0; 1 or, for wrong usage, 2 after one line that says what is wrong; 130 when interrupted, with nothing written."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        whole = ["engine.streaming=windowed"] if options.offline else []  # admits attention that needs whole sequences
        config = read_settings(options.config, [*whole, *options.set], options.model)
        together = offline_options(options, config)
        check_destination(options.out, options.overwrite, Path(options.input), OUTPUTS, "report.html")
    except (OSError, ValueError) as error:
        print(f"speed3r reconstruct: {error}", file=sys.stderr)
        return 2
    try:
        engine = config.engine
        if engine.model != "compact":  # said at once
            checkpoint_file(engine.model, engine.weights or None)
        source = open_source(options.input, options.topic)
        load_torch()
        with folder_written_whole(options.out, OUTPUTS) as folder:
            if options.offline:
                from speed3r_ros.offline import Options, reconstruct_offline

                results = reconstruct_offline(source, config, Options(**together), folder)
            else:
                from speed3r_ros.pipeline import Pipeline

                pipeline = Pipeline(config)
                results = reconstruct(source, pipeline, folder, options.stride, options.max_frames, options.bag)
    except (OSError, ValueError) as error:
        print(f"speed3r reconstruct: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"speed3r reconstruct: interrupted, {options.out} is as it was", file=sys.stderr)
        return 130
    print(summary(results))
    print(f"results    {options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}")
    return 0


def load_torch() -> None:
    """Import torch. Signals wait meanwhile: one in the middle of it aborts the process, which then cannot clean up."""
    came: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        importlib.import_module("torch")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in came:  # which a job in a shell's background ignores
        signal.raise_signal(number)


def offline_options(options: argparse.Namespace, config: Config) -> dict[str, object]:
    """What was said to `offline.Options`. Raise ValueError for what does not go together."""
    given = {name: getattr(options, name) for name in ("views", "pixels")}
    given = {name: value for name, value in given.items() if value is not None}
    if not options.offline:
        if given:
            raise ValueError(f"--{next(iter(given))}: goes with --offline only")
        return {}
    if config.engine.model == "compact":
        raise ValueError("--offline: the compact model streams only; name a backbone, e.g. --model pi3")
    return dict(given, stride=options.stride, limit=options.max_frames)


def check_destination(out: Path, overwrite: bool, given: Path, outputs: set[str], mark: str) -> None:
    """Raise ValueError when results in `out` would replace the input or what this command did not write.

    outputs: names that the command may write. mark: the one that it always writes.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if any((out / name).resolve() in (given.resolve(), *given.resolve().parents) for name in names & outputs):
        raise ValueError(f"--out {out}: the input {given} would be replaced; name another folder")
    if names and not overwrite and not (mark in names and names <= outputs):
        other = min(names - outputs or names)
        raise ValueError(f"--out {out}: holds other files ({other}); name a new folder or add --overwrite")


def read_settings(file: Path | None, assignments: list[str], model: str | None = None) -> Config:
    """Defaults, then a parameter file as for the node, the model, and NAME=VALUE. Raises ValueError, OSError."""
    values = {"engine.model": model} if model else {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment}: expected NAME=VALUE, e.g. engine.window=8")
        values[name] = parse_value(name, text)
    return with_values(load_yaml(file) if file else Config(), values)


class Run:
    """Feeds frames to the pipeline under the node's rules for stamps and intrinsics, and collects what comes out."""

    def __init__(self, pipeline: Pipeline, source: Source, count: int) -> None:
        values = {name: value for name, _, value in settings(pipeline.config)}
        self.results = Results(source.name, count, Trajectory(), source.truth, settings=values)
        self._pipeline = pipeline
        self._lost: Counter[str] = Counter()
        self._latencies: list[float] = []
        self._times: list[float] = []
        self._shown = evenly(count)
        self._last_stamp: int | None = None
        self._number = -1
        self._told: set[str] = set()

    def add(self, stamp_ns: int, image: np.ndarray, camera: Camera | None) -> Estimate | None:
        """The estimate of the next frame, or None when it gets no pose."""
        started = time.monotonic()
        self._number += 1
        if not self._continues(stamp_ns):
            return None
        K = None
        if camera is not None:
            try:
                image, K = camera.rectify(image)
            except ValueError as error:
                self._tell(f"{error}; intrinsics count as unknown")
        try:
            estimate = self._pipeline.process(Frame(image, stamp_ns, K))
        except ValueError as error:
            self._lost[str(error)] += 1
            return None
        if estimate.tracking is Tracking.LOST:
            self._lost[re.sub(r" \(.*?\)", "", estimate.lost_reason)] += 1  # without the numbers of the single frame
            return None
        self._pipeline.integrate(estimate)
        self.results.trajectory.append(stamp_ns, estimate.T_world_cam)
        self._times.append(time.monotonic())
        self._latencies.append(self._times[-1] - started)
        if self._shown and self._number >= self._shown[0]:
            self._shown.pop(0)
            from speed3r_ros.clouds import valid_depth

            depth = valid_depth(estimate, self._pipeline.config)
            aspect = image.shape[1] / image.shape[0]
            self.results.strips.append(Strip(stamp_ns, estimate.image, depth, estimate.confidence, aspect))
        return estimate

    def _continues(self, stamp_ns: int) -> bool:
        """Whether a frame with this stamp is to be used; a jump in time starts the pipeline anew, as in the node."""
        from speed3r_ros.pipeline import SKIPPED, Step, step_in_time

        last = self._last_stamp
        step = step_in_time(last, stamp_ns, self._pipeline.config.input)
        if step in SKIPPED:
            self._lost[f"the stamp {step.value}"] += 1
            return False
        self._last_stamp = stamp_ns
        if step is Step.BACK:
            self._tell(f"stamps jump back by {(last - stamp_ns) / 1e9:.3f} s: reconstruction starts anew")
            self._pipeline.reset()
            self.results.trajectory.clear()
        elif step is Step.GAP:
            self._tell(f"no image for {(stamp_ns - last) / 1e9:.1f} s: a new segment starts at the last pose")
            self._pipeline.restart()
        return True

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warn(text)

    def finish(self) -> Results:
        """All results, once the frames are through."""
        results = self.results
        results.points, results.colors, _ = self._pipeline.point_map.snapshot()
        results.lost = dict(self._lost)
        results.latency_s, results.wall_s = np.array(self._latencies), np.array(self._times)
        results.depth_wall_s = results.wall_s
        return results


def reconstruct(
    source: Source, pipeline: Pipeline, folder: Path, stride: int = 1, limit: int | None = None, bag: bool = True
) -> Results:
    """Process the frames of a source and write all results into `folder`. Raises OSError when that fails, ValueError when
    no frame gets a pose."""
    from speed3r_ros.writer import OutputBag

    count = len(range(0, len(source), stride)[:limit])
    run = Run(pipeline, source, count)
    with ExitStack() as stack:
        writer = stack.enter_context(OutputBag(folder / "bag", pipeline.config)) if bag else None
        frames = islice(source, 0, count * stride, stride)
        for stamp_ns, image, camera in tqdm(frames, desc="reconstructing", total=count, unit="frame"):
            estimate = run.add(stamp_ns, image, camera)
            if writer and estimate:
                writer.write(estimate, begins=len(run.results.trajectory) == 1)
    results = run.finish()
    if not len(results.trajectory):
        why = "".join(f"; {times}: {reason}" for reason, times in results.lost.items())
        raise ValueError(f"{source.name}: none of {count} frames got a pose{why}; check the input")
    results.trajectory.write_tum(folder / "trajectory.tum")
    pipeline.point_map.write_ply(folder / "map.ply")
    write_report(results, folder / "report.html")
    return results
