"""VGGT and StreamVGGT against the official code's outputs."""

import numpy as np
import pytest
import torch
from goldens import Golden, images, published, tiny

from speed3r_ros.model.attention import Speed3R
from speed3r_ros.model.backbones.incremental import Incremental
from speed3r_ros.model.backbones.tracker import TrackerConfig
from speed3r_ros.model.backbones.vggt import Vggt, VggtConfig
from speed3r_ros.model.memory import Sight

TINY = VggtConfig(
    channels=128, heads=2, encoder_blocks=2, table=5, pairs=4, camera_blocks=2, camera_heads=4,
    features=64, levels=(32, 48, 64, 64), taps=(0, 1, 2, 3),
    tracker=TrackerConfig(features=32, hidden=64, levels=4, radius=2, iterations=2),
)  # fmt: skip
VIEWS = (3, 56, 84)


def golden_model(causal=False):
    model = Vggt(TINY, causal)
    state = published(*tiny("vggt_tiny"))
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith(Vggt.UNUSED)})
    return model.eval()


def check_outputs(golden, out, prefix=""):
    for name in ("pose_enc", "depth", "depth_conf", "world_points", "world_points_conf"):
        golden.check(prefix + name, out.raw[name])


@pytest.mark.parametrize("chunk", [2, 8])
@torch.inference_mode()
def test_vggt_matches_the_official_code_stage_by_stage(chunk):
    model, golden = golden_model(), Golden("vggt_tiny")
    x = model.aggregator.encode(images(*VIEWS)[0], chunk)
    golden.check("dino_patch_tokens", x)
    first, last = model.aggregator(x, 3, (4, 6), (0, 3), chunk=chunk)
    golden.check("agg_0", first[None])
    golden.check("agg_3", last[None])
    golden.check("pose_enc_iter0", model.camera_head(last[None, :, 0])[0])
    out = model(images(*VIEWS), chunk=chunk)
    check_outputs(golden, out)
    golden.check("extrinsic", torch.linalg.inv(out.T_world_cam)[:, :, :3])
    golden.check("intrinsic", out.K)


@torch.inference_mode()
def test_tracks_match_the_official_code():
    model, golden = golden_model(), Golden("vggt_tiny")
    queries = torch.tensor([[[20.0, 30.0], [41.25, 10.5], [70.0, 50.0]]])
    raw = model(images(*VIEWS), queries, chunk=2).raw
    # random weights amplify rounding from iteration to iteration: a thousandth of a pixel after two
    golden.check("track", raw["track"], 1e-3 / np.abs(golden.arrays["track"]).max())
    golden.check("track_vis", raw["track_vis"], 1e-4)
    golden.check("track_conf", raw["track_conf"], 1e-4)
    taps = model.aggregator(model.aggregator.encode(images(*VIEWS)[0], 8), 3, (4, 6), TINY.taps)
    once = model.track_head(taps, 5, 3, (4, 6), queries, iterations=1)
    golden.check("track1", once.positions)
    golden.check("track1_vis", once.visibility)
    golden.check("track1_conf", once.confidence)
    torch.testing.assert_close(raw["track"][:, 0], queries)


@torch.inference_mode()
def test_streamvggt_matches_the_official_causal_form():
    check_outputs(Golden("streamvggt_tiny"), golden_model(causal=True)(images(*VIEWS)), "causal_batch/")


@torch.inference_mode()
def test_streamvggt_matches_the_official_frame_by_frame_form():
    """Its poses differ from the causal form's: the passes of the camera head see one another."""
    model, golden = golden_model(causal=True), Golden("streamvggt_tiny")
    memory = Incremental(model, VIEWS[1:]).new_memory(2, 1, 1, "dense")
    steps = []
    for image in images(*VIEWS)[0]:
        memory.admit()
        steps.append(model(image[None, None], sight=Sight.into(memory)).raw)
    for name in ("pose_enc", "depth", "depth_conf", "world_points", "world_points_conf"):
        golden.check(f"stream/{name}", torch.cat([raw[name] for raw in steps], 1))


@torch.inference_mode()
def test_points_project_to_their_pixels_in_the_frame_of_the_camera():
    out = golden_model()(images(*VIEWS), point_head=False)
    projected = torch.einsum("bnij,bnhwj->bnhwi", out.K, out.points)
    pixels = projected[..., :2] / projected[..., 2:]
    v, u = torch.meshgrid(torch.arange(56.0), torch.arange(84.0), indexing="ij")
    torch.testing.assert_close(pixels, torch.stack([u, v], -1).expand_as(pixels), rtol=0, atol=1e-3)
    torch.testing.assert_close(out.points[..., 2], out.depth)
    assert "world_points" not in out.raw


@torch.inference_mode()
def test_selecting_all_blocks_equals_dense_attention():
    model, x = golden_model(), images(3, 56, 112)
    sparse, dense = model(x, attention="speed3r", top_k=24), model(x)
    torch.testing.assert_close(sparse.depth, dense.depth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sparse.T_world_cam, dense.T_world_cam, rtol=1e-4, atol=1e-4)
    assert (model(x, attention="speed3r", top_k=1).depth - dense.depth).abs().max() > 1e-3


@torch.inference_mode()
def test_speed3r_always_shows_the_first_view_and_every_100th(monkeypatch):
    """As published; what that means is tested with the strategy."""
    calls, attend = [], Speed3R.__call__

    def recorded(self, q, k, v, fine, coarse, specials, top_k, layer):
        calls.append((layer.always.table, specials))
        return attend(self, q, k, v, fine, coarse, specials, top_k, layer)

    monkeypatch.setattr(Speed3R, "__call__", recorded)
    aggregator = golden_model(False).aggregator
    aggregator(torch.randn(101, 16, 128), 101, (4, 4), (3,), "speed3r", 1)
    expected = torch.zeros(1, 101, 101, dtype=torch.bool)
    expected[:, :, [0, 100]] = True
    assert len(calls) == 4
    assert all(torch.equal(table, expected) and specials == 5 for table, specials in calls)


@torch.inference_mode()
def test_images_too_small_for_the_tracker_are_refused():
    model = golden_model()  # 4 levels
    with pytest.raises(ValueError, match="tracks need images of at least 16 pixels"):
        model(images(2, 14, 28), torch.ones(1, 1, 2))
