"""Where the time of a training step goes: the recipe `compact` on rendered scenes, phase by phase.

    python benchmarks/training_phases.py                    # on a GPU, from the shipped weights
    python benchmarks/training_phases.py --set sizes=336x448 compile=true
    python benchmarks/training_phases.py --tiny             # on a CPU, to see that it runs

For each phase: the time until Python comes back from it, in which kernels are launched, and until the device has done it too.
A phase whose two times are the same waits for Python. The last row is of whole steps in a row, without waiting in between, as
a run takes them. Medians over steps with the sequence lengths that training draws; prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kernels import CUDA
from speed3r_ros.training.config import CompactConfig, parse_assignment, with_values
from speed3r_ros.training.losses import losses
from speed3r_ros.training.recipes import Draw
from speed3r_ros.training.trainer import Trainer

TINY = dict(network="tiny", init="", sizes="56x56", frames=8, longest=4, precision="fp32")


class Stopwatch:
    """Times of phases in milliseconds: until Python is back, until the device is done."""

    def __init__(self) -> None:
        self.launched: dict[str, list[float]] = defaultdict(list)
        self.done: dict[str, list[float]] = defaultdict(list)

    def __call__(self, name: str, run: Callable[[], Any]) -> Any:
        """Run a phase of this name on an idle device."""
        synchronise()
        start = time.perf_counter()
        result = run()
        self.launched[name].append((time.perf_counter() - start) * 1e3)
        synchronise()
        self.done[name].append((time.perf_counter() - start) * 1e3)
        return result

    def rows(self) -> str:
        """Lines of a Markdown table."""
        medians = (
            (name, statistics.median(self.launched[name]), statistics.median(x)) for name, x in self.done.items()
        )
        return "\n".join(f"| {name} | {launched:.1f} | {done:.1f} |" for name, launched, done in medians)


def synchronise() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def step_in_phases(trainer: Trainer, draw: Draw, watch: Stopwatch) -> None:
    """One optimiser step as `Trainer.update` makes it, one phase at a time."""
    recipe = trainer.recipe
    recipe.resize(draw.order.size)
    batch = watch("scenes, rendering, sensor", lambda: trainer.batch(draw.order))
    out = watch("forward", lambda: recipe.predict(trainer.model, batch, draw, draw.stage.attention))
    total, _ = watch("losses", lambda: losses(out, batch, draw.shift))
    trainer.network.zero_grad(set_to_none=True)
    watch("backward", total.backward)
    watch("clipping, optimiser, average", trainer.apply_gradients)


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps that count, of either kind")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the recipe compact")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    warm, count = (1, 1) if args.tiny else (12, args.steps)
    config = with_values(
        CompactConfig(), dict(init="compact", sizes="168x224", steps=2 * (warm + count), dense_share=0.0)
    )
    config = with_values(config, TINY if args.tiny else {})
    config = with_values(config, dict(parse_assignment(text, config) for text in args.set))
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer("compact", config, Path(folder))
        for i in range(warm + count):
            if i == warm:
                watch = Stopwatch()
            trainer.look_ahead()
            step_in_phases(trainer, trainer.draw(), watch)
            trainer.step += 1
        frames = 0
        synchronise()
        start = time.perf_counter()
        for _ in range(count):
            trainer.look_ahead()
            draw = trainer.draw()
            trainer.update(draw)
            trainer.step += 1
            frames += draw.order.sequences * draw.order.views
        launched = (time.perf_counter() - start) / count * 1e3
        synchronise()
        done = (time.perf_counter() - start) / count * 1e3
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if CUDA else ""
    print(f"{name}, torch {torch.__version__}, {config.sizes}, {config.frames} frames a step, {config.scenes}{peak}\n")
    print(f"| phase | launched, ms | done, ms |\n|---|---|---|\n{watch.rows()}")
    print(f"| steps in a row, {frames / done / count * 1e3:,.0f} frames/s | {launched:.1f} | {done:.1f} |")


if __name__ == "__main__":
    main()
