"""Checkpoints: round trip, and one clear line for every way in which one can be wrong."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from speed3r_ros.model import weights
from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.engine import Engine
from speed3r_ros.model.network import Network, NetworkConfig
from speed3r_ros.model.streaming import load_network

TINY = NetworkConfig(height=56, width=56, channels=64, encoder_blocks=1, alternating_blocks=1, stem=4, decoder=2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 200_000)
    weights.save(Network(TINY), tmp_path / "set")
    assert len(list((tmp_path / "set").iterdir())) > 2
    return tmp_path / "set"


def test_round_trip_at_half_precision(tmp_path):
    network = Network(TINY)
    weights.save(network, tmp_path / "set", {"note": "x"})
    loaded = weights.load(str(tmp_path / "set"))
    assert loaded.config == TINY and not loaded.training
    for (name, a), (_, b) in zip(network.named_parameters(), loaded.named_parameters()):
        torch.testing.assert_close(a.half().float(), b, msg=name, rtol=0, atol=0)


def refused(folder, says):
    with pytest.raises(ValueError, match=says) as error:
        weights.load(str(folder))
    assert "\n" not in str(error.value)


def rewrite(path, change):
    with safe_open(path, "pt") as shard:
        metadata = shard.metadata()
    state = load_file(path)
    change(state, metadata)
    save_file(state, path, metadata=metadata)


def test_missing_folder_names_both_places(tmp_path):
    refused(tmp_path / "nowhere", "nowhere.*give the name of shipped weights")
    refused("~nobody-here/compact", "no weights '~nobody-here/compact'.*give the name of shipped weights")


def test_missing_shard(folder):
    sorted(folder.iterdir())[0].unlink()
    refused(folder, "shards are there")


def test_shards_of_two_sets(folder, tmp_path):
    """As where newer weights of the same network were copied over older ones in part."""
    weights.save(Network(TINY), tmp_path / "newer", {"steps": "7"})
    shards = sorted((tmp_path / "newer").iterdir())
    for path in shards[: int(torch.randint(1, len(shards), ()))]:
        path.replace(folder / path.name)
    refused(folder, "is of another set than model-01")


def test_truncated_shard(folder):
    path = sorted(folder.iterdir())[1]
    path.write_bytes(path.read_bytes()[:-1000])
    refused(folder, f"{path.name}: truncated")


def test_foreign_file(folder):
    for path in folder.iterdir():
        path.unlink()
    save_file({"x": torch.zeros(3)}, folder / "model.safetensors")
    refused(folder, "not a 'speed3r_ros compact 1' checkpoint")


@pytest.mark.parametrize("kind", ["missing", "renamed", "shape"])
def test_first_differing_key_is_named(folder, kind):
    def change(state, _):
        key = sorted(state)[0]
        value = state.pop(key)
        if kind == "renamed":
            state["aaa." + key] = value
        if kind == "shape":
            state[key] = torch.zeros(7, 7)
        change.key = key

    rewrite(sorted(folder.iterdir())[0], change)
    refused(folder, {"missing": change.key, "renamed": "aaa", "shape": r"\(7, 7\)"}[kind])


@pytest.mark.parametrize(
    "changed",
    [dict(network='{"channels": "many"}'), dict(trained_sizes="[]"), dict(trained_sizes="[[60, 56]]")],
    ids=str,
)
def test_unreadable_configuration(folder, changed):
    def change(_, metadata):
        metadata |= changed

    for path in folder.iterdir():
        rewrite(path, change)
    refused(folder, "configuration")


def test_saving_replaces_an_older_set(folder):
    weights.save(Network(TINY), folder)
    assert weights.load(str(folder)).config == TINY and not folder.with_name("set.partial").exists()


def test_compact_runs_at_the_sizes_of_its_training_and_says_so_of_others(tmp_path, caplog):
    """By default the smallest on a CPU and the largest elsewhere; weights without a list have the size they name."""
    network = Network(replace(TINY, width=112))
    weights.save(network, tmp_path / "one")
    network.trained_sizes = (56, 56), (112, 168)
    weights.save(network, tmp_path / "two")

    def size(name, device, **asked):
        config = EngineConfig(weights=str(tmp_path / name), **asked)
        return load_network(config, torch.device(device)).input_size

    assert size("one", "cpu") == size("one", "cuda") == (56, 112)
    assert size("two", "cpu") == (56, 56) and size("two", "cuda") == (112, 168)
    assert size("two", "cpu", height=112, width=168) == (112, 168)
    assert not caplog.records
    assert size("two", "cpu", width=168) == (56, 168)
    assert "not trained on images of 56 x 168 (height x width), only of 56 x 56, 112 x 168" in caplog.text
    with pytest.raises(ValueError, match="engine.height = 400: compact with .* needs a multiple of 56, e.g. 392, or 0"):
        Engine(EngineConfig(height=400))
