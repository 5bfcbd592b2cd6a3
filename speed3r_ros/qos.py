"""Image subscriptions whose reliability follows the publisher.

A best-effort subscription loses nearly every message above 0.5 MB with stock Fast DDS, and a reliable one never matches
a best-effort publisher. So the publisher is looked at before subscribing, and again when QoS turns out incompatible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy

try:  # Iron and later; Humble has it in another module
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:
    from rclpy.qos_event import SubscriptionEventCallbacks

PERIOD = 0.25  # seconds between looks at the publishers
POLICIES = {"reliable": ReliabilityPolicy.RELIABLE, "best_effort": ReliabilityPolicy.BEST_EFFORT}


class FollowingSubscription:
    """A subscription that is created when a publisher appears, with its reliability, and renewed when that changes."""

    def __init__(
        self,
        node: Node,
        kind: type,
        topic: str,
        callback: Callable[[Any], None],
        reliability: str = "auto",
        depth: int = 2,
    ) -> None:
        self._node, self._kind, self._topic, self._callback = node, kind, topic, callback
        self._wanted, self._depth = POLICIES.get(reliability), depth
        self._subscription = None
        self.reliability: ReliabilityPolicy | None = None
        if self._wanted is not None:
            self._subscribe(self._wanted)
        else:
            steady = Clock(clock_type=ClockType.STEADY_TIME)  # /clock may wait for somebody to subscribe to the images
            self._timer = node.create_timer(PERIOD, self._look, clock=steady)
            self._look()

    def _look(self) -> None:
        topic = self._node.resolve_topic_name(self._topic)
        offered = [info.qos_profile.reliability for info in self._node.get_publishers_info_by_topic(topic)]
        if not offered:
            return
        reliable = all(policy == ReliabilityPolicy.RELIABLE for policy in offered)
        self._subscribe(ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT)

    def _subscribe(self, reliability: ReliabilityPolicy) -> None:
        if reliability == self.reliability:
            return
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
        self.reliability = reliability
        qos = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=self._depth, reliability=reliability)
        events = SubscriptionEventCallbacks(incompatible_qos=self._incompatible, use_default_callbacks=False)
        self._subscription = self._node.create_subscription(
            self._kind, self._topic, self._callback, qos, event_callbacks=events
        )
        self._node.get_logger().info(
            f"{self._node.resolve_topic_name(self._topic)}: subscribed, {reliability.name.lower()}"
        )

    def _incompatible(self, _: Any) -> None:
        self._node.get_logger().warning(
            f"{self._node.resolve_topic_name(self._topic)}: a publisher's QoS is incompatible with {self.reliability.name.lower()}; "
            + ("set input.reliability to auto" if self._wanted is not None else "looking again"),
            throttle_duration_sec=5.0,
        )
