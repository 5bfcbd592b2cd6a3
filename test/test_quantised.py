"""Linear layers in 8 bits against the float64 layer, and the engine that runs on them."""

import numpy as np
import pytest
import torch
from torch import nn

from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.engine import Engine
from speed3r_ros.model.network import Network, NetworkConfig
from speed3r_ros.model.quantised import Int8Linear
from speed3r_ros.model.types import Frame

pytestmark = pytest.mark.skipif(not Int8Linear.supported(), reason="needs an x86 CPU with AVX2")


def relative_error(layer: nn.Linear, x: torch.Tensor) -> float:
    exact = nn.functional.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    with torch.inference_mode():
        return float((Int8Linear(layer)(x).double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", [(7, 48), (1, 196, 384), (2, 3, 5, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_error_is_that_of_8_and_7_bits(shape, bias):
    layer, x = nn.Linear(shape[-1], 80, bias), torch.randn(shape)
    assert 0.002 < relative_error(layer, x) < 0.03


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_activations_of_one_sign(shift):
    assert relative_error(nn.Linear(64, 32), 0.5 * torch.rand(40, 64) + shift) < 0.03


def test_extremes_do_not_overflow():
    """All products at their largest and of one sign, where 16-bit sums of pairs would saturate."""
    layer = nn.Linear(512, 16, bias=False)
    nn.init.constant_(layer.weight, 0.7)
    x = torch.ones(8, 512)
    assert relative_error(layer, x) < 0.01
    x[:, ::2] = -1
    x[:, ::4] = 1  # three quarters 1, one quarter -1
    assert relative_error(layer, x) < 0.02


def test_constant_zero_gives_the_bias():
    layer = nn.Linear(32, 8)
    torch.testing.assert_close(Int8Linear(layer)(torch.zeros(3, 32)), layer.bias.detach().expand(3, 8))


def test_engine_agrees_with_float32():
    config = NetworkConfig(height=112, width=112, channels=128, encoder_blocks=2, alternating_blocks=2, stem=16)
    torch.manual_seed(int(torch.randint(2**31, ())))
    weights = Network(config).state_dict()
    rng = np.random.default_rng()
    frames = [Frame(rng.integers(0, 255, (120, 160, 3), dtype=np.uint8), i) for i in range(6)]
    depths = {}
    for precision in ("fp32", "int8"):
        network = Network(config)
        network.load_state_dict(weights)
        engine = Engine(EngineConfig(device="cpu", precision=precision), network)
        depths[precision] = np.stack([engine.push(frame).depth for frame in frames])
    error = np.abs(depths["int8"] / depths["fp32"] - 1)
    assert 0 < np.median(error) < 0.02  # not the same thing twice, and not another thing
