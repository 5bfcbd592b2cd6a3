"""The attention strategies by name."""

from __future__ import annotations

from speed3r_ros.model.attention import Strategy, dense, speed3r
from speed3r_ros.model.lite3r import Lite3R
from speed3r_ros.model.spark3r import Spark3R

STRATEGIES: dict[str, Strategy] = {"dense": dense, "speed3r": speed3r, "spark3r": Spark3R(), "lite3r": Lite3R()}


def strategy_for(attention: str | Strategy, all_visible: bool = True) -> Strategy:
    """The strategy of that name, or the given one, whose options may differ from the defaults.

    all_visible: whether all frames see all. ValueError on an unknown name, or where a frame sees only some frames and the
    strategy cannot obey that.
    """
    if not isinstance(attention, Strategy) and attention not in STRATEGIES:
        raise ValueError(f"attention {attention!r}: choose one of {', '.join(STRATEGIES)}")
    strategy = attention if isinstance(attention, Strategy) else STRATEGIES[attention]
    if not (all_visible or strategy.follows_visibility):
        able = ", ".join(name for name, other in STRATEGIES.items() if other.follows_visibility)
        raise ValueError(
            f"attention {attention!r} works where all frames see all, and here a frame sees only earlier ones: "
            f"choose one of {able}"
        )
    return strategy
