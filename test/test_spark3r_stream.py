"""Spark3R in streams against plain lists of what stays and attention in float64, on fresh random inputs."""

import random

import pytest
import torch
from test_incremental import FAMILIES, SIZE, relative_error, stream
from test_streaming import random_network
from tiny_backbones import tiny_backbone

from speed3r_ros.kernels.merging import match_tokens_reference
from speed3r_ros.model.attention import Strategy
from speed3r_ros.model.backbones.incremental import Incremental
from speed3r_ros.model.memory import Memory, Parts
from speed3r_ros.model.spark3r import Spark3R

EVERYTHING = 10, 1, 1  # window, anchors, bank: no frame ever leaves


def what_stays(keyframes, window, anchors, bank, specials, patches, stride, share):
    """For each frame the tokens that it sees, (frame, token) -> how many each stands for, by lists that pass on patches."""
    recent, whole, parts, turn, seen = [], [], [], [], []
    room = -(-bank // share)

    def patches_of_newcomer():
        if len(parts) == bank:  # the one whose neighbours stand closest goes, and leaves all it has
            gaps = [parts[i + 1][0] - parts[i - 1][0] for i in range(1, bank - 1)]
            return parts.pop(1 + gaps.index(min(gaps)) if gaps else 0)[1:]
        if len(parts) < room:
            return [list(range(len(parts) % stride, patches, stride)), stride]
        if not turn:
            turn.extend(parts)
        oldest = turn.pop(0)
        taken, oldest[1], oldest[2] = oldest[1][1::2], oldest[1][::2], 2 * oldest[2]
        return [taken, oldest[2]]

    for t in range(len(keyframes)):
        if len(recent) > window:
            old = recent.pop(0)
            if keyframes[old]:
                whole.append(old)
                if len(whole) > anchors:
                    retired = whole.pop(1 if anchors > 1 else 0)
                    parts.append([retired, *patches_of_newcomer()])
        recent.append(t)
        weights = {(f, i): 1 for f in recent + whole for i in range(specials + patches)}
        weights |= {(f, i): 1 for f, _, _ in parts for i in range(specials)}
        seen.append(weights | {(f, specials + i): weight for f, kept, weight in parts for i in kept})
    return seen


@pytest.mark.parametrize(
    "window, anchors, bank, share, specials, patches, strides",
    [
        (1, 1, 8, 4, 2, 24, (1, 3)),
        (2, 3, 12, 4, 0, 35, (3, 1)),
        (1, 2, 5, 2, 1, 20, (1, 2)),
        (2, 1, 3, 4, 3, 7, (1, 5)),
        (1, 1, 4, 1, 2, 6, (1, 2)),
    ],
)
@pytest.mark.parametrize("weighted", [True, False])
def test_exactly_the_tokens_of_the_rule_stay(window, anchors, bank, share, specials, patches, strides, weighted):
    """Keys carry their frame and token; cleared on the way, the memory starts anew."""
    length, limits = specials + patches, (window, anchors, bank)
    memory = Memory(2, 1, length, 0, 2, *limits, torch.float64, parts=Parts(specials, strides, share, weighted))
    size, addresses = memory.bytes, [x.data_ptr() for i in range(2) for x in memory.rows(i)]
    for frames in (40, 25):
        keyframes = [random.random() < 0.8 for _ in range(frames)]
        expected = [what_stays(keyframes, *limits, specials, patches, stride, share) for stride in strides]
        for t in range(frames):
            memory.admit()
            for layer in range(2):
                name = torch.stack([torch.full((length,), float(t)), torch.arange(float(length))], -1)
                memory.slot(layer).fine[:, 0, memory.index] = name.double()
                keys, values, bias = memory.rows(layer)
                assert torch.equal(keys, values)
                found, weights = (
                    keys[0, 0, bias[0] > -torch.inf].long().tolist(),
                    bias[bias > -torch.inf].exp().tolist(),
                )
                assert len(found) == len(expected[layer][t]), f"frame {t}, layer {layer}"
                for token, weight in zip(found, weights):
                    stands_for = expected[layer][t][tuple(token)]
                    assert weight == pytest.approx(stands_for if weighted else 1, rel=1e-6), f"frame {t}, layer {layer}"
                assert len(set(map(tuple, found))) == len(found)
            if keyframes[t]:
                memory.keep()
        memory.clear()
    assert memory.bytes == size and [x.data_ptr() for i in range(2) for x in memory.rows(i)] == addresses


class Listed(Strategy):
    """Attention, in float64, to the listed tokens of frames that are all still there."""

    reads_input = True

    def __init__(self, seen_by_layer, ratio):
        self.seen, self.ratio, self.calls = seen_by_layer, ratio, 0

    def __call__(self, q, k, v, fine, coarse, specials, top_k, layer=None):
        frame, self.calls = self.calls // len(self.seen), self.calls + 1
        queries, keys, values = (x.fine[0].double() for x in (q, k, v))
        weight = torch.zeros(keys.shape[1], dtype=torch.float64)
        for (f, i), stands_for in self.seen[layer.number][frame].items():
            weight[f * queries.shape[1] + i] = stands_for
        rows = match_tokens_reference(q.x, 1, specials, self.ratio)[0]
        merged = torch.stack([queries[:, rows == rows[i]].mean(1) for i in range(len(rows))], 1)
        scores = (merged @ keys.mT / queries.shape[-1] ** 0.5).exp() * weight
        return (scores / scores.sum(-1, keepdim=True) @ values)[None].to(q.fine.dtype)


@pytest.mark.parametrize("family, ratio", [("pi3", 1), ("pi3x", 2), ("da3", 1)])
@torch.inference_mode()
def test_a_stream_is_its_definition(family, ratio):
    model, frames, limits = tiny_backbone(family), 10, (1, 1, 3)
    network, images = Incremental(model, (28, 42)), torch.rand(frames, 3, 28, 42)
    keyframes = [t != 2 for t in range(frames)]
    strides = [1 if i in model.sensitive else 3 for i in range(len(model.across_views))]
    seen = [what_stays(keyframes, *limits, model.specials, 6, stride, 4) for stride in strides]
    expected = stream(network, images, EVERYTHING, keyframes, Listed(seen, ratio))
    for a, b in zip(stream(network, images, limits, keyframes, Spark3R(ratio)), expected):
        assert relative_error(a.points, b.points) < 1e-4
        torch.testing.assert_close(a.R, b.R, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, "compact"])
@torch.inference_mode()
def test_with_room_for_everything_it_is_dense_attention(family):
    network = random_network() if family == "compact" else Incremental(tiny_backbone(family), SIZE)
    images, keyframes = torch.rand(7, 3, *network.input_size), [True] * 7
    expected = stream(network, images, EVERYTHING, keyframes, "dense")
    for a, b in zip(stream(network, images, (1, 1, 20), keyframes, Spark3R(strides=1)), expected):
        assert relative_error(a.points[:, :, 2], b.points[:, :, 2]) < 1e-5
        if "vggt" not in family:  # whose camera head sees the window and the anchors alone
            torch.testing.assert_close(a.R, b.R, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family, attention", [("pi3", "spark3r"), ("compact", "dense"), ("vggt", "speed3r")])
@torch.inference_mode()
def test_a_cleared_memory_is_a_new_one(family, attention):
    """Even if the network failed on a frame: NaN in rows that are hidden would stay in all that follows."""
    network = random_network() if family == "compact" else Incremental(tiny_backbone(family), SIZE)
    used, fresh = (network.new_memory(1, 1, 2, attention) for _ in range(2))
    images = torch.rand(14, 3, *network.input_size)
    images[5] = torch.nan
    for t, image in enumerate(images):
        if t == 8:
            used.clear()
        found = []
        for memory in (used, fresh) if t >= 8 else (used,):
            memory.admit()
            found.append(network.step(image, memory, None, attention, 3).points)
            memory.keep()
        assert t < 8 or torch.equal(*found) and found[0].isfinite().all()


def test_what_a_stream_cannot_do_is_refused():
    with pytest.raises(ValueError, match="share 3: must be a power of two"):
        Spark3R(share=3)
    with pytest.raises(ValueError, match="'keys': a stream's keys are those of many views; choose input"):
        Incremental(tiny_backbone("pi3"), SIZE).new_memory(1, 1, 1, Spark3R(similarity="keys"))
    network = random_network()
    memory, image = network.new_memory(1, 1, 1, Spark3R(ratio=2)), torch.rand(3, *network.input_size)
    memory.admit()
    with pytest.raises(ValueError, match="ratio 2: this network does not hand on the input"), torch.inference_mode():
        network.step(image, memory, None, Spark3R(ratio=2))
