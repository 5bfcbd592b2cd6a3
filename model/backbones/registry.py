"""The backbones by name, and their published checkpoints: one file each, .safetensors or .pt."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from speed3r_ros.model.backbones.checkpoints import CHECKPOINTS, checkpoint_file, find_file, notice
from speed3r_ros.model.backbones.da3 import BASE, GIANT, LARGE, SMALL, Da3, Da3Mono, Da3Nested
from speed3r_ros.model.backbones.pi3 import Pi3, Pi3X, Speed3RPi3
from speed3r_ros.model.backbones.vggt import Vggt
from speed3r_ros.model.lite3r import add_linear_branch
from speed3r_ros.model.weights import read_safetensors, require_same_shapes

# How to make each in its published size.
BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "pi3": Pi3,
    "pi3x": Pi3X,
    "speed3r-pi3": Speed3RPi3,
    "vggt-1b": Vggt,
    "vggt-1b-commercial": Vggt,
    "streamvggt": lambda: Vggt(causal=True),
    "da3-small": lambda: Da3(SMALL),
    "da3-base": lambda: Da3(BASE),
    "da3-large": lambda: Da3(LARGE),
    "da3-giant": lambda: Da3(GIANT),
    "da3-nested": Da3Nested,
    "da3-metric": lambda: Da3Mono(metric=True),
    "da3-mono": Da3Mono,
}


def require_known(name: str) -> None:
    """Raise ValueError unless there is a backbone of that name."""
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r}: choose one of {', '.join(BACKBONES)}")


def build_backbone(name: str, device: torch.device | str = "cpu") -> nn.Module:
    """The backbone in its published size with random weights, in evaluation mode. ValueError on an unknown name."""
    require_known(name)
    with torch.device(device):
        return BACKBONES[name]().eval()


def load_backbone(name: str, path: Path | str | None = None) -> nn.Module:
    """The backbone with the weights of a published checkpoint, float32 on the CPU, in evaluation mode.

    path: the file, or a folder that holds one; without it, the copy that `speed3r weights fetch` made. Nothing is downloaded.
    ValueError with one line that names the file, the first differing key, both shapes and the remedy when the checkpoint is
    missing, truncated, incomplete or another model's. Logs a warning where the licence limits the use.
    """
    require_known(name)
    path = checkpoint_file(name, path)
    model = build_backbone(name, "meta")
    if line := notice(name):
        logging.getLogger(__name__).warning(line)
    return load_into(model, path, CHECKPOINTS[name].remedy)


def load_into(model: nn.Module, path: Path, remedy: str) -> nn.Module:
    """Give `model`, which may be on the meta device, the weights in `path`. Arguments and errors: see `load_backbone`."""
    path = find_file(path, remedy)
    return fit(model, read(path), path, remedy)


def read(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Tensors of a checkpoint; on the device meta, keys and shapes alone. ValueError with one line if it is none."""
    return read_safetensors(path, device)[0] if path.suffix == ".safetensors" else _read_pt(path, device)


def fit(model: nn.Module, state: dict[str, Tensor], path: Path, remedy: str) -> nn.Module:
    """Give `model` the tensors of the checkpoint `path`; ValueError with the first key or shape that differs.

    Keys that begin with one of the model's `UNUSED`, parts that this repository does not run, are passed over. Projections of
    Lite3R's linear branch are taken if the file has them.
    """
    if any(key.endswith("attn.proj_lin.weight") for key in state):
        add_linear_branch(model)
    unused = getattr(model, "UNUSED", ())
    state = {key: value.float() for key, value in state.items() if not key.startswith(unused)}
    expected = model.state_dict(keep_vars=True)
    stored = {id(expected[key]): key for key in state if key in expected}
    for key, parameter in expected.items():  # a tensor shared by several modules is stored once
        if key not in state and id(parameter) in stored:
            state[key] = state[stored[id(parameter)]]
    require_same_shapes(expected, state, path, remedy)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _read_pt(path: Path, device: str) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            mapped = file.read(2) == b"PK"  # PyTorch before 1.6 wrote no zip files, which alone can be mapped
        state = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: truncated or not a checkpoint of tensors ({reason}); copy it again") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{path}: not a plain table of tensors; save the model's state_dict() alone")
    return state
