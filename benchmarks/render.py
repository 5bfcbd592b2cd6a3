"""Frames per second of the training world's generator: by resolution, and with each option always on.

    python benchmarks/render.py

Whole batches as the trainer draws them (`SceneDataset.batch`: scenes, ray caster, sensor), 8 views and 4 samples per pixel,
and the ray caster alone on the last scene. Medians; prints Markdown. On a CPU: the plain reference, one small batch.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import fields, replace

import torch

from kernels import CUDA, DEVICE, milliseconds
from speed3r_ros.training.render import SceneDataset, WorldConfig
from speed3r_ros.training.world import sample_world

SIZES = ((168, 224), (224, 336), (336, 448), (392, 504)) if CUDA else ((28, 56),)
FRAMES, VIEWS = (240, 8) if CUDA else (8, 4)
RATE = 10_000  # frames/s per GPU at which rendering takes a quarter of a step of 2,500


def row(name: str, dataset: SceneDataset) -> str:
    """One line of the table."""
    whole = milliseconds(lambda: dataset.batch(FRAMES // VIEWS, VIEWS))
    size = FRAMES // VIEWS, VIEWS, dataset.height, dataset.width
    if dataset.world is None:
        return f"| {name} | {FRAMES / whole * 1e3:,.0f} | – | {FRAMES / whole * 1e3 / RATE:.2f} |"
    families = dataset.textures.families
    scene = sample_world(dataset.random, random.Random(0), dataset.world, families, *size, None)
    cast = milliseconds(lambda: dataset.cast(scene, dataset.textures.data, *size[2:], dataset.samples))
    rates = f"{FRAMES / whole * 1e3:,.0f} | {FRAMES / cast * 1e3:,.0f}"
    return f"| {name} | {rates} | {FRAMES / whole * 1e3 / RATE:.2f} |"


def main() -> None:
    """Command-line entry."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, {FRAMES} frames of {VIEWS} views per batch\n")
    print(f"| what | frames/s | ray caster alone | of {RATE:,} |\n|---|---|---|---|")
    textures = 24 if CUDA else 1
    for height, width in SIZES:
        dataset = SceneDataset(DEVICE, 1, height, width, textures_per_family=textures, world=WorldConfig())
        print(row(f"{width} x {height}", dataset), flush=True)
    dataset = SceneDataset(DEVICE, 1, *SIZES[0], textures_per_family=textures)
    print(row("rooms", dataset), flush=True)
    names = [field.name for field in fields(WorldConfig) if field.name != "field_of_view"]
    nothing = replace(WorldConfig(), **dict.fromkeys(names, 0.0))
    dataset = SceneDataset(DEVICE, 1, *SIZES[0], textures_per_family=textures, world=nothing)
    print(row("no option", dataset), flush=True)
    for name in names:
        dataset.world = replace(nothing, **{name: 1.0})
        print(row(name, dataset), flush=True)


if __name__ == "__main__":
    main()
