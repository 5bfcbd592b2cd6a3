"""Counters of the node and the diagnostic message made from them."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

WINDOW = 5.0  # seconds that rates and latencies are taken over
MOST = 5000  # events kept of them: 1 kHz


def resident_bytes() -> int:
    """Memory of this process in use, where the system tells (Linux)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0


class Statistics:
    """Thread-safe counters over a sliding window of a few seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._received: deque[float] = deque(maxlen=MOST)
        self._processed: deque[tuple[float, float, bool]] = deque(maxlen=MOST)
        self.counts: Counter[str] = Counter()
        self.tracking, self.note = "waiting for images", ""
        self.paused = False  # apart from `tracking`, which the frame that is being computed sets afterwards

    def received(self) -> None:
        """An image has arrived."""
        with self._lock:
            self._received.append(time.monotonic())
            self.counts["received"] += 1

    def processed(self, latency: float, tracking: str, note: str = "", by_network: bool = True) -> None:
        """A frame has been answered, `latency` seconds after it arrived."""
        with self._lock:
            self._processed.append((time.monotonic(), latency, by_network))
            self.counts["processed"] += 1
            self.tracking, self.note = tracking, note

    def count(self, what: str) -> None:
        """Something else has happened."""
        with self._lock:
            self.counts[what] += 1

    def summary(self) -> dict[str, float]:
        """Rates in Hz and latencies in ms over the last `WINDOW` seconds."""
        now = time.monotonic()
        with self._lock:
            received = sum(now - t < WINDOW for t in self._received)
            recent = [(latency, by_network) for t, latency, by_network in self._processed if now - t < WINDOW]
        latencies = [latency for latency, _ in recent]
        p50, p95 = np.percentile(latencies, (50, 95)) * 1e3 if latencies else (float("nan"),) * 2
        return {
            "input_hz": received / WINDOW,
            "processed_hz": len(recent) / WINDOW,
            "network_hz": sum(by_network for _, by_network in recent) / WINDOW,
            "latency_p50_ms": p50,
            "latency_p95_ms": p95,
        }


def diagnostics_message(
    stamp: Any, name: str, statistics: Statistics, dropped: int, facts: dict[str, object]
) -> DiagnosticArray:
    """The state of tracking and of throughput: OK, WARN or ERROR, with one line each and the numbers behind them."""
    numbers, counts = statistics.summary(), statistics.counts
    tracking = "paused" if statistics.paused else statistics.tracking
    level, text = DiagnosticStatus.OK if tracking == "tracking" else DiagnosticStatus.WARN, tracking
    if tracking == "lost":
        level, text = DiagnosticStatus.ERROR, f"lost: {statistics.note}"
    elif tracking == "weak":
        text = "weak: no image features confirm the pose, which is the network's alone"
    if counts["received"] and not numbers["input_hz"]:
        level, text = DiagnosticStatus.STALE, f"no images for {WINDOW:g} s"
    state = {
        "tracking": tracking,
        "lost_frames": counts["lost"],
        "weak_frames": counts["weak"],
        "bad_frames": counts["bad"],
        "resets": counts["resets"],
        **facts,
    }
    throughput = {k: f"{v:.1f}" for k, v in numbers.items()} | {
        "received": counts["received"],
        "processed": counts["processed"],
        "dropped": dropped,
        "memory_mb": resident_bytes() // 2**20,
    }
    load = "keeps up"
    if statistics.paused:
        load = "paused"
    elif numbers["input_hz"] > 1.5 * max(numbers["processed_hz"], 1e-9):
        load = "slower than the camera: frames are dropped"
    elif numbers["input_hz"] > 1.5 * max(numbers["network_hz"], 1e-9):
        load = "the network is slower than the camera: between its frames, features alone give the poses"

    def status(part: str, level: bytes, message: str, values: dict[str, object]) -> DiagnosticStatus:
        pairs = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        return DiagnosticStatus(level=level, name=f"{name}: {part}", message=message, hardware_id="", values=pairs)

    message = DiagnosticArray()
    message.header.stamp = stamp
    message.status = [
        status("tracking", level, text, state),
        status(
            "throughput",
            DiagnosticStatus.OK if load in ("keeps up", "paused") else DiagnosticStatus.WARN,
            load,
            throughput,
        ),
    ]
    return message
