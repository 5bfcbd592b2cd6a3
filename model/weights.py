"""Checkpoints: folders of safetensors shards, each at most 16 MiB, whose metadata holds the network's configuration."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from speed3r_ros.model.lite3r import add_linear_branch
from speed3r_ros.model.network import Network, NetworkConfig

SHARD_BYTES = 15 * 2**20
FORMAT = "speed3r_ros compact 1"


def locate(name: str) -> Path:
    """Folder of the shipped weights called `name`, or the folder that `name` is a path of.

    Shipped weights lie in the repository's `weights/` (a checkout) or in `speed3r_ros/weights` (an installation).
    Raises ValueError when neither exists.
    """
    package = Path(__file__).absolute().parent.parent
    places = [Path(os.path.expanduser(name)), package / "weights" / name]
    for place in places:
        if any(place.glob("*.safetensors")):
            return place
    raise ValueError(
        f"no weights {name!r}: neither {places[0]} nor {places[1]} is a folder with *.safetensors; "
        "give the name of shipped weights (compact) or a folder of shards"
    )


def write_shards(tensors: Mapping[str, Tensor], folder: Path, metadata: dict[str, str]) -> int:
    """Write tensors as safetensors of at most SHARD_BYTES, if no tensor alone exceeds them; returns the bytes of all tensors.

    Every shard has the metadata. An older set in the folder is replaced.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, value in tensors.items():
        value = value.detach().to("cpu").contiguous()
        if size and size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
        total += value.nbytes
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for i, shard in enumerate(shards, 1):
        save_file(shard, partial / f"model-{i:02d}-of-{len(shards):02d}.safetensors", metadata=metadata)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    for shard in partial.iterdir():
        shard.replace(folder / shard.name)
    partial.rmdir()
    return total


def read_shards(folder: Path) -> tuple[dict[str, Tensor], dict[str, str], Path]:
    """All tensors of a set of shards, their metadata and the path of the last one.

    ValueError with one line when a shard is missing, truncated, or of another set, as where copying was cut off.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder}: no *.safetensors there")
    last = paths[-1].stem.rsplit("-of-", 1)
    if len(last) == 2 and last[1].isdigit() and len(paths) != int(last[1]):
        raise ValueError(f"{folder}: {len(paths)} of {int(last[1])} shards are there; copy the missing ones")
    state: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        shard, about = read_safetensors(path)
        if path != paths[0] and about != metadata:
            raise ValueError(f"{path}: is of another set than {paths[0].name}; copy the whole set again")
        state.update(shard)
        metadata = about
    return state, metadata, paths[-1]


def save(network: Network, folder: Path, note: dict[str, str] | None = None) -> int:
    """Write fp16 shards of the network's parameters; returns their size in bytes. An older set there is replaced."""
    halves = {name: value.detach().half() for name, value in network.named_parameters()}
    about = {"network": json.dumps(network.settings()), "trained_sizes": json.dumps(network.trained_sizes)}
    return write_shards(halves, folder, {"format": FORMAT, **about, **(note or {})})


def read_safetensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; on the device meta, shapes alone, without reading the values.

    Raises ValueError with one line when the file is truncated or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            if device == "meta":
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
                return {key: torch.empty(shape, device=device) for key, shape in shapes.items()}, file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error}); copy it again") from error


def require_same_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: Path, remedy: str) -> None:
    """Raise ValueError with one line that names the first key whose shapes differ, both shapes and the remedy."""
    for key in sorted(expected.keys() | found.keys()):
        ours = tuple(expected[key].shape) if key in expected else "unknown"
        theirs = tuple(found[key].shape) if key in found else "missing"
        if ours != theirs:
            raise ValueError(f"{where}: key {key!r} is {theirs} in the file but {ours} in the network; {remedy}")


def load(name: str) -> Network:
    """The network that `name` (see `locate`) holds, at the smallest size that it was trained at, float32 on the CPU, in
    evaluation mode.

    Raises ValueError with one line that names the file and the first differing key or shape when the checkpoint is
    missing, truncated, foreign or incomplete.
    """
    folder = locate(name)
    state, metadata, last = read_shards(folder)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{last}: not a {FORMAT!r} checkpoint (its format is {metadata.get('format')!r})")
    try:
        settings = json.loads(metadata["network"])
        config = NetworkConfig(**{f.name: int(settings[f.name]) for f in fields(NetworkConfig)})
        network = Network(config)
        if "trained_sizes" in metadata:
            network.trained_sizes = tuple((int(h), int(w)) for h, w in json.loads(metadata["trained_sizes"]))
            network.resize(*network.trained_sizes[0])
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{last}: unreadable network configuration ({error!r})") from error
    if any(key.endswith("proj_lin.weight") for key in state):
        add_linear_branch(network)
    require_same_shapes(dict(network.named_parameters()), state, folder, "copy the folder again")
    network.load_state_dict(state, strict=True)
    return network.eval()
