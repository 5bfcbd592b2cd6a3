"""All settings of the node and of the bag command: one tree of frozen dataclasses, from which the ROS parameters,
`config/recon.yaml` and the command line are made."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from speed3r_ros.model.config import EngineConfig, check, read_yaml, setting


@dataclass(frozen=True)
class InputConfig:
    """Where images come from."""

    image_transport: str = setting(
        "raw", "raw reads `image`, compressed reads `image/compressed`", choices=("raw", "compressed")
    )
    reliability: str = setting(
        "auto", "QoS of the image subscription; auto follows the publisher", choices=("auto", "reliable", "best_effort")
    )
    reset_on_time_jump: bool = setting(True, "start afresh when stamps or the clock jump back", live=True)
    max_gap: float = setting(
        10.0, "seconds between frames after which tracking starts a new segment", low=0.1, live=True
    )


@dataclass(frozen=True)
class FramesConfig:
    """Names of coordinate frames (REP-105)."""

    map: str = setting("map", "world-fixed frame that corrections may move")
    odom: str = setting("odom", "world-fixed frame without jumps")
    base: str = setting("base_link", "robot body frame; empty = the image's own frame")
    camera: str = setting("", "camera optical frame; empty = the image's frame_id")
    base_to_camera: str = setting("", "camera optical frame in base, `x y z qx qy qz qw`; empty = looked up in TF")
    wait: float = setting(
        2.0, "seconds to wait for base to camera in TF before a level camera is assumed", low=0.0, high=60.0
    )

    def check_together(self, prefix: str) -> None:
        """Raise ValueError with one line for names that TF does not take."""
        for name in ("map", "odom", "base", "camera"):
            value = getattr(self, name)
            if value.startswith("/"):
                raise ValueError(f"{prefix}{name} = {value!r}: TF takes no slash in front; use {value.lstrip('/')!r}")
            if not value and name in ("map", "odom"):
                raise ValueError(f"{prefix}{name} = '': must have a name, e.g. {name!r}")


@dataclass(frozen=True)
class TfConfig:
    """Which transforms the node publishes."""

    publish: bool = setting(True, "publish transforms at all", live=True)
    publish_map_to_odom: bool = setting(True, "publish map -> odom", live=True)
    publish_odom_to_base: bool = setting(True, "publish odom -> base; off when another node does", live=True)
    publish_base_to_camera: bool = setting(False, "publish base -> camera as static TF when nobody does")
    rate: float = setting(20.0, "Hz at which map -> odom is repeated", low=0.1, high=1000.0)
    lead: float = setting(
        0.1,
        "seconds by which map -> odom is post-dated, so that consumers need not wait",
        low=0.0,
        high=10.0,
        live=True,
    )


@dataclass(frozen=True)
class OdometryConfig:
    """Refinement of poses by tracked image features."""

    features: int = setting(
        300, "image features tracked at most; 0 = the network's poses as they are", low=0, high=10000
    )
    window: int = setting(7, "keyframes that are adjusted together", low=4, high=30)
    between: int = setting(
        8,
        "frames between two that the network has time for whose poses features alone give, at most; 0 = drop them all",
        low=0,
        high=1000,
    )


@dataclass(frozen=True)
class DepthConfig:
    """Depth images."""

    min_confidence: float = setting(0.04, "depth of pixels below is NaN", low=0.0, high=1.0, live=True)
    max: float = setting(100.0, "depth beyond is NaN, m", low=0.01, live=True)


@dataclass(frozen=True)
class PointsConfig:
    """Cloud of each frame."""

    max: int = setting(
        30000,
        "points per cloud; 30000 keep it under the 0.5 MB that best-effort subscribers receive",
        low=1,
        high=1000000,
        live=True,
    )


@dataclass(frozen=True)
class MapConfig:
    """The map of points."""

    voxel: float = setting(0.02, "edge of a voxel, m", low=1e-4, high=100.0)
    max_points: int = setting(500000, "points that the map holds at most", low=16, high=100000000)
    min_confidence: float = setting(0.06, "points below do not enter the map", low=0.0, high=1.0, live=True)
    rate: float = setting(0.5, "Hz at which the map is published", low=0.01, high=30.0)


@dataclass(frozen=True)
class PathConfig:
    """The path message."""

    max_length: int = setting(1024, "poses in the published path", low=1, high=100000)
    rate: float = setting(2.0, "Hz at which the path is published", low=0.01, high=30.0)


@dataclass(frozen=True)
class ScaleConfig:
    """Scale of a monocular reconstruction."""

    factor: float = setting(
        1.0,
        "metres per unit of the model (about the mean depth of the first frame); 1 = unknown scale",
        low=1e-6,
        high=1e6,
    )


@dataclass(frozen=True)
class OutputConfig:
    """Files that the services write."""

    trajectory_path: str = setting("trajectory.tum", "file of ~/save_trajectory (TUM format)", live=True)
    map_path: str = setting("map.ply", "file of ~/save_map", live=True)


def _group(kind: type) -> Any:
    return field(default_factory=kind)


@dataclass(frozen=True)
class Config:
    """Everything."""

    engine: EngineConfig = _group(EngineConfig)
    input: InputConfig = _group(InputConfig)
    frames: FramesConfig = _group(FramesConfig)
    tf: TfConfig = _group(TfConfig)
    odometry: OdometryConfig = _group(OdometryConfig)
    depth: DepthConfig = _group(DepthConfig)
    points: PointsConfig = _group(PointsConfig)
    map: MapConfig = _group(MapConfig)
    path: PathConfig = _group(PathConfig)
    scale: ScaleConfig = _group(ScaleConfig)
    output: OutputConfig = _group(OutputConfig)


def settings(config: Config) -> Iterator[tuple[str, Field, Any]]:
    """(dotted name, dataclass field, value) of every setting."""
    for group in fields(config):
        branch = getattr(config, group.name)
        for item in fields(branch):
            yield f"{group.name}.{item.name}", item, getattr(branch, item.name)


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """A checked copy with some settings replaced, by dotted name. Raises ValueError with one line for the first wrong one."""
    known = {name: item for name, item, _ in settings(config)}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, 0.4)
            raise ValueError(
                f"unknown setting {name!r}"
                + (f": did you mean {close[0]!r}?" if close else f"; settings: {', '.join(known)}")
            )
        if type(known[name].default) is float and type(value) in (int, str):
            with suppress(ValueError, OverflowError):
                value = float(value)  # to YAML, 1e-3 without a point is text
        group, item = name.split(".")
        config = replace(config, **{group: replace(getattr(config, group), **{item: value})})
    check(config)
    return config


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def load_yaml(path: str | Path) -> Config:
    """Config from a ROS parameter file (`/**: ros__parameters:`) or a plain tree. Raises ValueError, OSError."""
    tree = read_yaml(path)
    for branch in tree.values():
        if isinstance(branch, dict) and "ros__parameters" in branch:
            tree = branch["ros__parameters"]
            break
    return with_values(Config(), {k: v for k, v in _flatten(tree).items() if k != "use_sim_time"})


def parse_value(name: str, text: str) -> Any:
    """Value of a setting given as text on a command line. Raises ValueError."""
    default = {known: item.default for known, item, _ in settings(Config())}.get(name)
    if isinstance(default, str):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} = {text!r}: not a value ({' '.join(str(error).split())})") from error


def dump_yaml(config: Config | None = None) -> str:
    """The parameter file with every setting and its documentation as comments."""
    config = config or Config()
    lines = [
        "# Parameters of recon_node, with their defaults. Made from speed3r_ros/config.py by `speed3r config`.",
        "/**:",
        "  ros__parameters:",
    ]
    for group in fields(config):
        branch = getattr(config, group.name)
        assert is_dataclass(branch)
        lines.append(f"    {group.name}:  # {branch.__doc__.strip().splitlines()[0]}")
        for item in fields(branch):
            meta, value = item.metadata, getattr(branch, item.name)
            extent = ""
            if meta["choices"]:
                extent = f" One of: {', '.join(meta['choices'])}."
            elif meta["low"] is not None or meta["high"] is not None:
                low, high = ("" if meta[k] is None else f"{meta[k]:g}" for k in ("low", "high"))
                extent = f" Range: [{low}, {high}]."
            live = " May change at run time." if meta["live"] else ""
            lines.append(f"      # {meta['help'][0].upper()}{meta['help'][1:]}.{extent}{live}")
            lines.append(
                f"      {item.name}: {yaml.safe_dump(value).splitlines()[0] if not isinstance(value, str) else repr(value)}"
            )
    return "\n".join(lines) + "\n"
