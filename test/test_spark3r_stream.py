"""Spark3R in streams against plain lists of what stays and attention in float64, on fresh random inputs."""

import random

import pytest
import torch
from test_incremental import FAMILIES, SIZE, relative_error, stream
from test_streaming import TINY, random_network
from tiny_backbones import tiny_backbone

from speed3r_ros.kernels.merging import match_tokens_reference
from speed3r_ros.model.attention import Strategy
from speed3r_ros.model.backbones.incremental import Incremental
from speed3r_ros.model.memory import Memory, Parts
from speed3r_ros.model.spark3r import Spark3R

EVERYTHING = 30, 1, 1  # window, anchors, bank: no frame ever leaves


def what_stays(keyframes, window, anchors, bank, specials, patches, stride, share):
    """For each frame the (frame, token) pairs that it sees, by lists of frames that pass on their tokens."""
    recent, whole, parts, turn, seen = [], [], [], [], []
    room = -(-bank // share)

    def tokens_of_newcomer():
        if len(parts) == bank:  # the one whose neighbours stand closest goes, and leaves all it has
            gaps = [parts[i + 1][0] - parts[i - 1][0] for i in range(1, bank - 1)]
            return parts.pop(1 + gaps.index(min(gaps)) if gaps else 0)[1]
        if len(parts) < room:
            return list(range(len(parts) % stride, patches, stride))
        if not turn:
            turn.extend(parts)
        patches_of_oldest = turn.pop(0)[1]
        taken = patches_of_oldest[1::2]
        del patches_of_oldest[1::2]
        return taken

    for t in range(len(keyframes)):
        if len(recent) > window:
            old = recent.pop(0)
            if keyframes[old]:
                whole.append(old)
                if len(whole) > anchors:
                    retired = whole.pop(1 if anchors > 1 else 0)
                    tokens = tokens_of_newcomer()
                    parts.append((retired, tokens))
        recent.append(t)
        pairs = [(f, i) for f in recent + whole for i in range(specials + patches)]
        pairs += [(f, i) for f, _ in parts for i in range(specials)]
        seen.append(pairs + [(f, specials + i) for f, kept in parts for i in kept])
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
def test_exactly_the_tokens_of_the_rule_stay(window, anchors, bank, share, specials, patches, strides):
    """Keys carry their frame and token; cleared on the way, the memory starts anew."""
    length, limits = specials + patches, (window, anchors, bank)
    memory = Memory(2, 1, length, 0, 2, *limits, torch.float64, parts=Parts(specials, strides, share))
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
                assert torch.equal(keys, values) and set(bias.flatten().tolist()) <= {0.0, -torch.inf}
                found = keys[0, 0, bias[0] == 0].long().tolist()
                assert sorted(map(tuple, found)) == sorted(expected[layer][t]), f"frame {t}, layer {layer}"
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
        length = q.fine.shape[2]
        listed = [f * length + i for f, i in self.seen[layer.number][frame]]
        rows = match_tokens_reference(q.x, 1, specials, self.ratio)[0].tolist()
        queries, keys, values = (x.fine.double() for x in (q, k, v))
        out = torch.empty_like(queries)
        for row in set(rows):
            members = [i for i, other in enumerate(rows) if other == row]
            query = queries[0, :, members].mean(1)
            weights = torch.einsum("hd,hnd->hn", query, keys[0, :, listed]) / query.shape[-1] ** 0.5
            out[0, :, members] = torch.einsum("hn,hnd->hd", weights.softmax(-1), values[0, :, listed])[:, None]
        return out.to(q.fine.dtype)


@pytest.mark.parametrize("family, ratio", [("pi3", 1), ("pi3x", 2), ("da3", 1)])
@torch.inference_mode()
def test_a_stream_is_its_definition(family, ratio):
    model, frames, limits = tiny_backbone(family), 12, (1, 2, 4)
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
    images, keyframes, strategy = torch.rand(7, 3, *SIZE), [True] * 7, Spark3R(strides=1)
    network = random_network() if family == "compact" else Incremental(tiny_backbone(family), SIZE)
    if family == "compact":
        images = torch.rand(7, 3, TINY.height, TINY.width)
    expected = stream(network, images, EVERYTHING, keyframes, "dense")
    kept = stream(network, images, (1, 1, 20), keyframes, strategy)
    reduced = stream(network, images, (1, 1, 2), keyframes, strategy)
    for t, (a, b, c) in enumerate(zip(kept, expected, reduced)):
        # VGGT's camera head, which says what depth is seen under, sees the window and the anchors alone
        assert relative_error(a.points[:, :, 2], b.points[:, :, 2]) < 1e-5
        assert (t > 4) == (relative_error(c.points[:, :, 2], b.points[:, :, 2]) > 1e-6)
        if "vggt" not in family:
            torch.testing.assert_close(a.R, b.R, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_cleared_memory_is_a_new_one():
    network = Incremental(tiny_backbone("pi3"), SIZE)
    used, fresh = (network.new_memory(1, 1, 2, "spark3r") for _ in range(2))
    for memory, images in ((used, torch.rand(8, 3, *SIZE)), (None, torch.rand(6, 3, *SIZE))):
        if memory is None:
            used.clear()
        for image in images:
            found = []
            for each in (used, fresh) if memory is None else (used,):
                each.admit()
                found.append(network.step(image, each, None, "spark3r").points)
                each.keep()
            assert torch.equal(found[0], found[-1])


def test_what_a_stream_cannot_do_is_refused():
    with pytest.raises(ValueError, match="share 3: must be a power of two"):
        Spark3R(share=3)
    with pytest.raises(ValueError, match="'keys': a stream's keys are those of many views; choose input"):
        Incremental(tiny_backbone("pi3"), SIZE).new_memory(1, 1, 1, Spark3R(similarity="keys"))
    network = random_network()
    memory, image = network.new_memory(1, 1, 1, Spark3R(ratio=2)), torch.rand(3, TINY.height, TINY.width)
    memory.admit()
    with pytest.raises(ValueError, match="ratio 2: this network does not hand on the input"), torch.inference_mode():
        network.step(image, memory, None, Spark3R(ratio=2))
