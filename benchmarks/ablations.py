"""What each part of the design brings, as far as that needs no training: one row per change, with its command.

    python benchmarks/ablations.py --data ../shared/data --sequences 32
    python benchmarks/ablations.py --tiny --device cpu

One table for held-out rendered sequences and, with --data, one for each real one. Every row is `speed3r evaluate` with
some options, with the network's poses alone (`--set odometry.features=0`) and as shipped, refined by features; in each
cell they stand in this order. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed3r_ros.evaluate import evaluate_all, sequences_in
from speed3r_ros.evaluation_tables import median_of
from speed3r_ros.model.network import NetworkConfig
from speed3r_ros.reconstruct import positive, read_settings
from speed3r_ros.rendered import rendered_sources
from speed3r_ros.sources import Source, open_source

ALONE = "odometry.features=0"
COLUMNS = {
    "ATE / path": ("ate_share", ".3f"),
    "scale": ("published.scale", ".2f"),
    "rotation AUC@5": ("published.rotation_auc5", ".3f"),
    "direction AUC@30": ("published.direction_auc30", ".3f"),
    "AbsRel": ("depth.absrel", ".3f"),
    "AbsRel, one scale": ("depth.absrel_one_scale", ".3f"),
    "d1.25": ("depth.delta125", ".3f"),
}


@dataclass(frozen=True)
class Row:
    """One change: settings, and whether intrinsics are withheld."""

    name: str
    settings: tuple[str, ...] = ()
    unknown: bool = False


CHANGES = (
    Row("as shipped"),
    Row("intrinsics unknown", unknown=True),
    Row("dense attention", ("engine.attention=dense",)),
    *(Row(f"top {k} blocks", (f"engine.top_k={k}",)) for k in (8, 16, 64)),
    Row("window of 1 frame", ("engine.window=1",)),
    Row("window of 8 frames", ("engine.window=8",)),
    Row("1 anchor", ("engine.anchors=1",)),
    Row("12 anchors", ("engine.anchors=12",)),
    Row("bank of 1 keyframe", ("engine.bank=1",)),
    Row("window, anchors and bank of 1", ("engine.window=1", "engine.anchors=1", "engine.bank=1")),
    Row("no refresh", ("engine.refresh=0",)),
    Row("refresh after 12 keyframes", ("engine.refresh=12",)),
    Row("every frame a keyframe", ("engine.keyframe_overlap=1.0",)),
)
LENGTHS = (24, 48, 96, 240)  # frames; the network was trained with 24 at most


def measure(row: Row, sources: list[Source], frames: int, general: list[str]) -> str:
    """The row's cells: medians over the sources, of the network alone and of the refined poses."""
    found = []
    for more in ([ALONE], []):
        config = read_settings(None, [*general, *row.settings, *more])
        rows = evaluate_all(sources, config, False if row.unknown else None, limit=frames)["sequences"]
        shares = [{"ate_share": x["published"]["ate"] / max(x["published"]["path"], 1e-9)} for x in rows]
        found.append([x | share for x, share in zip(rows, shares)])
    return " | ".join(", ".join(number(rows, *column) for rows in found) for column in COLUMNS.values())


def number(rows: list[dict[str, Any]], key: str, form: str) -> str:
    """Median over the sequences, or a dash."""
    value = median_of(rows, key)
    return "–" if math.isnan(value) else format(value, form)


def table(data: str, rows: list[tuple[Row, int, list[Source]]], general: list[str]) -> None:
    """Print a table, row by row as they come: changes with their frames and sequences."""
    print(f"\n| {data} | " + " | ".join(COLUMNS) + " | command |\n|---" + "|---" * (len(COLUMNS) + 1) + "|")
    for row, frames, sources in rows:
        options = [
            f"--frames {frames}",
            *["--unknown"] * row.unknown,
            *(f"--set {x}" for x in (*general, *row.settings)),
        ]
        cells = measure(row, sources, frames, general)
        print(f"| {row.name} | {cells} | `speed3r evaluate {data} {' '.join(options)}` |", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="real sequence with ground truth, or folder of such")
    parser.add_argument("--sequences", type=positive, default=32, help="rendered sequences of each row")
    parser.add_argument("--frames", type=positive, default=240, help="of each real sequence, at most")
    parser.add_argument("--device", default="auto", help="as engine.device")
    parser.add_argument("--precision", default="auto", help="as engine.precision")
    parser.add_argument("--tiny", action="store_true", help="few frames: only to see that it runs")
    options = parser.parse_args()
    general = [f"engine.device={options.device}", f"engine.precision={options.precision}"]
    lengths, count, most = ((4, 6), 1, 6) if options.tiny else (LENGTHS, options.sequences, options.frames)
    size = NetworkConfig().height, NetworkConfig().width
    scenes = {n: list(rendered_sources(count, n, size, options.device)) for n in lengths}
    rows = [(row, lengths[0], scenes[lengths[0]]) for row in CHANGES]
    rows += [(Row(f"{n} frames of the same motions"), n, scenes[n]) for n in lengths[1:]]
    table(f"rendered --sequences {count}", rows, general)
    for path in sequences_in(options.data) if options.data else []:
        source = open_source(path)
        frames = min(len(source), most)
        rows = [(row, frames, [source]) for row in CHANGES]
        rows += [(Row(f"the first {n} frames"), n, [source]) for n in lengths if n < frames]
        table(str(path), rows, general)


if __name__ == "__main__":
    main()
