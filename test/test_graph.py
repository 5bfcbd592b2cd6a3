"""The captured step against the same step launched kernel by kernel. Runs where there is a GPU."""

import pytest
import torch
from tiny_backbones import BACKBONES, tiny_backbone

from speed3r_ros.model.backbones.incremental import Incremental
from speed3r_ros.model.graph import GraphedStep
from speed3r_ros.model.network import Network, NetworkConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def compact():
    network = Network(NetworkConfig())
    for p in network.parameters():
        p.data.add_(0.02 * torch.randn_like(p))
    return network


NETWORKS = {"compact": compact}
for family in BACKBONES.keys() - {"da3-mono"}:
    NETWORKS[family] = lambda family=family: Incremental(tiny_backbone(family), (56, 112))


@pytest.mark.parametrize("attention", ["speed3r", "dense", "spark3r"])
@pytest.mark.parametrize("name", sorted(NETWORKS))
@torch.inference_mode()
def test_replay_equals_launch(name, attention):
    network = NETWORKS[name]().cuda().eval()
    plain, replayed = (network.new_memory(2, 2, 3, attention) for _ in range(2))
    graph = GraphedStep(network, replayed, attention, 8)
    for t in range(12):
        image = torch.rand(3, *network.input_size, device="cuda")
        rays = torch.randn(2, *network.input_size, device="cuda") if t % 3 else None
        plain.admit()
        replayed.admit()
        expected, got = network.step(image, plain, rays, attention, 8), graph(image, rays)
        for part in ("points", "R", "t", "confidence"):
            a, b = (
                getattr(out, part).sigmoid() if part == "confidence" else getattr(out, part) for out in (expected, got)
            )
            assert (a - b).norm() < 1e-4 * max(a.norm(), 1), f"{part} of frame {t}"  # t of the first frame is 0
        if t % 2:
            plain.keep()
            replayed.keep()
