"""Official backbones on random weights: products in bfloat16 and in FP8 stay near float32, which residual streams and results
keep, and gradients reach the images' embedding."""

import pytest
import torch
from tiny_backbones import BACKBONES

from speed3r_ros.model.backbones.blocks import Block
from speed3r_ros.model.quantised import Fp8Linear


def example(name):
    """A model, images and the conditions that it knows."""
    torch.manual_seed(0)
    given = {}
    if name == "pi3x":
        poses = torch.eye(4).repeat(1, 3, 1, 1)
        poses[0, :, 0, 3] = torch.arange(3.0)
        given = dict(depth=1 + torch.rand(1, 3, 56, 112), K=torch.eye(3).expand(1, 3, 3, 3), T_world_cam=poses)
    return BACKBONES[name]().eval(), torch.rand(1, 3, 3, 56, 112), given


@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_do_not_depend_on_the_chunks(name):
    model, images, given = example(name)
    weight = next(p for n, p in model.named_parameters() if n.endswith("patch_embed.proj.weight"))
    grads = []
    for chunk in (2, 8):
        model(images, **given, chunk=chunk).depth.square().mean().backward()
        grads.append(weight.grad.clone())
        weight.grad = None
    assert grads[0].abs().max() > 0 and (grads[0] - grads[1]).norm() <= 1e-3 * grads[1].norm()


@pytest.mark.parametrize("name", BACKBONES)
@torch.inference_mode()
def test_bfloat16_stays_near_float32(name, monkeypatch):
    model, images, given = example(name)
    streams, norm = [], Block.norm_first
    monkeypatch.setattr(Block, "norm_first", lambda self, x: streams.append(x.dtype) or norm(self, x))
    expected = model(images, **given)
    out = model.precision(torch.bfloat16)(images, **given)
    assert set(streams) == {torch.float32} and not torch.equal(out.depth, expected.depth)
    for field in ("depth", "points", "confidence", "T_world_cam", "K"):
        a, b = getattr(out, field), getattr(expected, field)
        assert (a is None) == (b is None), field
        if a is not None:
            assert a.dtype == torch.float32 and (a - b).norm() <= 0.02 * b.norm(), field


@pytest.mark.parametrize("name", BACKBONES)
@torch.inference_mode()
def test_fp8_rounds_the_wide_layers_of_the_blocks_and_stays_near_float32(name, fp8_by_definition):
    torch.manual_seed(0)
    model, images = BACKBONES[name]().eval(), torch.rand(1, 3, 3, 56, 112)
    expected = model(images).depth
    out = model.precision("fp8")(images).depth
    assert out.dtype == torch.float32 and 0 < (out - expected).norm() <= 0.03 * expected.norm()
    layers = {key.rsplit(".", 1)[1] for key, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert layers == {"qkv", "fc1", "fc2"}
    for key, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            assert ".attn." in key or ".mlp." in key
    for dtype in ("fp8", torch.float32):
        with pytest.raises(ValueError, match="in 8 bits already and cannot go back; load the model anew"):
            model.precision(dtype)


def test_fp8_layers_multiply_what_rounding_leaves():
    layer = torch.nn.Linear(48, 20)
    x = torch.randn(5, 3, 48)

    def rounded(rows):
        scale = rows.abs().amax(-1, keepdim=True).double() / 448
        return (rows / scale).to(torch.float8_e4m3fn).double() * scale

    expected = rounded(x) @ rounded(layer.weight.detach()).T + layer.bias.detach()
    torch.testing.assert_close(Fp8Linear(layer)(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_without_fp8_units_one_line_says_where_it_runs():
    model = BACKBONES["pi3"]()
    with pytest.raises(ValueError, match="^precision = 'fp8': device 'cpu' has no FP8 units, which come with .*bf16$"):
        model.precision("fp8")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="'fp4': give a torch.dtype or 'fp8'"):
        model.precision("fp4")
