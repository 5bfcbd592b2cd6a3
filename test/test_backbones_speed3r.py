"""Sparse attention across views in the official backbones: Speed3R-Pi3 against a plain definition, and every strategy
through the kernels."""

import gc
import os
import sys
import weakref
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speed3r_ros.kernels import coarse, frames, linear_attention, merging, qkv, selected
from speed3r_ros.model import attention as strategies
from speed3r_ros.model.backbones.blocks import AcrossViews, Block, Layout, block_order
from speed3r_ros.model.backbones.pi3 import Pi3Config, Speed3RPi3
from speed3r_ros.model.backbones.tracker import TrackerConfig
from speed3r_ros.model.backbones.vggt import Vggt, VggtConfig
from speed3r_ros.model.lite3r import add_linear_branch
from speed3r_ros.model.memory import Sight
from speed3r_ros.model.spark3r import Spark3R

needs_interpreter = pytest.mark.skipif(
    frames.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and TRITON_INTERPRET=1 before the start",
)
SIZES = dict(channels=128, heads=2, encoder_blocks=2, table=5, head_blocks=2, camera_channels=64)


def images(*sizes, seed=0):
    count, height, width = sizes
    return torch.rand(1, count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def random_student(seed=0, dtype=torch.float64, gates=True):
    torch.manual_seed(seed)
    model = Speed3RPi3(Pi3Config(decoder_blocks=4, registers=0, **SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "gamma" in name or "bias" in name or "gate" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        if not gates:
            for block in model.global_decoder:
                block.attn.gate[0].weight.zero_()
                block.attn.gate[0].bias.copy_(torch.tensor([-200.0, 200.0]).repeat(2))
    return model.to(dtype)


def rotate_by_definition(x, at):
    """x: (H, X, 64), at: (X, 2). Channel pairs (j, j + 16) of each half turn by position * 100 ** (-j / 16)."""
    x = x.clone()
    for axis in range(2):
        for j in range(16):
            angle = at[:, axis].to(x.dtype) * 100.0 ** (-j / 16)
            a, b = x[..., 32 * axis + j].clone(), x[..., 32 * axis + j + 16].clone()
            x[..., 32 * axis + j] = a * angle.cos() - b * angle.sin()
            x[..., 32 * axis + j + 16] = b * angle.cos() + a * angle.sin()
    return x


def sparse_block_by_definition(block, x, at, top_k):
    """One global block of Speed3R on all tokens (M, C) in block-major order, standing at (M, 2)."""
    attn, tokens = block.attn, len(x)
    h = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-6)
    raw = [y.view(tokens, 2, 64).transpose(0, 1) for y in (h @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, -1)]
    gates = torch.sigmoid(h @ attn.gate[0].weight.T + attn.gate[0].bias)

    def prepared(x, norm, at):
        return rotate_by_definition(F.layer_norm(x, (64,), norm.weight, norm.bias, 1e-6), at)

    blocks = tokens // 16
    coarse_at = at.view(blocks, 16, 2).double().mean(1).trunc()
    pooled = [y.view(2, blocks, 16, 64).mean(2) for y in raw]
    q, k, v = prepared(raw[0], attn.q_norm, at), prepared(raw[1], attn.k_norm, at), raw[2]
    qp, kp, vp = prepared(pooled[0], attn.q_norm, coarse_at), prepared(pooled[1], attn.k_norm, coarse_at), pooled[2]
    out = torch.empty(tokens, 2, 64, dtype=x.dtype)
    for head in range(2):
        for b in range(blocks):
            scores = kp[head] @ qp[head, b] / 8
            compressed = scores.softmax(0) @ vp[head]
            keys = [16 * j + i for j in scores.argsort(descending=True)[:top_k] for i in range(16)]
            for i in range(16 * b, 16 * b + 16):
                selected = (k[head, keys] @ q[head, i] / 8).softmax(0) @ v[head, keys]
                out[i, head] = gates[i, 2 * head] * compressed + gates[i, 2 * head + 1] * selected
    x = x + block.ls1.gamma * (out.flatten(1) @ attn.proj.weight.T + attn.proj.bias)
    h = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-6)
    return x + block.ls2.gamma * (
        F.gelu(h @ block.mlp.fc1.weight.T + block.mlp.fc1.bias) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    )


@pytest.mark.parametrize("top_k", [1, 3, 32])
@torch.inference_mode()
def test_speed3r_blocks_match_their_definition(top_k):
    model, grid, count = random_student(), (4, 8), 3
    x = torch.randn(count, 32, 128, dtype=torch.float64)
    rows = block_order(*grid)
    at = torch.stack([rows // 8, rows % 8], 1)  # from zero: the embedding is relative
    expected = x[:, rows]
    for frame, across in zip(model.local_decoder, model.global_decoder):
        h = expected.clone()
        for i, y in enumerate(expected):
            z = F.layer_norm(y, (128,), frame.norm1.weight, frame.norm1.bias, 1e-6)
            q, k, v = (
                part.view(32, 2, 64).transpose(0, 1)
                for part in (z @ frame.attn.qkv.weight.T + frame.attn.qkv.bias).chunk(3, -1)
            )
            q, k = (
                rotate_by_definition(F.layer_norm(p, (64,), n.weight, n.bias, 1e-6), at)
                for p, n in ((q, frame.attn.q_norm), (k, frame.attn.k_norm))
            )
            out = ((q @ k.mT / 8).softmax(-1) @ v).transpose(0, 1).flatten(1)
            y = y + frame.ls1.gamma * frame.attn.proj(out)
            h[i] = y + frame.ls2.gamma * frame.mlp(F.layer_norm(y, (128,), frame.norm2.weight, frame.norm2.bias, 1e-6))
        last = h
        expected = sparse_block_by_definition(across, h.flatten(0, 1), at.repeat(count, 1), top_k).view(count, 32, 128)
    frame, across = model.decode(x, count, grid, "speed3r", top_k, 2)
    torch.testing.assert_close(frame[:, rows], last, rtol=1e-5, atol=1e-5)  # rotary tables are float32
    torch.testing.assert_close(across[:, rows], expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_all_blocks_with_open_gate_equal_dense_attention():
    model = random_student(gates=False)
    x = images(3, 56, 112).double()
    sparse, dense = model(x, top_k=24), model(x, attention="dense")
    torch.testing.assert_close(sparse.points, dense.points, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sparse.T_world_cam, dense.T_world_cam, rtol=1e-9, atol=1e-9)
    fewer = model(x, top_k=2)
    assert (fewer.points - dense.points).abs().max() > 1e-6


@torch.inference_mode()
def test_speed3r_resizes_what_its_blocks_do_not_tile_and_returns_the_given_size():
    model = random_student(dtype=torch.float32)
    whole = images(2, 56, 112)
    other = F.interpolate(whole[0], (70, 100), mode="bilinear")[None]
    out = model(other)
    assert out.points.shape == (1, 2, 70, 100, 3) and out.confidence.shape == (1, 2, 70, 100)
    resized = F.interpolate(other[0], (56, 112), mode="bilinear", antialias=True)[None]
    at_56 = model(resized)
    torch.testing.assert_close(out.T_world_cam, at_56.T_world_cam)
    log_z = F.interpolate(at_56.depth.log(), (70, 100), mode="bilinear")
    torch.testing.assert_close(out.depth.log(), log_z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_sequences_of_a_batch_do_not_mix(batch):
    model = random_student(dtype=torch.float32)
    x = torch.rand(batch, 3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    together = model(x, top_k=2, chunk=2)
    for i in range(batch):
        alone = model(x[i : i + 1], top_k=2)
        torch.testing.assert_close(together.points[i], alone.points[0], rtol=1e-4, atol=1e-4)


def test_gradients_flow_in_chunks_too():
    model = random_student(dtype=torch.float32)
    x = images(3, 56, 56)
    grads = []
    for chunk in (2, 8):
        model.zero_grad()
        model(x, top_k=2, chunk=chunk).points.square().mean().backward()
        grads.append([p.grad.clone() for n, p in model.named_parameters() if n.startswith("global_decoder.0")])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("chunk", [2, 8])
@torch.inference_mode()
def test_keys_and_values_lie_alike_in_memory(chunk):
    """The kernels copy both else."""
    layout = Layout((4, 8), 3, "speed3r", torch.device("cpu"))
    across = AcrossViews.of(layout.at, 3, 2, 64, "speed3r", 4, chunk)
    _, k, v = across.before(Block(128, 2, qk_eps=1e-5, gated=True), torch.randn(4, 35, 128), 0)
    assert k.fine.stride() == v.fine.stride() and k.pooled.stride() == v.pooled.stride()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before, a caller holds what it hands over")
@pytest.mark.parametrize("attention", ["dense", "speed3r"])
@torch.inference_mode()
def test_patch_tokens_are_freed_before_the_decoder_begins(attention):
    model = random_student(dtype=torch.float32)
    encode, encoded, freed = model.encode, [], []

    def remembered(*arguments):
        tokens = encode(*arguments)
        encoded.append(weakref.ref(tokens))
        return tokens

    model.encode = remembered
    model.local_decoder[0].register_forward_pre_hook(lambda *_: freed.append(encoded[0]() is None))
    model(images(3, 56, 56), attention=attention, chunk=2)
    assert len(freed) == 2 and all(freed)


def test_unknown_strategies_are_refused():
    with pytest.raises(ValueError, match="'sparse': choose one of dense, speed3r"):
        random_student(dtype=torch.float32)(images(1, 56, 56), attention="sparse")


class Living(TorchDispatchMode):
    """Bytes of the tensors that operations see and that live, at their most."""

    def __init__(self):
        super().__init__()
        self.storages, self.most = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        self.storages = {key: value for key, value in self.storages.items() if not value[0].expired()}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        if self.total() > self.most:
            gc.collect()  # the interpreter leaves cycles that hold a kernel's arguments
            self.most = max(self.most, self.total())
        return out

    def __enter__(self):
        gc.freeze()  # what is there already need not be looked through each time
        return super().__enter__()

    def __exit__(self, *raised):
        gc.unfreeze()
        return super().__exit__(*raised)

    def total(self):
        return sum(size for reference, size in self.storages.values() if not reference.expired())


@needs_interpreter
@pytest.mark.parametrize("specials", [0, 4])  # the latter in a launch of their own
@torch.inference_mode()
def test_a_sparse_block_of_many_views_holds_less_than_a_dense_one(specials, monkeypatch):
    """By the kernels' account, where dense attention copies nothing, with one head in the work spaces as of many views."""
    for module in (coarse, selected, strategies, qkv):
        monkeypatch.setattr(module, "on_kernels", lambda _: True)
    for module in (coarse, selected):
        monkeypatch.setattr(module, "WORKSPACE", 1)
    views, channels, length, most = 8, 64, specials + 16, {}
    block = Block(channels, 4, qk_eps=1e-5, gated=True).requires_grad_(False)
    for attention in ("dense", "speed3r"):
        layout = Layout((4, 4), specials, attention, torch.device("cpu"))
        across = AcrossViews.of(layout.at, specials, views, channels // 4, attention, 1, 1)
        x = torch.randn(views, length, channels)
        with Living() as living:
            across(block, x, 0)
        most[attention] = living.most
    unit = 4 * views * length * channels
    assert 5 * unit <= most["dense"] < 5.2 * unit  # residual, queries, keys, values and result
    assert 4 * unit <= most["speed3r"] < most["dense"]


@needs_interpreter
@pytest.mark.parametrize(
    "kind, attention",
    [
        ("speed3r-pi3", "speed3r"),  # without special tokens
        ("vggt", "speed3r"),  # with some, and without gates
        ("vggt", Spark3R(ratio=3, strides=2, group=2)),
        ("vggt", "lite3r"),
        ("streamvggt", "dense"),  # without a mask, dense attention is the library's
    ],
)
@torch.inference_mode()
def test_kernels_take_the_tokens_of_backbones_as_they_lie_in_memory(kind, attention, monkeypatch):
    if kind == "speed3r-pi3":
        model = random_student(dtype=torch.float32)
    else:
        torch.manual_seed(0)
        whole = Vggt(VggtConfig(128, 2, 1, 5, 1, 4, 1, 4, 32, (8, 8, 8, 8), (0, 0, 0, 0), TrackerConfig(8, 16)))
        add_linear_branch(whole)
        model = whole.aggregator
    x = torch.randn(3, 32, 128)
    outputs, sight = [], Sight.causal(3) if kind == "streamvggt" else None
    for on_kernels in (False, True):
        asked = Mock(return_value=on_kernels)
        for module in (coarse, selected, strategies, merging, linear_attention, qkv):
            monkeypatch.setattr(module, "on_kernels", asked)
        if kind == "speed3r-pi3":
            outputs.append(torch.cat(model.decode(x, 3, (4, 8), attention, 3, 2), -1))
        else:
            outputs.append(model(x, 3, (4, 8), (0,), attention, 3, sight=sight)[0])
        assert asked.called
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
