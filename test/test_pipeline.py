"""What the pipeline keeps over a restart and over a reset."""

from dataclasses import replace

import numpy as np
from doubles import ScriptedEngine

from speed3r_ros.config import Config
from speed3r_ros.model.types import Frame
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
