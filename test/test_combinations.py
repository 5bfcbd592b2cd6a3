"""Every network in every way of streaming, attention and precision: it runs, or the engine is refused before the first frame."""

from copy import deepcopy
from itertools import product

import numpy as np
import pytest
from tiny_backbones import tiny_backbone

from speed3r_ros.model import streaming, weights
from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.engine import Engine
from speed3r_ros.model.lite3r import add_linear_branch
from speed3r_ros.model.network import Network, NetworkConfig
from speed3r_ros.model.quantised import Int8Linear
from speed3r_ros.model.types import Frame

COMPACT = NetworkConfig(56, 112, channels=64, encoder_blocks=1, alternating_blocks=1, stem=4, decoder=2)
TINY = {"pi3": "pi3", "pi3x": "pi3x", "speed3r-pi3": "speed3r-pi3", "vggt-1b": "vggt", "streamvggt": "streamvggt",
        "da3-small": "da3", "da3-nested": "da3-nested"}  # fmt: skip


def why_not(model, mode, attention, precision, branch):
    """What the refusal says, or None if it is to run."""
    if model != "compact":
        if attention == "lite3r" and mode == "incremental":
            return "engine.attention = 'lite3r': of backbones, it works on whole sequences"
        if attention == "spark3r" and (model, mode) == ("streamvggt", "windowed"):
            return "engine.attention = 'spark3r' works where all frames see all, and of streamvggt"
        if precision == "int8":
            return "engine.precision = 'int8': only compact runs in it"
    if precision == "int8" and not Int8Linear.supported():
        return "engine.precision = 'int8': needs an x86 CPU"
    if attention == "lite3r" and not branch:
        return f"engine.attention = 'lite3r': the weights {model!r} have no linear branch"
    return None


@pytest.mark.parametrize("model", ["compact", *TINY])
@pytest.mark.parametrize("mode", ["incremental", "windowed"])
def test_it_runs_or_is_refused_at_once(model, mode, monkeypatch, fp8_by_definition):
    plain = Network(COMPACT).eval() if model == "compact" else tiny_backbone(TINY[model])
    branched = deepcopy(plain)
    add_linear_branch(branched)

    def load(name, path=None):
        return deepcopy(branched if branch else plain)

    monkeypatch.setattr(streaming, "load_backbone", load)
    monkeypatch.setattr(weights, "load", load)
    frame = Frame(np.random.default_rng().integers(0, 255, (60, 120, 3), dtype=np.uint8), 0)
    size = dict(height=56, width=112, window=1, anchors=1, bank=1, device="cpu")
    attentions, precisions = ("dense", "speed3r", "spark3r", "lite3r"), ("fp32", "bf16", "fp8", "int8")
    for attention, precision, branch in product(attentions, precisions, (False, True)):
        if branch and attention != "lite3r":
            continue
        config = EngineConfig(model, streaming=mode, attention=attention, precision=precision, **size)
        if says := why_not(model, mode, attention, precision, branch):
            with pytest.raises(ValueError) as refused:
                Engine(config)
            assert str(refused.value).startswith(says) and "\n" not in str(refused.value)
        else:
            assert np.isfinite(Engine(config).push(frame).depth).all(), config
