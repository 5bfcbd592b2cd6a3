"""The evaluate command: the deployed pipeline on sequences with ground truth, without ROS.

Prints Markdown tables with trivial baselines beside every number; with --out also writes `evaluation.json` (its schema:
docs/evaluation.md), `evaluation.md` and, for each sequence, trajectories in the TUM format and `report.html`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from tqdm import tqdm

from speed3r_ros.camera import Camera
from speed3r_ros.config import Config, settings
from speed3r_ros.evaluation_tables import markdown
from speed3r_ros.mapping.files import folder_written_whole
from speed3r_ros.mapping.metrics import (
    TOLERANCE_NS,
    Accuracy,
    Sparsification,
    accuracy,
    depth_errors,
    sparsification,
    trajectory_errors,
)
from speed3r_ros.mapping.odometry import USUAL_FOV
from speed3r_ros.mapping.trajectory import Trajectory, associate
from speed3r_ros.model.types import Estimate, resize_intrinsics
from speed3r_ros.reconstruct import Run, add_settings, check_destination, load_torch, positive, read_settings
from speed3r_ros.report import write_report
from speed3r_ros.results import Results, versions
from speed3r_ros.sources import TRUTH_FILES, Source, open_source, truth_file
from speed3r_ros.variants import with_variants

if TYPE_CHECKING:  # importing torch takes seconds: not for --help, nor for a wrong setting
    from speed3r_ros.pipeline import Pipeline

HELP = "measure accuracy on sequences with ground truth"
OUTPUTS = {"evaluation.json", "evaluation.md", "sequences"}
SCHEMA = 1  # of evaluation.json; grows when a key changes its meaning or goes
GRID = 3  # of the network's pixels, every third in each direction is compared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the sub-command."""
    parser.add_argument(
        "data", help="sequence with ground truth, folder of such, or the word `rendered` for held-out rendered ones"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the results; without it they are printed only"
    )
    parser.add_argument("--overwrite", action="store_true", help="write into a DIR that holds other files; they stay")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--known", action="store_true", help="require intrinsics; by default they are used where given")
    group.add_argument("--unknown", action="store_true", help="withhold intrinsics; images keep their lens distortion")
    parser.add_argument("--stride", type=positive, default=1, metavar="N", help="use every Nth frame")
    parser.add_argument("--frames", type=positive, metavar="N", help="stop after N frames (rendered: 24)")
    parser.add_argument(
        "--variants",
        action="store_true",
        help="each sequence also mirrored, backwards and both; one is little to go by",
    )
    parser.add_argument("--sequences", type=positive, metavar="N", help="rendered sequences (8)")
    parser.add_argument("--size", type=image_size, metavar="HxW", help="pixels of rendered images (168x224)")
    parser.add_argument("--split", choices=("rooms", "world"), help="what rendered sequences are drawn from (rooms)")
    add_settings(parser)


def image_size(text: str) -> tuple[int, int]:
    """Height and width of `HxW`. ArgumentTypeError if it is something else, or sides are not 32 to 2048."""
    sides = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    if not sides or not all(32 <= int(side) <= 2048 for side in sides.groups()):
        raise argparse.ArgumentTypeError(f"{text!r}: must be HEIGHTxWIDTH, 32 to 2048 each, e.g. 336x448")
    return int(sides[1]), int(sides[2])


def run(options: argparse.Namespace) -> int:
    """0; 1 when a sequence failed, 2 for wrong usage, after one line each that says what is wrong; 130 interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config = read_settings(options.config, options.set, options.model)
        given = [f"--{name}" for name in ("sequences", "size", "split") if getattr(options, name)]
        if given and options.data != "rendered":
            raise ValueError(f"{' and '.join(given)}: only for rendered sequences; leave out for {options.data}")
        if options.out:
            check_destination(options.out, options.overwrite, Path(options.data), OUTPUTS, "evaluation.json")
    except (OSError, ValueError) as error:
        print(f"speed3r evaluate: {error}", file=sys.stderr)
        return 2
    known = True if options.known else False if options.unknown else None
    try:
        with ExitStack() as stack:
            paths = [] if options.data == "rendered" else sequences_in(Path(options.data))
            load_torch()
            folder = stack.enter_context(folder_written_whole(options.out, OUTPUTS)) if options.out else None
            sources, failed = open_all(paths)
            if failed and not sources:
                raise ValueError("; ".join(failed.values()))
            sources = sources or rendered(options, config.engine.device)
            if options.variants:
                sources = (
                    variant for source in sources for variant in with_variants(source, options.stride, options.frames)
                )
            found = evaluate_all(sources, config, known, options.stride, options.frames, folder, failed)
    except (OSError, ValueError) as error:
        print(f"speed3r evaluate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        unchanged = f", {options.out} is as it was" if options.out else ""
        print(f"speed3r evaluate: interrupted{unchanged}", file=sys.stderr)
        return 130
    print(markdown(found), end="")
    for reason in found["failed"].values():
        print(f"speed3r evaluate: {reason}", file=sys.stderr)
    return 1 if found["failed"] else 0


def sequences_in(path: Path) -> list[Path]:
    """The path itself if it has ground truth, else the folders in it that have. Raises ValueError, OSError."""
    path = path.resolve()
    if not path.exists() or truth_file(path):
        return [path]
    folders = sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
    found = [p for p in folders if truth_file(p)]
    if not found:
        raise ValueError(f"{path}: no ground truth in it or in its folders; expected {', '.join(TRUTH_FILES)}")
    return found


def open_all(paths: Iterable[Path]) -> tuple[list[Source], dict[str, str]]:
    """The sequences that can be opened, and why the others cannot, by name."""
    sources, failed = [], {}
    for path in paths:
        try:
            sources.append(open_source(path))
        except (OSError, ValueError) as error:
            failed[path.name] = str(error)
    return sources, failed


def rendered(options: argparse.Namespace, device: str) -> Iterable[Source]:
    """Held-out rendered sequences, by default of the smallest size that the shipped network takes."""
    from speed3r_ros.model.network import NetworkConfig
    from speed3r_ros.rendered import rendered_sources

    size = options.size or (NetworkConfig().height, NetworkConfig().width)
    count, frames = options.sequences or 8, (options.frames or 24) * options.stride
    return rendered_sources(count, frames, size, device, options.split or "rooms")


def evaluate_all(
    sources: Iterable[Source],
    config: Config,
    known: bool | None = None,
    stride: int = 1,
    limit: int | None = None,
    folder: Path | None = None,
    unopened: dict[str, str] | None = None,
) -> dict[str, Any]:
    """What evaluation.json holds, of all sources, with NaN for numbers that do not exist; arguments as of `evaluate`.

    unopened: why sequences are not among the sources, by name. In `folder`, if any, all files are written. A sequence that
    fails is named in the result. Raises ValueError when all do, OSError.
    """
    from speed3r_ros.pipeline import Pipeline

    pipeline = Pipeline(config)
    rows, failed = [], dict(unopened or {})
    for source in sources:
        try:
            found = evaluate(source, pipeline, known, stride, limit)
        except ValueError as error:
            failed[source.name] = str(error)
            continue
        rows.append(found.row())
        if folder:
            found.write(folder / "sequences" / source.name)
    if not rows:
        raise ValueError("; ".join(failed.values()))
    result = {
        "schema": SCHEMA,
        "versions": versions(),
        "device": str(pipeline.engine.device),
        "precision": str(pipeline.engine.dtype).removeprefix("torch."),
        "stride": stride,
        "settings": {name: value for name, _, value in settings(config)},
        "sequences": rows,
        "failed": failed,
    }
    if folder:
        text = json.dumps(without_nan(result), indent=1, allow_nan=False)
        (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        (folder / "evaluation.md").write_text(markdown(result), encoding="utf-8")
    return result


@dataclass
class Evaluation:
    """One sequence: what came out, and how good it is.

    results: of the run, with poses as first published. truth is that of the frames that were offered.
    final: all frames' poses as the map has them at the end; None when they are as published.
    keyframes: those of the keyframes, at the end. depth, focal: errors by name, or None without a truth of them.
    """

    results: Results
    known: bool
    published: Accuracy
    keyframes: Trajectory
    final: Trajectory | None
    depth: dict[str, float] | None
    focal: dict[str, float] | None

    def row(self) -> dict[str, Any]:
        """This sequence's part of evaluation.json; NaN where a number does not exist."""
        results, confidence = self.results, self.results.confidence
        p50, p95 = np.percentile(results.latency_s, (50, 95)) * 1e3
        return {
            "name": results.name,
            "frames": results.frames,
            "lost": results.lost,
            "intrinsics": "known" if self.known else "unknown",
            "latency_ms": {"p50": float(p50), "p95": float(p95)},
            "published": asdict(self.published.estimate),
            "final": asdict(trajectory_errors(self.final, results.truth)) if self.final else None,
            "keyframes": self._keyframe_errors(),
            "line": asdict(self.published.line),
            "still": asdict(self.published.still),
            "depth": self.depth,
            "confidence": None if confidence is None else confidence_row(confidence),
            "focal": self.focal,
        }

    def _keyframe_errors(self) -> dict[str, float] | None:
        """None with fewer than three of them; coverage is of the true poses of all frames."""
        try:
            return asdict(trajectory_errors(self.keyframes, self.results.truth))
        except ValueError:
            return None

    def write(self, folder: Path) -> None:
        """Trajectories and the report. Raises OSError."""
        folder.mkdir(parents=True)
        self.results.trajectory.write_tum(folder / "published.tum")
        self.results.truth.write_tum(folder / "truth.tum")
        self.keyframes.write_tum(folder / "keyframes.tum")
        if self.final:
            self.final.write_tum(folder / "final.tum")
        write_report(self.results, folder / "report.html")


def evaluate(
    source: Source, pipeline: Pipeline, known: bool | None = None, stride: int = 1, limit: int | None = None
) -> Evaluation:
    """Run a sequence through the pipeline from a fresh start, and compare with its truth.

    known: whether intrinsics are given to it; None = where the source has them. Raises ValueError, naming the sequence,
    without ground truth, with fewer than 3 matched poses, without required intrinsics, or for unreadable depth.
    """
    if source.truth is None:
        raise ValueError(f"{source.name}: no ground truth; expected {', '.join(TRUTH_FILES)} in {source.path}")
    pipeline.reset()
    count = len(range(0, len(source), stride)[:limit])
    steps, depths = Run(pipeline, source, count), DepthPairs()
    stamps, keyframes, focal = [], [], []
    calibrated = False
    frames = islice(source, 0, count * stride, stride)
    for stamp_ns, image, camera in tqdm(frames, desc=source.name, total=count, unit="frame"):
        if known and camera is None:
            raise ValueError(f"{source.name}: --known, but it has no intrinsics; add intrinsics.json or use --unknown")
        if known and not camera.fits(image):
            raise ValueError(
                f"{source.name}: --known, but its intrinsics are for {camera.width} x {camera.height} pixels, and images "
                f"have {image.shape[1]} x {image.shape[0]}; mend intrinsics.json or use --unknown"
            )
        given = None if known is False else camera
        usable = given is not None and given.fits(image)  # others count as unknown, and `Run` says so
        calibrated |= usable
        stamps.append(stamp_ns)
        estimate = steps.add(stamp_ns, image, given)
        if estimate is None:
            continue
        if estimate.is_keyframe:
            keyframes.append(stamp_ns)
        if camera is not None and given is None:
            focal.append(focal_lengths(estimate, camera))
        true_depth = source.true_depth(stamp_ns)
        if true_depth is not None:
            depths.add(estimate, given.rectify(true_depth, cv2.INTER_NEAREST)[0] if usable else true_depth)
    results = steps.finish()
    _, matched = associate(np.array(stamps), source.truth.stamps_ns, TOLERANCE_NS)
    results.truth = source.truth.select(matched)
    try:
        published = accuracy(results.trajectory, results.truth)
    except ValueError as error:
        raise ValueError(
            f"{source.name}: {error}; {len(matched)} of {len(stamps)} frames have a true pose, check the stamps"
        ) from error
    final = pipeline.recorded()
    corrected = not np.array_equal(final.poses, results.trajectory.poses)
    results.confidence = depths.sparsification()
    return Evaluation(
        results,
        calibrated,
        published,
        final.select(np.flatnonzero(np.isin(final.stamps_ns, keyframes))),
        final if corrected else None,
        depths.errors(published.estimate.scale),
        focal_row(np.array(focal)) if focal else None,
    )


class DepthPairs:
    """Predicted and true depth and confidence of every third pixel of the network's image, frame by frame."""

    def __init__(self) -> None:
        self._frames: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, estimate: Estimate, truth: np.ndarray) -> None:
        """One frame's true depth (H, W), aligned with the estimate's image; pixels where it is 0, NaN or infinite do not count."""
        true = cv2.resize(truth, estimate.depth.shape[::-1], interpolation=cv2.INTER_NEAREST)[::GRID, ::GRID]
        depth, confidence = estimate.depth[::GRID, ::GRID], estimate.confidence[::GRID, ::GRID]
        valid = (true > 0) & np.isfinite(true) & (depth > 0) & np.isfinite(depth)
        if valid.any():
            self._frames.append((depth[valid].astype(np.float64), true[valid].astype(np.float64), confidence[valid]))

    def errors(self, scale: float) -> dict[str, float] | None:
        """Means over frames, after each one's median scale, after the trajectory's one and after the sequence's median one,
        and those of a constant; and how far the frames' scales lie apart."""
        if not self._frames:
            return None
        constant = float(np.median([np.median(true) for _, true, _ in self._frames]))
        scales = np.array([np.median(true / depth) for depth, true, _ in self._frames])
        middle, (low, high) = np.median(scales), np.percentile(scales, (10, 90))
        rows = [
            (
                *depth_errors(depth * np.median(true / depth), true),
                *depth_errors(np.full_like(true, np.median(true)), true),
                *(depth_errors(depth * scale, true) if scale > 0 else (1.0, 0.0)),
                *depth_errors(np.full_like(true, constant), true),
                *depth_errors(depth * middle, true),
            )
            for depth, true, _ in self._frames
        ]
        names = [
            f"{metric}{which}"
            for which in ("", "_constant", "_one_scale", "_one_constant", "_median_scale")
            for metric in ("absrel", "delta125")
        ]
        means = dict(zip(names, np.mean(rows, 0).tolist()))
        return {"frames": len(rows)} | means | {"scale_spread": float(high / low)}

    def sparsification(self) -> Sparsification | None:
        """Of the relative errors of all pixels after each frame's median scale."""
        errors = [np.abs(depth * np.median(true / depth) / true - 1) for depth, true, _ in self._frames]
        if not errors or not np.concatenate(errors).any():
            return None
        return sparsification(np.concatenate(errors), np.concatenate([confidence for *_, confidence in self._frames]))


def confidence_row(found: Sparsification) -> dict[str, float]:
    """Of evaluation.json."""
    names = "ause", "ause_random", "worst_fifth", "worst_fifth_oracle"
    return {name: getattr(found, name) for name in names}


def focal_lengths(estimate: Estimate, camera: Camera) -> tuple[float, float]:
    """Ratios to the true fx of the estimate's, and of that of a usual lens."""
    size = estimate.depth.shape
    true = resize_intrinsics(np.asarray(camera.K), (camera.height, camera.width), size)[0, 0]
    return estimate.K[0, 0] / true, size[1] / 2 / math.tan(USUAL_FOV / 2) / true


def focal_row(ratios: np.ndarray) -> dict[str, float]:
    """From ratios (N, 2): median relative error over the frames, that of the last frame, and that of a usual lens."""
    error = np.abs(ratios - 1)
    return {"median": float(np.median(error[:, 0])), "last": float(error[-1, 0]), "usual": float(error[-1, 1])}


def without_nan(value: Any) -> Any:
    """The same tree with None for numbers that do not exist, as JSON has no NaN."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
