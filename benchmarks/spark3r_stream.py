"""What a stream loses when Spark3R keeps parts of past keyframes: the ablation behind its defaults (model/spark3r.py).

    python benchmarks/spark3r_stream.py --images ../shared/data/lingbot_loop/rgb --every 8 --frames 30
    python benchmarks/spark3r_stream.py --model pi3 --images FOLDER       # official weights, fetched before; on a GPU
    python benchmarks/spark3r_stream.py --tiny                            # in seconds, to see that it runs

Every frame is a keyframe, intrinsics are unknown. Differences are those from dense attention to all past frames, means over
all frames but the first four (as many as window and anchors hold): fidelity to dense attention, not accuracy. Prints Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from layer_sensitivity import read
from torch import Tensor

from speed3r_ros.model.attention import Strategy, dense, speed3r
from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.network import Network, NetworkConfig
from speed3r_ros.model.spark3r import Spark3R
from speed3r_ros.model.streaming import StreamingNetwork, load_network
from speed3r_ros.reconstruct import positive

WINDOW, ANCHORS = 2, 2  # few, so that short sequences fill the bank
ROWS: tuple[tuple[str, Strategy, int], ...] = (  # what it is, its strategy, places of the bank
    ("none: dense, window and anchors alone", dense, 1),
    *((f"room for 4 frames, shared by {4 * share}", Spark3R(share=share), 4 * share) for share in (1, 2, 4, 8)),
    *((f"room for {room} frames, shared by {4 * room}", Spark3R(), 4 * room) for room in (2, 8)),
    ("room for 4, shared by 16, keys not weighted", Spark3R(weighted=False), 16),
    ("room for 4, shared by 16, a stride of 3 at first", Spark3R(strides=3), 16),
    ("speed3r, 16 frames pooled", speed3r, 16),
)


@torch.inference_mode()
def stream(network: StreamingNetwork, images: Tensor, strategy: Strategy, limits: tuple[int, int, int]) -> tuple:
    """Depths (T, H, W), rotations (T, 3, 3) and positions (T, 3) of images (T, 3, H, W), and the memory's bytes."""
    memory, found = network.new_memory(*limits, strategy), []
    for image in images:
        memory.admit()
        out = network.step(image, memory, None, strategy, 32, None)
        memory.keep()
        found.append((out.points[0, 0, 2].float(), out.R[0, 0].float(), out.t[0, 0].float()))
    return *map(torch.stack, zip(*found)), memory.bytes


def differences(found: tuple, reference: tuple, first: int) -> str:
    """Cells: of depth in percent (median of a frame), of rotation in degrees, of position in percent of the depth."""
    (depth, R, t), (depth_0, R_0, t_0) = ((x[first:] for x in part[:3]) for part in (found, reference))
    relative = ((depth - depth_0).abs() / depth_0).flatten(1).median(1).values.mean()
    cosine = ((R.mT @ R_0).diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    moved = ((t - t_0).norm(dim=1) / depth_0.flatten(1).median(1).values).mean()
    return f"{100 * relative:.2f} | {torch.rad2deg(cosine.clamp(-1, 1).acos()).mean():.2f} | {100 * moved:.2f}"


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="compact")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--every", type=positive, default=1, help="take every N-th image")
    parser.add_argument("--frames", type=positive, default=60)
    numbers = range(len(ROWS))
    parser.add_argument("--rows", type=int, nargs="+", default=numbers, choices=numbers, help="numbers of rows, from 0")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.tiny:
        network, images = Network(NetworkConfig(56, 56, channels=64, stem=8, decoder=4)), torch.rand(14, 3, 56, 56)
    elif args.images:
        try:
            network = load_network(EngineConfig(model=args.model), device)
            images = read(args.images, *network.input_size, args.every * args.frames)[0, :: args.every]
            if len(images) <= WINDOW + ANCHORS:
                raise ValueError(
                    f"{len(images)} frames: give more than {WINDOW + ANCHORS}, see --images, --every, --frames"
                )
        except (ValueError, OSError) as error:
            parser.exit(1, f"{parser.prog}: {error}\n")
    else:
        parser.error("give --images, or --tiny")
    network, images = network.to(device).eval(), images.to(device)
    reference = stream(network, images, dense, (len(images), 1, 1))
    print(f"{args.model}, {len(images)} frames\n\n| past keyframes | depth, % | rotation, deg | position, % | MiB |")
    print("|---" * 5 + "|")
    for name, strategy, bank in (ROWS[i] for i in args.rows):
        found = stream(network, images, strategy, (WINDOW, ANCHORS, bank))
        print(f"| {name} | {differences(found, reference, WINDOW + ANCHORS)} | {found[3] / 2**20:.1f} |", flush=True)


if __name__ == "__main__":
    main()
