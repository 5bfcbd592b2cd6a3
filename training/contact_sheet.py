"""A picture of what the generator makes: rows of sequences, frames of one, and its depth (sky black, what moves white).

python -m speed3r_ros.training.contact_sheet docs/images/world.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from speed3r_ros.training.render import SceneDataset, WorldConfig

HEIGHT, WIDTH, FRAMES = 84, 112, 3


def draw(rows: int, columns: int, seed: int) -> np.ndarray:
    """rows x columns sequences of three frames and the first one's depth: (h, w, 3) uint8 BGR."""
    dataset = SceneDataset("cpu", seed, HEIGHT, WIDTH, textures_per_family=2, world=WorldConfig())
    tiles = []
    for _ in range(rows * columns):
        batch = dataset.batch(1, FRAMES)
        frames = [(255 * x).byte().permute(1, 2, 0).numpy()[..., ::-1] for x in batch["img"][0]]
        depth, valid = batch["depth"][0, 0], batch["valid"][0, 0]
        near = torch.where(valid, 1 / (1 + 2 * depth), 0.0)
        colour = cv2.applyColorMap((255 * near / near.max().clamp_min(1e-6)).byte().numpy(), cv2.COLORMAP_TURBO)
        colour[batch["sky"][0, 0].numpy()] = 0
        colour[batch["moving"][0, 0].numpy()] = 255
        tiles.append(np.hstack([*frames, colour]))
    return np.vstack([np.hstack(tiles[i * columns : (i + 1) * columns]) for i in range(rows)])


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--rows", type=int, default=7)
    parser.add_argument("--columns", type=int, default=2)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--colours", type=int, default=64, help="of the picture's palette, which keeps it small")
    args = parser.parse_args()
    if args.picture.suffix != ".png" or not args.picture.parent.is_dir():
        parser.error(f"{args.picture}: give a .png in an existing folder")
    picture = Image.fromarray(np.ascontiguousarray(draw(args.rows, args.columns, args.seed)[..., ::-1]))
    picture.quantize(args.colours, dither=Image.Dither.NONE).save(args.picture, optimize=True)


if __name__ == "__main__":
    main()
