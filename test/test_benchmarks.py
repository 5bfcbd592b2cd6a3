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
import rendered
import spark3r_stream
import strategies
import training_phases

from speed3r_ros.model import weights
from speed3r_ros.model.lite3r import add_linear_branch
from speed3r_ros.model.network import Network, NetworkConfig
from speed3r_ros.model.types import Estimate, Tracking
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


def test_rendered_sequences_score_the_truth_as_right_and_errors_by_their_size():
    """Of a pipeline that knows the answers, up to a gauge and a scale, at half the size; turned by three degrees once."""
    height, width, views = 12, 16, 5
    rng = np.random.default_rng()
    scale, turn = rng.uniform(0.5, 2), cv2.Rodrigues(np.deg2rad([0, 3.0, 0]))[0]
    depth = rng.uniform(0.5, 2, (1, views, height // 2, width // 2)).repeat(2, 2).repeat(2, 3)
    depth[0, 0, :2, :2] = np.inf
    R = [cv2.Rodrigues(rng.normal(0, 0.3, 3))[0] for _ in range(views)]
    t = np.cumsum(rng.normal(0, 0.3, (views, 3)), 0)
    fx, fy, cx, cy = rng.uniform(10, 20, 4)
    batch = dict(
        img=torch.rand(1, views, 3, height, width),
        depth=torch.tensor(depth),
        valid=torch.tensor(np.isfinite(depth)),
        R=torch.tensor(np.array(R))[None],
        t=torch.tensor(t)[None],
        K=torch.tensor([[fx, fy, cx, cy, 0.01]], dtype=torch.float64),
    )

    class Oracle:
        turned = lost = -1

        def reset(self):
            self.frames = []

        def process(self, frame):
            i = len(self.frames)
            self.frames.append(frame)
            T = np.eye(4)
            T[:3, :3], T[:3, 3] = (
                R[0].T @ R[i] @ (turn if i == self.turned else np.eye(3)),
                scale * R[0].T @ (t[i] - t[0]),
            )
            K = np.array([[1.1 * fx / 2, 0, 0], [0, 1, 0], [0, 0, 1]])
            half = (scale * depth[0, i, ::2, ::2]).astype(np.float32)
            if i == self.lost:
                return Estimate(frame.stamp_ns, Tracking.LOST)
            return Estimate(frame.stamp_ns, Tracking.TRACKING, T, np.where(np.isfinite(half), half, np.nan), K=K)

    oracle = Oracle()
    row = rendered.run(oracle, batch, True)
    assert row["rotation"].max() < 1e-4 and row["ate"] < 1e-6 and row["absrel"] < 1e-6
    assert np.isclose(row["focal"], 0.1)
    assert all(np.array_equal(f.K, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]) for f in oracle.frames)
    assert (np.diff([f.stamp_ns for f in oracle.frames]) == rendered.INTERVAL_NS).all()
    oracle.turned = 2
    rotation = rendered.run(oracle, batch, False)["rotation"]
    assert oracle.frames[0].K is None and np.allclose(np.sort(rotation)[-4:], 3) and np.sort(rotation)[-5] < 1e-4
    oracle.lost = 1
    assert rendered.run(oracle, batch, True) is None
