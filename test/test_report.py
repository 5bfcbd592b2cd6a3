"""The report: the numbers on the page are right, the page is valid HTML, complete in itself, and shows what it should."""

import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from speed3r_ros.mapping.metrics import sparsification
from speed3r_ros.mapping.trajectory import Trajectory
from speed3r_ros.report import depth_colors, ground_axes, splat, write_report
from speed3r_ros.results import Results, Strip, accuracy, dropped, rate, summary

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects numbers, texts, images and links, and fails on unbalanced tags."""

    def __init__(self, text):
        super().__init__()
        self.numbers, self.images, self.links, self.tags, self.texts, self._open = {}, [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        if tag == "data":
            assert values["id"] not in self.numbers
            self.numbers[values["id"]] = float(values["value"])
        if tag == "img":
            self.images.append(values)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


@pytest.fixture
def rng():
    return np.random.default_rng()


def trajectory_of(stamps, positions, rotations):
    out = Trajectory()
    for stamp, position, R in zip(stamps, positions, rotations):
        T = np.eye(4)
        T[:3, :3], T[:3, 3] = R, position
        out.append(stamp, T)
    return out


def make_results(rng, count=50, **changes):
    """A run over a random walk whose estimate has a known similarity and no noise."""
    stamps = 5_000_000_000 + np.arange(count) * 100_000_000
    rotations = Rotation.from_rotvec(rng.normal(size=(count, 3)) * 0.2).as_matrix()
    positions = np.cumsum(rng.normal(size=(count, 3)) * [0.2, 0.02, 0.2], axis=0)
    values = dict(
        name="<random> & walk",
        frames=count + 7,
        truth=trajectory_of(stamps, positions, rotations),
        trajectory=trajectory_of(stamps[:-10], positions[:-10] / 2.5, rotations[:-10]),
        strips=[
            Strip(
                int(stamp),
                rng.integers(0, 256, (84, 112, 3), dtype=np.uint8),
                rng.uniform(1, 5, (84, 112)).astype(np.float32),
                rng.uniform(0, 1, (84, 112)).astype(np.float32),
            )
            for stamp in stamps[::8]
        ],
        points=rng.normal(size=(2000, 3)).astype(np.float32),
        colors=rng.integers(0, 256, (2000, 3), dtype=np.uint8),
        latency_s=rng.uniform(0.01, 0.2, count - 10),
        wall_s=100 + np.arange(count - 10) * 0.25,
        depth_wall_s=100 + np.arange(count // 4) * 1.0,
        live=True,
        lost={"black frame (mean 3 of 255): check <the cap>": 4},
        settings={"engine.window": 4},
        confidence=sparsification(rng.uniform(size=500), rng.uniform(size=500)),
    )
    return Results(**{**values, **changes})


def page_of(results, tmp_path):
    write_report(results, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_numbers_on_the_page_are_the_known_ones(rng, tmp_path):
    results = make_results(rng)
    numbers = Page(page_of(results, tmp_path)).numbers
    positions = results.truth.poses[:40, :3, 3]
    assert numbers["poses"] == 40
    assert numbers["ate"] == pytest.approx(0, abs=1e-9)
    assert numbers["scale"] == pytest.approx(2.5)
    assert numbers["coverage"] == pytest.approx(40 / 50)
    assert numbers["rate"] == pytest.approx(4) and numbers["depth_rate"] == pytest.approx(1)
    assert numbers["latency_p50_ms"] == pytest.approx(1e3 * np.median(results.latency_s))
    assert numbers["latency_p95_ms"] == pytest.approx(1e3 * np.quantile(results.latency_s, 0.95))
    assert numbers["dropped"] == 57 - 40 - 4
    assert numbers["map_points"] == 2000
    assert numbers["path"] == pytest.approx(np.linalg.norm(np.diff(positions, axis=0), axis=1).sum())
    assert numbers["rpe_frame"] == pytest.approx(0, abs=1e-9)
    assert numbers["ate_still"] == pytest.approx(np.sqrt(positions.var(axis=0).sum()))


def test_the_line_baseline_is_the_best_straight_line(rng):
    """A free least-squares line in time has the same direction freedom as an aligned one: both errors agree."""
    results = make_results(rng)
    positions, time = results.truth.poses[:40, :3, 3], np.arange(40.0)
    residual = positions - np.stack([np.polyval(np.polyfit(time, column, 1), time) for column in positions.T], 1)
    assert accuracy(results).line.ate == pytest.approx(np.sqrt((residual**2).sum(1).mean()), rel=1e-9)


def test_metric_error_sees_the_scale(rng):
    score = accuracy(make_results(rng)).estimate
    assert score.ate < 1e-9 < 0.01 < score.ate_metric


def test_the_page_is_complete_in_itself(rng, tmp_path):
    text = page_of(make_results(rng), tmp_path)
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "@import" not in text
    assert page.links and all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not re.search(r"url\((?!['\"]?(#|data:))", text)
    assert "&lt;random&gt; &amp; walk" in text and "<random>" not in text and "<the cap>" not in text


def test_the_page_is_valid_html(rng, tmp_path):
    html5lib = pytest.importorskip("html5lib", reason="waits for `pip install html5lib`")
    html5lib.HTMLParser(strict=True).parse(page_of(make_results(rng), tmp_path))


def test_every_picture_decodes(rng, tmp_path):
    page = Page(page_of(make_results(rng), tmp_path))
    assert page.tags.count("svg") == 4  # trajectory, error, confidence, timing
    assert len(page.images) == 3 + 2 + 3 * 7  # map views, colour bars, strips
    for image in page.images:
        data = base64.b64decode(image["src"].split("base64,", 1)[1])
        assert image["alt"]
        assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) is not None


@pytest.mark.parametrize(
    "changes",
    [
        dict(truth=None),
        dict(trajectory=Trajectory(), wall_s=np.zeros(0), latency_s=np.zeros(0), strips=[], points=np.zeros((0, 3))),
        dict(live=False, lost={}, settings={}, confidence=None),
        dict(trajectory=trajectory_of([1, 2, 3], np.zeros((3, 3)), [np.eye(3)] * 3)),
        dict(trajectory=trajectory_of([5_000_000_000], np.zeros((1, 3)), [np.eye(3)])),
    ],
    ids=["no truth", "no pose at all", "offline", "no matching stamps", "one pose"],
)
def test_a_poor_run_still_gives_a_valid_page(rng, tmp_path, changes):
    results = make_results(rng, **changes)
    page = Page(page_of(results, tmp_path))
    assert ("ate" in page.numbers) == (accuracy(results) is not None)
    assert f"{len(results.trajectory)} of {results.frames}" in summary(results)


def test_too_slow_a_machine_is_told_the_remedy(rng):
    results = make_results(rng)
    assert "--rate" not in summary(results)
    results.frames = 5 * len(results.trajectory)
    assert "--rate 0.2" in summary(results)
    results.live = False
    assert "--rate" not in summary(results)


def test_standing_still_is_scored_not_crashed(rng):
    results = make_results(rng)
    results.trajectory = trajectory_of(results.truth.stamps_ns, np.zeros((50, 3)), results.truth.poses[:, :3, :3])
    score = accuracy(results)
    assert score.estimate.scale == 0 and score.estimate.ate == pytest.approx(score.still.ate)


def test_rate_and_drops():
    assert dropped(Results("x", 20, Trajectory(), lost={"black": 3})) == 17
    assert rate(np.array([1.0, 2.0, 5.0])) == pytest.approx(0.5) and np.isnan(rate(np.array([1.0])))


def test_views_are_level_and_follow_the_motion(rng):
    """Cameras that look around the horizon while moving along a line: up is their up, right is the line."""
    tilt = Rotation.random(random_state=int(rng.integers(2**31))).as_matrix()
    yaw = Rotation.from_rotvec(np.outer(rng.uniform(-3, 3, 30), [0, 1, 0])).as_matrix()
    positions = np.outer(np.linspace(-2, 2, 30), [0.6, 0, 0.8])
    poses = trajectory_of(range(30), positions @ tilt.T, tilt @ yaw).poses
    right, away, up = ground_axes(poses)
    np.testing.assert_allclose(up, tilt @ [0, -1, 0], atol=1e-9)
    np.testing.assert_allclose(abs(right @ tilt @ [0.6, 0, 0.8]), 1, atol=1e-9)
    np.testing.assert_allclose(np.cross(right, away), up, atol=1e-9)


def test_nearer_points_hide_farther_ones():
    points = np.array([[x, y, z] for z in (0.0, 1.0) for x in range(-3, 4) for y in range(-3, 4)])
    colors = np.where(points[:, 2:] > 0.5, [255, 0, 0], [0, 0, 255]).astype(np.uint8)
    image = splat(points, colors, np.array([[-3.0, -3, 0], [-3, -3, 0]]))
    drawn = image[image[..., 3] == 255]
    assert ((drawn[:, 0] == 255) & (drawn[:, 2] == 0)).sum() > 100 and not ((drawn[:, :3] == [0, 0, 255]).all(1)).any()


def test_invalid_depth_is_grey():
    image = depth_colors(np.array([[1.0, np.nan], [3.0, 2.0]], np.float32), 1, 3)
    np.testing.assert_array_equal(image[0, 1], [128, 128, 128])
    assert image[0, 0, 0] > image[0, 0, 2] and image[1, 0, 2] >= image[1, 0, 1]  # near is red, far is blue
