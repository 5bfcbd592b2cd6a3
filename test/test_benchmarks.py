"""What the benchmarks say of input that they cannot use."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_backbones
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import accuracy
import backbone_stream
import layer_sensitivity
import spark3r_stream
import strategies
import training_phases

from speed3r_ros.model import weights
from speed3r_ros.model.lite3r import add_linear_branch
from speed3r_ros.model.network import Network, NetworkConfig
from speed3r_ros.training.config import CompactConfig, with_values
from speed3r_ros.training.trainer import Trainer


@pytest.mark.parametrize(
    "prepare, options, says",
    [
        (lambda folder: folder.rmdir(), (), "No such file or directory"),
        (lambda folder: None, (), r"no \*.png or \*.jpg in it; give a folder"),
        (lambda folder: (folder / "a.png").write_bytes(b"text"), (), "a.png: not an image; take it out of the folder"),
        (lambda folder: None, ("--size", "50", "56"), "images are 50 x 56: sides must be multiples of 14"),
        (
            lambda folder: cv2.imwrite(str(folder / "a.png"), np.zeros((60, 60, 3), np.uint8)),
            ("--size", "56", "56"),
            "absent.pt: does not exist",
        ),
    ],
)
def test_layer_sensitivity_says_what_it_cannot_read(tmp_path, monkeypatch, capsys, prepare, options, says):
    folder = tmp_path / "frames"
    folder.mkdir()
    prepare(folder)
    command = ["layer_sensitivity.py", "--checkpoint", str(tmp_path / "absent.pt"), "--images", str(folder), *options]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        layer_sensitivity.main()
    message = capsys.readouterr().err
    assert end.value.code == 1 and message.count("\n") == 1 and message.startswith("layer_sensitivity.py: ")
    with pytest.raises(ValueError, match=says):
        raise ValueError(message)


@pytest.mark.parametrize(
    "module, options, code, says",
    [
        (spark3r_stream, "--tiny --rows 10", 2, "argument --rows: invalid choice: 10"),
        (spark3r_stream, "--images FOLDER --every 0", 2, "argument --every: '0': must be a positive integer"),
        (spark3r_stream, "--images FOLDER --every 2", 1, "3 frames: give more than 4, see --images, --every, --frames"),
        (backbone_stream, "pi3 --precision fp8", 1, "device 'cpu' has no FP8 units"),
    ],
)
def test_the_streams_benchmarks_refuse_before_the_table(tmp_path, monkeypatch, capsys, module, options, code, says):
    for i in range(6):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.zeros((60, 60, 3), np.uint8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [module.__name__, *options.replace("FOLDER", str(tmp_path)).split()])
    with pytest.raises(SystemExit) as end:
        module.main()
    out, message = capsys.readouterr()
    assert end.value.code == code and not out and says in message.splitlines()[-1]


def test_images_are_read_in_the_order_of_their_names(tmp_path):
    values = np.random.default_rng().permutation(200)[:3]
    for name, value in zip("cab", values):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((20, 30, 3), (value, 0, 255), np.uint8))
    images = layer_sensitivity.read(tmp_path, 14, 28, 2)
    assert images.shape == (1, 2, 3, 14, 28)
    torch.testing.assert_close(images[0, :, 2, 0, 0] * 255, torch.tensor(values[1:].copy()).float())
    assert (images[:, :, 0] == 1).all()


def test_a_step_in_phases_is_one_of_the_trainer(tmp_path):
    """In bf16, where it matters what autocast holds."""
    seed = int(torch.randint(2**31, ()))
    config = with_values(CompactConfig(), training_phases.TINY | dict(precision="bf16", steps=1, seed=seed))
    whole, parts = (Trainer("compact", config, tmp_path / name) for name in ("whole", "parts"))
    whole.update(whole.draw())
    training_phases.step_in_phases(parts, parts.draw(), training_phases.Stopwatch())
    for name, value in whole.parameters.items():
        assert torch.equal(parts.parameters[name], value), f"seed {seed}: {name}"


@pytest.mark.parametrize("name, heads", [("vggt", 2), ("da3", 1)])
@pytest.mark.parametrize("attention", ["dense", "speed3r", "spark3r"])
@torch.inference_mode()
def test_a_stopwatch_sees_each_part_of_a_network_once_and_leaves_no_trace(name, heads, attention):
    model, views, chunk = tiny_backbones.tiny_backbone(name), 10, 8
    images, strategy = torch.rand(1, views, 3, 56, 56), strategies.OPTIONS[attention]
    expected = strategies.forward(model, images, strategy, False)[0]
    watch = strategies.Stopwatch(on_gpu=False)
    with strategies.watched(model, watch):
        out = strategies.forward(model, images, strategies.Timed(strategy, watch), False)[0]
    assert torch.equal(out.points, expected.points) and torch.equal(out.T_world_cam, expected.T_world_cam)
    assert not any({"forward", "after", "project"} & vars(module).keys() for module in model.modules())

    calls, chunks = {part: len(marks) for part, marks in watch.marks.items()}, -(-views // chunk)
    assert calls["attention across views"] == len(model.across_views)
    inside = sum(isinstance(module, strategies.Block) for module in model.modules()) - len(model.across_views)
    elsewhere = sum(
        isinstance(m, strategies.Block) for n, m in model.named_modules() if n.startswith(model.full_precision)
    )
    blocks = {part: count for part, count in calls.items() if part.endswith("blocks")}
    assert sum(blocks.values()) == chunks * (inside - elsewhere)
    dense_heads = [part for part in calls if part.endswith(("point_head", "depth_head", "model.head"))]
    assert len(dense_heads) == heads and all(calls[part] == chunks for part in dense_heads)
    marks = sorted(mark for part in watch.marks.values() for mark in part)
    assert all(end <= start for (_, end), (start, _) in zip(marks, marks[1:]))  # nothing counts twice
    assert sum(watch.seconds().values()) <= marks[-1][1] - marks[0][0]


def test_a_profile_is_two_tables_per_configuration(monkeypatch, capsys):
    options = "--tiny --profile --backbones da3-large --strategies dense spark3r"
    monkeypatch.setattr(sys, "argv", ["strategies.py", *options.split()])
    strategies.main()
    sections = capsys.readouterr().out.split("#### ")[1:]
    assert [part.split("\n")[0] for part in sections] == [
        f"{views} views, fp32, {name}" for views in (4, 101) for name in ("dense", "spark3r")
    ]
    for section in sections:
        parts, operations = (
            [
                [cell.strip() for cell in line.strip("|").split("|")]
                for line in table.splitlines()
                if line.startswith("| ")
            ]
            for table in section.split("| operation |")
        )
        *rows, whole = parts[1:]
        assert sum(float(row[1]) for row in rows) == pytest.approx(float(whole[1]), abs=1e-4 * len(parts))
        assert "attention across views" in [row[0] for row in rows]
        assert 0 < len(operations) <= strategies.KERNELS
        assert all(row[0].startswith("aten::") and int(row[1]) > 0 for row in operations)


@torch.no_grad()
def test_accuracy_has_a_row_for_each_attention_that_the_weights_know(tmp_path, monkeypatch, capsys):
    network = Network(NetworkConfig(56, 56, channels=64, encoder_blocks=1, alternating_blocks=2, stem=8, decoder=4))
    for block in network.across_views:
        nn.init.normal_(block.proj.weight, std=0.3)
    for layer in (network.camera_fc2, network.point_conv3):
        nn.init.normal_(layer.weight, std=0.3)
    weights.save(network, tmp_path / "plain")
    for weight in add_linear_branch(network):
        nn.init.normal_(weight)
    weights.save(network, tmp_path / "branch")

    def rows(folder):
        options = ["--weights", str(folder), "--sequences", "1", "--views", "2", "--splits", "rooms"]
        monkeypatch.setattr(sys, "argv", ["accuracy.py", *options])
        accuracy.main()
        table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| rooms")]
        return {name.partition(": ")[2].rpartition(",")[0]: figures for name, *figures in table}

    assert list(rows(tmp_path / "plain")) == ["dense", "speed3r"]
    found = rows(tmp_path / "branch")
    alone = found["lite3r, chosen blocks alone"]
    assert found["lite3r"] != alone and alone == found["dense"]  # so few blocks that all are chosen
