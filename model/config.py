"""Settings as frozen dataclasses. Each field carries its own documentation and range, so that the ROS parameters, the
command line, `config/recon.yaml` and the checks all come from this one place."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from speed3r_ros.model.backbones.checkpoints import CHECKPOINTS, SINGLE_VIEW


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    live: bool = False,
) -> Any:
    """A dataclass field with its description, inclusive range or choices; `live` fields may change at run time."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices, "live": live})


def check(config: Any, prefix: str = "") -> None:
    """Raise ValueError with one line naming the first setting whose type, range or choice is wrong, and the remedy."""
    for item in fields(config):
        value, meta, name = getattr(config, item.name), item.metadata, f"{prefix}{item.name}"
        if not meta:
            check(value, f"{name}.")
            continue
        kind = type(item.default)
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise ValueError(f"{name} = {value!r}: expected {kind.__name__}, e.g. {item.default!r}")
        if meta["choices"] and value not in meta["choices"]:
            raise ValueError(f"{name} = {value!r}: choose one of {', '.join(meta['choices'])}")
        low, high = meta["low"], meta["high"]
        if kind in (int, float) and not ((low is None or value >= low) and (high is None or value <= high)):
            raise ValueError(
                f"{name} = {value!r}: must be " + (f"in [{low}, {high}]" if high is not None else f">= {low}")
            )
    if hasattr(config, "check_together"):
        config.check_together(prefix)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Settings from a YAML mapping. Raises ValueError with one line, OSError."""
    try:
        tree = yaml.safe_load(Path(path).read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


@dataclass(frozen=True)
class EngineConfig:
    """The streaming engine: which network, and how much of the past it keeps."""

    model: str = setting(
        "compact",
        "compact, the network that ships with the package, or a published backbone",
        choices=("compact", *(name for name in CHECKPOINTS if name not in SINGLE_VIEW)),
    )
    weights: str = setting(
        "", "path of the model's weights; empty = those that ship, or the copy that `speed3r weights fetch` made"
    )
    streaming: str = setting(
        "incremental",
        "how a published backbone streams: incremental = a frame is computed once; windowed = the last ones together",
        choices=("incremental", "windowed"),
    )
    height: int = setting(
        0,
        "pixels that frames are resized to; 0 = the model's default: 336 of compact on a GPU, 168 on a CPU, 392 of backbones",
        low=0,
        high=2016,
    )
    width: int = setting(0, "likewise; 0 = 448, 224 or 504", low=0, high=2016)
    attention: str = setting(
        "auto",
        "global attention strategy; auto = what the model was trained with: speed3r for compact and speed3r-pi3, else dense; "
        "lite3r needs weights with its linear branch, and of backbones windowed streaming",
        choices=("auto", "speed3r", "dense", "spark3r", "lite3r"),
    )
    device: str = setting("auto", "auto = the GPU when there is one, else the CPU", choices=("auto", "cpu", "cuda"))
    precision: str = setting(
        "auto",
        "of matrix products; auto = bf16 where the hardware has it, else int8 (x86 CPUs) or fp32; of backbones bf16 on a GPU, "
        "else fp32; fp8 = the blocks' wide layers in E4M3, the rest in bf16, on NVIDIA GPUs of compute capability 8.9 and above",
        choices=("auto", "fp32", "bf16", "fp8", "int8"),
    )
    threads: int = setting(0, "CPU threads of the network; 0 = all cores", low=0, high=256)
    window: int = setting(4, "recent frames whose fine keys and values stay in memory", low=1, high=64)
    anchors: int = setting(6, "keyframes whose fine keys and values stay in memory", low=1, high=64)
    bank: int = setting(
        32,
        "keyframes that stay in memory after those, pooled, or with spark3r as fewer and fewer of their patches",
        low=1,
        high=1024,
    )
    top_k: int = setting(32, "key blocks of 16 tokens that a query block attends to, per head", low=1, high=4096)
    refresh: int = setting(
        24, "keyframes after which a new segment takes over with a fresh gauge; 0 = never", low=0, high=100000
    )
    keyframe_overlap: float = setting(
        0.75,
        "a frame becomes a keyframe when it sees less than this share of the last one",
        low=0.05,
        high=1.0,
        live=True,
    )

    @property
    def strategy(self) -> str:
        """Name of the attention strategy, `auto` resolved."""
        trained = "speed3r" if self.model in ("compact", "speed3r-pi3") else "dense"
        return trained if self.attention == "auto" else self.attention

    def check_together(self, prefix: str) -> None:
        """Raise ValueError with one line for settings that do not go together."""
        if self.strategy == "lite3r" and self.model != "compact" and self.streaming != "windowed":
            raise ValueError(
                f"{prefix}attention = 'lite3r': of backbones, it works on whole sequences; use speed3r, spark3r or dense, or "
                f"{prefix}streaming = windowed"
            )
        if self.strategy == "spark3r" and self.model == "streamvggt" and self.streaming == "windowed":
            raise ValueError(
                f"{prefix}attention = 'spark3r' works where all frames see all, and of streamvggt a frame sees only earlier "
                f"ones; use dense or speed3r, or stream with {prefix}streaming = incremental"
            )
        if self.precision == "int8" and self.model != "compact":
            raise ValueError(f"{prefix}precision = 'int8': only compact runs in it; use auto, fp8, bf16 or fp32")
        step = 56 if self.model == "compact" or self.strategy in ("speed3r", "lite3r") else 14
        for name in ("height", "width"):
            if (side := getattr(self, name)) % step:
                near = max(1, round(side / step)) * step
                raise ValueError(
                    f"{prefix}{name} = {side}: {self.model} with {self.strategy} attention needs a multiple of {step}, "
                    f"e.g. {near}, or 0"
                )
