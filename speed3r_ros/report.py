"""`report.html`: one self-contained page that shows what a run produced and how good it is.

    python -m speed3r_ros.report --recorded BAG --source INPUT --out DIR

builds it, with `trajectory.tum` and `map.ply`, from the node's recorded outputs.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import re
import signal
import sys
from datetime import datetime, timezone
from pathlib import Path

import cv2
import numpy as np

from speed3r_ros.mapping.files import written_whole
from speed3r_ros.mapping.metrics import TOLERANCE_NS, WINDOW, Accuracy, Sparsification
from speed3r_ros.mapping.point_map import write_ply
from speed3r_ros.mapping.trajectory import absolute_trajectory_error
from speed3r_ros.results import Results, accuracy, dropped, rate, summary, versions

HELP = "report on a live run from the node's recorded outputs"
INK = "#010203"  # in plots: replaced by the page's text colour, so that they suit light and dark
ESTIMATE, TRUTH, MARK = "#3b7dd8", "#e0823d", "#d0453e"

STYLE = """
:root { color-scheme: light dark; --text: #1d2329; --soft: #66707a; --line: #dfe3e7; --page: #ffffff; --card: #f6f7f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #dde2e6; --soft: #98a2ab; --line: #333a41; --page: #16191c; --card: #1e2226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 2.5rem 1.5rem 4rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; font-weight: 600; margin: 2.8rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p, figcaption { color: var(--soft); margin: .3rem 0; }
figcaption { font-size: .85rem; }
figure { margin: 0; }
svg, img { display: block; max-width: 100%; height: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: .7rem; margin-top: 1.6rem; }
.tile { background: var(--card); border-radius: 8px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3; }
.tile span { color: var(--soft); font-size: .85rem; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1.2rem; align-items: start; }
.view { background: var(--card); border-radius: 8px; overflow: hidden; }
.view figcaption { padding: .4rem .8rem; }
.strips { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1rem; }
.strips img { width: 100%; }
.strips img + img { margin-top: 2px; }
.legend { display: flex; gap: 1.6rem; flex-wrap: wrap; color: var(--soft); font-size: .85rem; margin-bottom: .8rem; }
.legend img { display: inline-block; width: 120px; height: .7em; border-radius: 2px; margin: 0 .4em; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; color: var(--soft); }
td.number, th.number { text-align: right; }
details { margin-top: .6rem; } summary { cursor: pointer; color: var(--soft); }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the sub-command."""
    parser.add_argument("--recorded", type=Path, required=True, metavar="BAG", help="the node's outputs")
    parser.add_argument("--source", required=True, metavar="INPUT", help="what was played to the node")
    parser.add_argument("--topic", default="", help="image topic of the input, where it has several")
    parser.add_argument("--sent", type=Path, metavar="CSV", help="times of sending, from play.py --log")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")


def run(options: argparse.Namespace) -> int:
    """Write report.html, trajectory.tum and map.ply; 0; 1 after one line that says what is wrong; 130 when interrupted."""
    from speed3r_ros.recording import results_of_recording
    from speed3r_ros.sources import open_source

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        source = open_source(options.source, options.topic)
        results = results_of_recording(options.recorded, source, options.sent)
        options.out.mkdir(parents=True, exist_ok=True)
        results.trajectory.write_tum(options.out / "trajectory.tum")
        write_ply(options.out / "map.ply", results.points, results.colors)
        write_report(results, options.out / "report.html")
    except (OSError, ValueError) as error:
        print(f"speed3r report: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("speed3r report: interrupted", file=sys.stderr)
        return 130
    print(summary(results))
    return 0


def write_report(results: Results, path: str | Path) -> None:
    """Write the page; the file appears whole or not at all. Raises OSError."""
    body = [head(results), trajectory_section(results), map_section(results), strips_section(results)]
    body += [confidence_section(results), timing_section(results), table_section(results)]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(results.name)} · speed3r</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )
    with written_whole(path) as partial:
        partial.write_text(page, encoding="utf-8")


# sections


def head(results: Results) -> str:
    """Title and the numbers at a glance."""
    poses, score = len(results.trajectory), accuracy(results)
    tiles = [("frames with a pose", number("poses", poses, f"{poses} / {results.frames}"))]
    if score:
        found = score.estimate
        tiles.append(("ATE after Sim(3) alignment", number("ate", found.ate, f"{found.ate:.3g}")))
        tiles.append(("of the true path", number("drift", found.ate / max(found.path, 1e-12), share=True)))
        tiles.append(("recovered scale", number("scale", found.scale)))
        tiles.append(("coverage of the truth", number("coverage", found.coverage, share=True)))
    for name, label, times in (
        ("rate", "poses per second", results.wall_s),
        ("depth_rate", "depth images per second", results.depth_wall_s),
    ):
        if np.isfinite(rate(times)):
            tiles.append((label, number(name, rate(times), f"{rate(times):.1f} Hz")))
    if len(results.latency_s):
        p50 = float(np.percentile(results.latency_s, 50)) * 1e3
        tiles.append(("median latency", number("latency_p50_ms", p50, f"{p50:.0f} ms")))
    if results.live:
        tiles.append(("frames dropped", number("dropped", dropped(results), str(dropped(results)))))
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for label, value in tiles)
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    mode = "live, over ROS 2" if results.live else "offline"
    what = "Reconstruction of all views at once" if results.at_once else f"Streaming reconstruction, {mode}"
    return f'<h1>{html.escape(results.name)}</h1>\n<p>{what}. {made}.</p>\n<div class="tiles">{cells}</div>'


def trajectory_section(results: Results) -> str:
    """Top and side view, against the truth where there is one."""
    if len(results.trajectory) < 2:
        return section("Trajectory", "<p>Fewer than two frames got a pose: nothing to draw.</p>")
    score = accuracy(results)
    estimate, poses = results.trajectory.poses[:, :3, 3], results.trajectory.poses
    truth = None
    if score:
        fit = absolute_trajectory_error(results.trajectory, results.truth, tolerance_ns=TOLERANCE_NS)
        estimate = fit.scale * estimate @ fit.R.T + fit.t
        poses = results.truth.poses
        true = poses[:, :3, 3]
        truth = with_gaps(results.truth.stamps_ns, true)
        error = np.linalg.norm(estimate[fit.estimate_index] - true[fit.truth_index], axis=1)
        stamps = results.truth.stamps_ns[fit.truth_index]
        when, error = with_gaps(stamps, (stamps - stamps[0]) / 1e9), with_gaps(stamps, error)
    axes = ground_axes(poses)
    estimate = with_gaps(results.trajectory.stamps_ns, estimate)
    figures = [figure_of(track_plot(estimate @ axes.T, truth @ axes.T if score else None), "")]
    if score:
        note = (
            f"Aligned to the truth with a similarity (scale {fit.scale:.4g}, {fit.matched} poses). "
            "Lengths are in the truth's unit."
        )
        figures.append(figure_of(error_plot(when, error, fit.rmse), "Position error over time"))
    else:
        note = "No ground truth: lengths are in the model's unit times the configured scale."
        if results.truth is not None:
            note = f"Fewer than 3 poses match the truth within {TOLERANCE_NS / 1e6:g} ms. " + note
    return section("Trajectory", f"<p>{note}</p>" + "".join(figures))


def map_section(results: Results) -> str:
    """Three renderings of the point map with the camera's path."""
    if not len(results.points):
        return section("Map", "<p>The map is empty.</p>")
    axes = ground_axes(results.trajectory.poses)
    path = results.trajectory.poses[:, :3, 3] @ axes.T
    points = results.points.astype(np.float64) @ axes.T
    views = {"From above": np.eye(3), "From the side": tilt(-90), "Oblique": tilt(-55) @ turn(35)}
    figures = [
        figure_of(data_image(splat(points @ R.T, results.colors, path @ R.T), ".png", title), title, "view")
        for title, R in views.items()
    ]
    count = number("map_points", len(results.points), f"{len(results.points):,}")
    return section("Map", f'<p>{count} points; the line is the camera.</p><div class="row">{"".join(figures)}</div>')


def strips_section(results: Results) -> str:
    """Image, depth and confidence at a few instants."""
    if not results.strips:
        return ""
    depths = np.concatenate([strip.depth[np.isfinite(strip.depth)] for strip in results.strips])
    near, far = np.percentile(depths, (2, 98)) if len(depths) else (0.0, 1.0)
    start = results.strips[0].stamp_ns
    cards = []
    for strip in results.strips:
        time = (strip.stamp_ns - start) / 1e9
        shown = {
            "image": strip.image,
            "depth": depth_colors(strip.depth, near, far),
            "confidence": confidence_colors(strip.confidence),
        }
        shape = f"aspect-ratio: {strip.aspect:.4f}"
        images = "".join(data_image(image, ".jpg", f"{what} at {time:.2f} s", shape) for what, image in shown.items())
        cards.append(f"<figure>{images}<figcaption>{time:.2f} s</figcaption></figure>")
    ramp = np.linspace(0, 1, 128, dtype=np.float32)[None].repeat(8, 0)
    legend = (
        f"<span>depth {near:.2f}{data_image(depth_colors(ramp, 0, 1), '.png', 'depth colours')}{far:.2f}</span>"
        f"<span>confidence 0{data_image(confidence_colors(ramp), '.png', 'confidence colours')}1</span>"
    )
    strips = f'<div class="legend">{legend}</div><div class="strips">{"".join(cards)}</div>'
    return section("Image, depth, confidence", strips)


def timing_section(results: Results) -> str:
    """Rate over time and the latency histogram."""
    if len(results.wall_s) < 2 or not len(results.latency_s):
        return ""
    p50, p95 = np.percentile(results.latency_s, (50, 95)) * 1e3
    what = "from sending the image to receiving its pose" if results.live else "of one frame, from image to pose"
    drops = f" {dropped(results)} of {results.frames} frames got no pose." if results.live else ""
    note = (
        f"Latency {what}: median {p50:.0f} ms, "
        f"95th percentile {number('latency_p95_ms', float(p95), f'{p95:.0f}')} ms.{drops}"
    )
    return section("Rate and latency", f"<p>{note}</p>" + figure_of(timing_plot(results), ""))


def table_section(results: Results) -> str:
    """All numbers, settings and versions."""
    score = accuracy(results)
    parts = []
    if score:
        parts.append(accuracy_table(score))
    elif results.truth is None:
        parts.append("<p>The input has no ground truth.</p>")
    if results.lost:
        parts.append("<h3>Frames without a pose</h3>" + table(escaped(results.lost)))
    settings = table(escaped(results.settings))
    title = "The node's last diagnostics" if results.live else "Settings"
    parts.append(f"<details><summary>{title}</summary>{settings}</details>" if results.settings else "")
    parts.append(f"<details><summary>Versions</summary>{table(escaped(versions()))}</details>")
    return section("Numbers", "".join(parts))


def confidence_section(results: Results) -> str:
    """How well confidence sorts the errors of depth, where they are known."""
    found = results.confidence
    if found is None:
        return ""
    note = (
        "The fifth of the pixels with the least confidence holds "
        f"{number('worst_fifth', found.worst_fifth, share=True)} of the sum of depth errors; "
        f"the worst fifth holds {found.worst_fifth_oracle:.1%}. Area under the sparsification error "
        f"{number('ause', found.ause)}; {found.ause_random:.4g} if confidence said nothing."
    )
    return section("Confidence", f"<p>{note}</p>" + figure_of(sparsification_plot(found), ""))


ACCURACY_ROWS = {
    "ate": "ATE, Sim(3) aligned",
    "ate_metric": "ATE, SE(3) aligned (metric)",
    "scale": "recovered scale",
    "coverage": "coverage: true poses that have an estimate",
    "path": "length of the true path",
    "rpe_frame": "relative error per frame, translation",
    "rpe_frame_rotation": "relative error per frame, rotation in degrees",
    "rpe_second": "relative error per second, translation",
    "rpe_second_rotation": "relative error per second, rotation in degrees",
    "rpe_unit": "relative error per unit of the path, translation",
    "rpe_unit_rotation": "relative error per unit of the path, rotation in degrees",
    "rotation": f"rotation between pairs within {WINDOW} frames, median, degrees",
    "rotation_auc5": "the same, AUC@5",
    "direction": f"direction between pairs within {WINDOW} frames, median, degrees",
    "direction_auc5": "the same, AUC@5",
}


AT_A_GLANCE = {"ate", "scale", "coverage"}  # shown in the head, too, and an id stands once


def accuracy_table(score: Accuracy) -> str:
    """Errors beside those of the trivial trajectories."""
    columns = {"this run": score.estimate, "straight line": score.line, "standing still": score.still}
    head = "".join(f'<th class="number">{name}</th>' for name in columns)
    body = ""
    for key, title in ACCURACY_ROWS.items():
        values = [getattr(errors, key) for errors in columns.values()]
        names = (f"{key}_table" if key in AT_A_GLANCE else key, f"{key}_line", f"{key}_still")
        cells = "".join(
            f'<td class="number">{number(name, value) if np.isfinite(value) else "–"}</td>'
            for name, value in zip(names, values)
        )
        body += f'<tr><th scope="row">{title}</th>{cells}</tr>'
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


# HTML


def section(title: str, content: str) -> str:
    """A titled part of the page."""
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def number(name: str, value: float, text: str = "", share: bool = False) -> str:
    """A number that people read as `text` and programs by its id, in full precision."""
    text = text or (f"{value:.1%}" if share else f"{value:.4g}")
    return f'<data id="{name}" value="{float(value)!r}">{text}</data>'


def table(rows: dict[str, str]) -> str:
    """Names and values; the values are HTML."""
    body = "".join(
        f'<tr><th scope="row">{html.escape(k)}</th><td class="number">{v}</td></tr>' for k, v in rows.items()
    )
    return f"<table><tbody>{body}</tbody></table>"


def escaped(values: dict[str, object]) -> dict[str, str]:
    """Values as HTML text."""
    return {name: html.escape(str(value)) for name, value in values.items()}


def figure_of(content: str, caption: str, kind: str = "") -> str:
    """A figure with an optional caption."""
    caption = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind}">{content}{caption}</figure>' if kind else f"<figure>{content}{caption}</figure>"


def data_image(image: np.ndarray, kind: str, alt: str, style: str = "") -> str:
    """An inline image from (h, w, 3) RGB or (h, w, 4) RGBA uint8; kind is .png or .jpg."""
    flipped = cv2.cvtColor(image, cv2.COLOR_RGBA2BGRA if image.shape[2] == 4 else cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(kind, flipped, [cv2.IMWRITE_JPEG_QUALITY, 88] if kind == ".jpg" else [])
    mime = {".png": "image/png", ".jpg": "image/jpeg"}[kind]
    data = base64.b64encode(encoded.tobytes()).decode()
    style = f' style="{style}"' if style else ""
    return f'<img src="data:{mime};base64,{data}" alt="{html.escape(alt)}"{style}>'


# pictures


def ground_axes(poses: np.ndarray) -> np.ndarray:
    """Rows right, away, up of a level view on camera poses (N, 4, 4): up is the cameras' mean up, right their main run."""
    up = -poses[:, :3, 1].mean(0)
    up = up / np.linalg.norm(up) if np.linalg.norm(up) > 0.1 else np.array([0.0, -1.0, 0.0])
    spread = poses[:, :3, 3] - poses[:, :3, 3].mean(0)
    level = spread - np.outer(spread @ up, up)
    right = np.linalg.svd(level, full_matrices=False)[2][0] if np.abs(level).max() > 1e-9 else poses[0, :3, 0]
    right = right - (right @ up) * up
    if np.linalg.norm(right) < 1e-9:
        right = np.cross(up, np.eye(3)[np.abs(up).argmin()])
    right = right / np.linalg.norm(right)
    return np.stack([right, np.cross(up, right), up])


def tilt(degrees: float) -> np.ndarray:
    """Rotation about the view's horizontal axis."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def turn(degrees: float) -> np.ndarray:
    """Rotation about the vertical axis."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def splat(points: np.ndarray, colors: np.ndarray, path: np.ndarray, width: int = 720, height: int = 540) -> np.ndarray:
    """Orthographic picture (height, width, 4) RGBA of points (N, 3): x right, y up, larger z in front; path on top."""
    shown = np.vstack([np.percentile(points, (1, 99), axis=0), path])[:, :2]
    low, high = shown.min(0), shown.max(0)
    scale = 0.94 / max((high[0] - low[0]) / width, (high[1] - low[1]) / height, 1e-9)

    def pixel(x: np.ndarray) -> np.ndarray:
        return (x[:, :2] - (low + high) / 2) * [scale, -scale] + [width / 2, height / 2]

    uv = np.floor(pixel(points)).astype(np.int64)
    inside = ((uv >= 0) & (uv < [width - 1, height - 1])).all(1)
    order = np.flatnonzero(inside)[np.argsort(points[inside, 2], kind="stable")]
    image = np.zeros((height, width, 4), dtype=np.uint8)
    u, v = uv[order].T
    rgba = np.hstack([colors[order], np.full((len(order), 1), 255, np.uint8)])
    for dv, du in ((0, 0), (0, 1), (1, 0), (1, 1)):
        image[v + dv, u + du] = rgba
    track = np.rint(pixel(path) * 16).astype(np.int32)
    stroke = tuple(int(ESTIMATE[k : k + 2], 16) for k in (1, 3, 5))
    cv2.polylines(image, [track.reshape(-1, 1, 2)], False, (*stroke, 255), 2, cv2.LINE_AA, shift=4)
    return image


def depth_colors(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Depth (h, w) as RGB; grey where it is NaN."""
    valid = np.isfinite(depth)
    level = np.clip((np.where(valid, depth, near) - near) / max(far - near, 1e-9), 0, 1)
    image = cv2.applyColorMap((255 * (1 - level)).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1].copy()
    image[~valid] = 128
    return image


def confidence_colors(confidence: np.ndarray) -> np.ndarray:
    """Confidence (h, w) in [0, 1] as RGB."""
    level = np.clip(np.nan_to_num(confidence), 0, 1)
    return cv2.applyColorMap((255 * level).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1].copy()


def new_figure(columns: int, height: float, widths: tuple[float, ...] = (1, 1)):
    """A matplotlib figure without a window, in the page's style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.6, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, gridspec_kw={"width_ratios": widths[:columns]})[0]
    for ax in axes:
        ax.set_facecolor("none")
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(INK)
        ax.spines[["left", "bottom"]].set_alpha(0.4)
        ax.tick_params(colors=INK, labelsize=9)
        ax.grid(color=INK, alpha=0.08, linewidth=0.8)
    return figure, axes


def inline_svg(figure) -> str:
    """The figure as an <svg> element that takes the page's text colour."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', 'width="100%" ', re.sub(r"\s+", " ", svg, count=0), count=1)
    return svg.replace(INK, "currentColor")


def label(ax, x: str, y: str, title: str = "") -> None:
    """Axis names and a title."""
    ax.set_xlabel(x, color=INK, fontsize=9)
    ax.set_ylabel(y, color=INK, fontsize=9)
    ax.set_title(title, color=INK, fontsize=10, loc="left")


def with_gaps(stamps_ns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values (N, ...) with NaN before each frame that comes late, so that a plotted line breaks there."""
    values, step = np.array(values, dtype=np.float64), np.diff(stamps_ns)
    late = np.flatnonzero(step > 5 * max(np.median(step), 1)) + 1 if len(step) else np.zeros(0, int)
    return np.insert(values, late, np.nan, axis=0)


def track_plot(estimate: np.ndarray, truth: np.ndarray | None) -> str:
    """Estimate (N, 3), and truth (M, 3), from above and from the side; NaN breaks a line."""
    figure, axes = new_figure(2, 4.4)
    for ax, (title, second) in zip(axes, (("From above", 1), ("From the side", 2))):
        if truth is not None:
            ax.plot(truth[:, 0], truth[:, second], color=TRUTH, linewidth=2.2, alpha=0.75, label="truth")
        ax.plot(estimate[:, 0], estimate[:, second], color=ESTIMATE, linewidth=1.5, label="estimate")
        ax.plot(*estimate[0, [0, second]], "o", color=ESTIMATE, markersize=6, label="start")
        ax.plot(*estimate[-1, [0, second]], "s", color=ESTIMATE, markersize=6, label="end")
        ax.set_aspect("equal", adjustable="datalim")
        ax.margins(0.08)
        label(ax, "right", ("away", "up")[second - 1], title)
    axes[0].legend(frameon=False, labelcolor=INK, fontsize=9)
    return inline_svg(figure)


def error_plot(when: np.ndarray, error: np.ndarray, ate: float) -> str:
    """Position error (N,) at times (N,) in seconds."""
    figure, (ax,) = new_figure(1, 2.0)
    ax.plot(when, error, color=MARK, linewidth=1.3)
    ax.axhline(ate, color=INK, alpha=0.5, linewidth=1, linestyle="--")
    ax.set_ylim(bottom=0)
    label(ax, "time, s", "error")
    return inline_svg(figure)


def sparsification_plot(found: Sparsification) -> str:
    """Mean of the remaining errors while the least confident pixels, or those with the largest errors, go."""
    figure, (ax,) = new_figure(1, 2.6)
    shown = np.linspace(0, len(found.curve) - 1, 101).astype(int)
    for values, color, name in ((found.curve, ESTIMATE, "by confidence"), (found.oracle, TRUTH, "by error")):
        ax.plot(shown / len(values), values[shown], color=color, linewidth=1.5, label=name)
    ax.axhline(1, color=INK, alpha=0.5, linewidth=1, linestyle="--", label="at random")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, labelcolor=INK, fontsize=9)
    label(ax, "share of pixels left out", "mean error of the rest, of all")
    return inline_svg(figure)


def timing_plot(results: Results) -> str:
    """Poses in every second of the run, and the histogram of latencies."""
    figure, (left, right) = new_figure(2, 2.8, (1.4, 1))
    wall = results.wall_s - results.wall_s[0]
    bins = np.arange(0, np.ceil(max(wall[-1], 1)) + 1)
    left.stairs(np.histogram(wall, bins)[0], bins, color=ESTIMATE, fill=True, alpha=0.8)
    label(left, "time, s", "poses per second", "Rate")
    latency = results.latency_s * 1e3
    right.hist(latency, bins=min(40, max(8, len(latency) // 4)), color=ESTIMATE, alpha=0.8)
    for quantile, style in ((50, "-"), (95, "--")):
        value = np.percentile(latency, quantile)
        right.axvline(value, color=INK, alpha=0.6, linewidth=1, linestyle=style, label=f"p{quantile} {value:.0f} ms")
    right.legend(frameon=False, labelcolor=INK, fontsize=9)
    label(right, "latency, ms", "frames", "Latency")
    return inline_svg(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m speed3r_ros.report", description=HELP)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
