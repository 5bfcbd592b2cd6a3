"""Spark3R against a definition by loops in float64 on fresh random inputs, and in the official backbones."""

import pytest
import torch
from tiny_backbones import ACROSS_VIEWS, tiny_backbone

from speed3r_ros.kernels.frames import Visible
from speed3r_ros.kernels.merging import kept_tokens
from speed3r_ros.model.attention import Layer, Tokens
from speed3r_ros.model.network import Network, NetworkConfig
from speed3r_ros.model.spark3r import Spark3R, key_stride, probe, query_ratio, sensitive_layers

HEADS, WIDTH, CHANNELS = 2, 8, 12
NO_REDUCTION = Spark3R(ratio=1, strides=1)


def by_loops(q, k, v, x, views, specials, ratio, stride, group, stagger, reference):
    """One sequence: q, k, v (H, V * L, D), x (V * L, E) by which tokens are compared -> (H, V * L, D)."""
    length = len(x) // views
    token = lambda t, p: t * length + specials + p  # noqa: E731
    patches = range(length - specials)

    destinations = {}  # which tokens stand for themselves, by group
    for t in range(views):
        for first in range(0, len(patches), ratio):
            cell = patches[first : first + ratio]
            destinations.setdefault(t // group, []).append(token(t, cell[t % len(cell)]))
    members = {t * length + s: [t * length + s] for t in range(views) for s in range(specials)}
    members |= {i: [i] for group_of in destinations.values() for i in group_of}
    for t in range(views):
        for i in (token(t, p) for p in patches):
            if i not in members:
                candidates = destinations[t // group]
                cosine = [torch.nn.functional.cosine_similarity(x[i], x[j], dim=0).item() for j in candidates]
                members[candidates[cosine.index(max(cosine))]].append(i)

    order = [reference] + [t for t in range(views) if t != reference]
    kept = [t * length + s for t in range(views) for s in range(specials)]
    for place, t in enumerate(order):
        for p in patches:
            stays = p % stride == place % stride if stagger else place % stride == 0
            if stays or t == reference:
                kept.append(token(t, p))
    out = torch.empty_like(q)
    for ones in members.values():
        query = q[:, ones].mean(1)
        for h in range(len(q)):
            weights = (k[h, kept] @ query[h] / WIDTH**0.5).softmax(0)
            out[h, ones] = weights @ v[h, kept]
    return out


@pytest.mark.parametrize("reference", [None, "each its own"])
@pytest.mark.parametrize("similarity", ["input", "keys"])
@pytest.mark.parametrize(
    "views, specials, patches, ratio, stride, group, stagger",
    [
        (5, 2, 7, 3, 2, 2, False),
        (7, 1, 6, 2, 3, 20, True),
        (4, 0, 5, 4, 1, 3, False),
        (6, 3, 9, 1, 4, 20, False),
        (1, 1, 3, 2, 5, 20, False),
    ],
)
def test_spark3r_is_its_definition(views, specials, patches, ratio, stride, group, stagger, similarity, reference):
    seed = int(torch.randint(2**31, ()))
    g = torch.Generator().manual_seed(seed)
    tokens = views * (specials + patches)
    q, k, v = torch.randn(3, 2, HEADS, tokens, WIDTH, generator=g, dtype=torch.float64)
    x = torch.randn(2, tokens, CHANNELS, generator=g, dtype=torch.float64)
    references = torch.randint(views, (2,), generator=g)
    layer = Layer(reference=references if reference else None)
    everything = Visible(torch.ones(1, views, views, dtype=torch.bool))
    strategy = Spark3R(ratio, stride, group=group, similarity=similarity, stagger=stagger)
    out = strategy(Tokens(q, x=x), Tokens(k), Tokens(v), everything, everything, specials, 0, layer)
    for b in range(2):
        compared = x[b] if similarity == "input" else k[b].mean(0)
        first = int(references[b]) if reference else 0
        expected = by_loops(q[b], k[b], v[b], compared, views, specials, ratio, stride, group, stagger, first)
        torch.testing.assert_close(out[b], expected, rtol=1e-9, atol=1e-9, msg=f"seed {seed}")


def test_ratios_grow_with_the_number_of_views_as_published():
    assert [query_ratio(n) for n in (1, 100, 101, 300, 301, 500, 501, 5000)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [key_stride(n) for n in (1, 100, 101, 120, 121, 1000)] == [1, 1, 3, 3, 4, 25]
    strategy = Spark3R()
    assert [strategy.stride(n, Layer(0, sensitive=True)) for n in (2, 100, 1000)] == [1, 1, 25]
    assert [strategy.stride(n, Layer(0, sensitive=False)) for n in (2, 100, 1000)] == [3, 3, 75]
    mapped = Spark3R(sensitive=frozenset([4]))
    assert [mapped.stride(1000, Layer(i, sensitive=False)) for i in (3, 4)] == [75, 25]


def test_sensitive_layers_are_the_published_ones_and_stretch():
    assert sensitive_layers("pi3", 18) == sensitive_layers("vggt", 24) == frozenset(range(11, 17))
    assert sensitive_layers("da3", 14) == frozenset(range(3, 13))
    assert sensitive_layers("da3", 28) == frozenset(range(6, 26))
    assert sensitive_layers("da3", 4) == frozenset([1, 2, 3])


@pytest.mark.parametrize("name", ACROSS_VIEWS)
@pytest.mark.parametrize("views", [1, 5])
@torch.inference_mode()
def test_without_reduction_it_is_dense_attention_bit_for_bit(name, views):
    model = tiny_backbone(name)
    x = torch.rand(1, views, 3, 56, 112)
    dense, other = model(x, attention="dense"), model(x, attention=NO_REDUCTION)
    assert torch.equal(dense.points, other.points) and torch.equal(dense.T_world_cam, other.T_world_cam)


@pytest.mark.parametrize("name", ACROSS_VIEWS[:-1])  # the nested one's scale hangs on which pixels are confident
@torch.inference_mode()
def test_mild_reduction_changes_little_and_strong_reduction_more(name):
    model = tiny_backbone(name)
    x = torch.rand(2, 6, 3, 70, 42)  # 5 x 3 patches
    dense = model(x, attention="dense").depth
    changes = []
    for strategy in (Spark3R(ratio=2, strides=1), Spark3R(ratio=1, strides=2), Spark3R(ratio=12, strides=6)):
        out = model(x, attention=strategy).depth
        assert out.isfinite().all()
        changes.append(float((out - dense).norm() / dense.norm()))
    assert 1e-7 < max(changes[:2]) < 0.03 and changes[2] > min(changes[:2])


@pytest.mark.parametrize("name", ACROSS_VIEWS)
@pytest.mark.parametrize("views", [1, 3, 101])
@torch.inference_mode()
def test_by_name_it_takes_any_sides_and_number_of_views(name, views):
    model = tiny_backbone(name)
    x = torch.rand(1, views, 3, 42, 28)
    out, dense = model(x, attention="spark3r"), model(x, attention="dense")
    assert out.points.shape == (1, views, 42, 28, 3) and out.points.isfinite().all()
    reduced = views > 100 or (views > 1 and "da3" not in name)  # all layers of the tiny da3 are sensitive ones
    assert torch.equal(out.depth, dense.depth) != reduced


@torch.inference_mode()
def test_known_poses_go_with_it():
    model, x, poses = tiny_backbone("pi3x"), torch.rand(1, 4, 3, 42, 56), torch.eye(4).repeat(1, 4, 1, 1)
    poses[0, :, 0, 3] = torch.arange(4.0)
    dense = model(x, T_world_cam=poses).depth
    assert torch.equal(model(x, T_world_cam=poses, attention=NO_REDUCTION).depth, dense)
    assert not torch.equal(model(x, T_world_cam=poses, attention="spark3r").depth, dense)
    with pytest.raises(
        ValueError, match="'speed3r': with poses, Pi3X runs no attention in blocks: choose dense or spark3r"
    ):
        model(torch.rand(1, 4, 3, 56, 56), T_world_cam=poses, attention="speed3r")


@torch.inference_mode()
def test_views_of_one_kind_may_change_places():
    """Pi3 has no reference view: only which views keep their keys tells views apart."""
    model, strategy = tiny_backbone("pi3").double(), Spark3R(ratio=1, strides=2)
    x = torch.rand(1, 6, 3, 56, 56, dtype=torch.float64)
    order = [4, 1, 0, 5, 2, 3]  # 0, 2 and 4 keep their keys, the others do not
    out, permuted = model(x, attention=strategy).depth, model(x[:, order], attention=strategy).depth
    torch.testing.assert_close(permuted, out[:, order], rtol=1e-9, atol=1e-9)
    moved = model(x[:, [1, 0, 2, 3, 4, 5]], attention=strategy).depth
    assert (moved[:, 2] - out[:, 2]).abs().max() > 1e-9


@torch.inference_mode()
def test_the_reference_view_keeps_its_keys_wherever_it_stands():
    """Depth Anything 3 chooses its reference; with a stride as long as the sequence, only that view is looked at."""
    model, strategy = tiny_backbone("da3").double(), Spark3R(ratio=1, strides=5)
    x = torch.rand(1, 5, 3, 56, 56, dtype=torch.float64)
    run = lambda x: model(x, attention=strategy, reference="middle").depth  # noqa: E731
    out = run(x)
    torch.testing.assert_close(run(x[:, [4, 1, 2, 3, 0]]), out[:, [4, 1, 2, 3, 0]], rtol=1e-9, atol=1e-9)
    assert (run(x[:, [2, 1, 0, 3, 4]])[:, 1] - out[:, 1]).abs().max() > 1e-9


@torch.inference_mode()
def test_networks_whose_frames_see_only_earlier_ones_say_why_they_refuse():
    with pytest.raises(ValueError, match="'spark3r' works where all frames see all.*choose one of dense, speed3r"):
        tiny_backbone("streamvggt")(torch.rand(1, 2, 3, 56, 56), attention="spark3r")
    network, see = Network(NetworkConfig(56, 56, channels=64, stem=8, decoder=4)), torch.ones(1, 2, 2).bool()
    with pytest.raises(ValueError, match="'spark3r' works where all frames see all"):
        network(torch.rand(1, 2, 3, 56, 56), see, see, attention="spark3r")


@torch.inference_mode()
def test_the_kept_keys_are_counted_once_for_each_stride(monkeypatch):
    """Counting makes the host wait for a GPU."""
    counted, nonzero = [], torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x, **options: counted.append(x) or nonzero(x, **options))
    kept_tokens.cache_clear()
    model, x = tiny_backbone("vggt"), torch.rand(1, 101, 3, 28, 28)
    for _ in range(2):
        model(x, attention="spark3r")
    assert len(counted) == len({3, 9})  # of sensitive layers, and of the others
    model(x[:, :50], attention="spark3r")
    assert len(counted) == 3


def test_gradients_and_unknown_options_are_refused():
    with pytest.raises(ValueError, match="no gradient: run the network under torch.inference_mode"):
        tiny_backbone("vggt")(torch.rand(1, 2, 3, 56, 56), attention="spark3r")
    with pytest.raises(ValueError, match="'queries': choose one of input, keys"):
        Spark3R(similarity="queries")
    for options in (dict(ratio=0), dict(strides=-2), dict(strides=[2, 0]), dict(factor=0)):
        with pytest.raises(ValueError, match=rf"{next(iter(options))} .*: must be at least 1"):
            Spark3R(**options)
    with torch.inference_mode(), pytest.raises(ValueError, match="3 strides, but the network has more layers"):
        tiny_backbone("vggt")(torch.rand(1, 2, 3, 56, 56), attention=Spark3R(strides=[1, 2, 3]))


def test_the_probe_names_the_layers_that_bear_no_long_stride():
    def error(strategy):
        assert len(set(strategy.strides) if not isinstance(strategy.strides, int) else [strategy.strides]) <= 2
        strides = [strategy.strides] * 4 if isinstance(strategy.strides, int) else strategy.strides
        return 1 + sum(0.001 * s * weight for s, weight in zip(strides, (0.1, 1, 0, 2)))

    layers, ratios = probe(error, 4)
    assert layers == frozenset([1, 3]) and ratios[2] == 1
