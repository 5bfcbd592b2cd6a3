"""Goldens of the official backbones: outputs of the official code on weights that their key and shape determine.

They lie beside the checkout, in ../shared/checkpoints; tests that need them skip where it is absent.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

CHECKPOINTS = Path(__file__).parents[2] / "shared" / "checkpoints"
if not CHECKPOINTS.is_dir():
    pytest.skip(f"no goldens: {CHECKPOINTS} is absent", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("golden_rule", CHECKPOINTS / "goldens" / "golden_rule.py")
golden_rule = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden_rule)


def manifest(name):
    """Keys and shapes of a published checkpoint, and the keys that its file lacks, by the key that they equal."""
    content = json.loads((CHECKPOINTS / "manifests" / f"{name}.json").read_text())
    return content["keys"], content.get("tied_aliases", {})


def tiny(name):
    """The same of a tiny configuration."""
    content = json.loads((CHECKPOINTS / "goldens" / "tiny_shapes.json").read_text())[name]
    return content["keys"], content.get("tied_aliases", {})


def published(keys, aliases):
    """What the file of a checkpoint holds."""
    return {key: torch.from_numpy(golden_rule.weight(key, shape)) for key, shape in keys.items() if key not in aliases}


def images(*sizes):
    return torch.from_numpy(golden_rule.images(*sizes))[None]


def conditions(*sizes):
    return tuple(torch.from_numpy(x)[None] for x in golden_rule.conditions(*sizes))


class Golden:
    """One file of goldens. `check` compares by the largest error, relative to the golden's largest magnitude."""

    def __init__(self, name):
        self.arrays = np.load(CHECKPOINTS / "goldens" / f"{name}.npz")

    def check(self, name, value, tolerance=2e-5):
        expected = self.arrays[name]
        value = value.detach().numpy()
        assert value.shape == expected.shape, name
        error = np.abs(value - expected).max() / np.abs(expected).max()
        assert error <= tolerance, f"{name}: {error:.1e}"
