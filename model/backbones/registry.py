"""The backbones by name, and their published checkpoints: one file each, .safetensors or .pt."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from speed3r_ros.model.backbones.da3 import BASE, GIANT, LARGE, SMALL, Da3, Da3Mono, Da3Nested
from speed3r_ros.model.backbones.pi3 import Pi3, Pi3X, Speed3RPi3
from speed3r_ros.model.backbones.vggt import Vggt
from speed3r_ros.model.lite3r import add_linear_branch
from speed3r_ros.model.weights import read_safetensors, require_same_shapes

SUFFIXES = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class Backbone:
    """How to make a backbone of its published size, where its weights are, and under which licence."""

    build: Callable[[], nn.Module]
    hub: str
    licence: str


BACKBONES = {
    "pi3": Backbone(Pi3, "yyfz233/Pi3", "CC BY-NC 4.0"),
    "pi3x": Backbone(Pi3X, "yyfz233/Pi3X", "CC BY-NC 4.0"),
    "speed3r-pi3": Backbone(Speed3RPi3, "weining17/Speed3R_Pi3", "CC BY-NC 4.0"),
    "vggt-1b": Backbone(Vggt, "facebook/VGGT-1B", "CC BY-NC 4.0"),
    "vggt-1b-commercial": Backbone(Vggt, "facebook/VGGT-1B-Commercial", "VGGT License v1 (commercial, not military)"),
    "streamvggt": Backbone(lambda: Vggt(causal=True), "lch01/StreamVGGT", "CC BY-NC-SA 4.0"),
    "da3-small": Backbone(lambda: Da3(SMALL), "depth-anything/DA3-SMALL", "Apache-2.0"),
    "da3-base": Backbone(lambda: Da3(BASE), "depth-anything/DA3-BASE", "Apache-2.0"),
    "da3-large": Backbone(lambda: Da3(LARGE), "depth-anything/DA3-LARGE-1.1", "CC BY-NC 4.0"),
    "da3-giant": Backbone(lambda: Da3(GIANT), "depth-anything/DA3-GIANT-1.1", "CC BY-NC 4.0"),
    "da3-nested": Backbone(Da3Nested, "depth-anything/DA3NESTED-GIANT-LARGE-1.1", "CC BY-NC 4.0"),
    "da3-metric": Backbone(lambda: Da3Mono(metric=True), "depth-anything/DA3METRIC-LARGE", "Apache-2.0"),
    "da3-mono": Backbone(Da3Mono, "depth-anything/DA3MONO-LARGE", "Apache-2.0"),
}


def build_backbone(name: str, device: torch.device | str = "cpu") -> nn.Module:
    """The backbone in its published size with random weights, in evaluation mode. ValueError on an unknown name."""
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r}: choose one of {', '.join(BACKBONES)}")
    with torch.device(device):
        return BACKBONES[name].build().eval()


def load_backbone(name: str, path: Path | str) -> nn.Module:
    """The backbone with the weights of a published checkpoint, float32 on the CPU, in evaluation mode.

    path: the file, or a folder that holds one. ValueError with one line that names the file, the first differing key, both
    shapes and the remedy when the checkpoint is missing, truncated, incomplete or another model's.
    """
    model = build_backbone(name, "meta")
    return load_into(model, Path(path).expanduser(), f"give the checkpoint of {BACKBONES[name].hub} on Hugging Face")


def load_into(model: nn.Module, path: Path, remedy: str) -> nn.Module:
    """Give `model`, which may be on the meta device, the weights in `path`. Arguments and errors: see `load_backbone`.

    Keys that begin with one of the model's `UNUSED`, parts that this repository does not run, are passed over. Projections of
    Lite3R's linear branch are taken if the file has them.
    """
    path = _file(path, remedy)
    state = read_safetensors(path)[0] if path.suffix == ".safetensors" else _read_pt(path)
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


def _file(path: Path, remedy: str) -> Path:
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.suffix in SUFFIXES)
    if len(files) != 1 or files[0].suffix not in SUFFIXES:
        raise ValueError(f"{path}: {len(files)} checkpoints ({', '.join(SUFFIXES)}), expected one; {remedy}")
    return files[0]


def _read_pt(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: truncated or not a checkpoint of tensors ({reason}); copy it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: not a plain table of tensors; save the model's state_dict() alone")
    return state
