"""What the pipeline keeps over a restart and over a reset."""

from dataclasses import replace

import numpy as np
import pytest
from doubles import ScriptedEngine

from speed3r_ros.config import Config
from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.engine import Engine
from speed3r_ros.model.network import Network, NetworkConfig
from speed3r_ros.model.types import Frame, Tracking
from speed3r_ros.pipeline import Pipeline


def test_doubt_of_the_past_outlives_a_restart_but_not_a_reset():
    config = Config()
    pipeline = Pipeline(replace(config, odometry=replace(config.odometry, features=0)), ScriptedEngine())
    image = np.random.default_rng().integers(0, 255, (120, 160, 3), dtype=np.uint8)
    own = pipeline.process(Frame(image, 1)).pose_sigma
    for i in range(2, 5):  # the world goes on from the last pose, as uncertain as that was
        pipeline.restart()
        np.testing.assert_allclose(pipeline.process(Frame(image, i)).pose_sigma, own * i**0.5)
    pipeline.reset()
    np.testing.assert_allclose(pipeline.process(Frame(image, 9)).pose_sigma, own)


@pytest.mark.parametrize("features", [0, 300])
def test_a_frame_that_overflows_the_network_does_not_end_the_stream(features):
    """Its tokens are infinite, and then all that the memory holds is no number."""
    config, rng = Config(), np.random.default_rng()
    size = NetworkConfig(
        height=56, width=112, channels=32, head_width=16, encoder_blocks=1, alternating_blocks=1, stem=4, decoder=2
    )
    engine = Engine(EngineConfig(device="cpu", precision="fp32"), Network(size))
    pipeline = Pipeline(replace(config, odometry=replace(config.odometry, features=features)), engine)
    image = rng.integers(0, 255, (60, 120, 3), dtype=np.uint8)
    K = np.array([[100.0, 0, 60], [0, 100.0, 30], [0, 0, 1]])
    before = [pipeline.process(Frame(image, i, K)) for i in range(3)]
    bias = engine.network.patch_embed.bias.data
    right = bias.clone()
    bias[0] = np.inf
    lost = pipeline.process(Frame(image, 3, K))
    bias.copy_(right)
    assert lost.tracking is Tracking.LOST and lost.T_world_cam is None
    assert "not finite" in lost.lost_reason and "\n" not in lost.lost_reason
    after = [pipeline.process(Frame(image, i, K)) for i in range(4, 7)]
    for estimate in after:
        assert np.isfinite(estimate.T_world_cam).all() and np.isfinite(estimate.depth).all()
    np.testing.assert_allclose(
        after[0].T_world_cam, before[-1].T_world_cam, atol=1e-9
    )  # the world goes on from the last pose
    assert len(pipeline.recorded()) == 6
