"""The large backbones in their published sizes against the official code's outputs: minutes and up to 8 GB each.

Deselected by default; `pytest -m full test/test_backbones_full.py` runs them.
"""

import pytest
import torch
from goldens import Golden, conditions, images, manifest, published

from speed3r_ros.model.backbones.registry import build_backbone

pytestmark = pytest.mark.full


def full_model(name, checkpoint):
    model = build_backbone(name, "meta")
    keys, aliases = manifest(checkpoint)
    unused = getattr(model, "UNUSED", ())
    keys = {key: shape for key, shape in keys.items() if not key.startswith(unused)}
    model.load_state_dict(published(keys, aliases), assign=True)
    return model


@torch.inference_mode()
def test_pi3():
    model, golden = full_model("pi3", "pi3"), Golden("pi3_full")
    x = model.encode(images(2, 56, 84)[0], 2)
    golden.check("encoder_patch_tokens", x[:, ::5, ::32])
    golden.check("decoder_out", torch.cat(model.decode(x, 2, (4, 6), "dense", 0, 2), -1)[:, ::5, ::64])
    out = model(images(2, 56, 84))
    golden.check("camera_poses", out.T_world_cam, 5e-5)
    golden.check("local_points", out.points[:, :, ::2, ::2])
    golden.check("points", out.world_points()[:, :, ::2, ::2], 5e-5)
    golden.check("conf", out.raw["conf"][:, :, ::2, ::2])


@torch.inference_mode()
def test_pi3x():
    model, golden = full_model("pi3x", "pi3x"), Golden("pi3x_full")
    depth, K, T_world_cam = conditions(2, 56, 84)
    cases = {
        "none": {},
        "all": dict(depth=depth, K=K, T_world_cam=T_world_cam),
        "pose_ray": dict(K=K, T_world_cam=T_world_cam),
    }
    for case, given in cases.items():
        out = model(images(2, 56, 84), **given)
        outputs = dict(out.raw, points=out.world_points())
        for name in golden.arrays:
            if name.startswith(f"{case}/"):
                key = name.split("/")[1]
                value = outputs[key] if key in ("camera_poses", "metric") else outputs[key][:, :, ::2, ::2]
                golden.check(name, value, 5e-5 if key in ("camera_poses", "points") else 2e-5)


@torch.inference_mode()
def test_vggt():
    model, golden = full_model("vggt-1b", "vggt_1b"), Golden("vggt_full")
    x = model.aggregator.encode(images(2, 140, 196)[0], 2)
    golden.check("dino_patch_tokens", x[:, ::7, ::16])
    for i, tap in zip((0, 4, 11, 23), model.aggregator(x, 2, (10, 14), (0, 4, 11, 23))):
        golden.check(f"agg_{i}", tap[None, :, ::7, ::32])
    golden.check("pose_enc_iter0", model.camera_head(tap[None, :, 0])[0])
    out = model(images(2, 140, 196))
    golden.check("pose_enc", out.raw["pose_enc"])
    golden.check("extrinsic", torch.linalg.inv(out.T_world_cam)[:, :, :3])
    golden.check("intrinsic", out.K)
    for name in ("depth", "depth_conf", "world_points", "world_points_conf"):
        golden.check(name, out.raw[name][:, :, ::3, ::3])
    taps = model.aggregator(x, 2, (10, 14), model.config.taps)
    queries = torch.tensor([[[40.0, 60.0], [101.25, 30.5], [170.0, 120.0]]])
    once = model.track_head(taps, 5, 2, (10, 14), queries, iterations=1)
    golden.check("track1", once.positions)
    golden.check("track1_vis", once.visibility)
    golden.check("track1_conf", once.confidence)
