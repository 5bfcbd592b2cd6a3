"""What one reconstruction produced, and the numbers that judge it. Filled by the bag command or from a recording."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib import metadata

import numpy as np

from speed3r_ros.mapping import metrics
from speed3r_ros.mapping.metrics import Accuracy, Sparsification
from speed3r_ros.mapping.trajectory import Trajectory

STRIPS = 8  # instants shown


@dataclass(frozen=True)
class Strip:
    """One instant: image (h, w, 3) uint8 RGB, depth (h, w) with NaN where invalid, confidence (h, w) in [0, 1].

    aspect: width over height of the camera's image, which the network's input need not have.
    """

    stamp_ns: int
    image: np.ndarray
    depth: np.ndarray
    confidence: np.ndarray
    aspect: float = 4 / 3


@dataclass
class Results:
    """One run over one input.

    frames: offered by the input. trajectory: of the frames that got a pose, camera-to-world. truth: the input's, if any.
    points, colors: the final map in the trajectory's world, (N, 3) float32 and (N, 3) uint8.
    latency_s: (N,) seconds from a frame's arrival to its pose. wall_s: (N,) monotonic times of the poses.
    depth_wall_s: (M,) the same of the depth images. live: frames came in real time, so that slow processing leaves some
    without depth, or drops them. lost: frames without a pose, by reason. confidence: how it sorts errors of depth, if known.
    """

    name: str
    frames: int
    trajectory: Trajectory
    truth: Trajectory | None = None
    strips: list[Strip] = field(default_factory=list)
    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.float32))
    colors: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.uint8))
    latency_s: np.ndarray = field(default_factory=lambda: np.zeros(0))
    wall_s: np.ndarray = field(default_factory=lambda: np.zeros(0))
    depth_wall_s: np.ndarray = field(default_factory=lambda: np.zeros(0))
    live: bool = False
    lost: dict[str, int] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    confidence: Sparsification | None = None


def accuracy(results: Results) -> Accuracy | None:
    """Errors over the frames that have a pose and a truth; None when there are fewer than 3."""
    try:
        return None if results.truth is None else metrics.accuracy(results.trajectory, results.truth)
    except ValueError:
        return None


def evenly(count: int, wanted: int = STRIPS) -> list[int]:
    """Up to `wanted` indices spread over range(count), the first and the last included."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(wanted, count))})


def rate(wall_s: np.ndarray) -> float:
    """Events per second of wall-clock time, from their times (N,)."""
    return (len(wall_s) - 1) / (wall_s[-1] - wall_s[0]) if len(wall_s) > 1 and wall_s[-1] > wall_s[0] else float("nan")


def dropped(results: Results) -> int:
    """Frames that were offered and got neither a pose nor a reason."""
    return max(results.frames - len(results.trajectory) - sum(results.lost.values()), 0)


def summary(results: Results) -> str:
    """A few lines for the terminal."""
    poses, score = len(results.trajectory), accuracy(results)
    lines = [f"frames     {poses} of {results.frames} have a pose ({poses / max(results.frames, 1):.1%})"]
    if results.live:
        lines.append(f"dropped    {dropped(results)}")
        if 0 < poses < results.frames / 2 < dropped(results):
            slower = f"{0.8 * poses / results.frames:.1g}"
            lines.append(
                f"           this machine is too slow for the recording: `scripts/demo.sh --rate {slower}` plays it slower"
            )
    lines += [f"lost       {count}: {reason}" for reason, count in results.lost.items()]
    if np.isfinite(rate(results.wall_s)):
        lines.append(
            f"rate       {rate(results.wall_s):.2f} Hz of poses, {rate(results.depth_wall_s):.2f} Hz of depth images"
        )
    if len(results.latency_s):
        p50, p95 = np.percentile(results.latency_s, (50, 95)) * 1e3
        lines.append(f"latency    {p50:.0f} ms median, {p95:.0f} ms 95th percentile")
    if score:
        found = score.estimate
        lines += [
            f"ATE        {found.ate:.4f} after Sim(3) alignment, on a path of {found.path:.2f}",
            f"           scale {found.scale:.4f}, coverage {found.coverage:.1%} ({found.matched} true poses matched)",
            f"           {found.ate_metric:.4f} after SE(3) alignment",
            f"baselines  {score.line.ate:.4f} straight line, {score.still.ate:.4f} standing still",
        ]
    elif results.truth is not None:
        lines.append("ATE        not computed: fewer than 3 poses match the truth in time")
    lines.append(f"map        {len(results.points)} points")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of this package and of what decides its numbers."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in ("speed3r_ros", "torch", "numpy", "opencv-python", "opencv-python-headless", "rosbags"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
