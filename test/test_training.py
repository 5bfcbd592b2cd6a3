"""The training recipes at a tiny size on the CPU."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import recordings
import torch
import yaml
from tiny_backbones import BACKBONES, PI3, tiny_backbone
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from speed3r_ros.kernels.fp8 import fp8_linear, quantise_rows
from speed3r_ros.model import weights
from speed3r_ros.model.backbones import blocks
from speed3r_ros.model.backbones.pi3 import Pi3, Pi3Config, Speed3RPi3
from speed3r_ros.model.backbones.registry import load_into
from speed3r_ros.model.lite3r import add_linear_branch
from speed3r_ros.model.network import Block, Network, NetworkConfig
from speed3r_ros.model.quantised import Fp8Linear, Fp8TrainingLinear, train_in_fp8
from speed3r_ros.training import checkpoint, recipes
from speed3r_ros.training.__main__ import main
from speed3r_ros.training.config import CONFIGS, with_values
from speed3r_ros.training.distil import Geometry, distillation_loss, geometry, speed3r_student
from speed3r_ros.training.recipes import predict, start_pool
from speed3r_ros.training.render import SceneDataset, WorldConfig
from speed3r_ros.training.trainer import Trainer, optimisers, wide_matrices

ROOT = Path(__file__).parents[1]
SMALL = dict(
    sizes="56x56", frames=8, longest=4, held_out=0, network="tiny", precision="fp32", warmup=1, hold=0.9, ema=0.0, top_k=4,
)  # fmt: skip
UNSEEN = (50, 51)  # steps whose batches no test trains on


def config(recipe, **values):
    return with_values(CONFIGS[recipe](), SMALL | values)


def tiny_weights(folder, seed=None, linear=False):
    """Random weights whose blocks matter; with lite3r's linear branch or without."""
    torch.manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)
    network = Network(NetworkConfig(56, 56, channels=64, encoder_blocks=1, alternating_blocks=2, stem=8, decoder=4))
    for block in [m for m in network.modules() if isinstance(m, Block)]:
        nn.init.normal_(block.proj.weight, std=0.1)
    nn.init.normal_(network.camera_fc2.weight, std=0.05)
    nn.init.normal_(network.point_conv3.weight, std=0.2)
    if linear:
        add_linear_branch(network)
    weights.save(network, folder)
    return str(folder)


@torch.no_grad()
def unseen(trainer, measure=None):
    """Mean of the recipe's loss, or of `measure(batch, draw)`, over steps that are not trained on."""
    now, values = trainer.step, []
    for trainer.step in UNSEEN:
        draw = trainer.draw()
        trainer.recipe.resize(draw.order.size)
        batch = trainer.batch(draw.order)
        values.append(float(measure(batch, draw) if measure else trainer.recipe.loss(trainer.network, batch, draw)[0]))
    trainer.step = now
    return float(np.mean(values))


def test_compact_learns_a_batch_by_heart_in_both_stages(tmp_path, monkeypatch):
    """Of the rendered world; so few steps do not teach anything about other scenes."""
    begin = recipes.RenderedData.begin
    monkeypatch.setattr(recipes.RenderedData, "begin", lambda data, order: begin(data, replace(order, step=0)))
    batch = recipes.RenderedData.batch
    monkeypatch.setattr(
        recipes.RenderedData, "batch", lambda data, order, begun: batch(data, replace(order, step=0), begun)
    )
    seed = int(torch.randint(2**31, ()))
    settings = config("compact", steps=48, dense_share=0.5, lr=3e-3, lr_sparse=3e-3, longest=2, frames=4, seed=seed)
    trainer = Trainer("compact", settings, tmp_path / "run")
    start = unseen(trainer)
    trainer.run(until=24)
    assert trainer.stage.name == "dense" and trainer.stage.bidirectional
    middle, gates = unseen(trainer), [block.gate.weight.clone() for block in trainer.network.global_blocks]
    trainer = Trainer("compact", settings, tmp_path / "run", resume=True)
    trainer.run()
    assert trainer.stage.name == "sparse" and not trainer.stage.bidirectional
    assert middle < 0.95 * start and unseen(trainer) < 0.95 * start
    for block, gate in zip(trainer.network.global_blocks, gates):  # which dense attention has not
        assert not gate.any() and block.gate.weight.any()
    written = weights.load(str(tmp_path / "run/weights"))
    for (name, a), b in zip(written.named_parameters(), trainer.averaged().parameters()):
        assert torch.equal(a, b), name
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["lr_sparse"] == 3e-3


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_stopped_run_goes_on_bit_for_bit(optimiser, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "REFRESH", 2)  # steps between new textures
    values = dict(steps=4, dense_share=0.5, sizes="56x56 56x112", longest=6, ema=0.9, optimiser=optimiser)
    settings = config("compact", **values)
    settings = replace(settings, seed=int(torch.randint(2**31, ())))
    Trainer("compact", settings, tmp_path / "whole").run()
    Trainer("compact", settings, tmp_path / "parts").run(until=3)
    Trainer("compact", settings, tmp_path / "parts", resume=True).run()
    a, b = (checkpoint.read(tmp_path / name / "checkpoint") for name in ("whole", "parts"))
    assert a[0].keys() == b[0].keys() and len(a[0]) > 100
    for name, value in a[0].items():
        assert torch.equal(value, b[0][name]), name
    assert a[1]["steps"] == b[1]["steps"] and a[1]["step"] == 4
    sizes = weights.load(str(tmp_path / "whole/weights")).config
    assert (sizes.height, sizes.width) == (56, 112)


@pytest.mark.parametrize("before, after", [("adamw", "muon"), ("muon", "adamw")])
def test_a_run_may_go_on_with_another_optimiser(before, after, tmp_path):
    """Where both have a mean of gradients, it goes on; what is not kept for the one begins anew with the other."""
    values = dict(steps=4, dense_share=0, seed=int(torch.randint(2**31, ())))
    Trainer("compact", config("compact", optimiser=before, **values), tmp_path / "run").run(until=2)
    state, _ = checkpoint.read(tmp_path / "run/checkpoint")
    trainer = Trainer("compact", config("compact", optimiser=after, **values), tmp_path / "run", resume=True)
    if after == "muon":
        muon = trainer.optimisers[0]
        for parameters, momenta in muon.stacks:  # what steps read and what is written
            for p, momentum in zip(parameters, muon._apart(parameters, momenta)):
                (name,) = (name for name, q in trainer.parameters.items() if q is p)
                assert momentum.any() and torch.equal(momentum.flatten(), state[f"mean.{name}"])
                assert muon.state[p].keys() == {"exp_avg"} and torch.equal(muon.state[p]["exp_avg"], momentum)
    trainer.run()
    _, note = checkpoint.read(tmp_path / "run/checkpoint")
    wide = {id(p) for p in wide_matrices(trainer.network)}
    moved = [id(p) in wide for p in trainer.parameters.values()]
    assert {x for x, wide in zip(note["steps"], moved) if wide} == {0 if after == "muon" else 2}
    assert {x for x, wide in zip(note["steps"], moved) if not wide} == {4}


@pytest.mark.parametrize("kind", ["compact", "pi3", "vggt"])
def test_muon_moves_the_wide_matrices_of_blocks_alone(kind):
    """Never layers of heads, some of which have the same names."""
    network = Network(recipes.TINY) if kind == "compact" else tiny_backbone(kind)
    expected = set()
    for block in [part for part in network.modules() if isinstance(part, (Block, blocks.Block))]:
        attn, mlp = (block, block) if kind == "compact" else (block.attn, block.mlp)
        expected |= {id(layer.weight) for layer in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)}
    muon, adamw = optimisers(network, config("compact", optimiser="muon"))
    moved = {id(p) for p in muon.param_groups[0]["params"]}
    assert moved == expected
    others = [id(p) for group in adamw.param_groups for p in group["params"]]
    assert sorted([*moved, *others]) == sorted(id(p) for p in network.parameters())


def test_data_begun_ahead_is_what_the_step_would_draw(tmp_path):
    """Also by the processes that sample for a GPU, over new textures and another size than was expected."""
    values = dict(steps=200, seed=int(torch.randint(2**31, ())), longest=12)
    ahead, now = (Trainer("compact", config("compact", **values), tmp_path / name) for name in ("ahead", "now"))
    ahead.data._pool = start_pool(1)
    texture = ahead.data.scenes.textures.data.clone()
    for step in (0, 1, recipes.REFRESH):
        for trainer in (ahead, now):
            trainer.step = step
        ahead.look_ahead()
        if step == 1:  # a schedule in minutes may find another stage than it expected
            for trainer in (ahead, now):
                trainer.sizes = [(56, 112)]
        assert {order.step for order in ahead._begun} >= set(range(step, step + 4))
        found, expected = (trainer.batch(trainer.draw().order) for trainer in (ahead, now))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        assert found["img"].shape[-2:] == trainer.sizes[0]
    changed = (texture != ahead.data.scenes.textures.data).any(1)
    assert changed.all()  # one of each family
    ahead.data._pool.shutdown()


SAMPLING = """
import os, signal
from speed3r_ros.training.recipes import start_pool
if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    pool = start_pool(1)
    print("started", flush=True)
    input()
    print(pool.submit(os.getpid).result(), flush=True)
    input()
    print(pool.submit(os.getpid).result(), flush=True)
    input()
"""


def test_processes_that_sample_outlive_signals_to_the_group_but_not_the_trainer(tmp_path):
    """As a terminal's Ctrl-C and torchrun's SIGTERM are, before and after the process is ready; then the trainer is killed."""
    (tmp_path / "run.py").write_text(SAMPLING)
    run = subprocess.Popen(
        [sys.executable, tmp_path / "run.py"], cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert run.stdout.readline() == "started\n"
    pids = []
    for _ in range(2):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(run.pid, number)
        print(file=run.stdin, flush=True)
        pids.append(int(run.stdout.readline()))
    assert pids[0] == pids[1] != run.pid
    run.kill()
    run.wait()
    until = time.monotonic() + 20
    while Path(f"/proc/{pids[0]}").exists() and "Z" not in Path(f"/proc/{pids[0]}/stat").read_text().split()[2]:
        assert time.monotonic() < until, "it outlives the trainer"
        time.sleep(0.1)


def test_distil_moves_the_student_towards_the_teacher(tmp_path):
    teacher, init = tiny_weights(tmp_path / "teacher"), tiny_weights(tmp_path / "student")
    settings = config("distil", steps=20, teacher=teacher, init=init, lr=2e-3)
    trainer = Trainer("distil", settings, tmp_path / "run")
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}

    def away(batch, draw):
        """Disagreement of point maps up to scale, per sequence, in the network's own precision."""
        every = replace(draw, fine=torch.ones_like(draw.fine), coarse=torch.ones_like(draw.fine))
        a = predict(trainer.network, batch, draw, "speed3r", 4).points.flatten(1)
        b = predict(trainer.recipe.teacher, batch, every, "dense", 4).points.flatten(1)
        return 1 - nn.functional.cosine_similarity(a, b).mean()

    start, loss = unseen(trainer, away), unseen(trainer)
    trainer.run()
    assert unseen(trainer, away) < 0.8 * start and unseen(trainer) < 0.8 * loss
    for name, p in trainer.network.named_parameters():
        changed = not torch.equal(p, before[name])
        frozen = name.split(".")[0] in (
            "stem1",
            "stem2",
            "patch_embed",
            "position",
            "encoder",
            "describe",
            "match_scale",
        )
        assert not (frozen and changed), name
        assert changed or frozen or name.startswith(("ray_embed", "patch_norm")), name


def test_distillation_loss_is_its_definition():
    """In float64: nothing for the teacher's answer in another gauge and unit; the terms of the paper for another."""
    g = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    z = 1 + rand(2, 3, 1, 6, 7)
    points = torch.cat([(rand(2, 3, 2, 6, 7) - 0.5) * z, z], 2)
    Q = torch.linalg.qr(rand(2, 4, 3, 3) - 0.5)[0]
    Q = Q * torch.det(Q)[..., None, None]
    t = rand(2, 3, 3)
    teacher = Geometry(points, Q[:, :3], t)
    gauge = Q[:, 3:]
    same = Geometry(points * 0.4, gauge @ Q[:, :3], 0.4 * (gauge @ t[..., None]).squeeze(-1) + 7)
    valid = rand(2, 3, 6, 7) > 0.3
    assert distillation_loss(same, teacher, valid)[0] < 1e-4
    noise = 0.05 * rand(2, 3, 3, 6, 7) * (rand(2, 3, 1, 6, 7) > 0.8)  # most points are exact: the scale stays 1
    student = Geometry(points + noise, Q[:, 1:4], t + 0.1 * rand(2, 3, 3))
    figures = distillation_loss(student, teacher, valid)[1]
    unit = torch.stack([depth[:, 0][mask].mean() for depth, mask in zip(z, valid)])
    near = (noise.abs().sum(2) / z[:, :, 0])[valid].mean()
    torch.testing.assert_close(figures["points"], near)
    angles, offsets = [], []
    for b in range(2):
        for i in range(3):
            for j in (j for j in range(3) if j != i):
                a = student.R[b, i].T @ student.R[b, j]
                c = teacher.R[b, i].T @ teacher.R[b, j]
                angles.append(((a.T @ c).trace() - 1).div(2).clamp(-1, 1).arccos())
                d = student.R[b, i].T @ (student.t[b, j] - student.t[b, i])
                e = teacher.R[b, i].T @ (teacher.t[b, j] - teacher.t[b, i])
                d = (d - e).abs() / unit[b]
                offsets.append(torch.where(d < 0.1, d * d / 2, 0.1 * (d - 0.05)).mean())
    torch.testing.assert_close(figures["rot_deg"].deg2rad(), torch.stack(angles).mean(), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(figures["translation"], torch.stack(offsets).mean())
    total = near + figures["normals"] + 0.1 * (100 * figures["translation"] + figures["rot_deg"].deg2rad())
    torch.testing.assert_close(figures["loss"], total)


def test_lite3r_trains_the_projections_alone(tmp_path):
    init = tiny_weights(tmp_path / "dense")
    settings = config("lite3r", steps=8, init=init, lr=1e-3, gamma=1e3, gamma_end=1e3, top_k=1, frames=4)
    trainer = Trainer("lite3r", settings, tmp_path / "run")
    assert list(trainer.parameters) == [f"global_blocks.{i}.proj_lin.weight" for i in range(2)]

    def off_dense(batch, draw):
        """How far attention with FP8 rounding is from exact dense attention."""
        return trainer.recipe.loss(trainer.network, batch, draw)[1]["attention"]

    start, error = unseen(trainer), unseen(trainer, off_dense)
    trainer.run()
    assert unseen(trainer, off_dense) < 0.85 * error and unseen(trainer) < start
    shipped, old = weights.load(str(tmp_path / "run/weights")), weights.load(init)
    added = shipped.state_dict().keys() - old.state_dict().keys()
    assert added == set(trainer.parameters)
    for name, value in old.state_dict().items():
        assert torch.equal(value, shipped.state_dict()[name]), name
    size = sum(path.stat().st_size for path in (tmp_path / "run/checkpoint").iterdir())
    assert size < 4 * 4 * 2 * 64 * 64 + 4000  # parameters, average and two moments of the projections


@pytest.mark.parametrize("kind", ["compact", "pi3"])
def test_training_in_fp8_is_what_fp8_computes(kind):
    """Forward as the deployed layer, gradients straight through, weights and names as before."""
    model = Network(NetworkConfig(56, 56, channels=64, encoder_blocks=1, alternating_blocks=1, stem=4, decoder=2))
    model = tiny_backbone("pi3") if kind == "pi3" else model
    add_linear_branch(model)
    names = [name for name, _ in model.named_parameters()]
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    count = train_in_fp8(model)
    assert [name for name, _ in model.named_parameters()] == names
    new = {name: layer for name, layer in model.named_modules() if name in layers and type(layer) is not nn.Linear}
    assert len(new) == count > 0 and {name.rsplit(".", 1)[1] for name in new} == {"qkv", "fc1", "fc2"}
    name, layer = sorted(new.items())[int(torch.randint(count, ()))]
    x = torch.randn(5, layer.in_features, requires_grad=True)
    expected = fp8_linear(x.detach(), *quantise_rows(layer.weight.detach()), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5, msg=name)
    assert layer.weight is layers[name].weight
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0 and x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["compact", *(name for name in BACKBONES if name != "da3-mono")])
def test_the_recipe_rounds_the_layers_that_inference_rounds(kind, monkeypatch, fp8_by_definition):
    """Those of heads and of what reads conditions not."""

    def make(name="made here"):
        return Network(recipes.TINY) if kind == "compact" else tiny_backbone(kind)

    def rounded(model, layer):
        return {name for name, module in model.named_modules() if isinstance(module, layer)}

    monkeypatch.setattr(recipes, "load_model", make)
    student = recipes.Lite3R(config("lite3r", init="made here"), torch.device("cpu")).network
    found = rounded(student, Fp8TrainingLinear)
    assert found == rounded(make().precision("fp8"), Fp8Linear) and found
    assert not [name for name in found if "head" in name or "cam_" in name or "depth_encoder" in name]


@pytest.mark.parametrize("recipe, values", [("distil", dict(student="backbone")), ("distil", {}), ("lite3r", {})])
def test_backbones_take_part(recipe, values, tmp_path, monkeypatch):
    """Pi3 as teacher of its own sparse form and of the compact network, and with a linear branch."""
    monkeypatch.setattr(recipes, "load_model", lambda name: Pi3(Pi3Config(**PI3)).eval() if name == "pi3" else None)
    values = values | {"init" if recipe == "lite3r" else "teacher": "pi3"}
    trainer = Trainer(recipe, config(recipe, steps=2, longest=2, frames=2, **values), tmp_path / "run")
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    trainer.run()
    changed = {name for name, p in trainer.network.named_parameters() if not torch.equal(p, before[name])}
    if recipe == "lite3r":
        assert changed == {f"decoder.{i}.attn.proj_lin.weight" for i in (1, 3, 5)}
    elif values.get("student"):
        assert any(".gate." in name for name in changed) and not any(name.startswith("encoder.") for name in changed)
    else:  # from random weights, those of the image encoder, too
        assert type(trainer.network) is Network and {"stem1.weight", "encoder.0.qkv.weight"} <= changed
    if values.get("student"):
        load_into(Speed3RPi3(Pi3Config(**{**PI3, "registers": 0})), tmp_path / "run/weights/model.safetensors", "")


@pytest.mark.parametrize("recipe", ["compact", "lite3r"])
def test_losses_are_not_rounded_with_the_network(recipe, tmp_path):
    """In bf16, the true poses' mean angle over pairs is what it is in float64."""
    values = dict(init=tiny_weights(tmp_path / "w")) if recipe == "lite3r" else {}
    trainer = Trainer(recipe, config(recipe, steps=1, precision="bf16", **values), tmp_path / "run")
    draw = trainer.draw()
    batch = trainer.batch(draw.order)
    trainer.batch = lambda _: batch
    found = trainer._gradients(draw)["rot_identity"]
    R = batch["R"].double()
    chords = (R[:, :, None] - R[:, None]).square().sum((-1, -2)).sqrt() / 2**0.5  # |1 - R_i' R_j| = |R_i - R_j|
    expected = chords.sum().rad2deg() / (len(R) * draw.order.views * (draw.order.views - 1))
    assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-3)


class Waits(TorchDispatchMode):
    """Collects where a step would make the host wait for a GPU; it runs on a CPU.

    That is where values are read back, where shapes depend on values, and where tensors are made of Python numbers, whose
    copies block. kernels/ is left out: a GPU takes another path there.
    """

    FOUND = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh")
    FOUND += ("nanmedian", "linalg_matrix_exp")  # on a GPU these read values back inside

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        masked = name.startswith(("index.", "index_put")) and torch.bool in [x.dtype for x in args[1] if x is not None]
        if name in self.FOUND or masked:
            caller = [frame for frame in traceback.extract_stack() if "speed3r_ros" in frame.filename][-1]
            if "/kernels/" not in caller.filename:
                self.found.add(f"{caller.filename}:{caller.lineno} {name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe, start", [("compact", None), ("distil", "teacher"), ("lite3r", "init")])
def test_a_step_does_not_wait_for_the_device(recipe, start, tmp_path):
    """Both stages of `compact`; scenes are sampled before."""
    values = {start: tiny_weights(tmp_path / "weights")} if start else dict(dense_share=0.5, optimiser="muon")
    trainer, waits = Trainer(recipe, config(recipe, steps=2, frames=4, **values), tmp_path / "run"), Waits()
    load = trainer.batch
    for trainer.step in range(2):
        if trainer.stage_progress()[0] != trainer.stage_number:
            trainer._next_stage(1)
        draw = trainer.draw()
        batch = load(draw.order)
        trainer.batch = lambda _, batch=batch: batch
        trainer.recipe.resize(draw.order.size)  # makes tables when the size changes
        with waits:
            trainer.update(draw)
    assert not waits.found


@pytest.mark.parametrize("world", [None, WorldConfig()])
def test_what_follows_the_ray_caster_does_not_wait_for_the_device(world, monkeypatch):
    scenes = SceneDataset("cpu", int(torch.randint(2**31, ())), 56, 56, 1, textures_per_family=1, world=world)
    scene = scenes.sample(2, 2)
    seen = scenes.cast(scene, scenes.textures.data, 56, 56, 1)
    monkeypatch.setattr(scenes, "sample", lambda *_: scene)
    monkeypatch.setattr(scenes, "cast", lambda *_: seen)
    scenes.batch(2, 2)  # makes the sensor's tables
    with Waits() as waits:
        scenes.batch(2, 2)
    assert not waits.found


def test_finetune_lowers_its_loss_on_recorded_sequences(tmp_path):
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    recordings.write_listing(tmp_path / "a", rng, 6, (96, 128))
    recordings.write_listing(tmp_path / "b", rng, 6, (96, 128), with_depth=False)
    settings = config(
        "finetune",
        steps=40,
        init=tiny_weights(tmp_path / "w"),
        lr=2e-3,
        sequences=f"{tmp_path}/a:{tmp_path}/b",
        frames=4,
    )
    trainer = Trainer("finetune", settings, tmp_path / "run")
    start = unseen(trainer)
    trainer.run()
    assert unseen(trainer) < 0.95 * start


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """Gradients, as AdamW's first moments, of two gloo processes with 4 frames each and of one with 8; and held-out rows.

    The weights have a linear branch, which speed3r does not read.
    """
    recordings.write_listing(tmp_path / "a", np.random.default_rng(), 6, (96, 128))
    init = tiny_weights(tmp_path / "w", linear=True)
    values = SMALL | dict(steps=1, init=init, sequences=f"{tmp_path}/a", longest=2, held_out=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "speed3r_ros.training", "finetune", "--out", str(tmp_path / "two"), "--set"]
    command += [f"{name}={value}" for name, value in (values | dict(frames=4)).items()]
    environment = os.environ | dict(
        PYTHONPATH=str(ROOT), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1"
    )
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment | dict(RANK=str(rank)), stdout=-1, stderr=-1, text=True)
        for rank in range(2)
    ]
    Trainer("finetune", with_values(CONFIGS["finetune"](), values), tmp_path / "one").run()
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
    one, two = (checkpoint.read(tmp_path / name / "checkpoint")[0] for name in ("one", "two"))
    largest = max(float(value.abs().max()) for name, value in one.items() if name.startswith("mean."))
    off = 0.0
    assert one.keys() == two.keys() and largest > 1e-3
    for name, value in one.items():
        if name.startswith("mean."):
            off = max(off, float((two[name] - value).abs().max()) / largest)
    assert off < 1e-3  # a pixel may change sides of a threshold when sums are rounded otherwise
    one, two = (json.loads((tmp_path / name / "held_out.json").read_text()) for name in ("one", "two"))
    assert list(one) == list(two) and len(one) == 10
    for name, row in one.items():
        assert two[name]["rotation"] == pytest.approx(row["rotation"], rel=0.02, abs=0.1), name


def test_pi3_becomes_speed3r_pi3():
    """The student's blocks are the teacher's; with closed gates' place taken by full selection it is dense attention."""
    torch.manual_seed(int(torch.randint(2**31, ())))
    teacher = Pi3(Pi3Config(**{**PI3, "registers": 0})).eval()
    for module in teacher.modules():
        if isinstance(module, blocks.LayerScale):
            nn.init.constant_(module.gamma, 0.5)
    student = speed3r_student(teacher)
    x = torch.rand(1, 3, 3, 56, 112)
    with torch.no_grad():
        for block in student.across_views:  # the released initial gates, then compression shut and selection open
            assert torch.equal(block.attn.gate[0].bias.view(-1, 2)[0], torch.tensor([-1.0, 1.0]))
            block.attn.gate[0].bias.view(-1, 2).copy_(torch.tensor([-100.0, 100.0]))
        a, b = geometry(teacher(x)), geometry(student(x, top_k=24))
    torch.testing.assert_close(a.points, b.points, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a.t, b.t, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind, bound", [("fp32", 0), ("bf16", 2**-8), ("fp8", 2**-4)])
def test_checkpoints_hold_what_they_were_given(kind, bound, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 3000)
    tensors = {"parameter.a": torch.randn(37, 41), "average.b": torch.randn(3)}
    mean, square = torch.randn(37, 41), torch.randn(37, 41).square() * 10.0 ** torch.randint(-6, 0, (37, 41))
    checkpoint.write(tmp_path / "c", tensors, {"mean.a": mean, "square.a": square}, kind, dict(step=3))
    state, note = checkpoint.read(tmp_path / "c")
    assert note == dict(step=3) and len(list((tmp_path / "c").iterdir())) > 2
    assert all(path.stat().st_size < 4000 for path in (tmp_path / "c").iterdir())
    for name, value in tensors.items():
        assert torch.equal(checkpoint.decode(name, state, value), value)
    off = (checkpoint.decode("mean.a", state, mean) - mean).abs()
    assert (off <= bound * mean.abs() + (bound > 0.01) * 0.01).all()
    off, back = (
        (checkpoint.decode("square.a", state, square) - square).abs(),
        checkpoint.decode("square.a", state, square),
    )
    assert (off <= 2.2 * bound * square + (bound > 0.01) * 1e-4).all() and (back[square > 0] > 0).all()
    with pytest.raises(ValueError, match="mean.z has missing values, not 9: it is of another network"):
        checkpoint.decode("mean.z", state, torch.zeros(9))
    next((tmp_path / "c").iterdir()).unlink()
    with pytest.raises(ValueError, match="shards are there"):
        checkpoint.read(tmp_path / "c")


def test_sizes_share_parameters():
    """The network at another size is the network made at that size."""
    torch.manual_seed(int(torch.randint(2**31, ())))
    small, large = (
        NetworkConfig(56, 56, channels=64, encoder_blocks=1, alternating_blocks=1, stem=4, decoder=2),
        (112, 168),
    )
    network, other = Network(small), Network(replace(small, height=large[0], width=large[1]))
    other.load_state_dict(network.state_dict())
    x, see = torch.rand(1, 2, 3, *large), torch.ones(1, 2, 2).bool().tril()
    with torch.no_grad():
        assert torch.equal(network.resize(*large)(x, see, see).points, other(x, see, see).points)
    assert network.settings() == other.settings()
    with pytest.raises(ValueError, match="height 60 and width 56 must be multiples of 56"):
        network.resize(60, 56)


def test_positions_are_those_of_the_picture_at_any_size():
    """A block of four by four patches lies where, at a quarter of the size, one patch does: rotary angles are the same."""
    fine, coarse = Network(NetworkConfig(336, 448)), NetworkConfig(168, 224)
    (h, w), angle = coarse.grid, torch.atan2(fine.sin_g, fine.cos_g)[0, :, 0]
    # centres of the fine grid's blocks are corners of the coarse grid's patches
    y, x = torch.meshgrid(torch.arange(h // 2) * 2 + 1.5, torch.arange(w // 2) * 2 + 1.5, indexing="ij")
    rate = 100.0 ** (-torch.arange(16) / 16)
    expected = torch.cat([y.flatten()[:, None] * rate] * 2 + [x.flatten()[:, None] * rate] * 2, 1)
    assert torch.allclose(angle.sin(), expected.sin(), atol=1e-5) and torch.allclose(
        angle.cos(), expected.cos(), atol=1e-5
    )


def test_mixed_sizes_are_drawn_for_each_step(tmp_path):
    """Every size comes up at all times, frames fall with its area, and a run's draws repeat."""
    sizes = dict(sizes="56x56 112x56", frames=16, steps=40)
    trainer = Trainer("compact", config("compact", **sizes, mix_sizes=True), tmp_path / "a")
    orders = [trainer.order(step) for step in range(40)]
    for half in orders[:20], orders[20:]:
        assert {order.size for order in half} == {(56, 56), (112, 56)}
    assert all(order.sequences * order.views <= (16 if order.size == (56, 56) else 8) for order in orders)
    again = Trainer("compact", config("compact", **sizes, mix_sizes=True), tmp_path / "b")
    assert [again.order(step) for step in range(40)] == orders
    assert trainer.averaged().trained_sizes == ((56, 56), (112, 56))


def test_weights_say_what_they_were_trained_at_last(tmp_path):
    """Sizes that take turns, in both stages: written weights know the last step's, wherever a run is stopped."""
    steps, share = 16, float(torch.randint(3, 7, ())) / 10
    trainer = Trainer("compact", config("compact", sizes="56x56 112x56", steps=steps, dense_share=share), tmp_path)
    seen = []
    for trainer.step in range(1, steps + 1):
        network = trainer.averaged()
        seen.append(network.input_size)
        assert network.trained_sizes == (trainer.order(trainer.step - 1).size,) == (network.input_size,)
    assert set(seen) == {(56, 56), (112, 56)} and seen[-1] == (112, 56)


def test_mixed_sizes_are_told_smallest_first(tmp_path):
    """By area, which is what the time of a step follows."""
    settings = config("compact", steps=1, sizes="56x280 112x56 168x56", mix_sizes=True)
    trainer = Trainer("compact", settings, tmp_path)
    assert trainer.averaged().trained_sizes == ((112, 56), (168, 56), (56, 280))


@pytest.mark.parametrize("recipe, start", [("finetune", "init"), ("distil", "teacher"), ("lite3r", "init")])
def test_training_goes_on_at_the_sizes_of_its_weights(recipe, start, tmp_path):
    tiny_weights(tmp_path / "w")
    network = weights.load(str(tmp_path / "w"))
    network.trained_sizes = (56, 56), (112, 56)
    weights.save(network, tmp_path / "w")
    values = {start: str(tmp_path / "w")} | dict(sizes="", steps=30)
    if recipe == "finetune":
        recordings.write_listing(tmp_path / "a", np.random.default_rng(), 6, (96, 128))
        values |= dict(sequences=str(tmp_path / "a"))
    trainer = Trainer(recipe, config(recipe, **values), tmp_path / "run")
    assert {trainer.order(step).size for step in range(30)} == set(network.trained_sizes)
    trainer.run(until=1)
    assert weights.load(str(tmp_path / "run/weights")).trained_sizes == network.trained_sizes
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["sizes"] == "56x56 112x56"
    other = Trainer(recipe, config(recipe, **values | dict(sizes="112x112")), tmp_path / "other")
    assert other.averaged().trained_sizes == ((112, 112),)


@pytest.mark.parametrize("recipe", CONFIGS)
def test_every_setting_is_listed_and_read_back(recipe, tmp_path, capsys):
    assert main([recipe, "--list"]) == 0
    listed = yaml.safe_load(capsys.readouterr().out)
    assert with_values(CONFIGS[recipe](), listed) == CONFIGS[recipe]()
    assert with_values(CONFIGS[recipe](), dict(lr="2e-4", minutes=3)).lr == 2e-4


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["compact"], 2, "--out DIR"),
        (["compact", "--out", "o"], 2, "steps = 0 and minutes = 0.0: set one"),
        (["compact", "--out", "o", "--set", "steps=1", "learning_rate=1"], 2, "unknown setting 'learning_rate'"),
        (["compact", "--out", "o", "--set", "lr=fast"], 2, "lr = 'fast': expected float"),
        (["compact", "--out", "o", "--set", "steps"], 2, "expected name=value"),
        (["compact", "--out", "o", "--set", "steps=1", "sizes=100x100"], 2, "multiples of 56"),
        (["finetune", "--out", "o", "--set", "steps=1"], 2, "give the folders to fine-tune on"),
        (["lite3r", "--out", "o", "--set", "steps=1", "attention=dense"], 2, "trains lite3r"),
        (["distil", "--out", "o", "--set", "steps=1", "optimiser=muon", "parallel=fsdp"], 2, "use adamw or ddp"),
        (["lite3r", "--out", "o", "--set", "steps=1", "optimiser=muon"], 2, "lite3r trains none"),
        (["compact", "--out", "o", "--config", "none.yaml"], 2, "none.yaml"),
        (["compact", "--out", "o", "--resume"], 2, "o/config.yaml"),
        (
            ["compact", "--out", "o", "--resume", "--config", "c.yaml"],
            2,
            "--config: a run goes on with its own settings",
        ),
        (
            ["distil", "--out", "o", "--set", "steps=1", "student=backbone", "init=compact"],
            2,
            "starts from the teacher",
        ),
        (["finetune", "--out", "o", "--set", "steps=1", "sequences=nowhere"], 1, "nowhere: not a folder"),
        (["compact", "--out", "o", "--set", "steps=1", "init=nothing"], 1, "no weights 'nothing'"),
        (["distil", "--out", "o", "--set", "steps=1", "teacher=nothing"], 1, "no weights 'nothing'"),
        (["distil", "--out", "o", "--set", "steps=1", "student=backbone"], 1, "neither a Pi3 nor a VGGT"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, code, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        result = main(arguments)
    except SystemExit as error:
        result = error.code
    errors = capsys.readouterr().err.strip().splitlines()
    assert result == code and says in errors[-1]
    assert not list(tmp_path.iterdir())


def test_held_out_rows_are_json_where_numbers_do_not_exist(tmp_path, monkeypatch):
    """No direction where no camera moved, for example; JSON has no NaN."""
    monkeypatch.setattr(
        "speed3r_ros.training.trainer.evaluate_rendered", lambda *_, **__: dict(focal=0.5, ate=math.nan)
    )
    Trainer("compact", config("compact", steps=1, held_out=1), tmp_path).run()
    rows = json.loads((tmp_path / "held_out.json").read_text(), parse_constant=pytest.fail)
    assert len(rows) == 10 and all(row == dict(focal=0.5, ate=None) for row in rows.values())


def test_a_folder_is_not_overwritten(tmp_path):
    settings = config("compact", steps=1, dense_share=0.0)
    Trainer("compact", settings, tmp_path).run()
    with pytest.raises(ValueError, match="has a checkpoint; give --resume"):
        Trainer("compact", settings, tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint; leave --resume out"):
        Trainer("compact", settings, tmp_path / "other", resume=True)
    with pytest.raises(ValueError, match="the checkpoint is of the recipe compact"):
        Trainer("distil", config("distil", steps=1, teacher=tiny_weights(tmp_path / "w")), tmp_path, resume=True)


def test_the_command_line_starts_without_torch():
    code = "from speed3r_ros.training.__main__ import main; main(['compact', '--list'])"
    code += "; import sys; assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-1000:]
