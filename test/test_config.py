"""Settings: one tree, its YAML file, and clear refusals."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from speed3r_ros.config import Config, dump_yaml, load_yaml, parse_value, settings, with_values

YAML = Path(__file__).parents[1] / "config" / "recon.yaml"


def test_the_shipped_file_is_the_tree():
    assert YAML.read_text() == dump_yaml()
    assert load_yaml(YAML) == Config()
    tree = yaml.safe_load(YAML.read_text())["/**"]["ros__parameters"]
    assert {f"{g}.{k}" for g, branch in tree.items() for k in branch} == {name for name, _, _ in settings(Config())}


def test_every_setting_is_documented():
    for name, item, value in settings(Config()):
        assert len(item.metadata["help"]) > 10, name
        assert isinstance(value, (bool, int, float, str)), name


def test_values_replace_and_are_checked(tmp_path):
    config = with_values(Config(), {"engine.window": 9, "scale.factor": 2})
    assert config.engine.window == 9 and config.scale.factor == 2.0 and Config().engine.window != 9
    for values, says in [({"engine.windw": 1}, "did you mean 'engine.window'"), ({"engine.window": 0}, "must be in"), ({"depth.max": 0.0}, "depth.max = 0.0: must be >= 0.01"),
                         ({"tf.publish": "yes"}, "expected bool"), ({"input.reliability": "maybe"}, "choose one of")]:  # fmt: skip
        with pytest.raises(ValueError, match=says):
            with_values(Config(), values)
    path = tmp_path / "x.yaml"
    path.write_text("engine: {window: 3}\nframes: {map: world}\n")
    assert load_yaml(path).engine.window == 3 and load_yaml(path).frames.map == "world"
    path.write_text("engine: [")
    with pytest.raises(ValueError, match="not YAML"):
        load_yaml(path)
    path.write_text("- 1")
    with pytest.raises(ValueError, match="expected a mapping"):
        load_yaml(path)


def test_text_values():
    assert (
        parse_value("engine.window", "8") == 8
        and parse_value("frames.map", "8") == "8"
        and parse_value("tf.publish", "false") is False
    )
    with pytest.raises(ValueError, match=r"engine.window = '\[1': not a value") as error:
        parse_value("engine.window", "[1")
    assert "\n" not in str(error.value)


def test_numbers_without_a_point_are_numbers(tmp_path):
    """YAML 1.1 takes 1e-3 for text; the parameter files of ROS do not."""
    exponent, path = int(np.random.default_rng().integers(-5, 5)), tmp_path / "x.yaml"
    path.write_text(f"scale: {{factor: 1e{exponent}}}\n")
    typed = with_values(Config(), {"scale.factor": parse_value("scale.factor", f"1e{exponent}")})
    assert load_yaml(path).scale.factor == typed.scale.factor == 10.0**exponent
    for text in ("many", "nan", "1e9"):
        with pytest.raises(ValueError, match="scale.factor = "):
            with_values(Config(), {"scale.factor": text})


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="x.yaml: not YAML"):
        load_yaml(tmp_path / "x.yaml")
