"""Official backbones on random weights: bfloat16 products stay near float32, which residual streams and results keep, and
gradients reach the images' embedding."""

import pytest
import torch

from speed3r_ros.model.backbones.blocks import Block
from speed3r_ros.model.backbones.da3 import Da3, Da3Config, Da3Mono, Da3Nested
from speed3r_ros.model.backbones.pi3 import Pi3, Pi3Config, Pi3X, Speed3RPi3
from speed3r_ros.model.backbones.tracker import TrackerConfig
from speed3r_ros.model.backbones.vggt import Vggt, VggtConfig

PI3 = dict(
    channels=128, heads=2, encoder_blocks=2, table=5, decoder_blocks=6, head_blocks=2, camera_channels=64,
    metric_channels=64, metric_heads=2, metric_blocks=1, upsample=(32, 32, 32), last_channels=8,
)  # fmt: skip
ANY = Da3Config(128, 2, 6, 2, (2, 3, 4, 5), 32, (8, 8, 8, 8), table=5)
MONO = Da3Config(128, 2, 4, None, (0, 1, 2, 3), 32, (8, 8, 8, 8), table=5)
MODELS = {
    "pi3": lambda: Pi3(Pi3Config(**PI3)),
    "pi3x": lambda: Pi3X(Pi3Config(**PI3)),
    "speed3r-pi3": lambda: Speed3RPi3(Pi3Config(**{**PI3, "registers": 0})),
    "vggt": lambda: Vggt(VggtConfig(128, 2, 2, 5, 4, 4, 1, 4, 32, (8, 8, 8, 8), (0, 1, 2, 3), TrackerConfig(8, 16))),
    "da3": lambda: Da3(ANY),
    "da3-mono": lambda: Da3Mono(MONO),
    "da3-nested": lambda: Da3Nested(ANY, MONO),
}


def example(name):
    """A model, images and the conditions that it knows."""
    torch.manual_seed(0)
    given = {}
    if name == "pi3x":
        poses = torch.eye(4).repeat(1, 3, 1, 1)
        poses[0, :, 0, 3] = torch.arange(3.0)
        given = dict(depth=1 + torch.rand(1, 3, 56, 112), K=torch.eye(3).expand(1, 3, 3, 3), T_world_cam=poses)
    return MODELS[name]().eval(), torch.rand(1, 3, 3, 56, 112), given


@pytest.mark.parametrize("name", MODELS)
def test_gradients_do_not_depend_on_the_chunks(name):
    model, images, given = example(name)
    weight = next(p for n, p in model.named_parameters() if n.endswith("patch_embed.proj.weight"))
    grads = []
    for chunk in (2, 8):
        model(images, **given, chunk=chunk).depth.square().mean().backward()
        grads.append(weight.grad.clone())
        weight.grad = None
    assert grads[0].abs().max() > 0 and (grads[0] - grads[1]).norm() <= 1e-3 * grads[1].norm()


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_bfloat16_stays_near_float32(name):
    model, images, given = example(name)
    streams = []
    for block in (module for module in model.modules() if isinstance(module, Block)):
        block.norm1.register_forward_pre_hook(lambda _, x: streams.append(x[0].dtype))
    expected = model(images, **given)
    out = model.precision(torch.bfloat16)(images, **given)
    assert set(streams) == {torch.float32} and not torch.equal(out.depth, expected.depth)
    for field in ("depth", "points", "confidence", "T_world_cam", "K"):
        a, b = getattr(out, field), getattr(expected, field)
        assert (a is None) == (b is None), field
        if a is not None:
            assert a.dtype == torch.float32 and (a - b).norm() <= 0.02 * b.norm(), field
