"""What diagnostics call a state, and at which level."""

import numpy as np
import pytest

messages = pytest.importorskip("diagnostic_msgs.msg", reason="needs ROS messages")
from builtin_interfaces.msg import Time  # noqa: E402

from speed3r_ros import diagnostics  # noqa: E402
from speed3r_ros.diagnostics import Statistics, diagnostics_message  # noqa: E402
from speed3r_ros.model.types import Tracking  # noqa: E402

LEVEL = messages.DiagnosticStatus


@pytest.fixture
def clock(monkeypatch):
    """Time as the statistics see it: a list of one number, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(diagnostics.time, "monotonic", lambda: now[0])
    return now


def test_rates_of_fast_and_slow_cameras(clock):
    rng = np.random.default_rng()
    for period in (1 / rng.uniform(200, 900), 1 / rng.uniform(41, 120), 1 / rng.uniform(1, 30)):
        statistics = Statistics()
        for i in range(int(12 / period)):
            clock[0] += period
            statistics.received()
            if i % 2:
                statistics.processed(0.01, "tracking", by_network=i % 4 == 1)
        rates = statistics.summary()
        found = [rates[f"{name}_hz"] for name in ("input", "processed", "network")]
        np.testing.assert_allclose(found, np.array([1, 1 / 2, 1 / 4]) / period, atol=0.4)


@pytest.mark.parametrize("tracking", ["tracking", "lost", "weak"])
def test_a_pause_is_said_although_a_frame_is_answered_after_it(tracking):
    statistics = Statistics()
    for _ in range(9):
        statistics.received()
    statistics.paused = True
    statistics.processed(0.1, tracking, "dark")
    told = diagnostics_message(Time(), "recon", statistics, 0, {}).status
    assert [status.message for status in told] == ["paused", "paused"]
    assert [status.level for status in told] == [LEVEL.WARN, LEVEL.OK]
    statistics.paused = False
    assert "paused" not in diagnostics_message(Time(), "recon", statistics, 0, {}).status[0].message


def test_waiting_is_not_ok():
    statistics = Statistics()
    for statistics.tracking in ("waiting for images", "waiting for TF"):
        status = diagnostics_message(Time(), "recon", statistics, 0, {}).status[0]
        assert (status.level, status.message) == (LEVEL.WARN, statistics.tracking)


@pytest.mark.parametrize(
    "tracking, note, level, text",
    [
        (Tracking.TRACKING, "", LEVEL.OK, "tracking"),
        (Tracking.STARTING, "", LEVEL.WARN, "starting"),
        (Tracking.WEAK, "", LEVEL.WARN, "no image features confirm the pose"),
        (Tracking.LOST, "black frame", LEVEL.ERROR, "lost: black frame"),
    ],
)
def test_level_follows_tracking(tracking, note, level, text):
    statistics = Statistics()
    for _ in range(3):
        statistics.received()
        statistics.processed(0.1, tracking.value, note)
    if tracking is Tracking.WEAK:
        statistics.count("weak")
    status = diagnostics_message(Time(), "recon", statistics, 0, {}).status[0]
    assert status.level == level and text in status.message
    values = {pair.key: pair.value for pair in status.values}
    assert values["weak_frames"] == str(int(tracking is Tracking.WEAK)) and values["tracking"] == tracking.value
