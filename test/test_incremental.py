"""Published backbones as streams: each tiny one against its own parallel form, against float64, and end to end."""

import gc

import numpy as np
import pytest
import torch
from tiny_backbones import BACKBONES, VGGT, tiny_backbone

from speed3r_ros.model.backbones.incremental import Incremental
from speed3r_ros.model.backbones.pi3 import nearest_rotation
from speed3r_ros.model.backbones.results import invert
from speed3r_ros.model.backbones.vggt import Vggt
from speed3r_ros.model.config import EngineConfig, check
from speed3r_ros.model.engine import Engine
from speed3r_ros.model.memory import Sight, visibility
from speed3r_ros.model.types import Frame, Tracking

FAMILIES = ("pi3", "pi3x", "speed3r-pi3", "vggt", "streamvggt", "da3", "da3-nested")
SIZE = 56, 112
LARGE, SMALL = (8, 2, 2), (1, 2, 2)  # window, anchors, bank: all is seen; all tiers are in use


def stream(network, images, limits, keyframes, attention, rays=None, top_k=3):
    """Predictions of frames (T, 3, H, W), one by one; rays: (T, 2, H, W), of every frame but the second."""
    memory = network.new_memory(*limits, attention)
    out = []
    for t, image in enumerate(images):
        memory.admit()
        out.append(network.step(image, memory, None if rays is None or t == 1 else rays[t], attention, top_k))
        if keyframes[t]:
            memory.keep()
    return out


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("limits", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("attention", ["dense", "speed3r"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_parallel_equals_recurrent(family, attention, limits):
    model, frames = tiny_backbone(family), 6
    if family == "streamvggt":  # its released stream lets passes of the camera head see one another, the parallel form not
        model.camera_head.all_passes = False
    keyframes = [True, True, False, True, True, True]
    images = torch.rand(frames, 3, *SIZE)
    rays = torch.randn(frames, 2, *SIZE) if family == "pi3x" else None
    given = {}
    if rays is not None:
        given = dict(rays=rays[None], has_K=(torch.arange(frames) != 1)[None])
    sight = Sight(*(table[None] for table in visibility(keyframes, *limits)))
    expected = model(images[None], attention=attention, top_k=3, sight=sight, **given)
    T = invert(expected.T_world_cam[:, :1]) @ expected.T_world_cam
    for t, out in enumerate(stream(Incremental(model, SIZE), images, limits, keyframes, attention, rays)):
        points = expected.points[0, t].movedim(-1, 0)
        if rays is not None and t != 1:
            points = torch.cat([rays[t] * points[2:], points[2:]])
        for name, value, reference in (
            ("points", out.points[0, 0], points),
            ("confidence", out.confidence[0, 0].sigmoid(), expected.confidence[0, t]),
            ("R", out.R[0, 0], T[0, t, :3, :3]),
            ("t", torch.cat([out.t[0, 0], torch.ones(1)]), torch.cat([T[0, t, :3, 3], torch.ones(1)])),
        ):
            assert relative_error(value, reference) < 1e-4, f"{name} of frame {t}"
    assert out.log_sigma.shape == (1, 1, 2) and out.descriptor is None
