"""A network of Pi3's size with random weights: many views at once, and one new view against a memory.

    python benchmarks/pi3_size.py                # on a GPU with 139 GiB; about 8 minutes
    python benchmarks/pi3_size.py --tiny         # the same code on a CPU, to see that it runs

24 encoder blocks and 18 pairs of frame and global blocks of width 1024, 16 heads, 504 x 392 pixels: 1008 patches and 5
special tokens per view; bf16. Sparse attention beside dense attention of the same network (every token sees every token),
by the library's fastest backend, cuDNN. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from speed3r_ros.model.attention import Strategy, Tokens, unmasked
from speed3r_ros.model.graph import GraphedStep
from speed3r_ros.model.memory import Memory
from speed3r_ros.model.network import Network, NetworkConfig
from speed3r_ros.model.strategies import STRATEGIES

PI3 = NetworkConfig(
    height=392, width=504, channels=1024, encoder_blocks=24, alternating_blocks=18, registers=4, stem=48, decoder=32
)
TINY = NetworkConfig(height=56, width=56, channels=64, encoder_blocks=1, alternating_blocks=2, stem=8, decoder=4)
TOP_K = 32
WINDOW, ANCHORS, BANK = 8, 16, 256


class Everything(Strategy):
    """Dense attention without any mask."""

    def __call__(self, q: Tokens, k: Tokens, v: Tokens, *_: object) -> Tensor:
        """See `Strategy.__call__`."""
        return unmasked(q.fine, k.fine, v.fine)


def synchronise(device: torch.device) -> None:
    """Wait until the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call, and the peak of allocated memory in GiB."""
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")


def forward(network: Network, device: torch.device, views: int, attention: str) -> tuple[str, str, float]:
    """Seconds and peak GiB of the whole network on `views` views that all see one another, as cells, and the seconds."""
    config = network.config
    images = torch.rand(1, views, 3, config.height, config.width, device=device)
    see = torch.ones(1, views, views, dtype=torch.bool, device=device)

    def run() -> None:
        network(images, see, see, attention=attention, top_k=TOP_K)

    try:
        if views <= 256:
            run()  # compiles the kernels
        seconds, peak = min((timed(device, run) for _ in range(3 if views <= 256 else 1)), key=lambda pair: pair[0])
    except torch.OutOfMemoryError:
        return "out of memory", "–", float("nan")
    return f"{seconds:.3f}", f"{peak:.1f}", seconds


def at_once(network: Network, device: torch.device, counts: list[int]) -> None:
    """The whole network, dense beside sparse."""
    print("\n| views at once | dense, s | peak, GiB | sparse, s | peak, GiB | dense / sparse |")
    print("|---|---|---|---|---|---|")
    for views in counts:
        sparse = forward(network, device, views, "speed3r")
        dense = forward(network, device, views, "everything")
        print(f"| {views} | {' | '.join(dense[:2] + sparse[:2])} | {dense[2] / sparse[2]:.1f} |", flush=True)


def memory_of(config: NetworkConfig, dtype: torch.dtype, device: torch.device, *limits: int) -> Memory:
    """An empty memory of window, anchors and bank."""
    patches = config.grid[0] * config.grid[1]
    sizes = config.channels // config.head_width, config.specials + patches, patches // 16, config.head_width
    return Memory(config.alternating_blocks, *sizes, *limits, dtype, device)


def milliseconds(device: torch.device, step: Callable[[], object], count: int) -> np.ndarray:
    """Of each of `count` calls."""
    times = np.zeros(count)
    for i in range(count):
        times[i] = timed(device, step)[0] * 1e3
    return times


def streaming(network: Network, device: torch.device, dtype: torch.dtype, frames: int) -> None:
    """One view at a time, each a keyframe, as one CUDA graph; then the same network with a dense cache of 1,000 views."""
    config = network.config
    image = torch.rand(3, config.height, config.width, device=device)
    memory = memory_of(config, dtype, device, WINDOW, ANCHORS, BANK)
    graph = GraphedStep(network, memory, "speed3r", TOP_K) if device.type == "cuda" else None

    def step() -> None:
        memory.admit()
        if graph is None:
            network.step(image, memory, None, "speed3r", TOP_K)
        else:
            graph(image, None)
        memory.keep()

    print("\n| frame | step p50, ms | p95, ms | allocated, GiB |")
    print("|---|---|---|---|")
    done = 0
    for frame in (100, frames):
        for _ in range(done, frame):
            step()
        times = milliseconds(device, step, 100)
        done = frame + 100
        used = torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
        print(f"| {frame} | {np.percentile(times, 50):.2f} | {np.percentile(times, 95):.2f} | {used:.2f} |", flush=True)
    views = 1000 if device.type == "cuda" else 10
    memory = memory_of(config, dtype, device, 1, views - 2, 1)
    memory._mask.fill_(True)
    times = milliseconds(device, lambda: network.step(image, memory, None, "everything", TOP_K), 6)[2:]
    print(
        f"\nDense against a cache of {views} views: {np.median(times):.1f} ms; {memory.bytes / 2**30:.1f} GiB of cache"
    )


@torch.inference_mode()
def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--views", type=int, nargs="*", default=[32, 128, 256, 512, 1024])
    parser.add_argument("--frames", type=int, default=10_000)
    args = parser.parse_args()
    device = torch.device("cpu" if args.tiny else "cuda")
    dtype = torch.float32 if args.tiny else torch.bfloat16
    STRATEGIES["everything"] = Everything()
    with torch.device(device):
        network = Network(TINY if args.tiny else PI3).eval()
    network.precision(dtype)
    count = sum(p.numel() for p in network.parameters()) / 1e6
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {dtype}, {count:.0f} M parameters")
    streaming(network, device, dtype, args.frames)
    at_once(network, device, args.views)


if __name__ == "__main__":
    main()
