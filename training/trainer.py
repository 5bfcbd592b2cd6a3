"""Train the compact model on rendered scenes, in two stages.

    torchrun --standalone --nproc_per_node 4 -m speed3r_ros.training.trainer --out runs/dense --minutes 14.5 \\
        --attention dense --bidirectional --compile
    torchrun --standalone --nproc_per_node 4 -m speed3r_ros.training.trainer --out runs/compact --minutes 22 \\
        --init runs/dense/weights --lr 6e-4 --ema 0.999 --compile

The first stage is dense and bidirectional; the second is sparse and causal, under exactly the incremental visibility that
the model is deployed with. From scratch, the second alone does not learn to match views (docs/benchmarks.md).

One process per GPU (or one on the CPU for a trial: `--frames 48 --steps 2`). The schedule is in minutes of training, so
that a run fits a machine's time; `--resume` continues from the checkpoint in --out.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from speed3r_ros.model import weights
from speed3r_ros.model.memory import visibility
from speed3r_ros.model.network import Block, GlobalBlock, Network, NetworkConfig
from speed3r_ros.training.evaluate import evaluate_rendered
from speed3r_ros.training.losses import Batch, losses
from speed3r_ros.training.render import SPLITS, SceneDataset

VIEWS = (2, 4, 6, 8, 12, 16, 24)  # frames of a sequence; drawn per step with the odds below
VIEW_ODDS = (8, 15, 15, 22, 20, 14, 6)
WINDOW, ANCHORS, BANK = 4, 6, 32  # the deployed memory
PATTERNS = 32  # random keyframe patterns per length


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, weights and log")
    parser.add_argument("--minutes", type=float, default=22.0, help="length of the schedule, in minutes of training")
    parser.add_argument("--steps", type=int, default=0, help="stop after this many steps, whatever the time (trials)")
    parser.add_argument("--frames", type=int, default=240, help="frames per step and process, a multiple of 48")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.03)
    parser.add_argument("--warmup", type=int, default=400, help="steps of linear warm-up")
    parser.add_argument("--hold", type=float, default=0.35, help="share of the schedule before the cosine decay starts")
    parser.add_argument(
        "--ema", type=float, default=0.998, help="decay of the weights' moving average, which is shipped"
    )
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--attention", default="speed3r", choices=("speed3r", "dense"))
    parser.add_argument("--bidirectional", action="store_true", help="every frame sees every frame (the first stage)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks (CUDA)")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--init", default="", help="start from these weights (a name or folder) with a fresh optimiser")
    parser.add_argument("--tiny", action="store_true", help="a very small network, for trials on a CPU")
    args = parser.parse_args(argv)
    if args.frames % math.lcm(*VIEWS):
        parser.error(f"--frames {args.frames}: use a multiple of {math.lcm(*VIEWS)}")
    return args


class VisibilityBank:
    """Precomputed masks of random keyframe patterns, per sequence length."""

    def __init__(self, device: torch.device, seed: int, bidirectional: bool) -> None:
        draw = random.Random(seed)
        self.masks: dict[int, tuple[Tensor, Tensor]] = {}
        for views in VIEWS:
            pairs = []
            for _ in range(PATTERNS):
                rate = draw.choice((0.3, 0.6, 1.0))
                keyframes = [t == 0 or draw.random() < rate for t in range(views)]
                pairs.append(visibility(keyframes, WINDOW, ANCHORS, BANK))
            fine, coarse = (torch.stack(x).to(device) | bidirectional for x in zip(*pairs))
            self.masks[views] = fine, coarse

    def draw(self, sequences: int, views: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Masks (sequences, views, views), a pattern for each sequence."""
        index = torch.randint(PATTERNS, (sequences,), generator=generator, device=generator.device)
        fine, coarse = self.masks[views]
        return fine[index], coarse[index]


def optimiser(network: Network, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW; no decay on vectors and tokens."""
    matrices = [
        p for name, p in network.named_parameters() if p.dim() >= 2 and "token" not in name and "first" not in name
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in network.parameters() if id(p) not in chosen]
    groups = [dict(params=matrices, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, progress: float, args: argparse.Namespace) -> float:
    """Warm-up, plateau, cosine to 2 %."""
    decay = min(1.0, max(0.0, (progress - args.hold) / (1 - args.hold)))
    return args.lr * min(1.0, (step + 1) / args.warmup) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * decay)))


class Trainer:
    """One process of the run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.monotonic()
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = False  # poses are small float32 products and must stay exact
            torch.backends.cudnn.benchmark = True
            torch.backends.cuda.enable_cudnn_sdp(False)  # no plan building for each shape
        if self.world > 1:
            dist.init_process_group("nccl" if cuda else "gloo", **(dict(device_id=self.device) if cuda else {}))
        args.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        config = (
            NetworkConfig(channels=64, encoder_blocks=1, alternating_blocks=1, stem=16, decoder=8)
            if args.tiny
            else NetworkConfig()
        )
        self.network = (weights.load(args.init) if args.init else Network(config)).to(self.device).train()
        self.optimiser = optimiser(self.network, args)
        self.parameters = list(self.network.parameters())
        self.step, self.trained = 0, 0.0
        self.average = [p.detach().clone() for p in self.parameters]
        if args.resume:
            self._load()
        self.dataset = SceneDataset(
            self.device,
            1000 + 7919 * self.rank + self.step * 13 + args.seed,
            config.height,
            config.width,
            textures_per_family=24 if cuda else 1,
            samples=4 if cuda else 1,
            world=SPLITS["world"],
            verbose=self.rank == 0,
        )
        self.visibility = VisibilityBank(self.device, args.seed, args.bidirectional)
        self.generator = torch.Generator(self.device).manual_seed(args.seed + 31 * self.rank + self.step)
        if args.compile:
            torch._dynamo.config.recompile_limit = 64
            for cls, method in ((Block, "before"), (Block, "after"), (GlobalBlock, "before_global")):
                setattr(cls, method, torch.compile(getattr(cls, method), dynamic=False))
        self.model = (
            torch.nn.parallel.DistributedDataParallel(
                self.network,
                device_ids=[self.device.index] if cuda else None,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
                find_unused_parameters=args.attention == "dense",  # the gates
            )
            if self.world > 1
            else self.network
        )

    def say(self, text: str) -> None:
        """Print and log, from the first process."""
        if self.rank == 0:
            line = f"{time.monotonic() - self.started:6.0f}s {text}"
            print(line, flush=True)
            with open(self.args.out / "log.txt", "a") as log:
                log.write(line + "\n")

    def update(self, batch: Batch, shift: int) -> dict[str, Tensor]:
        """One optimiser step; non-finite gradients skip it on the device, without a synchronisation."""
        images = batch["img"]
        sequences, views = images.shape[:2]
        fine, coarse = self.visibility.draw(sequences, views, self.generator)
        known = (torch.rand(sequences, generator=self.generator, device=self.device) < 0.5)[:, None].expand(-1, views)
        rays = batch["ray"].permute(0, 3, 1, 2)[:, None].expand(-1, views, -1, -1, -1)
        with torch.autocast(self.device.type, torch.bfloat16):
            out = self.model(images, fine, coarse, rays, known, self.args.attention, self.args.top_k)
        total, figures = losses(out, batch, shift)
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimiser.found_inf = (~torch.isfinite(norm)).float()
        self.optimiser.step()
        return dict(figures, grad_norm=norm.detach().clamp(max=1e4), skipped=self.optimiser.found_inf)

    def run(self) -> None:
        """Train until the schedule or the steps end; then write the averaged weights and evaluate them."""
        args, span = self.args, self.args.minutes * 60
        self.say(
            f"{sum(p.numel() for p in self.parameters) / 1e6:.2f} M parameters, {self.world} processes, "
            f"{args.frames} frames per step and process, torch {torch.__version__}"
        )
        batch = self.dataset.batch(args.frames // VIEWS[0], VIEWS[0])
        if args.compile and self.device.type == "cuda":  # compile before the clock starts
            self.update_dry(batch)
            self.say("compiled")
        sums: dict[str, Tensor] = {}
        count = frames = 0
        begun = logged = saved = time.monotonic()
        base, progress, first_step = self.trained, 0.0, self.step
        while True:
            if (self.step - first_step) % 10 == 0:
                self.trained = base + time.monotonic() - begun
                state = torch.tensor(
                    [self.trained / span, float(self.trained >= span)], dtype=torch.float64, device=self.device
                )
                if self.world > 1:
                    dist.broadcast(state, 0)
                progress, done = float(state[0]), float(state[1]) > 0
                if done or (args.steps and self.step - first_step >= args.steps):
                    break
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate(self.step, progress, args)
            draw = random.Random(self.step * 7919 + args.seed)  # the same on every process
            views = draw.choices(VIEWS, VIEW_ODDS)[0]
            if self.step % 60 == 59:
                self.dataset.refresh()
            figures = self.update(self.dataset.batch(args.frames // views, views), draw.randrange(1, views))
            decay = min(args.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
            self.step += 1
            count += 1
            frames += args.frames * self.world
            for name, value in figures.items():
                sums[name] = sums.get(name, 0) + value
            now = time.monotonic()
            if self.rank == 0 and (now - logged > 20 or args.steps):
                means = " ".join(f"{name} {float(value) / count:.4g}" for name, value in sums.items())
                memory = f", {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB" if self.device.type == "cuda" else ""
                self.say(f"p {progress:.3f} step {self.step} {means} | {frames / (now - logged):.0f} frames/s{memory}")
                sums, count, frames, logged = {}, 0, 0, now
            if self.rank == 0 and now - saved > 100:
                self._save()
                saved = time.monotonic()
        self.say(f"{self.step} steps, {self.trained:.0f} s of training")
        if self.rank == 0:
            self._save()
            self.evaluate()
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def update_dry(self, batch: Batch) -> None:
        """Forward and backward without a step, so that compilation is outside the schedule."""
        fine, coarse = self.visibility.draw(*batch["img"].shape[:2], self.generator)
        views = batch["img"].shape[1]
        rays = batch["ray"].permute(0, 3, 1, 2)[:, None].expand(-1, views, -1, -1, -1)
        known = torch.ones(batch["img"].shape[:2], dtype=torch.bool, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            out = self.model(batch["img"], fine, coarse, rays, known, self.args.attention, self.args.top_k)
        losses(out, batch, 1)[0].backward()
        self.optimiser.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    def averaged(self) -> Network:
        """A float32 copy of the network with the averaged weights, rounded to the fp16 that is shipped."""
        network = copy.deepcopy(self.network)
        with torch.no_grad():
            for p, average in zip(network.parameters(), self.average):
                p.copy_(average.half().float())
        return network.eval().requires_grad_(False)

    @torch.compiler.set_stance("force_eager")
    def evaluate(self) -> None:
        """Held-out rendered sequences, as a table and as JSON."""
        network, rows = self.averaged(), {}
        count = 96 if self.device.type == "cuda" else 2
        for split, views in itertools.product(SPLITS, (2, 4, 8, 12, 24)):
            row = evaluate_rendered(
                network,
                count,
                views,
                self.device,
                attention=self.args.attention,
                top_k=self.args.top_k,
                seed=100 + views,
                split=split,
            )
            rows[f"{split}, {views} views"] = row
            self.say(f"held-out {split}, {views} views: " + " ".join(f"{k} {v:.4g}" for k, v in row.items()))
        (self.args.out / "held_out.json").write_text(json.dumps(rows, indent=1))

    def _save(self) -> None:
        weights.save(
            self.averaged(),
            self.args.out / "weights",
            {"trained_seconds": f"{self.trained:.0f}", "steps": str(self.step)},
        )
        path = self.args.out / "checkpoint.pt"
        state = dict(
            network=self.network.state_dict(),
            optimiser=self.optimiser.state_dict(),
            average=self.average,
            step=self.step,
            trained=self.trained,
        )
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def _load(self) -> None:
        path = self.args.out / "checkpoint.pt"
        if not path.exists():
            raise SystemExit(f"--resume: {path} does not exist; leave --resume out to start afresh")
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average, self.step, self.trained = state["average"], state["step"], state["trained"]


def main(argv: list[str] | None = None) -> None:
    """Command-line entry."""
    Trainer(arguments(argv)).run()


if __name__ == "__main__":
    main()
