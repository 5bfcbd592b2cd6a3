"""The tables of `speed3r evaluate`: every number with its trivial baselines in brackets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from speed3r_ros.mapping.metrics import WINDOW
from speed3r_ros.mapping.odometry import USUAL_FOV

Column = tuple[list[str], list[str], str]
"""Dotted names, in a row of evaluation.json, of the numbers of one cell and of their baselines, and the format."""


def pair_columns(kind: str, baseline: str) -> dict[str, Column]:
    """Median and areas under the curve of rotations or directions."""
    names = [f"{kind}_auc{t}" for t in (5, 10, 30)]
    return {
        f"{kind}, deg": ([f"published.{kind}"], [f"{baseline}.{kind}"], ".2f"),
        f"{kind} AUC@5 / 10 / 30": ([f"published.{n}" for n in names], [f"{baseline}.{n}" for n in names], ".3f"),
    }


def against(name: str, form: str, *baselines: str) -> Column:
    """A column of one error of the trajectory."""
    return [f"published.{name}"], [f"{baseline}.{name}" for baseline in baselines], form


POSE_AUC = [f"pose_auc{t}" for t in (5, 10, 30)]
TABLES: dict[str, dict[str, Column]] = {  # title: columns
    "Trajectory, as first published. In brackets a straight line at constant speed and standing still; of rotations, "
    "not turning at all": {
        "frames": (["frames"], [], ".0f"),
        "path": against("path", ".2f"),
        "coverage": against("coverage", ".1%"),
        "ATE": against("ate", ".3f", "line", "still"),
        "ATE, SE(3)": against("ate_metric", ".3f", "line", "still"),
        "scale": against("scale", ".3f"),
        "RPE / frame": against("rpe_frame", ".4f", "line", "still"),
        "deg / frame": against("rpe_frame_rotation", ".2f", "still"),
        "RPE / s": against("rpe_second", ".3f", "line", "still"),
        "deg / s": against("rpe_second_rotation", ".2f", "still"),
        "RPE / unit": against("rpe_unit", ".3f", "line", "still"),
        "deg / unit": against("rpe_unit_rotation", ".2f", "still"),
    },
    f"All pairs within {WINDOW} frames. In brackets not turning, and a straight line": {
        **pair_columns("rotation", "still"),
        **pair_columns("direction", "line"),
        "both AUC@5 / 10 / 30": ([f"published.{n}" for n in POSE_AUC], [f"line.{n}" for n in POSE_AUC], ".3f"),
    },
    "Depth, confidence and focal length. In brackets constant depth, a confidence that says nothing, and a lens of "
    f"{math.degrees(USUAL_FOV):.0f} degrees": {
        "AbsRel": (["depth.absrel"], ["depth.absrel_constant"], ".3f"),
        "d1.25": (["depth.delta125"], ["depth.delta125_constant"], ".3f"),
        "AbsRel, one scale": (["depth.absrel_one_scale"], ["depth.absrel_one_constant"], ".3f"),
        "d1.25, one scale": (["depth.delta125_one_scale"], ["depth.delta125_one_constant"], ".3f"),
        "AbsRel, median scale": (["depth.absrel_median_scale"], ["depth.absrel_one_constant"], ".3f"),
        "scale spread": (["depth.scale_spread"], [], ".2f"),
        "AUSE": (["confidence.ause"], ["confidence.ause_random"], ".3f"),
        "error in the worst fifth": (["confidence.worst_fifth"], ["chance"], ".1%"),
        "focal": (["focal.median"], ["focal.usual"], ".3f"),
    },
    "ATE at the end, when the map has corrected what it can": {
        "as published": against("ate", ".3f"),
        "all frames": (["final.ate"], [], ".3f"),
        "keyframes": (["keyframes.ate"], [], ".3f"),
    },
}


def markdown(found: dict[str, Any]) -> str:
    """Tables of the sequences in what `evaluate_all` returns, with the median over them where there are several."""
    rows = [row | {"chance": 0.2} for row in found["sequences"]]
    named = {f"{row['name']}, K {row['intrinsics']}": [row] for row in rows}
    if len(rows) > 1:
        named["median"] = rows
    parts = []
    for title, columns in TABLES.items():
        body = {name: [cell(some, *column) for column in columns.values()] for name, some in named.items()}
        lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in body.items() if set(cells) != {"–"}]
        head = [f"| sequence | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        parts += ["\n".join([f"{title}.\n", *head, *lines]) + "\n"] if lines else []
    if not any(row["final"] for row in rows):
        parts.append("No pose was corrected after it was published: those of all frames at the end are the same.\n")
    parts += [f"Failed: {reason}\n" for reason in found["failed"].values()]
    return "\n".join(parts)


def cell(rows: list[dict[str, Any]], names: list[str], baselines: list[str], form: str) -> str:
    """Medians over the rows of the numbers, with those of the baselines in brackets; a dash where there are none."""
    values, beside = ([median_of(rows, name) for name in some] for some in (names, baselines))
    if not np.isfinite(values).any():
        return "–"
    text, trivial = (
        " / ".join(format(v, form) if math.isfinite(v) else "–" for v in some) for some in (values, beside)
    )
    return f"{text} ({trivial})" if trivial else text


def median_of(rows: list[dict[str, Any]], name: str) -> float:
    """Of the numbers that exist at a dotted name."""
    values = []
    for row in rows:
        value: Any = row
        for key in name.split("."):
            value = value[key] if value is not None else None
        values.append(math.nan if value is None else float(value))
    values = [value for value in values if math.isfinite(value)]
    return float(np.median(values)) if values else math.nan
