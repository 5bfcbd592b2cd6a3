"""Official backbones with bfloat16 products, on random weights: near float32, which residual streams and results keep."""

import pytest
import torch
from tiny_backbones import BACKBONES

from speed3r_ros.model.backbones.blocks import Block


@pytest.mark.parametrize("name", BACKBONES)
@torch.inference_mode()
def test_bfloat16_stays_near_float32(name):
    torch.manual_seed(0)
    model = BACKBONES[name]().eval()
    images = torch.rand(1, 3, 3, 56, 112)
    given = {}
    if name == "pi3x":
        poses = torch.eye(4).repeat(1, 3, 1, 1)
        poses[0, :, 0, 3] = torch.arange(3.0)
        given = dict(depth=1 + torch.rand(1, 3, 56, 112), K=torch.eye(3).expand(1, 3, 3, 3), T_world_cam=poses)
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
