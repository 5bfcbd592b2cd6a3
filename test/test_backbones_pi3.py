"""Pi3 and Pi3X against the official code's outputs."""

import pytest
import torch
from goldens import Golden, conditions, images, published, tiny

from speed3r_ros.model.backbones.pi3 import Pi3, Pi3Config, Pi3X

SIZES = dict(
    channels=128, heads=2, encoder_blocks=2, table=5, head_blocks=2, camera_channels=64,
    metric_channels=64, metric_heads=2, metric_blocks=2, upsample=(64, 32, 32), last_channels=16,
)  # fmt: skip
VIEWS = (3, 56, 84)


def golden_model(kind, name, decoder_blocks):
    model = kind(Pi3Config(decoder_blocks=decoder_blocks, **SIZES))
    model.load_state_dict(published(*tiny(name)))
    return model.eval()


@pytest.mark.parametrize("chunk", [2, 32])
@torch.inference_mode()
def test_pi3_matches_the_official_code_stage_by_stage(chunk):
    model, golden = golden_model(Pi3, "pi3_tiny", 6), Golden("pi3_tiny")
    x = model.encode(images(*VIEWS)[0], chunk)
    golden.check("encoder_patch_tokens", x)
    golden.check("decoder_out", torch.cat(model.decode(x, 3, (4, 6), "dense", 0, chunk), -1))
    out = model(images(*VIEWS), chunk=chunk)
    golden.check("camera_poses", out.T_world_cam, 5e-5)
    golden.check("local_points", out.points)
    golden.check("points", out.world_points(), 5e-5)
    golden.check("conf", out.raw["conf"])


def views(*has):
    return torch.tensor([has], dtype=torch.bool)


@pytest.mark.parametrize("case", ["none", "all", "pose_ray", "partial"])
@torch.inference_mode()
def test_pi3x_matches_the_official_code_under_conditions(case):
    model, golden = golden_model(Pi3X, "pi3x_tiny", 12), Golden("pi3x_tiny")
    depth, K, T_world_cam = conditions(*VIEWS)
    given = {
        "none": dict(),
        "all": dict(depth=depth, K=K, T_world_cam=T_world_cam),
        "pose_ray": dict(K=K, T_world_cam=T_world_cam),
        "partial": dict(
            depth=depth, K=K, T_world_cam=T_world_cam,
            has_depth=views(1, 0, 1), has_K=views(1, 1, 0), has_pose=views(1, 1, 0),
        ),
    }[case]  # fmt: skip
    out = model(images(*VIEWS), **given, chunk=2)
    outputs = dict(out.raw, points=out.world_points())
    for name in golden.arrays:
        if name.startswith(f"{case}/"):
            key = name.split("/")[1]
            golden.check(name, outputs[key], 5e-5 if key in ("camera_poses", "points") else 2e-5)


@torch.inference_mode()
def test_pi3x_passes_over_a_lone_pose():
    model, T_world_cam = golden_model(Pi3X, "pi3x_tiny", 12), conditions(*VIEWS)[2]
    lone = model(images(*VIEWS), T_world_cam=T_world_cam, has_pose=views(0, 1, 0))
    torch.testing.assert_close(lone.points, model(images(*VIEWS)).points, rtol=0, atol=0)


@torch.inference_mode()
def test_pi3x_passes_over_what_is_unknown():
    model, (depth, K, T_world_cam) = golden_model(Pi3X, "pi3x_tiny", 12), conditions(*VIEWS)
    x, has = images(*VIEWS), views(1, 0, 1)
    depth = depth.clone()
    depth[:, 1] = 0
    for unknown in (torch.nan, torch.inf, -1.0):
        other_depth, other_K, other_T = depth.clone(), K.clone(), T_world_cam.clone()
        other_depth[:, 1], other_K[:, 1], other_T[:, 1] = unknown, 0, torch.nan
        outputs = (
            model(x, *given, has_depth=has, has_K=has, has_pose=has)
            for given in ((depth, K, T_world_cam), (other_depth, other_K, other_T))
        )
        torch.testing.assert_close(*(out.points for out in outputs), rtol=0, atol=0)
    nowhere = model(x, depth=torch.zeros_like(depth), T_world_cam=T_world_cam)
    torch.testing.assert_close(nowhere.points, model(x, T_world_cam=T_world_cam).points, rtol=0, atol=0)


def test_wrong_sizes_are_refused():
    model = golden_model(Pi3, "pi3_tiny", 6)
    with pytest.raises(ValueError, match="60 x 56: sides must be multiples of 14, resize to 56 x 56"):
        model(images(1, 60, 56))
    with pytest.raises(ValueError, match="multiples of 4, images of 56"):
        model(images(1, 56, 84), attention="speed3r")
    with pytest.raises(ValueError, match="chunk 0: must be at least 1"):
        model(images(1, 56, 84), chunk=0)
