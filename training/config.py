"""Settings of the training recipes, as frozen dataclasses. No torch: the command line reads them first."""

from __future__ import annotations

import difflib
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import yaml

from speed3r_ros.model.config import check, setting


@dataclass(frozen=True)
class TrainingConfig:
    """What all recipes share; each gives defaults of its own."""

    steps: int = setting(0, "length of the schedule in optimiser steps; such a run repeats exactly", low=0)
    minutes: float = setting(0.0, "or its length in minutes of training, to fit a machine's time", low=0.0)
    seed: int = setting(0, "of the first weights and of all random draws", low=0)
    frames: int = setting(
        240, "frames per step and process at the first of `sizes`; larger images, fewer, but one sequence", low=2
    )
    longest: int = setting(24, "frames of the longest training sequence", low=2, high=24)
    lengthening: float = setting(
        0.0, "share of a stage in which the longest sequence grows from 4 frames to `longest`", low=0.0, high=1.0
    )
    sizes: str = setting(
        "",
        "height x width of the images, multiples of 56; several, as `168x224 336x448`, take equal shares; empty = those that "
        "the weights it starts from were trained at, drawn for every step; 168x224 from random weights and of backbones",
    )
    mix_sizes: bool = setting(False, "draw one of `sizes` for every step; off = one after the other")
    scenes: str = setting(
        "world",
        "what rendered scenes are drawn from: streets, corridors and rooms with all options, or plain rooms (docs/training.md)",
        choices=("world", "rooms"),
    )
    sequences: str = setting(
        "",
        "folders of recorded sequences to train on, separated by `:`; empty = rendered scenes (training/sequences.py)",
    )
    stride: int = setting(
        8, "largest step, in recorded frames, between the views of a training sequence", low=1, high=1000
    )
    init: str = setting("", "weights to start from, a name or folder; empty = as the recipe says")
    network: str = setting(
        "full", "size of a network made from scratch; tiny is for trials on a CPU", choices=("full", "tiny")
    )
    attention: str = setting(
        "speed3r", "attention across views of what is trained", choices=("speed3r", "dense", "lite3r")
    )
    top_k: int = setting(32, "key blocks that a query block attends to, per head", low=1, high=4096)
    bidirectional: bool = setting(False, "let every frame see every frame; off = those that the stream's memory holds")
    optimiser: str = setting(
        "adamw",
        "muon: Muon for the blocks' wide matrices, AdamW for the rest (training/muon.py)",
        choices=("adamw", "muon"),
    )
    lr: float = setting(1e-3, "peak learning rate", low=0.0, high=1.0)
    weight_decay: float = setting(0.03, "of matrices; vectors and tokens have none", low=0.0, high=1.0)
    warmup: int = setting(400, "steps of linear warm-up", low=1)
    hold: float = setting(0.35, "share of a stage before the learning rate falls", low=0.0, high=0.99)
    decay: str = setting("cosine", "how it falls", choices=("cosine", "linear"))
    floor: float = setting(0.02, "share of the peak that it falls to", low=0.0, high=1.0)
    clip: float = setting(1.0, "largest norm of the gradient", low=1e-6)
    ema: float = setting(0.998, "decay of the weights' moving average, which is what is written", low=0.0, high=0.99999)
    precision: str = setting("bf16", "of matrix products in training", choices=("bf16", "fp32"))
    compile: bool = setting(False, "torch.compile the blocks (CUDA)")
    parallel: str = setting(
        "ddp",
        "several processes hold copies (ddp), or share weights and optimiser state (fsdp)",
        choices=("ddp", "fsdp"),
    )
    optimiser_state: str = setting(
        "fp32",
        "its type in the checkpoint; below fp32 it is smaller and resuming is not exact",
        choices=("fp32", "bf16", "fp8"),
    )
    save_every: float = setting(100.0, "seconds between checkpoints", low=0.0)
    tensorboard: bool = setting(False, "write TensorBoard events too; needs the extra [train]")
    held_out: int = setting(
        96, "rendered sequences per row of the evaluation at the end, of either kind of scenes; 0 = none", low=0
    )


def _default(name: str, default: Any) -> Any:
    """The field of `TrainingConfig` with another default."""
    return setting(default, **TrainingConfig.__dataclass_fields__[name].metadata)


@dataclass(frozen=True)
class CompactConfig(TrainingConfig):
    """The compact network on rendered scenes: dense and bidirectional first, then sparse and causal."""

    dense_share: float = setting(
        0.4, "share of the schedule for the first stage; 0 = none, e.g. with `init`", low=0.0, high=0.99
    )
    lr_sparse: float = setting(6e-4, "peak learning rate of the second stage", low=0.0, high=1.0)
    ema_sparse: float = setting(0.999, "decay of the moving average in the second stage", low=0.0, high=0.99999)
    lengthening: float = _default("lengthening", 0.1)


@dataclass(frozen=True)
class DistilConfig(TrainingConfig):
    """A sparse student learns the outputs of a frozen dense teacher (Speed3R, section 1.4)."""

    teacher: str = setting(
        "compact", "weights of the compact network, a name or folder, or a published backbone that was fetched"
    )
    student: str = setting(
        "compact",
        "compact, or backbone: the teacher's own with sparse attention (Pi3 becomes Speed3R-Pi3)",
        choices=("compact", "backbone"),
    )
    lr: float = _default("lr", 1e-4)
    weight_decay: float = _default("weight_decay", 0.05)
    warmup: int = _default("warmup", 50)
    hold: float = _default("hold", 0.0)
    floor: float = _default("floor", 0.01)


@dataclass(frozen=True)
class Lite3RConfig(TrainingConfig):
    """Lite3R's linear branch: its projections alone learn, under FP8 rounding, from dense attention (section 3)."""

    gamma: float = setting(0.1, "weight of the attention's distillation at the start", low=0.0)
    gamma_end: float = setting(0.01, "and at the end; a cosine between", low=0.0)
    fp8: bool = setting(True, "round weights and activations of the blocks' linear layers to E4M3")
    init: str = _default("init", "compact")
    attention: str = _default("attention", "lite3r")
    weight_decay: float = _default("weight_decay", 0.0)
    warmup: int = _default("warmup", 30)
    hold: float = _default("hold", 0.0)
    decay: str = _default("decay", "linear")
    floor: float = _default("floor", 0.5)


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """The compact network on recorded sequences with poses, and depth where there is any."""

    init: str = _default("init", "compact")
    lr: float = _default("lr", 1e-4)
    warmup: int = _default("warmup", 100)
    hold: float = _default("hold", 0.1)
    ema: float = _default("ema", 0.999)
    frames: int = _default("frames", 48)


CONFIGS: dict[str, type[TrainingConfig]] = {
    "compact": CompactConfig,
    "distil": DistilConfig,
    "lite3r": Lite3RConfig,
    "finetune": FinetuneConfig,
}


def with_values(config: TrainingConfig, values: dict[str, Any], where: str = "--set") -> TrainingConfig:
    """A checked copy with some settings replaced. ValueError with one line for the first that is wrong."""
    known = {item.name: item for item in fields(config)}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1, 0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"settings: {', '.join(known)}"
            raise ValueError(f"{where}: unknown setting {name!r}: {hint}")
        if type(known[name].default) is float and type(value) in (int, str):
            with suppress(ValueError):  # YAML 1.1 takes 1e-4 for text
                values = {**values, name: float(value)}
    config = replace(config, **values)
    check(config)
    return config


def require_runnable(recipe: str, config: TrainingConfig) -> None:
    """ValueError with one line for settings that exclude each other or are missing."""
    if bool(config.steps) == bool(config.minutes):
        raise ValueError(
            f"steps = {config.steps} and minutes = {config.minutes}: set one of them, the length of the run"
        )
    image_sizes(config)
    if config.optimiser == "muon" and config.parallel == "fsdp":
        raise ValueError("optimiser = 'muon': needs whole matrices, which parallel = 'fsdp' splits; use adamw or ddp")
    if config.optimiser == "muon" and recipe == "lite3r":
        raise ValueError("optimiser = 'muon': moves matrices of blocks, of which lite3r trains none; leave it out")
    if recipe == "distil" and config.student == "backbone" and config.init:
        raise ValueError(
            f"init = {config.init!r}: with student = 'backbone', training starts from the teacher; leave it out"
        )
    if recipe == "finetune" and not config.sequences:
        raise ValueError("sequences = '': give the folders to fine-tune on, e.g. --set sequences=DATA/a:DATA/b")
    if recipe == "lite3r" and config.attention != "lite3r":
        raise ValueError(f"attention = {config.attention!r}: the recipe lite3r trains lite3r")
    if recipe in ("compact", "finetune") and config.attention == "lite3r":
        raise ValueError("attention = 'lite3r': its projections are trained by the recipe lite3r; use speed3r or dense")


def image_sizes(config: TrainingConfig) -> list[tuple[int, int]]:
    """`sizes` as (height, width) pairs, none where the recipe is to choose. ValueError for other text, and for sides that are
    no multiples of 56."""
    sizes = []
    for text in config.sizes.split():
        sides = text.split("x")
        if len(sides) != 2 or not all(side.isdigit() and int(side) and int(side) % 56 == 0 for side in sides):
            raise ValueError(
                f"sizes = {config.sizes!r}: expected HEIGHTxWIDTH of multiples of 56, e.g. 168x224 336x448"
            )
        sizes.append((int(sides[0]), int(sides[1])))
    return sizes


def parse_assignment(text: str, config: TrainingConfig) -> tuple[str, Any]:
    """`name=value` of the command line; text where the setting is text, else YAML. ValueError."""
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"--set {text!r}: expected name=value, e.g. lr=1e-4")
    if isinstance(getattr(config, name, None), str):
        return name, value
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text!r}: not a value ({' '.join(str(error).split())})") from error


def settings_table(recipe: str) -> str:
    """Every setting of a recipe as a YAML file with its documentation, ready for --config."""
    lines = []
    for item in fields(CONFIGS[recipe]):
        meta = item.metadata
        choices = f" One of: {', '.join(meta['choices'])}." if meta["choices"] else ""
        lines.append(f"# {meta['help'][0].upper()}{meta['help'][1:]}.{choices}")
        lines.append(yaml.safe_dump({item.name: item.default}).strip())
    return "\n".join(lines) + "\n"
