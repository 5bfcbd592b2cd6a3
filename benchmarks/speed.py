"""Time and memory of the engine's step, frame by frame.

    python benchmarks/speed.py --frames 600

Frames are random images at 640 x 480 with a keyframe every third frame, the steady state of a moving camera. Reports the
engine as a whole (`push`: resize, step, transfer, keyframe policy) and the network's step alone; then the whole pipeline,
from image to pose, depth and map, on a real sequence or the sample bag. Prints Markdown.
"""

from __future__ import annotations

import argparse
import platform
import time
from itertools import islice
from pathlib import Path

import speed3r_ros  # noqa: F401  before torch: it sets how OpenMP's threads wait

# isort: split

import numpy as np
import psutil
import torch

from speed3r_ros.config import Config
from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.engine import Engine
from speed3r_ros.model.types import Frame
from speed3r_ros.pipeline import Pipeline
from speed3r_ros.sources import open_source

SAMPLE = Path(__file__).parents[1] / "resource" / "sample_bag"


def device_name(engine: Engine) -> str:
    """What ran, in words."""
    if engine.device.type == "cuda":
        return torch.cuda.get_device_name(engine.device)
    return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"


def resident(engine: Engine) -> float:
    """MiB in use by the process, or on the GPU."""
    if engine.device.type == "cuda":
        return torch.cuda.memory_allocated(engine.device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def measure(engine: Engine, count: int) -> tuple[np.ndarray, dict[int, float]]:
    """Seconds of each push, and memory at a few frames."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (480, 640, 3), dtype=np.uint8) for _ in range(16)]
    seconds, memory = np.zeros(count), {}
    keyframe = engine._is_keyframe
    for i in range(count):
        engine._is_keyframe = (lambda view: True) if i % 3 == 0 else (lambda view: False)
        frame = Frame(images[i % 16], i)
        start = time.perf_counter()
        engine.push(frame)
        seconds[i] = time.perf_counter() - start
        if i in (100, count // 2, count - 1):
            memory[i] = resident(engine)
    engine._is_keyframe = keyframe
    return seconds, memory


@torch.inference_mode()
def step_alone(engine: Engine, count: int) -> np.ndarray:
    """Seconds of each `Network.step`, device work included."""
    memory, seconds = engine._segment.memory, np.zeros(count)
    image = torch.rand(3, *engine.input_size, device=engine.device)

    def step(image: torch.Tensor) -> None:
        if graph := engine._graphs.get(id(memory)):
            graph(image, None)
        else:
            engine.network.step(image, memory, None, engine.config.strategy, engine.config.top_k)

    for i in range(count):
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        memory.admit()
        step(image)
        memory.keep()
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[i] = time.perf_counter() - start
    engine.reset()
    return seconds


def pipeline_alone(engine: Engine, sequence: Path, count: int) -> np.ndarray:
    """Seconds of each frame of a sequence in the pipeline: engine, odometry, scale, trajectory and map."""
    config = Config()
    pipeline, seconds = Pipeline(config, engine), []
    for stamp_ns, image, camera in islice(open_source(sequence), count):
        image, K = camera.rectify(image)
        start = time.perf_counter()
        pipeline.integrate(pipeline.process(Frame(image, stamp_ns, K)))
        seconds.append(time.perf_counter() - start)
    return np.array(seconds)


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--precision", nargs="*", default=["bf16", "fp32"], help="on a CPU without bf16: int8 fp32")
    parser.add_argument("--attention", nargs="*", default=["speed3r", "dense"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--sequence", type=Path, default=SAMPLE, help="of the pipeline")
    args = parser.parse_args()
    print(
        "| device | precision | attention | push p50 / p95, ms | rate, Hz | step alone p50, ms | pipeline p50 / p95, ms | "
        "rate, Hz | memory, MiB, at frames |"
    )
    print("|---" * 9 + "|")
    for precision in args.precision:
        for attention in args.attention:
            config = EngineConfig(precision=precision, attention=attention, device=args.device, threads=args.threads)
            engine = Engine(config)
            step = np.median(step_alone(engine, min(args.frames, 100))[20:]) * 1e3
            seconds, memory = measure(engine, args.frames)
            engine.reset()
            whole = pipeline_alone(engine, args.sequence, args.frames)
            cells = [device_name(engine), precision, attention]
            for times in (seconds, whole):
                p50, p95 = np.percentile(times[len(times) // 5 :] * 1e3, (50, 95))
                cells += [f"{p50:.1f} / {p95:.1f}", f"{1 / times[len(times) // 5 :].mean():.1f}"]
            cells.insert(5, f"{step:.1f}")
            cells.append(", ".join(f"{value:.0f} @ {frame}" for frame, value in memory.items()))
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
