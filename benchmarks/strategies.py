"""Attention strategies on the official backbones: time of the whole network, memory, and how far outputs move.

    python benchmarks/strategies.py                                    # on a GPU with 139 GiB; about half an hour
    python benchmarks/strategies.py --backbones pi3 --strategies dense spark3r --views 256
    python benchmarks/strategies.py --precision bf16 fp8               # one beside the other
    python benchmarks/strategies.py --parts                            # as `speed3r reconstruct --offline` runs them
    python benchmarks/strategies.py --graph --views 2 --precision bf16 fp8   # few views wait for launches, graphs do not
    python benchmarks/strategies.py --profile --backbones vggt-1b --strategies spark3r --views 1000   # where time goes
    python benchmarks/strategies.py --tiny                             # on a CPU in seconds, to see that it runs

Published sizes, from images to points and poses. Dense attention is the library's fastest, cuDNN's. Times and differences
are to dense attention's of the same run, in the first precision. Unless `--checkpoint` is given, weights are
random (one seed, LayerScale 0.3 so that blocks matter): then the differences say that a strategy is an approximation of dense
attention and how close, but nothing about accuracy. Views are crops of one random texture, 8 pixels apart. Prints Markdown.
With `--parts` images start on the host and maps return there a chunk of views at a time, and VGGT's point head, of which that
command reads nothing, is left out; else both stay on the GPU. With `--graph` the whole network is captured in a CUDA graph, which
is replayed; the peak is then what the allocator holds. With `--profile` each configuration gets two tables instead: the time of
the network's parts, and the kernels that take longest.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from speed3r_ros.model.attention import Strategy
from speed3r_ros.model.backbones.blocks import Block, LayerScale
from speed3r_ros.model.backbones.checkpoints import SINGLE_VIEW
from speed3r_ros.model.backbones.da3 import Da3, Da3Config
from speed3r_ros.model.backbones.pi3 import Pi3, Pi3Config, Speed3RPi3
from speed3r_ros.model.backbones.registry import BACKBONES, build_backbone, load_backbone
from speed3r_ros.model.backbones.results import Reconstruction
from speed3r_ros.model.backbones.tracker import TrackerConfig
from speed3r_ros.model.backbones.vggt import Vggt, VggtConfig
from speed3r_ros.model.lite3r import Lite3R, add_linear_branch
from speed3r_ros.model.spark3r import Spark3R
from speed3r_ros.model.strategies import STRATEGIES

OPTIONS: dict[str, Strategy] = STRATEGIES | {
    "spark3r-stagger": Spark3R(stagger=True),
    "spark3r-keys": Spark3R(similarity="keys"),
    "lite3r-tokens": Lite3R("tokens"),
    "lite3r-dense": Lite3R("dense"),
}
TINY = {
    "pi3": lambda: Pi3(Pi3Config(128, 2, 1, 5, 4, 5, 1, 64)),
    "speed3r-pi3": lambda: Speed3RPi3(Pi3Config(128, 2, 1, 5, 4, 0, 1, 64)),
    "vggt-1b": lambda: Vggt(VggtConfig(128, 2, 1, 5, 4, 4, 1, 4, 32, (8, 8, 8, 8), (0, 1, 2, 3), TrackerConfig(8, 16))),
    "da3-large": lambda: Da3(Da3Config(128, 2, 6, 2, (2, 3, 4, 5), 32, (8, 8, 8, 8), table=5)),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": "fp8"}
HEADER = "| views | precision | attention | s | times dense | peak, GiB | depth differs, median | p95 | rotation, deg |"
PATIENCE = 40.0  # seconds; once its runs have taken so long, a configuration is not repeated
KERNELS = 20  # in the table of those that take longest


def make(name: str, precision: str, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The backbone on the device, in this precision, with projections for Lite3R."""
    torch.manual_seed(0)
    if args.checkpoint:
        model = load_backbone(name, args.checkpoint).to(device)
    else:
        model = TINY[name]().eval() if args.tiny else build_backbone(name, device)
        for scale in (m for m in model.modules() if isinstance(m, LayerScale)):
            nn.init.constant_(scale.gamma, 0.3)
    if not hasattr(model.across_views[0].attn, "proj_lin"):
        add_linear_branch(model)
    return model.precision(PRECISIONS[precision])


def sequence(views: int, height: int, width: int, device: torch.device) -> Tensor:
    """Images (1, N, 3, H, W) of a camera that slides along a plane."""
    wide = width + 8 * (views - 1)
    coarse = torch.rand(1, 3, height // 7, wide // 7, generator=torch.Generator().manual_seed(0))
    plane = F.interpolate(coarse.to(device), (height, wide), mode="bicubic").clamp(0, 1)[0]
    return torch.stack([plane[:, :, 8 * t : 8 * t + width] for t in range(views)])[None]


def captured(run: Callable[[], list[Reconstruction]]) -> Callable[[], list[Reconstruction]]:
    """The same, replayed as a CUDA graph. RuntimeError if it cannot be captured."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # libraries choose their algorithms outside the capture
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> list[Reconstruction]:
        graph.replay()
        return out

    return replay


def forward(model: nn.Module, images: Tensor, strategy: Strategy, parts: bool) -> list[Reconstruction]:
    """The whole network once. parts: of the command line."""
    less = dict(point_head=False) if parts and isinstance(model, Vggt) else {}
    heads = model.trunk(images, attention=strategy, **less)
    return [on_host(part) for part in heads.parts()] if parts else [heads.whole()]


def now(on_gpu: bool) -> float:
    """Seconds of a clock, once the GPU has done all that it was given."""
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_and_peak(
    model: nn.Module, images: Tensor, strategy: Strategy, how: argparse.Namespace
) -> tuple[float, float, tuple[Tensor, Tensor]]:
    """Seconds of the fastest of up to three runs, GiB allocated at its worst (0 on a CPU), and its output as `compared`.

    how: `parts` and `graph` of the command line.
    """
    on_gpu, times = next(model.parameters()).is_cuda, []

    def run() -> list[Reconstruction]:
        return forward(model, images, strategy, how.parts)

    if how.graph:
        run = captured(run)
    while True:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = now(on_gpu)
        out = run()
        times.append(now(on_gpu) - start)
        worst = torch.cuda.max_memory_reserved if how.graph else torch.cuda.max_memory_allocated
        peak = worst() / 2**30 if on_gpu else 0.0
        if len(times) == 3 or sum(times) > PATIENCE:
            return min(times), peak, compared(out)
        del out


def on_host(part: Reconstruction) -> Reconstruction:
    """What a map is made of: depth, points, confidence and poses."""
    fields = ("depth", "points", "confidence", "T_world_cam")
    return Reconstruction(**{name: getattr(part, name).cpu() for name in fields})


def compared(out: list[Reconstruction]) -> tuple[Tensor, Tensor]:
    """Of all views in their order: depth (N, H, W), every 7th pixel, and rotations from view 0 (N, 3, 3), on the host."""
    depth = [part.depth[..., ::7, ::7].flatten(0, -3).float().cpu() for part in out]
    R = torch.cat([part.T_world_cam[..., :3, :3].flatten(0, -3).double().cpu() for part in out])
    return torch.cat(depth), R[0].mT @ R


class Stopwatch:
    """Times calls by their names, on a GPU by events in its stream, and those inside other ones not again."""

    def __init__(self, on_gpu: bool) -> None:
        self.marks: dict[str, list[tuple]] = defaultdict(list)
        self._on_gpu, self._inside = on_gpu, False

    def _mark(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, whose calls count as `name`."""

        def call(*args: object, **options: object) -> object:
            if self._inside:
                return function(*args, **options)
            self._inside, start = True, self._mark()
            out = function(*args, **options)
            self._inside = False
            self.marks[name].append((start, self._mark()))
            return out

        return call

    def seconds(self) -> dict[str, float]:
        """Of each name, in the order of their first calls; on a GPU that is idle."""
        if not self._on_gpu:
            return {name: sum(end - start for start, end in marks) for name, marks in self.marks.items()}
        return {name: sum(a.elapsed_time(b) for a, b in marks) / 1e3 for name, marks in self.marks.items()}


class Timed(Strategy):
    """A strategy whose calls the stopwatch times."""

    def __init__(self, strategy: Strategy, watch: Stopwatch) -> None:
        self.in_blocks, self.reads_input = strategy.in_blocks, strategy.reads_input
        self.follows_visibility = strategy.follows_visibility
        self._call = watch.timed("attention across views", strategy)

    def __call__(self, *args: object) -> Tensor:
        """See `Strategy.__call__`."""
        return self._call(*args)


@contextmanager
def watched(model: nn.Module, watch: Stopwatch) -> Iterator[None]:
    """Time blocks, those across views without their attention, and heads, by their modules' names without numbers."""
    across, replaced = {id(block) for block in model.across_views}, []
    for name, module in model.named_modules():
        label = re.sub(r"\.\d+", "", name)
        if id(module) in across:
            label += ", across views, all but attention"
            methods = [(module, "norm_first"), (module, "after")]
            methods += [(module.attn, method) for method in ("project", "prepare", "prepare_in_blocks", "gates")]
        elif isinstance(module, Block) or name in model.full_precision:
            methods = [(module, "forward")]
        else:
            continue
        for owner, method in methods:
            setattr(owner, method, watch.timed(label, getattr(owner, method)))
        replaced += methods
    try:
        yield
    finally:
        for owner, method in replaced:
            delattr(owner, method)


def print_profile(model: nn.Module, images: Tensor, strategy: Strategy, parts: bool) -> None:
    """Tables of the network's parts and of its longest kernels (on a CPU: operations), each from a run of its own."""
    on_gpu = next(model.parameters()).is_cuda
    forward(model, images, strategy, parts)  # libraries choose, kernels are compiled
    watch = Stopwatch(on_gpu)
    with watched(model, watch):
        start = now(on_gpu)
        forward(model, images, Timed(strategy, watch), parts)
        whole = now(on_gpu) - start
    seconds = watch.seconds()
    seconds["everything else"] = whole - sum(seconds.values())
    print("| part | s | share |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.4f} | {value / whole:.1%} |")
    print(f"| all | {whole:.4f} | |\n")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as record:
        forward(model, images, strategy, parts)
        now(on_gpu)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    rows = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
        for event in record.key_averages()
        if event.device_type == kind
    ]
    whole = sum(row[0] for row in rows)
    print(f"| {'kernel' if on_gpu else 'operation'} | calls | s | share |\n|---|---|---|---|")
    for microseconds, calls, name in sorted(rows, reverse=True)[:KERNELS]:
        name = name.replace("|", "/")[:100]
        print(f"| {name} | {calls} | {microseconds / 1e6:.4f} | {microseconds / whole:.1%} |")


def differences(out: tuple[Tensor, Tensor], dense: tuple[Tensor, Tensor], trained: bool) -> str:
    """Cells: median and 95th percentile of |log depth ratio|, median angle between rotations in degrees.

    Untrained heads give quaternions near zero, whose angles mean nothing: then there is no angle.
    """
    log_ratio = (out[0] / dense[0]).log().abs().flatten()
    chord = (out[1] - dense[1]).flatten(1).norm(dim=1)  # = 2 sqrt(2) sin(angle / 2)
    angle = 2 * torch.rad2deg(torch.asin((chord / 8**0.5).clamp(max=1)))
    p95 = log_ratio.kthvalue(max(1, int(0.95 * len(log_ratio)))).values
    return f"{log_ratio.median():.1e} | {p95:.1e} | {f'{angle.median():.3f}' if trained else '–'}"


def row(
    model: nn.Module, images: Tensor, name: str, base: tuple | None, how: argparse.Namespace
) -> tuple[str, tuple | None]:
    """Cells of a configuration, and its seconds and output for the rows below."""
    try:
        seconds, peak, out = seconds_and_peak(model, images, OPTIONS[name], how)
        result = seconds, out
    except torch.OutOfMemoryError:
        return "out of memory | – | – | – | – | –", None
    except ValueError as refusal:
        return f"{refusal} | – | – | – | – | –", None
    moved = differences(result[1], base[1], bool(how.checkpoint)) if base else "– | – | –"
    times = f"{base[0] / seconds:.2f}" if base else "–"
    return f"{seconds:.3f} | {times} | {peak:.1f} | {moved}", result


@torch.inference_mode()
def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several_views = [name for name in BACKBONES if name not in SINGLE_VIEW]
    parser.add_argument("--backbones", nargs="+", default=["pi3", "vggt-1b", "da3-large"], choices=several_views)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=OPTIONS)
    parser.add_argument("--views", type=int, nargs="+", default=[32, 128, 256, 512, 1024])
    parser.add_argument(
        "--size", type=int, nargs=2, default=(392, 504), help="height and width, multiples of 56 pixels"
    )
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["bf16"], help="one after the other")
    parser.add_argument("--checkpoint", help="published weights of the one backbone that is named")
    parser.add_argument("--parts", action="store_true", help="images and maps on the host, the GPU sees chunks of them")
    parser.add_argument("--graph", action="store_true", help="replay the network as a CUDA graph")
    parser.add_argument("--profile", action="store_true", help="where time goes instead of how much it is")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.checkpoint and len(args.backbones) > 1:
        parser.error("--checkpoint is of one backbone: name it in --backbones")
    if args.graph and (args.parts or args.tiny or args.profile):
        parser.error("--graph is of a GPU alone, and of a whole: leave --parts, --tiny and --profile out")
    if args.tiny and (args.checkpoint or not TINY.keys() >= set(args.backbones)):
        parser.error(f"--tiny has random weights, and of {', '.join(TINY)} alone")
    if args.tiny:
        args.views, args.size, args.precision = [4, 101], (56, 56), ["fp32"]
    device = torch.device("cpu" if args.tiny else "cuda")
    name = "CPU" if args.tiny else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {args.size[1]} x {args.size[0]} pixels")
    for backbone in args.backbones:
        bases: dict[int, tuple | None] = {}
        for precision in args.precision:
            model = make(backbone, precision, args, device)
            if precision == args.precision[0]:
                weights = "trained" if args.checkpoint else "random"
                millions = sum(x.numel() for x in model.state_dict().values()) / 1e6  # in FP8 they are buffers
                print(f"\n### {backbone}, {weights} weights, {millions:.0f} M parameters\n")
                if not args.profile:
                    print(HEADER)
                    print("|---" * 9 + "|")
            for views in args.views:
                images = sequence(views, *args.size, torch.device("cpu") if args.parts else device)
                for strategy in sorted(args.strategies, key=lambda name: name != "dense"):
                    if args.profile:
                        print(f"\n#### {views} views, {precision}, {strategy}\n")
                        print_profile(model, images, OPTIONS[strategy], args.parts)
                    else:
                        cells, result = row(model, images, strategy, bases.get(views), args)
                        if strategy == "dense":
                            bases.setdefault(views, result)
                        print(f"| {views} | {precision} | {strategy} | {cells} |", flush=True)
                    gc.collect()
                    if not args.tiny:
                        torch.cuda.empty_cache()
            del model, images
            gc.collect()


if __name__ == "__main__":
    main()
