"""The recipes: what is trained, on what, with which loss. The loop is `trainer`, the settings are in `config`."""

from __future__ import annotations

import os
import random
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from math import cos, pi
from multiprocessing import get_context, parent_process, resource_tracker

import numpy as np
import torch
from torch import Tensor, nn

from speed3r_ros.model import weights
from speed3r_ros.model.attention import Strategy, dense
from speed3r_ros.model.backbones.checkpoints import CHECKPOINTS
from speed3r_ros.model.backbones.pi3 import Pi3
from speed3r_ros.model.backbones.registry import load_backbone
from speed3r_ros.model.backbones.vggt import Vggt
from speed3r_ros.model.lite3r import add_linear_branch
from speed3r_ros.model.memory import visibility
from speed3r_ros.model.network import Network, NetworkConfig
from speed3r_ros.model.quantised import train_in_fp8
from speed3r_ros.model.strategies import STRATEGIES
from speed3r_ros.training.config import TrainingConfig, image_sizes
from speed3r_ros.training.distil import (
    Recorded,
    attention_loss,
    distillation_loss,
    freeze_untrained,
    geometry,
    speed3r_student,
)
from speed3r_ros.training.losses import Batch, losses, where_counted
from speed3r_ros.training.render import SPLITS, SceneDataset, WorldConfig, sample_tables
from speed3r_ros.training.sequences import SequenceDataset, open_recording
from speed3r_ros.training.textures import Rng

VIEWS = (2, 4, 6, 8, 12, 16, 24)  # frames of a sequence; drawn per step with the odds below
VIEW_ODDS = (8, 15, 15, 22, 20, 14, 6)
FIRST_LONGEST = 4  # frames of the longest sequence when a lengthening curriculum begins
WINDOW, ANCHORS, BANK = 4, 6, 32  # the deployed memory
REFRESH = 60  # steps after which a few textures are replaced
KNOWN = 0.5  # share of sequences whose intrinsics the network is given
TRAINING_SIZE = 168, 224  # (h, w) of the images that backbones are trained on by default
TINY = NetworkConfig(channels=64, encoder_blocks=1, alternating_blocks=1, stem=16, decoder=8)


@dataclass(frozen=True)
class Stage:
    """A part of the schedule, with a learning rate and a moving average of its own. share: of the schedule's length."""

    name: str
    share: float
    attention: str
    bidirectional: bool
    lr: float
    ema: float


@dataclass(frozen=True)
class Order:
    """What a step asks of its data: so many sequences per process, of so many views, of size (H, W)."""

    step: int
    sequences: int
    views: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Draw:
    """What a step does, on all processes alike; the masks are this process's part.

    progress: of the whole schedule, in [0, 1]. shift: frames between the two views that descriptors match. fine, coarse:
    (B, T, T) bool, see `Network.forward`. known: (B,) bool, whose intrinsics are given.
    """

    order: Order
    stage: Stage
    progress: float
    shift: int
    fine: Tensor
    coarse: Tensor
    known: Tensor


def lengths(config: TrainingConfig, stage_progress: float) -> tuple[list[int], list[int]]:
    """Lengths of sequences that are drawn now, and their odds."""
    longest = float(config.longest)
    if stage_progress < config.lengthening:
        longest = min(longest, FIRST_LONGEST + (longest - FIRST_LONGEST) * stage_progress / config.lengthening)
    count = max(1, sum(views <= longest for views in VIEWS))
    return list(VIEWS[:count]), list(VIEW_ODDS[:count])


@lru_cache(4096)
def deployed_visibility(keyframes: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
    """fine and coarse (T, T) bool of the deployed memory, which must not be changed."""
    return visibility(keyframes, WINDOW, ANCHORS, BANK)


def draw_sequences(seeds: list[str], views: int, bidirectional: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A sequence per seed: fine, coarse (B, T, T) bool of random patterns of keyframes, known (B,) bool, on the CPU."""
    pairs, known = [], []
    for seed in seeds:
        draw = random.Random(seed)
        rate = draw.choice((0.3, 0.6, 1.0))
        pairs.append(deployed_visibility(tuple(t == 0 or draw.random() < rate for t in range(views))))
        known.append(draw.random() < KNOWN)
    fine, coarse = (torch.stack(x) | bidirectional for x in zip(*pairs))
    return fine, coarse, torch.tensor(known)


STOPPING = signal.SIGINT, signal.SIGTERM


def prepare_process() -> None:
    """Of one that samples scenes: it shares the cores, leaves signals to the trainer, which still needs the scenes when it is
    told to stop, and ends with it, however that ends."""
    torch.set_num_threads(1)
    os.setpgid(0, 0)  # a terminal and torchrun signal groups
    handlers = [signal.signal(number, signal.SIG_IGN) for number in STOPPING]  # drops those that wait
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    for number, handler in zip(STOPPING, handlers):
        signal.signal(number, handler)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(0)), daemon=True).start()


def start_pool(count: int = 2) -> ProcessPoolExecutor:
    """Processes that sample scenes; signals wait until they have left the trainer's group."""
    resource_tracker.ensure_running()
    pool = ProcessPoolExecutor(count, get_context("spawn"), prepare_process)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        for _ in range(count):
            pool.submit(int)  # starts one
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pool


def sample_apart(world: WorldConfig | None, families: np.ndarray, seed: str, order: Order) -> dict[str, np.ndarray]:
    """`sample_tables` for a step; arrays, which travel between processes as bytes."""
    size = order.sequences, order.views, *order.size
    r = Rng("cpu", random.Random(f"{seed} scenes {order.step}").getrandbits(62))
    tables = sample_tables(world, torch.from_numpy(families), r, random.Random(f"{seed} step {order.step}"), size)
    return {name: table.numpy() for name, table in tables.items()}


class RenderedData:
    """Rendered scenes, so that a batch depends on the seed, the process and its order alone.

    Scenes are sampled beside the training: by a thread, or with a GPU, whose kernels Python has to launch, by two processes.
    """

    def __init__(self, device: torch.device, config: TrainingConfig, rank: int) -> None:
        cuda = device.type == "cuda"
        self.seed = f"{config.seed} {rank}"
        self.scenes = SceneDataset(
            device,
            1000 + 7919 * rank + config.seed,
            *image_sizes(config)[0],
            textures_per_family=24 if cuda else 1,
            samples=4 if cuda else 1,
            world=SPLITS[config.scenes],
            verbose=rank == 0,
        )
        self.refreshed = 0
        self._pool = start_pool() if cuda else ThreadPoolExecutor(1)

    def begin(self, order: Order) -> list[Future[dict[str, np.ndarray]]]:
        """Start to sample the scenes of a step."""
        families = self.scenes.textures.families.numpy()
        return [self._pool.submit(sample_apart, self.scenes.world, families, self.seed, order)]

    def batch(self, order: Order, begun: list[Future[dict[str, np.ndarray]]]) -> Batch:
        """Render what `begin` began. Steps must not go back; those passed over are caught up with."""
        while self.refreshed < order.step // REFRESH:
            self.refreshed += 1
            self._reseed(self.scenes.textures.r, f"textures {self.refreshed}")
            self.scenes.refresh()
        self._reseed(self.scenes.random, f"step {order.step}")
        self.scenes.height, self.scenes.width = order.size
        return self.scenes.render({name: torch.from_numpy(table) for name, table in begun[0].result().items()})

    def _reseed(self, rng: Rng, of: str) -> None:
        rng.g.manual_seed(random.Random(f"{self.seed} {of}").getrandbits(62))


class RecordedData:
    """Recorded sequences; a sample depends on the seed, the step and its place in the whole batch of all processes."""

    def __init__(self, device: torch.device, config: TrainingConfig, rank: int) -> None:
        recordings = [open_recording(path) for path in config.sequences.split(":")]
        self.seed, self.rank = config.seed, rank
        self.windows = SequenceDataset(recordings, device, config.longest, config.stride)

    def begin(self, order: Order) -> list[Future[dict[str, Tensor]]]:
        """Start to read the windows of a step."""
        first = self.rank * order.sequences
        seeds = [f"{self.seed} {order.step} {i}" for i in range(first, first + order.sequences)]
        return self.windows.begin(seeds, order.views, order.size)

    def batch(self, order: Order, begun: list[Future[dict[str, Tensor]]]) -> Batch:
        """See `SequenceDataset.batch`."""
        return self.windows.batch(begun)


def load_model(name: str) -> nn.Module:
    """The compact network or a published backbone by the name or path of its weights. ValueError."""
    return load_backbone(name) if name in CHECKPOINTS else weights.load(name)


def predict(model: nn.Module, batch: Batch, draw: Draw, attention: str | Strategy, top_k: int) -> object:
    """Output of the compact network, under the step's masks, or of a backbone; `model` may be wrapped."""
    images = batch["img"]
    if not isinstance(getattr(model, "module", model), Network):
        return model(images, attention=attention, top_k=top_k)
    views = images.shape[1]
    rays = batch["ray"].permute(0, 3, 1, 2)[:, None].expand(-1, views, -1, -1, -1)
    known = draw.known[:, None].expand(-1, views)
    return model(images, draw.fine, draw.coarse, rays, known, attention, top_k)


class Recipe:
    """The compact network with ground truth (the recipes `compact` and `finetune`); others change parts of it.

    network: what is trained, where `requires_grad`. teacher: a frozen one beside it, or None. config: that given, with the
    `sizes` that it leaves to the recipe. ValueError where weights or sequences are missing or wrong.
    """

    teacher: nn.Module | None = None

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.network = self.make_network().to(device)
        if not image_sizes(config):
            sizes = self.network.trained_sizes if isinstance(self.network, Network) else [TRAINING_SIZE]
            text = " ".join(f"{height}x{width}" for height, width in sizes)
            self.config = replace(config, sizes=text, mix_sizes=len(sizes) > 1)

    def make_network(self) -> nn.Module:
        """The network to be trained, on the CPU."""
        if self.config.init:
            return weights.load(self.config.init)
        return Network(TINY if self.config.network == "tiny" else NetworkConfig())

    def stages(self) -> list[Stage]:
        """Parts of the schedule."""
        c = self.config
        last = Stage("train", 1.0, c.attention, c.bidirectional, c.lr, c.ema)
        if not getattr(c, "dense_share", 0):
            return [last]
        sparse = Stage("sparse", 1 - c.dense_share, c.attention, c.bidirectional, c.lr_sparse, c.ema_sparse)
        return [Stage("dense", c.dense_share, "dense", True, c.lr, c.ema), sparse]

    def data(self, rank: int) -> RenderedData | RecordedData:
        """Where this process's batches come from."""
        return (RecordedData if self.config.sequences else RenderedData)(self.device, self.config, rank)

    def resize(self, size: tuple[int, int]) -> None:
        """Let the networks take images of this size (H, W)."""
        for network in (self.network, self.teacher):
            if isinstance(network, Network) and (network.config.height, network.config.width) != size:
                network.resize(*size)

    def predict(self, model: nn.Module, batch: Batch, draw: Draw, attention: str | Strategy) -> object:
        """`predict` in the precision of the settings; losses are outside, because products of poses need float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return predict(model, batch, draw, attention, self.config.top_k)

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the network, as `model` wraps it, and figures to log."""
        return losses(self.predict(model, batch, draw, draw.stage.attention), batch, draw.shift)


class Distil(Recipe):
    """Everything but the image encoder, unless it begins with random weights, learns a frozen dense teacher's answers to the
    same images."""

    def make_network(self) -> nn.Module:
        """The student; the teacher beside it."""
        c = self.config
        self.teacher = load_model(c.teacher).requires_grad_(False).to(self.device)
        if c.student == "backbone":
            if not isinstance(self.teacher, (Pi3, Vggt)):
                raise ValueError(
                    f"student = 'backbone': teacher {c.teacher!r} is neither a Pi3 nor a VGGT; use compact"
                )
            student = speed3r_student(self.teacher)
            freeze_untrained(student.requires_grad_(True))
        elif init := c.init or (c.teacher if isinstance(self.teacher, Network) else ""):
            student = weights.load(init)
            freeze_untrained(student.requires_grad_(True))
        else:
            student = super().make_network()
            freeze_untrained(student, random=True)
        return student

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher is dense and sees all frames, whatever its student sees."""
        every = torch.ones_like(draw.fine)
        whole = replace(draw, fine=every, coarse=every)
        with torch.no_grad():
            teacher = geometry(self.predict(self.teacher, batch, whole, "dense"))
        student = geometry(self.predict(model, batch, draw, draw.stage.attention))
        return distillation_loss(student, teacher, where_counted(batch["valid"], batch["judged"]))


class Lite3R(Recipe):
    """The projections of the linear branch learn, with FP8 rounding, what sparse attention leaves of dense."""

    def make_network(self) -> nn.Module:
        """The student; its exact, dense teacher beside it, with the same weights."""
        c = self.config
        self.teacher = load_model(c.init).requires_grad_(False).to(self.device)
        student = load_model(c.init).requires_grad_(False)
        for weight in self.branch(student) or add_linear_branch(student):
            weight.requires_grad_(True)
        if c.fp8:
            train_in_fp8(student)
        return student

    @staticmethod
    def branch(model: nn.Module) -> list[nn.Parameter]:
        """The projections that a model has."""
        return [parameter for name, parameter in model.named_parameters() if name.endswith("proj_lin.weight")]

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """The task's loss (a backbone's: distillation from itself) + gamma times that of attention outputs."""
        c = self.config
        exact, own = Recorded(dense), Recorded(STRATEGIES["lite3r"])
        with torch.no_grad():
            truth = self.predict(self.teacher, batch, draw, exact)
        out = self.predict(model, batch, draw, own)
        if isinstance(self.network, Network):
            task, figures = losses(out, batch, draw.shift)
        else:
            task, figures = distillation_loss(
                geometry(out), geometry(truth), where_counted(batch["valid"], batch["judged"])
            )
        attention = attention_loss(own.outputs, exact.outputs)
        gamma = c.gamma_end + (c.gamma - c.gamma_end) * (1 + cos(pi * draw.progress)) / 2
        total = task + gamma * attention
        return total, figures | dict(loss=total.detach(), attention=attention.detach())


RECIPES: dict[str, type[Recipe]] = {"compact": Recipe, "distil": Distil, "lite3r": Lite3R, "finetune": Recipe}
