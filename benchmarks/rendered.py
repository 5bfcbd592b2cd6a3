"""The whole pipeline on held-out rendered sequences: the network alone and refined, intrinsics given and unknown.

    python benchmarks/rendered.py --views 8 --count 48

Images of 448 x 336 pixels, as a camera has more of them than the network takes; 0.2 s between frames. Poses count as they
are first published, over all pairs of a sequence, depth after one median scale per sequence; trivial baselines stand in
brackets. Sequences in which a frame gets no pose are left out of a row and counted. Weights and precision are the engine's
defaults. Seeded, so that versions can be compared. Prints Markdown; `training/evaluate.py` scores networks alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.config import Config
from speed3r_ros.model.types import Frame
from speed3r_ros.pipeline import Pipeline
from speed3r_ros.training.evaluate import header, pose_errors, poses_of, sparse_depth_errors, summarise, table_row
from speed3r_ros.training.render import SPLITS, SceneDataset

SIZE = 336, 448
INTERVAL_NS = 200_000_000
Row = dict[str, np.ndarray | float]


def run(pipeline: Pipeline, batch: dict[str, Tensor], known: bool) -> Row | None:
    """Errors on one rendered sequence, or None if a frame of it gets no pose."""
    fx, fy, cx, cy, _ = batch["K"][0].tolist()
    K = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]) if known else None
    images = (batch["img"][0] * 255).round().byte().permute(0, 2, 3, 1).cpu().contiguous().numpy()
    pipeline.reset()
    estimates = [pipeline.process(Frame(image, i * INTERVAL_NS, K)) for i, image in enumerate(images)]
    if any(estimate.T_world_cam is None for estimate in estimates):
        return None
    depth = torch.from_numpy(np.stack([estimate.depth for estimate in estimates]))
    truth, valid = (
        F.interpolate(batch[key].float(), depth.shape[1:], mode="nearest-exact")[0].cpu() for key in ("depth", "valid")
    )
    row: Row = dict(pose_errors(np.stack([e.T_world_cam for e in estimates]), poses_of(batch["R"][0], batch["t"][0])))
    row |= sparse_depth_errors(depth, truth, valid.bool() & depth.isfinite())
    focal = fx * depth.shape[2] / images.shape[2]
    return row | dict(focal=float(np.median([abs(e.K[0, 0] / focal - 1) for e in estimates])))


def sequences(split: str, views: int, count: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Rendered sequences of held-out scenes, one at a time, the same for the same seed."""
    dataset = SceneDataset("cpu", seed, *SIZE, samples=1, held_out=True, textures_per_family=1, world=SPLITS[split])
    for _ in range(count):
        yield dataset.batch(1, views)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=list(SPLITS))
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--count", type=int, default=48, help="sequences of each split")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = Config()
    alone = replace(config, odometry=replace(config.odometry, features=0))
    pipelines = {"network alone": Pipeline(alone), "refined": Pipeline(config)}
    print(f"{options.views} views, {options.count} sequences of each split, seed {options.seed}\n")
    print(header("sequences"))
    for split in options.splits:
        rows: dict[str, list[Row | None]] = {}
        for batch in sequences(split, options.views, options.count, options.seed):
            for name, pipeline in pipelines.items():
                for known in (True, False):
                    title = f"{split}, K {'given' if known else 'unknown'}, {name}"
                    rows.setdefault(title, []).append(run(pipeline, batch, known))
        for title, found in rows.items():
            whole = [row for row in found if row is not None]
            lost = f" ({len(found) - len(whole)} left out)" if len(whole) < len(found) else ""
            print(table_row(title + lost, summarise(whole)) if whole else f"| {title}{lost} |", flush=True)


if __name__ == "__main__":
    main()
