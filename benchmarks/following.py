"""How well frames are followed by their features where the network is too slow for all of them.

    python benchmarks/following.py ../shared/data/lingbot_loop

The network gets a random 5th to 9th frame, a random 5 % of the others are lost, and the rest is followed, as in a node that
is five to nine times slower than its camera. Seeded, so that versions can be compared. Prints Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from speed3r_ros.config import Config
from speed3r_ros.mapping.trajectory import Trajectory, absolute_trajectory_error
from speed3r_ros.model.types import Frame
from speed3r_ros.pipeline import Pipeline
from speed3r_ros.sources import Source, open_source


def frames_of(source: Source, known: bool) -> list[Frame]:
    """Rectified frames in memory, with intrinsics if `known`."""
    frames = []
    for stamp_ns, image, camera in source:
        image, K = camera.rectify(image) if camera else (image, None)
        frames.append(Frame(image, stamp_ns, K if known else None))
    return frames


def follow(pipeline: Pipeline, frames: list[Frame], truth: Trajectory, seed: int) -> tuple[float, int, int]:
    """ATE after Sim(3) alignment, in the truth's unit, frames with a pose, and frames for the network."""
    rng = np.random.default_rng(seed)
    due, count = 0, 0
    pipeline.reset()
    for i, frame in enumerate(frames):
        if i == due:
            pipeline.process(frame)
            due, count = i + int(rng.integers(5, 10)), count + 1
        elif rng.random() >= 0.05:
            pipeline.follow(frame)
    found = absolute_trajectory_error(pipeline.recorded(), truth, tolerance_ns=20_000_000)
    return found.rmse, len(pipeline.recorded()), count


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="sequences with rgb.txt and poses.txt")
    parser.add_argument("--runs", type=int, default=8)
    options = parser.parse_args()
    pipeline = Pipeline(Config())
    print(
        "| sequence | intrinsics | frames | for the network | with a pose | ATE median / worst |\n|---|---|---|---|---|---|"
    )
    for folder in options.folders:
        for known in (True, False):
            source = open_source(folder)
            frames = frames_of(source, known)
            errors, poses, counts = zip(*(follow(pipeline, frames, source.truth, k) for k in range(options.runs)))
            print(
                f"| {source.name} | {'given' if known else 'unknown'} | {len(frames)} "
                f"| {min(counts)} to {max(counts)} | {min(poses)} to {max(poses)} "
                f"| {np.median(errors):.3f} / {max(errors):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
