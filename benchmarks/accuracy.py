"""Accuracy of the shipped model: held-out rendered sequences and real sequences, trivial baselines beside each number.

    python benchmarks/accuracy.py --rendered 48 --real ../shared/data

Real sequences are folders with `rgb.txt` and `poses.txt` (camera-to-world, TUM format). They go through the engine as
deployed: windows of a few frames at several strides, and every sequence as a whole. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch

from speed3r_ros.config import Config
from speed3r_ros.mapping.trajectory import Trajectory, absolute_trajectory_error, associate
from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.engine import Engine
from speed3r_ros.model.types import Frame
from speed3r_ros.pipeline import Pipeline
from speed3r_ros.sources import open_source
from speed3r_ros.training.evaluate import depth_errors, evaluate_rendered, pose_errors, summarise

COLUMNS = {
    "rotation, deg": ("rotation", "rotation_identity", "{:.2f}"),
    "AUC@5": ("auc5", "auc5_identity", "{:.3f}"),
    "direction, deg": ("direction", None, "{:.1f}"),
    "ATE / path": ("ate", "ate_line", "{:.3f}"),
    "AbsRel": ("absrel", "absrel_constant", "{:.3f}"),
    "d1.25": ("within_25", None, "{:.3f}"),
    "focal": ("focal", None, "{:.3f}"),
}


def table_row(name: str, row: dict[str, float]) -> str:
    """One Markdown row; the trivial baseline in brackets."""

    def cell(key: str, baseline: str | None, form: str) -> str:
        if not np.isfinite(row.get(key, np.nan)):
            return "–"
        beside = f" ({form.format(row[baseline])})" if baseline and np.isfinite(row.get(baseline, np.nan)) else ""
        return form.format(row[key]) + beside

    return f"| {name} | " + " | ".join(cell(*column) for column in COLUMNS.values()) + " |"


def header(first: str) -> str:
    """Markdown table head."""
    return f"| {first} | " + " | ".join(COLUMNS) + " |\n|---" + "|---" * len(COLUMNS) + "|"


class Sequence:
    """A real sequence in memory: rectified frames, true poses and, where there are any, depth maps."""

    def __init__(self, folder: Path, known: bool) -> None:
        self.name = folder.name
        source = open_source(folder)
        truth = source.truth
        self.frames: list[Frame] = []
        for stamp_ns, image, camera in source:
            K = None
            if camera is not None:
                image, K = camera.rectify(image)
            self.frames.append(Frame(image, stamp_ns, K if known else None))
        self.K = K
        self.truth = truth
        stamps = np.array([frame.stamp_ns for frame in self.frames])
        mine, theirs = associate(stamps, truth.stamps_ns, 20_000_000)
        self.posed = [self.frames[i] for i in mine]
        self.poses = truth.poses[theirs]
        self.depths = self._depths(folder, camera)

    def _depths(self, folder: Path, camera) -> dict[int, np.ndarray]:
        """Depth maps in metres by the stamp of their frame, NaN where invalid."""
        listing = folder / "depth.txt"
        if not listing.exists():
            return {}
        settings = json.loads((folder / "intrinsics.json").read_text())
        rows = [line.split() for line in listing.read_text().splitlines() if line and line[0] != "#"]
        stamps = np.array([round(float(stamp) * 1e9) for stamp, _ in rows])
        frame_stamps = np.array([frame.stamp_ns for frame in self.posed])
        depths = {}
        for i, j in zip(*associate(frame_stamps, stamps, 20_000_000)):
            depth = cv2.imread(str(folder / rows[j][1]), cv2.IMREAD_UNCHANGED).astype(np.float32)
            depth *= settings.get("depth_scale_m", 0.001)
            depth[(depth < 0.1) | (depth > settings.get("depth_max_m", 10))] = np.nan
            depths[int(frame_stamps[i])] = depth
        return depths


def windows(engine: Engine, sequence: Sequence, length: int, stride: int, most: int = 24) -> dict[str, float] | None:
    """Summary over windows of `length` frames, each from a fresh start."""
    frames, poses = sequence.posed, sequence.poses
    span = (length - 1) * stride
    if span >= len(frames):
        return None
    rows = []
    for start in np.unique(np.linspace(0, len(frames) - span - 1, most).astype(int)):
        index = range(start, start + span + 1, stride)
        engine.reset()
        estimates = [engine.push(frames[i]) for i in index]
        T = torch.from_numpy(np.stack([estimate.T_world_cam for estimate in estimates]))
        T_true = torch.from_numpy(poses[list(index)])
        shortest = 0.1 * float(torch.cdist(T_true[:, :3, 3], T_true[:, :3, 3]).max())
        row = pose_errors(T[:, :3, :3], T[:, :3, 3], T_true[:, :3, :3], T_true[:, :3, 3], max(shortest, 1e-6))
        pairs = [(e.depth, sequence.depths[e.stamp_ns]) for e in estimates if e.stamp_ns in sequence.depths]
        if pairs:
            true = [cv2.resize(d, e.shape[::-1], interpolation=cv2.INTER_NEAREST) for e, d in pairs]
            valid = np.isfinite(np.stack(true))
            z, z_true = np.stack([e for e, _ in pairs])[valid], np.stack(true)[valid]
            row |= depth_errors(torch.from_numpy(z), torch.from_numpy(z_true))
        if sequence.K is not None:
            fx = sequence.K[0, 0] * engine.input_size[1] / frames[0].image.shape[1]
            row["focal"] = abs(float(np.median([estimate.K[0, 0] for estimate in estimates])) / fx - 1)
        rows.append(row)
    return summarise(rows)


def causal_trajectory(pipeline: Pipeline, frames: list[Frame]) -> Trajectory:
    """All frames' poses as first published."""
    pipeline.reset()
    for frame in frames:
        pipeline.process(frame)
    return pipeline.recorded()


def whole(engine: Engine, sequence: Sequence) -> str:
    """Markdown row of a sequence as a whole: the network alone, refined, and the trivial baselines."""
    config = Config(engine=engine.config)
    alone = Pipeline(replace(config, odometry=replace(config.odometry, features=0)), engine)
    by_network = absolute_trajectory_error(causal_trajectory(alone, sequence.frames), sequence.truth)
    trajectory = causal_trajectory(Pipeline(config, engine), sequence.frames)
    result = absolute_trajectory_error(trajectory, sequence.truth)
    stamps = trajectory.stamps_ns
    line, still = Trajectory(), np.eye(4)
    for stamp in stamps:
        T = np.eye(4)
        T[0, 3] = (stamp - stamps[0]) * 1e-9
        line.append(int(stamp), T)
    straight = absolute_trajectory_error(line, sequence.truth)
    xyz = sequence.truth.poses[:, :3, 3]
    still = float(np.sqrt(((xyz - xyz.mean(0)) ** 2).sum(1).mean()))
    length = float(np.linalg.norm(np.diff(xyz, axis=0), axis=1).sum())
    return (
        f"| {sequence.name} | {len(sequence.frames)} | {length:.2f} | {by_network.rmse:.3f} | {result.rmse:.3f} | {straight.rmse:.3f} | {still:.3f} "
        f"| {result.scale:.3f} | {100 * result.coverage:.0f} % |"
    )


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="compact")
    parser.add_argument("--attention", default="speed3r")
    parser.add_argument("--rendered", type=int, default=0, help="held-out rendered sequences for each row")
    parser.add_argument("--real", type=Path, help="folder of real sequences")
    parser.add_argument("--only", nargs="*", help="names of real sequences")
    parser.add_argument("--refresh", type=int, default=EngineConfig.refresh)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--known", action="store_true", help="give the engine the intrinsics of the real sequences")
    parser.add_argument("--no-windows", action="store_true", help="whole sequences only")
    args = parser.parse_args()
    config = EngineConfig(
        weights=args.weights, attention=args.attention, refresh=args.refresh, precision=args.precision
    )
    engine = Engine(config)
    if args.rendered:
        print(header("held-out rendered"))
        for views in (2, 4, 8, 12, 24):
            row = evaluate_rendered(
                engine.network, args.rendered, views, engine.device, args.attention, seed=100 + views
            )
            print(table_row(f"{views} views", row), flush=True)
    if args.real:
        folders = sorted(p.parent for p in args.real.glob("*/poses.txt") if not args.only or p.parent.name in args.only)
        sequences = [Sequence(folder, args.known) for folder in folders]
        if not args.no_windows:
            print("\n" + header("real, windows of 8 / stride"))
            for sequence in sequences:
                for stride in (1, 2, 4, 8, 16):
                    row = windows(engine, sequence, min(8, len(sequence.posed)), stride)
                    if row:
                        print(table_row(f"{sequence.name} / {stride}", row), flush=True)
        print(
            "\n| real, whole | frames | path | ATE, network alone | ATE | line | still | scale | coverage |\n"
            "|---|---|---|---|---|---|---|---|---|"
        )
        for sequence in sequences:
            print(whole(engine, sequence), flush=True)


if __name__ == "__main__":
    main()
