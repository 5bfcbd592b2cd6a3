"""Time of one streaming step of published backbones at their real sizes, with random weights, and the memory that it takes.

    python benchmarks/backbone_stream.py pi3 vggt-1b da3-small --attention dense spark3r --precision bf16 fp8
    python benchmarks/backbone_stream.py --tiny                       # in seconds, to see that it runs

On a CPU, add --frames 20; each frame of the large ones takes many seconds there.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from strategies import TINY

from speed3r_ros.model.backbones.incremental import Incremental
from speed3r_ros.model.backbones.registry import build_backbone
from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.engine import select_device
from speed3r_ros.model.graph import GraphedStep
from speed3r_ros.model.streaming import BACKBONE_SIZE
from speed3r_ros.reconstruct import positive


@torch.inference_mode()
def measure(name: str, attention: str, precision: str, frames: int, tiny: bool) -> str:
    """A row of the table. All frames are keyframes; the first half, while the memory fills, is left out."""
    config = EngineConfig(model=name, precision=precision)
    device, dtype = select_device(config)
    size = (56, 112) if tiny else BACKBONE_SIZE
    backbone = TINY[name]().to(device).eval() if tiny else build_backbone(name, device)
    network = Incremental(backbone, size).precision(dtype)
    memory = network.new_memory(config.window, config.anchors, config.bank, attention)
    graph = GraphedStep(network, memory, attention, config.top_k) if device.type == "cuda" else None
    image, times = torch.rand(3, *size, device=device), []
    for _ in range(frames):
        start = time.perf_counter()
        memory.admit()
        if graph:
            graph(image, None)
            torch.cuda.synchronize()
        else:
            network.step(image, memory, None, attention, config.top_k)
        memory.keep()
        times.append(1e3 * (time.perf_counter() - start))
    p50, p95 = np.percentile(times[frames // 2 :], (50, 95))
    weights = sum(x.numel() * x.element_size() for x in network.state_dict().values())
    held = f"{memory.bytes / 2**30:.2f} | {weights / 2**30:.2f}"
    return f"| {name} | {attention} | {device}, {str(dtype).removeprefix('torch.')} | {p50:.1f} / {p95:.1f} | {held} |"


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of backbones for several views")
    parser.add_argument("--attention", nargs="*", default=["dense", "speed3r", "spark3r"])
    precisions = ("auto", "fp32", "bf16", "fp8")
    parser.add_argument("--precision", nargs="+", default=["auto"], choices=precisions, help="as engine.precision")
    parser.add_argument("--frames", type=positive, default=300)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        args.names, args.frames = list(TINY), 20
    elif not args.names:
        parser.error("give names of backbones, or --tiny")
    try:
        for precision in args.precision:
            select_device(EngineConfig(precision=precision))
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print("| model | attention | device | step p50 / p95, ms | one memory, GiB | weights, GiB |")
    print("|---" * 6 + "|")
    for name in args.names:
        for attention in args.attention:
            for precision in args.precision:
                print(measure(name, attention, precision, args.frames, args.tiny), flush=True)


if __name__ == "__main__":
    main()
