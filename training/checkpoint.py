"""Checkpoints of a run: trained parameters, their average and the optimiser's state, as small safetensors shards.

The optimiser's state may be stored in fewer bits, so that it can be moved. Sizes per trained parameter, in bytes:
parameter 4, average 4, and both moments of AdamW 8 (fp32), 4 (bf16) or 2 (fp8); of Muon, which has one, half of that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speed3r_ros.kernels.fp8 import E4M3, quantise_rows
from speed3r_ros.mapping.files import folder_written_whole
from speed3r_ros.model import weights

FORMAT = "speed3r_ros training 1"
SMALLEST = 2.0**-9  # positive number of E4M3
ROW = 256  # values of a moment that share a scale in fp8


def encode(name: str, value: Tensor, kind: str) -> dict[str, Tensor]:
    """A moment as flat tensors of type `kind`: fp32, bf16, or fp8 (E4M3 with a scale per 256 values).

    Second moments, whose names begin with `square.`, are rounded as roots, which span half as many powers; in fp8 no
    positive one becomes 0, because steps are divided by it.
    """
    flat = value.detach().flatten()
    if kind == "fp32":
        return {name: flat}
    square = name.startswith("square.")
    flat = flat.sqrt() if square else flat
    if kind == "bf16":
        return {name: flat.bfloat16()}
    rows = F.pad(flat, (0, -len(flat) % ROW)).view(-1, ROW)
    values, scale = quantise_rows(rows)
    if square:
        values = values.float().masked_fill((values.float() == 0) & (rows > 0), SMALLEST).to(E4M3)
    return {name: values.flatten()[: len(flat)], f"{name}.scale": scale}


def decode(name: str, state: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The inverse of `encode`, in the shape, type and place of `like`. ValueError where the size differs."""
    if name not in state or state[name].numel() != like.numel():
        found = state[name].numel() if name in state else "missing"
        raise ValueError(
            f"checkpoint: {name} has {found} values, not {like.numel()}: it is of another network or recipe"
        )
    stored = state[name]
    flat = stored.float()
    if stored.dtype == E4M3:
        flat = F.pad(flat, (0, -len(flat) % ROW)).view(-1, ROW) * state[f"{name}.scale"][:, None]
        flat = flat.flatten()[: like.numel()]
    if stored.dtype != torch.float32 and name.startswith("square."):
        flat = flat.square()
    return flat.view(like.shape).to(like)


def write(
    folder: Path, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor], kind: str, note: dict[str, Any]
) -> int:
    """Write a checkpoint, whole or not at all; returns its bytes.

    tensors: stored as they are. moments: the optimiser's, see `encode`. note: numbers and text, stored as JSON.
    """
    state = {name: value.detach().flatten() for name, value in tensors.items()}
    for name, value in moments.items():
        state |= encode(name, value, kind)
    parts, most = {}, weights.SHARD_BYTES
    for name, value in state.items():
        for i, part in enumerate(value.split(most // value.element_size())):
            parts[f"{name}#{i}"] = part
    with folder_written_whole(folder, owned=[path.name for path in folder.glob("*.safetensors")]) as partial:
        return weights.write_shards(parts, partial, {"format": FORMAT, "note": json.dumps(note)})


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flat tensors by name, moments as stored, and the note. ValueError if it is missing, torn or foreign."""
    parts, metadata, last = weights.read_shards(folder)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{last}: not a {FORMAT!r} checkpoint (its format is {metadata.get('format')!r})")
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for key, value in parts.items():
        name, _, number = key.rpartition("#")
        pieces.setdefault(name, []).append((int(number), value))
    joined = {name: torch.cat([part for _, part in sorted(found, key=itemgetter(0))]) for name, found in pieces.items()}
    return joined, json.loads(metadata["note"])
