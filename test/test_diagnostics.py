"""What diagnostics call a state, and at which level."""

import pytest

messages = pytest.importorskip("diagnostic_msgs.msg", reason="needs ROS messages")
from builtin_interfaces.msg import Time  # noqa: E402

from speed3r_ros.diagnostics import Statistics, diagnostics_message  # noqa: E402
from speed3r_ros.model.types import Tracking  # noqa: E402

LEVEL = messages.DiagnosticStatus


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
