"""Frames per second of the training world's generator: by resolution, and with each option always on.

    python benchmarks/render.py            # on a GPU; --tiny on a CPU, by the plain reference

Whole batches as the trainer draws them (`SceneDataset.batch`: scenes, ray caster, sensor), 8 views and 4 samples per pixel,
and the ray caster alone on the last scene. Medians; prints Markdown.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace

import torch

from kernels import CUDA, DEVICE, milliseconds
from speed3r_ros.training.render import SceneDataset, WorldConfig

SIZES = ((168, 224), (224, 336), (336, 448), (392, 504)) if CUDA else ((28, 56),)
FRAMES, VIEWS = (240, 8) if CUDA else (8, 4)
VIEWS = 8
RATE = 10_000  # frames/s per GPU at which rendering takes a quarter of a step of 2,500


def row(name: str, dataset: SceneDataset, frames: int) -> str:
    """One line of the table, from batches of `frames` frames in sequences of VIEWS."""
    size = frames // VIEWS, VIEWS, dataset.height, dataset.width
    whole = frames / milliseconds(lambda: dataset.batch(*size[:2])) * 1e3  # frames/s
    cast = "–"
    if dataset.world is not None:
        scene = dataset.place(dataset.sample(*size[:2]))
        took = milliseconds(lambda: dataset.cast(scene, dataset.textures.data, *size[2:], dataset.samples))
        cast = f"{frames / took * 1e3:,.0f}"
    return f"| {name} | {whole:,.0f} | {cast} | {whole / RATE:.2f} |"


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="small images, few frames and textures: only to see that it runs"
    )
    tiny = parser.parse_args().tiny
    frames, sizes, textures = (8, ((28, 56),), 1) if tiny else (240, SIZES, 24)
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, {frames} frames of {VIEWS} views per batch\n")
    print(f"| what | frames/s | ray caster alone | of {RATE:,} |\n|---|---|---|---|")

    def dataset(size: tuple[int, int], world: WorldConfig | None) -> SceneDataset:
        return SceneDataset(DEVICE, 1, *size, textures_per_family=textures, world=world)

    for height, width in sizes:
        print(row(f"{width} x {height}", dataset((height, width), WorldConfig()), frames), flush=True)
    print(row("rooms", dataset(sizes[0], None), frames), flush=True)
    names = [field.name for field in fields(WorldConfig) if field.name != "field_of_view"]
    nothing = replace(WorldConfig(), **dict.fromkeys(names, 0.0))
    world = dataset(sizes[0], nothing)
    print(row("no option", world, frames), flush=True)
    for name in names:
        world.world = replace(nothing, **{name: 1.0})
        print(row(name, world, frames), flush=True)


if __name__ == "__main__":
    main()
