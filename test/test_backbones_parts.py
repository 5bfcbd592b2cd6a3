"""Heads a chunk of views at a time: the same geometry as all at once, and never the maps of all views in memory."""

import pytest
import torch
from tiny_backbones import BACKBONES, tiny_backbone
from torch.utils._python_dispatch import TorchDispatchMode

FIELDS = ("depth", "points", "confidence", "T_world_cam", "K")
SEVERAL_VIEWS = [name for name in BACKBONES if name != "da3-mono"]
H, W = 56, 112


def given(name, batch, views):
    """Conditions that the backbone knows: intrinsics of some views."""
    if name != "pi3x":
        return {}
    K = torch.tensor([[90.0, 0, W / 2], [0, 95, H / 2], [0, 0, 1]]).repeat(batch, views, 1, 1)
    return dict(K=K, has_K=torch.rand(batch, views) < 0.7)


@pytest.mark.parametrize("name", SEVERAL_VIEWS)
@torch.inference_mode()
def test_parts_are_the_whole_exactly(name):
    model, images = tiny_backbone(name), torch.rand(2, 5, 3, H, W)
    options = dict(given(name, 2, 5), chunk=3)
    whole, parts = model(images, **options), list(model.trunk(images, **options).parts())
    assert [len(part.depth) for part in parts] == [3, 3, 3, 1]
    for field in FIELDS:
        expected = getattr(whole, field)
        if expected is None:
            assert all(getattr(part, field) is None for part in parts)
        else:
            torch.testing.assert_close(
                torch.cat([getattr(p, field) for p in parts]), expected.flatten(0, 1), rtol=0, atol=0
            )
    assert {part.metric for part in parts} == {whole.metric} == {name in ("pi3x", "da3-nested")}


class MapsOf(TorchDispatchMode):
    """Counts the tensors of H x W maps of so many views that operations make, the images themselves aside."""

    def __init__(self, views, images):
        super().__init__()
        self.views, self.images, self.count = views, images.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() != self.images:
                shape = tuple(x.shape)
                self.count += any(
                    shape[at : at + 2] == (H, W) and self.views in shape[:at] for at in range(1, x.ndim - 1)
                )
        return out


# The scale of da3-nested comes from all maps, which wait beside the images.
@pytest.mark.parametrize("name", [name for name in SEVERAL_VIEWS if name != "da3-nested"])
@torch.inference_mode()
def test_no_map_of_all_views_is_ever_made(name):
    views = 11  # no number of channels is the same
    model, images = tiny_backbone(name), torch.rand(1, views, 3, H, W)
    options = dict(given(name, 1, views), chunk=2)
    with MapsOf(views, images) as parts:
        for _ in model.trunk(images, **options).parts():
            pass
    with MapsOf(views, images) as whole:
        model(images, **options)
    assert parts.count == 0 and whole.count >= 3
