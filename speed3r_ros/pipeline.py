"""From frames to poses, depth and a map: what the node and the bag command have in common. No ROS."""

from __future__ import annotations

import threading
from dataclasses import replace
from enum import Enum

import numpy as np

from speed3r_ros.clouds import cloud, split_rows, to_world, valid_depth
from speed3r_ros.config import Config, InputConfig
from speed3r_ros.mapping.odometry import Odometry
from speed3r_ros.mapping.point_map import PointMap
from speed3r_ros.mapping.trajectory import Trajectory
from speed3r_ros.model.engine import Engine
from speed3r_ros.model.types import Estimate, Frame, Tracking

LONGEST = 1_000_000  # poses kept for ~/save_trajectory: nine hours at 30 Hz, in bounded memory
CALENDAR_NS = 10**17  # stamps beyond three years count from 1970, not from the start of a recording or a simulation
DISORDER_NS = 1_000_000_000  # frames up to this late are out of order; beyond it the clock went back (as in tf2)


class Step(Enum):
    """How a frame's stamp follows the last one's."""

    NEXT = "continues the stream"
    UNSET = "is not set"
    REPEATED = "repeats"
    LATE = "is older than the one before"
    BACK = "jumps back"
    GAP = "comes after a gap"


SKIPPED = Step.UNSET, Step.REPEATED, Step.LATE


def step_in_time(last_ns: int | None, stamp_ns: int, rules: InputConfig) -> Step:
    """Compare a stamp with the newest one so far. One bad stamp must not cost the map: a little disorder is no jump, nor is
    a stamp that the driver forgot to set."""
    if stamp_ns == 0 and last_ns is not None and last_ns > CALENDAR_NS:
        return Step.UNSET
    if last_ns is None or last_ns < stamp_ns <= last_ns + rules.max_gap * 1e9:
        return Step.NEXT
    if stamp_ns > last_ns:
        return Step.GAP
    if stamp_ns == last_ns:
        return Step.REPEATED
    if last_ns - stamp_ns <= DISORDER_NS:
        return Step.LATE
    return Step.BACK if rules.reset_on_time_jump else Step.NEXT


class Pipeline:
    """Engine, odometry, scale, trajectory and map.

    Poses are camera-to-world, OpenCV axes; world is the optical frame of the first tracked frame since `reset`.
    One thread computes (`process`, `follow`, `restart`, `reset`); any may `integrate`, read `point_map` and call `recorded`.
    """

    def __init__(self, config: Config | None = None, engine: Engine | None = None) -> None:
        self.config = config or Config()
        self.engine = engine or Engine(self.config.engine)
        features, window = self.config.odometry.features, self.config.odometry.window
        self.odometry = Odometry(features, window) if features else None
        self.trajectory = Trajectory(LONGEST)
        self.point_map = PointMap(self.config.map.voxel, self.config.map.max_points)
        self.map_version = 0  # grows whenever the map changes
        self._lock = threading.Lock()  # of the trajectory
        self._origin = np.eye(4)
        self._last = np.eye(4)
        self._last_sigma = self._inherited_sigma = np.zeros(2)  # the latter from before the last `restart`

    def process(self, frame: Frame) -> Estimate:
        """Estimate of one frame, in metres as far as `scale.factor` makes them so. Raises ValueError as `Engine.push`. A frame
        of which the network's output is not finite is lost, and a new segment starts at the last pose."""
        try:
            estimate = self.engine.push(frame)
        except FloatingPointError as error:
            self.restart()
            return Estimate(frame.stamp_ns, Tracking.LOST, lost_reason=str(error))
        if estimate.T_world_cam is None:
            return estimate
        if self.odometry:
            estimate = self.odometry.refine(frame.image, estimate, frame.K is not None)
        factor = self.config.scale.factor
        self._last_sigma = np.hypot(estimate.pose_sigma * [factor, 1.0], self._inherited_sigma)
        return replace(
            estimate,
            T_world_cam=self._continue(frame.stamp_ns, estimate.T_world_cam),
            depth=estimate.depth * np.float32(factor),
            pose_sigma=self._last_sigma,
        )

    def follow(self, frame: Frame) -> Estimate | None:
        """The pose, without depth, of a frame that there is no time to `process`; None when its features do not give it,
        and then the frame counts for nothing. Takes a small part of the time."""
        T = self.odometry.follow(frame.image, frame.K) if self.odometry else None
        if T is None:
            return None
        T = self._continue(frame.stamp_ns, T)
        return Estimate(frame.stamp_ns, Tracking.TRACKING, T_world_cam=T, pose_sigma=self._last_sigma)

    def _continue(self, stamp_ns: int, T_world_cam: np.ndarray) -> np.ndarray:
        """Scale a pose, put it behind the past's, and record it."""
        T = T_world_cam.copy()
        T[:3, 3] *= self.config.scale.factor
        self._last = T = self._origin @ T
        with self._lock:
            self.trajectory.append(stamp_ns, T)
        return T

    def integrate(self, estimate: Estimate) -> None:
        """Put the points of a keyframe into the map. Apart from `process`, so that its answer need not wait for this."""
        if estimate.is_keyframe:
            T = estimate.T_world_cam
            depth = valid_depth(estimate, self.config)
            rows, pixels = cloud(estimate, depth, min_confidence=self.config.map.min_confidence)
            points, colors = split_rows(rows)
            self.point_map.insert(to_world(T, points), colors, estimate.confidence.take(pixels))
            self.map_version += 1

    def restart(self) -> None:
        """Forget what the engine has seen, but go on from the last pose: trajectory and map stay."""
        self._forget()
        self._origin, self._inherited_sigma = self._last, self._last_sigma

    def reset(self) -> None:
        """Start anew: trajectory and map are cleared, and the next frame defines the world."""
        self._forget()
        with self._lock:
            self.trajectory.clear()
        self.point_map.clear()
        self.map_version += 1
        self._origin = self._last = np.eye(4)
        self._last_sigma = self._inherited_sigma = np.zeros(2)

    def _forget(self) -> None:
        self.engine.reset()
        if self.odometry:
            self.odometry.reset()

    def recorded(self) -> Trajectory:
        """A copy of the trajectory, which may be written while tracking goes on."""
        with self._lock:
            return self.trajectory.copy()
