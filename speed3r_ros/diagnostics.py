"""Counters of the node and the diagnostic message made from them."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue


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
        self._received: deque[float] = deque(maxlen=200)
        self._processed: deque[tuple[float, float, bool]] = deque(maxlen=200)
        self.counts: Counter[str] = Counter()
        self.tracking, self.note = "waiting for images", ""

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

    def summary(self, window: float = 5.0) -> dict[str, float]:
        """Rates in Hz and latencies in ms over the last `window` seconds."""
        now = time.monotonic()
        with self._lock:
            received = sum(now - t < window for t in self._received)
            recent = [(latency, by_network) for t, latency, by_network in self._processed if now - t < window]
        latencies = [latency for latency, _ in recent]
        p50, p95 = np.percentile(latencies, (50, 95)) * 1e3 if latencies else (float("nan"),) * 2
        return {
            "input_hz": received / window,
            "processed_hz": len(recent) / window,
            "network_hz": sum(by_network for _, by_network in recent) / window,
            "latency_p50_ms": p50,
            "latency_p95_ms": p95,
        }


def diagnostics_message(
    stamp: Any, name: str, statistics: Statistics, dropped: int, facts: dict[str, object]
) -> DiagnosticArray:
    """The state of tracking and of throughput: OK, WARN or ERROR, with one line each and the numbers behind them."""
    numbers, counts = statistics.summary(), statistics.counts
    level, text = DiagnosticStatus.OK, statistics.tracking
    if statistics.tracking == "lost":
        level, text = DiagnosticStatus.ERROR, f"lost: {statistics.note}"
    elif statistics.tracking == "weak":
        level, text = DiagnosticStatus.WARN, "weak: no image features confirm the pose, which is the network's alone"
    elif statistics.tracking in ("starting", "paused", "waiting for images"):
        level = DiagnosticStatus.WARN
    if counts["received"] and not numbers["input_hz"]:
        level, text = DiagnosticStatus.STALE, "no images for 5 s"
    tracking = {
        "tracking": statistics.tracking,
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
    if numbers["input_hz"] > 1.5 * max(numbers["processed_hz"], 1e-9):
        load = "slower than the camera: frames are dropped"
    elif numbers["input_hz"] > 1.5 * max(numbers["network_hz"], 1e-9):
        load = "the network is slower than the camera: between its frames, features alone give the poses"

    def status(part: str, level: bytes, message: str, values: dict[str, object]) -> DiagnosticStatus:
        pairs = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        return DiagnosticStatus(level=level, name=f"{name}: {part}", message=message, hardware_id="", values=pairs)

    message = DiagnosticArray()
    message.header.stamp = stamp
    message.status = [
        status("tracking", level, text, tracking),
        status(
            "throughput",
            DiagnosticStatus.OK if load == "keeps up" else DiagnosticStatus.WARN,
            load,
            throughput,
        ),
    ]
    return message
