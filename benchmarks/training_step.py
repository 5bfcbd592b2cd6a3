"""A training step of the compact network, sparse beside dense: forward, backward and optimiser.

    python benchmarks/training_step.py           # on a GPU
    python benchmarks/training_step.py --tiny    # on a CPU, to see that it runs

bf16 products, float32 parameters, under the incremental visibility that the network is trained with (every frame a keyframe);
random images and a loss that reads every output. Dense attention obeys the same visibility. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from speed3r_ros.model.memory import visibility
from speed3r_ros.model.network import Network, NetworkConfig

WINDOW, ANCHORS, BANK, TOP_K = 4, 6, 32, 32
TINY = NetworkConfig(height=56, width=56, channels=64, encoder_blocks=1, alternating_blocks=1, stem=8, decoder=4)


def step(network: Network, optimiser: torch.optim.Optimizer, images: Tensor, tables: list[Tensor], name: str) -> None:
    """One update."""
    with torch.autocast(images.device.type, torch.bfloat16):
        out = network(images, *tables, attention=name, top_k=TOP_K)
    outputs = out.points, out.confidence, out.R, out.t, out.log_sigma, out.descriptor
    loss = sum(x.float().square().mean() for x in outputs)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=240, help="frames of a step, in sequences of so many views")
    parser.add_argument("--views", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = torch.device("cpu" if args.tiny else "cuda")
    config, repeats = (TINY, 1) if args.tiny else (NetworkConfig(), 10)
    network = Network(config).to(device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    name = "CPU" if args.tiny else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {config.width} x {config.height}, {args.frames} frames a step\n")
    print("| views of a sequence | attention | ms | frames/s | peak, GiB |\n|---|---|---|---|---|")
    for views in args.views:
        count = max(1, args.frames // views)
        images = torch.rand(count, views, 3, config.height, config.width, device=device)
        tables = [x[None].to(device) for x in visibility([True] * views, WINDOW, ANCHORS, BANK)]
        for attention in ("dense", "speed3r"):
            times = []
            for i in range(3 + repeats):
                if i == 3 and not args.tiny:
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                step(network, optimiser, images, tables, attention)
                if not args.tiny:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            ms = statistics.median(times[3:]) * 1e3
            peak = float("nan") if args.tiny else torch.cuda.max_memory_allocated() / 2**30
            print(f"| {views} | {attention} | {ms:.1f} | {count * views / ms * 1e3:.0f} | {peak:.1f} |", flush=True)


if __name__ == "__main__":
    main()
