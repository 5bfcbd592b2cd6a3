"""Depth Anything 3, any-view, single-view and nested, against the official code's outputs."""

import numpy as np
import pytest
import torch
from goldens import Golden, conditions, images, manifest, published, tiny

from speed3r_ros.model.backbones.da3 import (
    SMALL,
    Da3,
    Da3Config,
    Da3Mono,
    Da3Nested,
    quantile,
    reference_view,
)
from speed3r_ros.model.backbones.results import quaternion_from_rotation, rotation_from_quaternion

LEVELS = dict(features=64, levels=(32, 48, 64, 64), table=5)
TINY = Da3Config(128, 2, 8, 2, (3, 5, 6, 7), **LEVELS)
TINY_G = Da3Config(128, 2, 8, 3, (4, 5, 6, 7), swiglu=True, **LEVELS)
TINY_MONO = Da3Config(128, 2, 4, None, (0, 1, 2, 3), **LEVELS)


def golden_model(model, checkpoint):
    keys, aliases = checkpoint
    state = published(keys, aliases)
    state.update({key: state[source] for key, source in aliases.items()})
    model.load_state_dict(state)
    return model.eval()


def subsampled(out):
    """The goldens of the full sizes hold every other pixel."""
    return {
        k: x[:, :, ::2, ::2] if x.dim() > 3 and k not in ("extrinsics", "intrinsics") else x for k, x in out.items()
    }


def check_any_view(model, golden, case, size, chunk=8, full=False):
    given, count = (), int(case[-1])
    if case.startswith("pose"):
        _, K, T_world_cam = conditions(count, *size)
        given = (T_world_cam, K)
    out = model(images(count, *size), *given, chunk=chunk)
    raw = subsampled(out.raw) if full else out.raw
    for name in golden.arrays:
        key = name.split("/")[1]
        if not name.startswith(case) or key in ("ref_view", "extrinsics_in") or key.startswith("feat"):
            continue
        golden.check(name, raw[key])
    expected = int(golden.arrays[f"{case}/ref_view"][0])  # -1: none was chosen
    assert expected == -1 or raw["ref_view"].tolist() == [expected]
    golden.check(f"{case}/extrinsics", torch.linalg.inv(out.T_world_cam)[:, :, :3])


@pytest.mark.parametrize(
    "name, config, case",
    [("da3_tiny", TINY, "s2"), ("da3_tiny", TINY, "s4"), ("da3_tiny", TINY, "pose3")]
    + [("da3_tinyg", TINY_G, "s2"), ("da3_tinyg", TINY_G, "s4")],
)
@torch.inference_mode()
def test_any_view_matches_the_official_code(name, config, case):
    model, golden = golden_model(Da3(config), tiny(name)), Golden(name)
    check_any_view(model, golden, case, (56, 84), chunk=3)
    if case != "pose3":
        count = int(case[1])
        encoder = model.model.backbone.pretrained
        features = encoder.features(encoder(images(count, 56, 84)[0], count)[0])
        for i in (0, 3):
            golden.check(f"{case}/feat_{i}", features[i][None, :, ::3, ::4])


@pytest.mark.parametrize("case", ["s1", "s4", "pose3"])
@torch.inference_mode()
def test_the_small_model_in_its_published_size_matches_the_official_code(case):
    model = golden_model(Da3(SMALL), manifest("da3_small"))
    check_any_view(model, Golden("da3_small"), case, (70, 98), full=True)


@torch.inference_mode()
def test_selecting_all_blocks_equals_dense_attention():
    model, x = golden_model(Da3(TINY), tiny("da3_tiny")), images(3, 56, 112)
    sparse, dense = model(x, attention="speed3r", top_k=24), model(x)
    torch.testing.assert_close(sparse.depth, dense.depth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sparse.T_world_cam, dense.T_world_cam, rtol=1e-4, atol=1e-4)
    assert (model(x, attention="speed3r", top_k=1).depth - dense.depth).abs().max() > 1e-3


def nearly_everywhere(golden, name, value):
    """A pixel may fall on the other side of the sky's threshold."""
    expected = golden.arrays[name]
    close = np.abs(value.numpy() - expected) <= 2e-5 * np.abs(expected).max()
    assert close.mean() >= 0.999, name


@torch.inference_mode()
def test_mono_matches_the_official_code():
    model, golden = golden_model(Da3Mono(TINY_MONO), tiny("da3_mono_tiny")), Golden("da3_mono_tiny")
    out = model(images(2, 56, 84), chunk=1)
    encoder = model.model.backbone.pretrained
    golden.check("feat_3", encoder.features(encoder(images(2, 56, 84)[0], 1)[0])[3][None])
    golden.check("head_depth", out.raw["head_depth"])
    golden.check("sky", out.raw["sky"])
    nearly_everywhere(golden, "depth_after_sky", out.depth)


@torch.inference_mode()
def test_metric_depth_grows_with_the_focal_length():
    model = golden_model(Da3Mono(TINY_MONO, metric=True), tiny("da3_mono_tiny"))
    K = torch.tensor([[200.0, 0, 40], [0, 400, 30], [0, 0, 1]]).expand(1, 2, 3, 3)
    with_K, without = model(images(2, 56, 84), K), model(images(2, 56, 84))
    assert with_K.metric and not without.metric and without.points is None
    torch.testing.assert_close(with_K.depth, without.depth)  # a focal length of 300 pixels means factor 1
    torch.testing.assert_close(with_K.points[..., 2], with_K.depth)


@torch.inference_mode()
def test_nested_matches_the_official_code():
    model = golden_model(Da3Nested(TINY_G, TINY_MONO), tiny("da3_nested_tiny"))
    golden, out = Golden("da3_nested_tiny"), model(images(3, 56, 84))
    for name in ("extrinsics", "intrinsics", "scale_factor"):
        golden.check(name, out.raw[name])
    for name in ("depth", "depth_conf"):
        nearly_everywhere(golden, name, out.raw[name])
    assert out.metric and ((out.confidence == 0) == (out.raw["depth_conf"] == 1)).all()


@torch.inference_mode()
def test_without_a_pixel_that_tells_the_scale_it_is_one():
    """No sky, but what is confident lies at no distance to speak of."""
    depth, metres = torch.rand(2, 3, 8, 8).add(1)
    confidence, sky = torch.rand(3, 8, 8).add(1), torch.rand(3, 8, 8) < 0.3
    assert Da3Nested._scale(depth, metres.mul(1e-3), confidence, sky) == 1
    assert Da3Nested._scale(depth.mul(1e-4), metres, confidence, sky) == 1
    assert Da3Nested._scale(depth, metres, confidence, torch.ones_like(sky)) == 1
    scale = Da3Nested._scale(depth, 3.7 * depth, confidence, sky)
    torch.testing.assert_close(float(scale), 3.7, rtol=1e-5, atol=0)


def test_reference_views():
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert reference_view(tokens, "first").tolist() == [0, 0] and reference_view(tokens, "middle").tolist() == [2, 2]
    shuffle = torch.tensor([3, 1, 4, 0, 2])
    chosen = reference_view(tokens, "saddle_balanced")
    again = reference_view(tokens[:, shuffle], "saddle_balanced")
    assert (shuffle[again] == chosen).all()
    assert reference_view(tokens[:, :2], "saddle_balanced").tolist() == [0, 0]


def test_quaternions_return_their_rotation():
    q = torch.randn(1000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q[:6] = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 1e-9, 0, -1.0]])
    R = rotation_from_quaternion(q)
    torch.testing.assert_close(R @ R.mT, torch.eye(3, dtype=R.dtype).expand_as(R))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(1000, dtype=R.dtype))
    back = quaternion_from_rotation(R)
    assert (back[:, 3] >= 0).all()
    torch.testing.assert_close(rotation_from_quaternion(back), R)


def test_quantile_equals_torch():
    x = torch.randn(1001, dtype=torch.float64)  # in float32 torch rounds the place
    for q in (0.0, 0.5, 0.99, 1.0):
        for n in (1, 2, 1000, 1001):
            torch.testing.assert_close(quantile(x[:n], q, torch.ones(n, dtype=torch.bool)), torch.quantile(x[:n], q))
            valid = torch.rand(1001) < 0.5
            torch.testing.assert_close(quantile(x, q, valid), torch.quantile(x[valid], q))
    assert quantile(x, 0.5, torch.zeros(1001, dtype=torch.bool)) == torch.inf


def test_wrong_arguments_are_refused():
    model = Da3(TINY)
    with pytest.raises(ValueError, match="'last': choose one of saddle_balanced, middle, first"):
        model(images(1, 56, 56), reference="last")
    with pytest.raises(ValueError, match="give both T_world_cam and K"):
        model(images(1, 56, 56), K=torch.eye(3)[None, None])
