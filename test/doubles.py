"""Stand-ins for the engine whose answers are known in closed form, to test the node's messages. They also run as a node:

python test/doubles.py ScriptedEngine --ros-args ...
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np
import torch

from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.engine import Engine, unusable
from speed3r_ros.model.types import Estimate, Frame, Tracking, resize_intrinsics

SIZE = (24, 32)
STEP = np.array([0.01, 0.0, 0.1])  # metres per frame along x (right) and z (forward) of the camera
TURN = np.radians(2.0)  # per frame, about the camera's y axis (down): to the right
DEPTH = 2.0
SLOWNESS = 0.4  # seconds that the slow one takes for a frame
SPEED = np.array([0.3, 0.0, 0.0])  # metres per second of the slow one: to the right
K_UNKNOWN = np.array([[30.0, 0, 15.5], [0, 30.0, 11.5], [0, 0, 1]])


def step_transform() -> np.ndarray:
    """Pose of the next camera in the present one."""
    c, s = np.cos(TURN), np.sin(TURN)
    T = np.eye(4)
    T[:3, :3] = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
    T[:3, 3] = STEP
    return T


class ScriptedEngine:
    """Moves by the same step at every usable frame, in front of a wall with an invalid corner."""

    device, dtype, input_size = torch.device("cpu"), torch.float32, SIZE

    def __init__(self) -> None:
        self.config = EngineConfig()
        self.reset()

    def reset(self) -> None:
        self.T = None

    def push(self, frame: Frame) -> Estimate:
        Engine._prepare(self, frame)  # the same checks of the input
        reason = unusable(frame.image)
        if reason:
            return Estimate(frame.stamp_ns, Tracking.LOST, lost_reason=reason)
        first = self.T is None
        self.T = np.eye(4) if first else self.T @ step_transform()
        confidence = np.ones(SIZE, np.float32)
        confidence[:4, :4] = 0
        K = K_UNKNOWN if frame.K is None else resize_intrinsics(frame.K, frame.image.shape[:2], SIZE)
        image = np.full((*SIZE, 3), (10, 20, 30), np.uint8)
        return Estimate(
            frame.stamp_ns,
            Tracking.STARTING if first else Tracking.TRACKING,
            self.T.copy(),
            np.full(SIZE, DEPTH, np.float32),
            confidence,
            K,
            image,
            first,
            np.array([0.01, 0.02]),
        )


class SlowEngine(ScriptedEngine):
    """Slides along the wall at a constant speed, and takes its time."""

    def push(self, frame: Frame) -> Estimate:
        time.sleep(SLOWNESS)
        first, estimate = self.T is None, super().push(frame)
        if estimate.tracking is Tracking.LOST:
            return estimate
        self.start = frame.stamp_ns if first else self.start
        T = np.eye(4)
        T[:3, 3] = SPEED * (frame.stamp_ns - self.start) / 1e9
        return replace(estimate, T_world_cam=T)


class LeavingEngine(ScriptedEngine):
    """ROS shuts down while it works."""

    def push(self, frame: Frame) -> Estimate:
        import rclpy

        rclpy.shutdown()
        return super().push(frame)


if __name__ == "__main__":
    from speed3r_ros.recon_node import main

    kinds = {kind.__name__: kind for kind in (ScriptedEngine, SlowEngine, LeavingEngine)}
    sys.exit(main(engine=kinds[sys.argv[1]]()))
