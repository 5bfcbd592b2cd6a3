"""The captured step against the same step launched kernel by kernel. Runs where there is a GPU."""

import pytest
import torch

from speed3r_ros.model.graph import GraphedStep
from speed3r_ros.model.memory import Memory
from speed3r_ros.model.network import Network, NetworkConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("attention", ["speed3r", "dense"])
@torch.inference_mode()
def test_replay_equals_launch(attention):
    config = NetworkConfig()
    network = Network(config).cuda().eval()
    for p in network.parameters():
        p.add_(0.02 * torch.randn_like(p))

    def memory():
        return Memory(config.alternating_blocks, 6, 196, 12, 64, 2, 2, 3, device="cuda")

    plain, replayed = memory(), memory()
    graph = GraphedStep(network, replayed, attention, 8)
    for t in range(12):
        image = torch.rand(3, config.height, config.width, device="cuda")
        rays = torch.randn(2, config.height, config.width, device="cuda") if t % 3 else None
        plain.admit()
        replayed.admit()
        expected, got = network.step(image, plain, rays, attention, 8), graph(image, rays)
        for name in ("points", "R", "t", "confidence"):
            a, b = getattr(expected, name), getattr(got, name)
            assert (a - b).norm() / a.norm() < 1e-4, f"{name} of frame {t}"
        if t % 2:
            plain.keep()
            replayed.keep()
