"""How far the pose drifts while the camera stands still, in percent of the mean depth and in degrees.

    python benchmarks/stand_still.py --data ../shared/data      # 100 frames each; about a minute per row on two cores
    python benchmarks/stand_still.py --rendered 1 --frames 4    # to see that it runs

Rendered: held-out scenes of the training world, seen from one place, with all that its sensors do: noise, darkness, exposure
steps, and vehicles and persons that pass. Of each sequence in --data: its first image again and again, with fresh noise. As
deployed, or with --set odometry.features=0 by the network alone; intrinsics are not given. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from speed3r_ros.evaluate import sequences_in
from speed3r_ros.mapping.geometry import rotation_angle
from speed3r_ros.mapping.trajectory import NANO
from speed3r_ros.model.types import Frame
from speed3r_ros.pipeline import Pipeline
from speed3r_ros.reconstruct import positive, read_settings
from speed3r_ros.rendered import SEED
from speed3r_ros.sources import open_source
from speed3r_ros.training.render import SPLITS, SceneDataset

NOISE = 3.0  # standard deviation, in grey levels


def rendered(number: int, frames: int) -> Iterator[np.ndarray]:
    """Images (H, W, 3) of a scene."""
    dataset = SceneDataset("cpu", SEED + number, samples=1, held_out=True, textures_per_family=1, world=SPLITS["world"])
    for image in dataset.batch(1, frames, "stand")["img"][0]:
        yield (image.permute(1, 2, 0) * 255).round().byte().numpy()


def repeated(path: Path, frames: int) -> Iterator[np.ndarray]:
    """The first image of a sequence, noisy."""
    rng = np.random.default_rng(0)
    _, image, _ = next(iter(open_source(path)))
    for _ in range(frames):
        yield np.clip(image + rng.normal(0, NOISE, image.shape), 0, 255).round().astype(np.uint8)


def drift(images: Iterator[np.ndarray], settings: list[str]) -> str:
    """Cells of the table: the last and the largest distance and turn from the first pose."""
    pipeline, poses, depths = Pipeline(read_settings(None, settings)), [], []
    for i, image in enumerate(images):
        estimate = pipeline.process(Frame(stamp_ns=i * NANO // 10, image=image, K=None))
        if estimate.T_world_cam is not None:
            poses.append(estimate.T_world_cam)
            depths.append(np.nanmean(np.where(estimate.depth > 0, estimate.depth, np.nan)))
    T = np.stack(poses)
    far = 100 * np.linalg.norm(T[:, :3, 3] - T[0, :3, 3], axis=1) / np.mean(depths)
    turned = np.degrees(rotation_angle(T[0, :3, :3].T @ T[:, :3, :3]))
    return f"{len(T)} | {far[-1]:.2f} / {far.max():.2f} | {turned[-1]:.2f} / {turned.max():.2f}"


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of sequences")
    parser.add_argument("--rendered", type=positive, default=8, help="rendered scenes")
    parser.add_argument("--frames", type=positive, default=100)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one setting; repeatable")
    options = parser.parse_args()
    print("| scene | poses | drift, % of depth: last / largest | turn, deg |\n|---|---|---|---|")
    for number in range(options.rendered):
        print(f"| rendered {number} | {drift(rendered(number, options.frames), options.set)} |", flush=True)
    for path in sequences_in(options.data) if options.data else []:
        print(f"| {path.name} | {drift(repeated(path, options.frames), options.set)} |", flush=True)


if __name__ == "__main__":
    main()
