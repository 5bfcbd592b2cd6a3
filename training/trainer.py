"""The training loop: one class and one loop for all recipes; on one process, or several under torchrun.

Whatever is random in a step follows from the seed and the step's number, so that a run that was stopped goes on as if
it had not been (bit for bit on a CPU, with a schedule in steps and the optimiser's state in fp32).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import signal
import time
from concurrent import futures
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from speed3r_ros.mapping.files import written_whole
from speed3r_ros.model import weights
from speed3r_ros.model.network import Block, GlobalBlock, Network
from speed3r_ros.model.quantised import WideBlock
from speed3r_ros.training import checkpoint
from speed3r_ros.training.config import TrainingConfig, image_sizes, require_runnable
from speed3r_ros.training.evaluate import evaluate_rendered
from speed3r_ros.training.losses import Batch
from speed3r_ros.training.muon import Muon
from speed3r_ros.training.recipes import RECIPES, Draw, Order, Stage, draw_sequences, lengths
from speed3r_ros.training.render import SPLITS

LOG_EVERY = 20.0  # seconds
AHEAD = 4  # steps whose data is begun before they are
WIDE = "qkv", "proj", "fc1", "fc2"  # the blocks' layers whose matrices Muon can move
MOMENTS = dict(mean="exp_avg", square="exp_avg_sq")  # their names in a checkpoint and in an optimiser's state
UNREAD = dict(
    dense={"gate", "proj_lin"}, speed3r={"proj_lin"}, lite3r={"gate"}
)  # layers that kinds of attention leave out
CLOCK_EVERY = 10  # steps after which processes agree on the time and on a wish to stop


def wide_matrices(network: nn.Module) -> list[nn.Parameter]:
    """Trained weights of the blocks' layers `WIDE`; heads have layers of the same names, which are AdamW's."""
    layers = (part for block in network.modules() if isinstance(block, WideBlock) for part in block.named_modules())
    return [layer.weight for name, layer in layers if name.rpartition(".")[2] in WIDE and layer.weight.requires_grad]


def optimisers(network: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """AdamW of what is trained, no decay on vectors and tokens; with `muon`, Muon of the blocks' wide matrices before it."""
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    wide = wide_matrices(network) if config.optimiser == "muon" else []
    chosen = {id(p) for p in wide}
    matrices = [
        p for name, p in named if p.dim() >= 2 and "token" not in name and "first" not in name and id(p) not in chosen
    ]
    chosen |= {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=others, weight_decay=0.0)]
    found: list[torch.optim.Optimizer] = [Muon(wide, config.lr, config.weight_decay)] if wide else []
    if groups := [g for g in groups if g["params"]]:
        found.append(torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True))
    return found


def learning_rate(peak: float, step: int, progress: float, config: TrainingConfig) -> float:
    """Warm-up, plateau, then a fall to `floor` of the peak. step, progress: in the stage."""
    fall = min(1.0, max(0.0, (progress - config.hold) / (1 - config.hold)))
    left = 1 - fall if config.decay == "linear" else 0.5 + 0.5 * math.cos(math.pi * fall)
    return peak * min(1.0, (step + 1) / config.warmup) * (config.floor + (1 - config.floor) * left)


def whole(x: Tensor) -> Tensor:
    """The full tensor of one that FSDP has split; all processes must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def put(x: Tensor, value: Tensor) -> None:
    """Overwrite x, which FSDP may have split, by a full tensor."""
    x.copy_(distribute_tensor(value, x.device_mesh, x.placements) if isinstance(x, DTensor) else value)


class Trainer:
    """One process of a run. out: folder for `config.yaml`, `log.txt`, `checkpoint/`, `weights/` and `held_out.json`.

    resume: go on from the checkpoint in `out`. ValueError with one line for settings, weights, sequences or checkpoints
    that cannot work; nothing is written then.
    """

    def __init__(self, recipe: str, config: TrainingConfig, out: Path, resume: bool = False) -> None:
        require_runnable(recipe, config)
        if resume != (out / "checkpoint").is_dir():
            state, remedy = (
                ("no", "leave --resume out") if resume else ("a", "give --resume to go on, or another folder")
            )
            raise ValueError(f"{out}: has {state} checkpoint; {remedy}")
        self.name, self.out, self.started = recipe, out, time.monotonic()
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = False  # poses are small float32 products and must stay exact
            torch.backends.cudnn.benchmark = True
            torch.backends.cuda.enable_cudnn_sdp(False)  # no plan building for each shape
        torch.manual_seed(config.seed)
        self.recipe = RECIPES[recipe](config, self.device)
        self.config = config = self.recipe.config
        self.network = self.recipe.network.train()
        self.stages, self.sizes = self.recipe.stages(), image_sizes(config)
        self.data = self.recipe.data(self.rank)
        self._begun: dict[Order, list[futures.Future]] = {}  # data of the coming steps
        self.waited = 0.0  # seconds for it, since the last line of the log
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo", **(dict(device_id=self.device) if cuda else {}))
        self.unsharded: nn.Module | None = None  # what FSDP has split, in its form before
        if self.world > 1 and config.parallel == "fsdp":
            self._shard()
        self.parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step = self.stage_number = self.stage_begun = 0  # steps done; the stage, and the step at which it began
        self.trained = 0.0  # seconds
        self.wished = self.stop = False  # a signal came; all processes know
        if config.compile:
            torch._dynamo.config.recompile_limit = 64
            for cls, method in ((Block, "before"), (Block, "after"), (GlobalBlock, "before_global")):
                setattr(cls, method, torch.compile(getattr(cls, method), dynamic=False))
        self._prepare_stage()
        if resume:
            self._load()
        self.events = self._open_events()
        out.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------------------------------------ schedule

    @property
    def progress(self) -> float:
        """Share of the schedule that is done."""
        return self._progress_at(self.step)

    def _progress_at(self, step: int) -> float:
        c = self.config
        return min(1.0, step / c.steps if c.steps else self.trained / (60 * c.minutes))

    def stage_progress(self, step: int | None = None) -> tuple[int, float]:
        """The stage that the schedule has come to, now or at a step, and the share of it that is done."""
        begin, progress = 0.0, self._progress_at(self.step if step is None else step)
        for number, stage in enumerate(self.stages):
            if progress < begin + stage.share or number == len(self.stages) - 1:
                return number, (progress - begin) / stage.share
            begin += stage.share
        raise AssertionError

    @property
    def stage(self) -> Stage:
        """The stage that is being trained."""
        return self.stages[self.stage_number]

    def _size_at(self, done: float) -> tuple[int, int]:
        """The one of `sizes` whose turn it is at a share of a stage."""
        return self.sizes[min(len(self.sizes) - 1, int(done * len(self.sizes)))]

    @property
    def trained_sizes(self) -> tuple[tuple[int, int], ...]:
        """Sizes (h, w) that the weights are for now, the smallest first: of those that take turns, the latest."""
        if self.config.mix_sizes:
            return tuple(sorted(set(self.sizes), key=lambda size: (math.prod(size), size)))
        return (self._size_at(self.stage_progress(max(0, self.step - 1))[1]),)

    def _prepare_stage(self) -> None:
        """Optimisers and a wrapper for several processes, made for the present stage."""
        self.optimisers = optimisers(self.network, self.config)
        self._states = {p: o.state for o in self.optimisers for group in o.param_groups for p in group["params"]}
        self.model = self.network
        if self.world > 1 and self.config.parallel == "ddp":
            self.model = nn.parallel.DistributedDataParallel(
                self.network,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
                find_unused_parameters=any(UNREAD[self.stage.attention] & set(n.split(".")) for n in self.parameters),
            )

    def _next_stage(self, number: int) -> None:
        """Begin another stage, from the averaged weights."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.average[name])
        self.stage_number, self.stage_begun = number, self.step
        self._prepare_stage()
        self.say(f"stage {self.stage.name} at step {self.step}")

    def order(self, step: int) -> Order:
        """What a step asks of its data, as far as the schedule can tell now."""
        draw = random.Random(f"{self.config.seed} {step}")  # the same on every process
        _, done = self.stage_progress(step)
        views = draw.choices(*lengths(self.config, done))[0]
        size = draw.choice(self.sizes) if self.config.mix_sizes else self._size_at(done)
        frames = self.config.frames * math.prod(self.sizes[0]) // math.prod(size)
        return Order(step, max(1, frames // views), views, size)

    def draw(self) -> Draw:
        """What the coming step does."""
        order = self.order(self.step)
        shift = random.Random(f"{self.config.seed} {self.step} shift").randrange(1, order.views)
        first = self.rank * order.sequences
        seeds = [f"{self.config.seed} {self.step} {i}" for i in range(first, first + order.sequences)]
        parts = draw_sequences(seeds, order.views, self.stage.bidirectional)
        masks = (x.to(self.device, non_blocking=True) for x in parts)
        return Draw(order, self.stage, self.progress, shift, *masks)

    def look_ahead(self) -> None:
        """Begin the data of the coming steps, so that it is there when they are."""
        for step in range(self.step, min(self.step + AHEAD, self.config.steps or math.inf)):
            order = self.order(step)
            if order not in self._begun:
                self._begun[order] = self.data.begin(order)

    def batch(self, order: Order) -> Batch:
        """The data of the coming step."""
        begun = self._begun.pop(order, None) or self.data.begin(order)
        start = time.monotonic()
        futures.wait(begun)
        self.waited += time.monotonic() - start
        for stale in [other for other in self._begun if other.step <= order.step]:
            for future in self._begun.pop(stale):
                future.cancel()
        return self.data.batch(order, begun)

    # ---------------------------------------------------------------------------------------------------------- loop

    def run(self, until: int | None = None) -> None:
        """Train to the end of the schedule, then write the averaged weights and evaluate them.

        until: stop after this step, as an interruption does: with a checkpoint, to be resumed.
        """
        c = self.config
        self.say(
            f"{self.name}: {sum(p.numel() for p in self.parameters.values()) / 1e6:.2f} M parameters trained, {self.world} "
            f"processes, {c.frames} frames per step and process, torch {torch.__version__}"
        )
        if self.rank == 0:
            settings = dict(recipe=self.name, **asdict(c))
            with written_whole(self.out / "config.yaml") as partial:
                partial.write_text(yaml.safe_dump(settings, sort_keys=False))
        if c.compile and self.device.type == "cuda":  # compile before the clock starts
            self._gradients(self.draw())
            self.network.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            self.say("compiled")
        handlers = {number: signal.signal(number, self._wish_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        sums: dict[str, Tensor] = {}
        count = frames = 0
        begun = logged = saved = time.monotonic()
        self.waited = 0.0
        before = self.trained
        total = c.steps or round(60 * c.minutes)
        bar = tqdm(total=total, unit="step" if c.steps else "s", disable=None if self.rank == 0 else True)
        while self.progress < 1 and not self.stop and self.step != until:
            number, done = self.stage_progress()
            if number != self.stage_number:
                self._next_stage(number)
            rate = learning_rate(self.stage.lr, self.step - self.stage_begun, done, c)
            for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
                group["lr"] = rate
            self.look_ahead()
            draw = self.draw()
            figures = self.update(draw)
            self.step += 1
            count += 1
            frames += draw.order.sequences * draw.order.views * self.world
            for name, value in figures.items():
                sums[name] = sums.get(name, 0) + value
            now = time.monotonic()
            save_now = self._tick(before + now - begun, now - saved > c.save_every)
            bar.n = min(total, self.step if c.steps else round(self.trained))
            bar.update(0)
            if self.rank == 0 and now - logged > LOG_EVERY:
                self._log(sums, count, frames, now - logged, rate)
                sums, count, frames, logged = {}, 0, 0, now
            if save_now:
                self.save()
                saved = now
        bar.close()
        if self.rank == 0 and count:
            self._log(sums, count, frames, max(time.monotonic() - logged, 1e-9), rate)
        self.save()
        for number, handler in handlers.items():  # only now: torchrun passes on a signal that processes already had
            signal.signal(number, handler)
        self.say(f"{self.step} steps, {self.trained:.0f} s of training, {'done' if self.progress >= 1 else 'stopped'}")
        if self.progress >= 1:
            self.evaluate()
        if self.world > 1:
            dist.barrier()  # for the first one's files
        if self.events:
            self.events.close()

    def _gradients(self, draw: Draw) -> dict[str, Tensor]:
        """Forward and backward; figures to log."""
        self.recipe.resize(draw.order.size)
        total, figures = self.recipe.loss(self.model, self.batch(draw.order), draw)
        self.network.zero_grad(set_to_none=True)
        total.backward()
        return figures

    def update(self, draw: Draw) -> dict[str, Tensor]:
        """One optimiser step."""
        return self._gradients(draw) | self.apply_gradients()

    def apply_gradients(self) -> dict[str, Tensor]:
        """Move parameters and their average; non-finite gradients move nothing, on the device, without a synchronisation."""
        norm = whole(nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip, foreach=True))
        skipped = (~torch.isfinite(norm)).float()
        for optimiser in self.optimisers:
            optimiser.found_inf = skipped
            optimiser.step()
        age = self.step - self.stage_begun
        decay = min(self.stage.ema, (1 + age) / (10 + age))
        with torch.no_grad():
            parameters = [p.detach() for p in self.parameters.values()]
            torch._foreach_lerp_(list(self.average.values()), parameters, 1 - decay)
        return dict(grad_norm=norm.detach().clamp(max=1e4), skipped=skipped)

    def _wish_to_stop(self, number: int, frame: FrameType | None) -> None:
        self.wished = True

    def _tick(self, trained: float, save: bool) -> bool:
        """Take over the time and a wish to stop, from the first process now and then; whether to save now."""
        if self.world == 1:
            self.trained, self.stop = trained, self.wished
            return save
        if self.step % CLOCK_EVERY:
            return False
        state = torch.tensor([trained, self.wished, save], dtype=torch.float64, device=self.device)
        dist.broadcast(state, 0)
        self.trained, self.stop, save = state[0].item(), bool(state[1]), bool(state[2])
        return save

    # -------------------------------------------------------------------------------------------------------- output

    def say(self, text: str) -> None:
        """Print and log, from the first process."""
        if self.rank == 0:
            line = f"{time.monotonic() - self.started:6.0f}s {text}"
            tqdm.write(line)
            with open(self.out / "log.txt", "a") as log:
                log.write(line + "\n")

    def _open_events(self) -> object | None:
        if not self.config.tensorboard or self.rank:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "tensorboard = True: it is not installed; pip install 'speed3r_ros[train]', or leave it out"
            ) from error
        return SummaryWriter(self.out / "events")

    def _log(self, sums: dict[str, Tensor], count: int, frames: int, seconds: float, lr: float) -> None:
        """Means since the last time, of `count` steps."""
        means = {name: float(value) / count for name, value in sums.items()}
        rate, waited, self.waited = frames / seconds, self.waited / seconds, 0.0
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB" if self.device.type == "cuda" else ""
        text = " ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.say(
            f"p {self.progress:.3f} step {self.step} {text} | lr {lr:.2g}, {rate:.0f} frames/s, {waited:.0%} waiting for data{memory}"
        )
        if self.events:
            for name, value in {**means, "lr": lr, "frames per second": rate}.items():
                self.events.add_scalar(f"train/{name}", value, self.step)

    def averaged(self) -> nn.Module:
        """A float32 copy of the network with the averaged weights, rounded to the fp16 that is written.

        With FSDP all processes must ask.
        """
        average = {name: whole(value) for name, value in self.average.items()}
        network = copy.deepcopy(self.unsharded or self.network)
        with torch.no_grad():
            for name, p in network.named_parameters():
                if name in average:
                    p.copy_(average[name].half().float())
        if isinstance(network, Network):
            network.trained_sizes = self.trained_sizes
            network.resize(*network.trained_sizes[-1])
        return network.to(self.device).eval().requires_grad_(False)

    @torch.compiler.set_stance("force_eager")
    def evaluate(self) -> None:
        """Held-out rendered sequences, logged and as JSON, for the compact network; processes take turns of a row each."""
        network, rows = self.averaged(), {}
        if not self.config.held_out or not isinstance(network, Network):
            return
        wanted = list(itertools.product(SPLITS, (2, 4, 8, 12, 24)))
        for first in range(0, len(wanted), self.world):
            turn, row = wanted[first : first + self.world], None
            if self.rank < len(turn):
                split, views = turn[self.rank]
                row = evaluate_rendered(
                    network,
                    self.config.held_out,
                    views,
                    self.device,
                    attention=self.stages[-1].attention,
                    top_k=self.config.top_k,
                    seed=100 + views,
                    split=split,
                )
            parts = [row] * self.world
            if self.world > 1:
                dist.all_gather_object(parts, row)
            for (split, views), row in zip(turn, parts):
                rows[f"{split}, {views} views"] = row
                self.say(f"held-out {split}, {views} views: " + " ".join(f"{k} {v:.4g}" for k, v in row.items()))
        if self.rank == 0:
            with written_whole(self.out / "held_out.json") as partial:
                numbers = {
                    name: {k: v if math.isfinite(v) else None for k, v in row.items()} for name, row in rows.items()
                }
                partial.write_text(json.dumps(numbers, indent=1, allow_nan=False))

    def save(self) -> None:
        """Write the checkpoint and the averaged weights, from the first process; with FSDP all must call."""
        tensors, moments, steps = {}, {}, []
        for name, p in self.parameters.items():
            tensors[f"parameter.{name}"], tensors[f"average.{name}"] = whole(p), whole(self.average[name])
            state = self._states[p].get(p, {})
            steps.append(float(state.get("step", 0)))
            moments |= {f"{kind}.{name}": whole(state[key]) for kind, key in MOMENTS.items() if key in state}
        network = self.averaged()
        if self.rank:
            return
        note = dict(recipe=self.name, step=self.step, trained=self.trained, stage=self.stage_number)
        note |= dict(stage_begun=self.stage_begun, steps=steps)
        checkpoint.write(self.out / "checkpoint", tensors, moments, self.config.optimiser_state, note)
        if isinstance(network, Network):
            seconds = {"trained_seconds": f"{self.trained:.0f}", "steps": str(self.step)}
            weights.save(network, self.out / "weights", seconds)
        else:
            (self.out / "weights").mkdir(exist_ok=True)
            with written_whole(self.out / "weights" / "model.safetensors") as partial:
                save_file({name: x.half().contiguous() for name, x in network.state_dict().items()}, partial)

    @torch.no_grad()
    def _load(self) -> None:
        state, note = checkpoint.read(self.out / "checkpoint")
        if note["recipe"] != self.name:
            raise ValueError(f"{self.out}: the checkpoint is of the recipe {note['recipe']}, not {self.name}")
        self.step, self.trained = note["step"], note["trained"]
        self.stage_number, self.stage_begun = note["stage"], note["stage_begun"]
        self._prepare_stage()
        for (name, p), steps in zip(self.parameters.items(), note["steps"]):
            full = whole(p)
            put(p, checkpoint.decode(f"parameter.{name}", state, full))
            put(self.average[name], checkpoint.decode(f"average.{name}", state, full))
            of_p = self._states[p].setdefault(p, {})
            if steps and not of_p:  # AdamW's begins with its first step; Muon's is there, and takes over AdamW's mean
                of_p |= dict(step=torch.tensor(steps, device=p.device))
                of_p |= {key: torch.zeros_like(p) for key in MOMENTS.values()}
            for kind, key in MOMENTS.items():
                if key in of_p:
                    put(of_p[key], checkpoint.decode(f"{kind}.{name}", state, full))

    def _shard(self) -> None:
        """Split weights, gradients and the optimiser's state over the processes (FSDP); a step gathers the weights."""
        if isinstance(self.network, Network):
            raise ValueError("parallel = 'fsdp': is for backbones; the compact network is small, use ddp")
        from torch.distributed.fsdp import fully_shard

        self.unsharded = copy.deepcopy(self.network).cpu()
        fully_shard(self.network)
