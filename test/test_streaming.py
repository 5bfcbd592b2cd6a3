"""The invariants of the streaming memory: parallel = recurrent, sparse -> dense, flat, static."""

import gc
import random

import pytest
import torch

from speed3r_ros.model.lite3r import add_linear_branch
from speed3r_ros.model.memory import Schedule, visibility
from speed3r_ros.model.network import Network, NetworkConfig

TINY = NetworkConfig(
    height=112, width=56, channels=64, head_width=32, encoder_blocks=1, alternating_blocks=2, stem=8, decoder=4
)


def random_network(config: NetworkConfig = TINY) -> Network:
    """Weights large enough that every path matters (a fresh network's heads and gates are nearly constant)."""
    network = Network(config).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network


@pytest.mark.parametrize("attention", ["dense", "speed3r", "lite3r"])
@pytest.mark.parametrize("known", [True, False])
@torch.no_grad()
def test_parallel_equals_recurrent(attention, known):
    network, frames, limits = random_network(), 14, (2, 3, 3)
    for weight in add_linear_branch(network):
        weight.normal_()
    keyframes = [t == 0 or random.random() < 0.7 for t in range(frames)]
    images = torch.rand(1, frames, 3, TINY.height, TINY.width)
    rays = 0.5 * torch.randn(1, frames, 2, TINY.height, TINY.width)
    fine, coarse = visibility(keyframes, *limits)
    given = (rays, torch.ones(1, frames, dtype=torch.bool)) if known else ()
    parallel = network(images, fine[None], coarse[None], *given, attention=attention, top_k=3)
    memory = network.new_memory(*limits, attention)
    for t in range(frames):
        memory.admit()
        step = network.step(images[0, t], memory, rays[0, t] if known else None, attention, top_k=3)
        if keyframes[t]:
            memory.keep()
        for name in ("points", "confidence", "R", "t", "log_sigma", "descriptor"):
            expected = getattr(parallel, name)[0, t]
            error = (getattr(step, name)[0, 0] - expected).norm() / expected.norm()
            assert error < 1e-4, f"{name} of frame {t}: {error:.1e}"


@torch.no_grad()
def test_memory_matters_and_eviction_forgets():
    network = random_network()
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        memory = network.new_memory(1, 1, 1, "speed3r")
        for t in range(4):  # two different pasts; frame 0 stays as the anchor, frames 1 and 2 come and go
            memory.admit()
            image = (
                torch.rand(3, TINY.height, TINY.width)
                if t in (1, 2)
                else torch.full((3, TINY.height, TINY.width), 0.1 * t)
            )
            out = network.step(image, memory)
        outputs.append(out.points)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-6  # frame 2 is in the window
    # frames that nothing resident has seen leave no trace: with window 1, frame 4 sees 3 which saw 2; a cleared memory does not
    memory.clear()
    memory.admit()
    fresh = network.new_memory(1, 1, 1, "speed3r")
    fresh.admit()
    image = torch.rand(3, TINY.height, TINY.width)
    torch.testing.assert_close(network.step(image, memory).points, network.step(image, fresh).points)


def naive_tiers(keyframes, window, anchors, bank):
    """The cascade written with plain lists of frame numbers."""
    recent, kept, pooled, rows = [], [], [], []
    for t in range(len(keyframes)):
        if len(recent) == window + 1:
            old = recent.pop(0)
            if keyframes[old]:
                kept.append(old)
                if len(kept) > anchors:
                    retired = kept.pop(1 if anchors > 1 else 0)
                    if len(pooled) == bank:
                        gaps = {i: pooled[i + 1] - pooled[i - 1] for i in range(1, bank - 1)}
                        pooled.pop(min(gaps, key=lambda i: (gaps[i], i)) if gaps else 0)
                    pooled.append(retired)
        recent.append(t)
        rows.append((set(recent + kept), set(recent + kept + pooled)))
    return rows


@pytest.mark.parametrize("window, anchors, bank", [(1, 1, 1), (4, 6, 32), (2, 3, 4), (3, 1, 2), (2, 2, 3)])
def test_visibility_is_the_cascade(window, anchors, bank):
    keyframes = [random.random() < 0.6 for _ in range(80)]
    fine, coarse = visibility(keyframes, window, anchors, bank)
    for t, (resident, known) in enumerate(naive_tiers(keyframes, window, anchors, bank)):
        assert set(fine[t].nonzero().flatten().tolist()) == resident
        assert set(coarse[t].nonzero().flatten().tolist()) == known
        assert t in resident and len(resident) <= window + anchors + 1 and len(known) <= window + anchors + 1 + bank


def test_slots_are_never_shared():
    schedule = Schedule(3, 2, 4)
    for _ in range(500):
        schedule.admit()
        if random.random() < 0.5:
            schedule.keep()
        slots = [slot for _, slot in schedule.resident]
        places = [place for _, place in schedule.bank]
        assert len(set(slots)) == len(slots) and len(set(places)) == len(places)
        assert schedule.current == schedule.window[-1][1] and schedule.window[-1][0] == schedule.frame


def test_bank_thins_and_keeps_coverage():
    schedule = Schedule(1, 1, 8)
    for _ in range(1000):
        schedule.admit()
        schedule.keep()
    frames = [frame for frame, _ in schedule.bank]
    assert len(frames) == 8 and min(frames) < 50 and max(frames) > 950
    assert frames == sorted(frames)


@torch.no_grad()
def test_flat_memory_over_ten_thousand_frames():
    """After the tiers have filled, neither storage, live tensors nor the shapes of the step change."""
    config = NetworkConfig(
        height=56, width=56, channels=32, head_width=16, encoder_blocks=1, alternating_blocks=1, stem=4, decoder=2
    )
    network, memory = random_network(config), None
    memory = network.new_memory(2, 2, 4, "speed3r")
    addresses = memory.slot(0).fine.data_ptr(), memory._pooled.data_ptr(), memory._mask.data_ptr()
    size, census = memory.bytes, {}
    image = torch.rand(3, 56, 56)
    for t in range(10_000):
        memory.admit()
        out = network.step(image, memory)
        if t % 3 == 0:
            memory.keep()
        if t in (100, 5_000, 9_999):
            del out
            gc.collect()
            census[t] = sorted(tuple(x.shape) for x in gc.get_objects() if isinstance(x, torch.Tensor))
            shapes = memory.fine.shape, memory.coarse.shape, int(memory.fine.sum()), int(memory.coarse.sum())
            assert shapes == ((1, 1, 5), (1, 1, 9), 5, 9)
    assert census[100] == census[5_000] == census[9_999]
    assert (
        memory.slot(0).fine.data_ptr(),
        memory._pooled.data_ptr(),
        memory._mask.data_ptr(),
    ) == addresses and memory.bytes == size
