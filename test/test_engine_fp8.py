"""`engine.precision: fp8` in every way that networks stream: what it moves is what rounding to E4M3 moves."""

import copy

import numpy as np
import pytest
import torch
from tiny_backbones import tiny_backbone
from torch import nn

from speed3r_ros.model import network
from speed3r_ros.model.backbones import blocks
from speed3r_ros.model.backbones.incremental import Incremental
from speed3r_ros.model.backbones.windowed import Windowed
from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.engine import Engine
from speed3r_ros.model.network import Network, NetworkConfig
from speed3r_ros.model.quantised import Fp8Linear
from speed3r_ros.model.types import Frame

SIZE = 56, 112
COMPACT = NetworkConfig(*SIZE, channels=128, encoder_blocks=2, alternating_blocks=2, stem=16)
NETWORKS = {
    "compact": lambda: Network(COMPACT),
    "incremental": lambda: Incremental(tiny_backbone("pi3"), SIZE),
    "windowed": lambda: Windowed(tiny_backbone("pi3"), SIZE),
}


def rounded(rows):
    """To E4M3 with a scale per row, and back: (..., K) in float64."""
    scale = rows.double().abs().amax(-1, keepdim=True) / 448
    return (rows.double() / scale).to(torch.float8_e4m3fn).double() * scale


class Rounded(nn.Module):
    """A linear layer on rounded weights and activations, otherwise exact."""

    takes = torch.float32

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = rounded(layer.weight.detach()), layer.bias.detach()

    def forward(self, x):
        return (rounded(x) @ self.weight.T + self.bias).float()


def blocks_of(model):
    return [m for m in model.modules() if isinstance(m, (network.Block, blocks.Block))]


def with_rounded_layers(model):
    for block in blocks_of(model):
        for holder in (block, getattr(block, "attn", None), getattr(block, "mlp", None)):
            for name in ("qkv", "fc1", "fc2"):
                if isinstance(layer := getattr(holder, name, None), nn.Linear):
                    setattr(holder, name, Rounded(layer))
    return model


def depths(model, frames, precision):
    engine = Engine(EngineConfig(device="cpu", precision=precision, attention="dense", window=2, anchors=2), model)
    return np.log([engine.push(frame).depth for frame in frames]), engine


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_fp8_moves_is_what_rounding_moves(kind, fp8_by_definition):
    model, rng = NETWORKS[kind](), np.random.default_rng()
    frames = [Frame(rng.integers(0, 255, (60, 120, 3), dtype=np.uint8), i) for i in range(2)]
    exact, _ = depths(copy.deepcopy(model), frames, "fp32")
    expected, _ = depths(with_rounded_layers(copy.deepcopy(model)), frames, "fp32")
    out, engine = depths(model, frames, "fp8")
    assert engine.dtype == "fp8" and any(isinstance(m, Fp8Linear) for m in engine.network.modules())
    moved, by_rounding = (np.sqrt(np.mean((x - exact) ** 2)) for x in (out, expected))
    assert 0.5 * by_rounding < moved < 2 * by_rounding  # the rest is bfloat16, which rounds 16 times as finely


@pytest.mark.parametrize("model", ["compact", "pi3"])
def test_where_fp8_does_not_run_one_line_says_so(model):
    says = "^engine.precision = 'fp8': device 'cpu' has no FP8 units, .*; run on such a GPU, or in bf16$"
    with pytest.raises(ValueError, match=says):
        Engine(EngineConfig(model=model, device="cpu", precision="fp8"))
