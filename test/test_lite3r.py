"""Lite3R's attention against a definition by loops in float64 on fresh random inputs, and in the official backbones."""

import pytest
import torch
from tiny_backbones import ACROSS_VIEWS, BACKBONES, tiny_backbone
from torch import nn

from speed3r_ros.kernels.frames import Visible
from speed3r_ros.model import lite3r, weights
from speed3r_ros.model.attention import Layer, Tokens
from speed3r_ros.model.backbones.registry import load_into
from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.engine import Engine
from speed3r_ros.model.lite3r import Lite3R, add_linear_branch
from speed3r_ros.model.network import Network, NetworkConfig

HEADS, WIDTH, BLOCK = 2, 16, 16
STRATEGIES = [Lite3R(), Lite3R("tokens"), Lite3R("dense")]


def phi(x):
    return torch.where(x > 0, x + 1, x.exp())


def by_loops(q, k, v, pooled_q, pooled_k, table, specials, blocks, sparse, keep, top_k, weight):
    """One sequence: q, k, v (H, V * L, D), pooled ones (H, V * G, D), table (V, V) -> (H, V * L, D)."""
    length = specials + blocks * BLOCK
    out = torch.empty_like(q)
    for h in range(HEADS):
        for i in range(q.shape[1]):
            view, place = divmod(i, length)
            frames = [t for t in range(len(table)) if table[view, t]]
            seen = [t * length + j for t in frames for j in range(length)]
            chosen = seen
            if sparse == "tokens":
                chosen = sorted(seen, key=lambda j: -(q[h, i] @ k[h, j]))[: max(1, int(keep * len(seen)))]
            if sparse == "blocks" and place >= specials:
                query = pooled_q[h, view * blocks + (place - specials) // BLOCK]
                local = [t * blocks + g for t in frames for g in range(blocks)]
                best = sorted(local, key=lambda j: -(query @ pooled_k[h, j]))[:top_k]
                chosen = [t * length + s for t in frames for s in range(specials)]
                chosen += [
                    (j // blocks) * length + specials + (j % blocks) * BLOCK + e for j in best for e in range(BLOCK)
                ]
            softmax = (k[h, chosen] @ q[h, i] / WIDTH**0.5).softmax(0) @ v[h, chosen]
            similarity = phi(k[h, seen]) @ phi(q[h, i])
            linear = similarity @ v[h, seen] / similarity.sum()
            out[h, i] = softmax + weight @ linear
    return out


@pytest.mark.parametrize("specials", [0, 3])
@pytest.mark.parametrize(
    "sparse, unmasked", [("blocks", True), ("blocks", False), ("tokens", True), ("dense", True), ("dense", False)]
)
def test_lite3r_is_its_definition(sparse, unmasked, specials, monkeypatch):
    strategy = Lite3R(sparse)
    monkeypatch.setattr(lite3r, "SCORES", 1000)  # several parts
    seed = int(torch.randint(2**31, ()))
    g = torch.Generator().manual_seed(seed)
    views, blocks, top_k = 3, 2, 2
    draw = lambda count: torch.randn(3, 2, HEADS, count, WIDTH, generator=g, dtype=torch.float64)  # noqa: E731
    (q, k, v), pooled = draw(views * (specials + blocks * BLOCK)), draw(views * blocks)
    tokens = [Tokens(x, y) for x, y in zip((q, k, v), pooled)]
    table = torch.ones(1, views, views, dtype=torch.bool)
    visible = Visible(table if unmasked else table.tril())
    linear = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
    out = strategy(*tokens, visible, visible, specials, top_k, Layer(unmasked=unmasked, linear=linear))
    for b in range(2):
        parts = q[b], k[b], v[b], pooled[0][b], pooled[1][b], visible.table[0], specials, blocks
        expected = by_loops(*parts, strategy.sparse, strategy.keep, top_k, linear.weight.detach())
        torch.testing.assert_close(out[b].detach(), expected, rtol=1e-9, atol=1e-9, msg=f"seed {seed}")


@pytest.mark.parametrize("name", ACROSS_VIEWS[:-1])  # the nested one's scale hangs on which pixels are confident
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.sparse)
@torch.inference_mode()
def test_a_zero_projection_over_all_tokens_is_dense_attention(name, strategy):
    model = tiny_backbone(name)
    branch = add_linear_branch(model)
    x = torch.rand(1, 3, 3, 56, 112)
    dense = model(x, attention="dense")
    for weight in branch:
        weight.zero_()
    same = model(x, attention=Lite3R(strategy.sparse, keep=1.0), top_k=24)
    torch.testing.assert_close(same.T_world_cam, dense.T_world_cam, rtol=1e-4, atol=3e-5)
    torch.testing.assert_close(same.depth, dense.depth, rtol=1e-4, atol=3e-5)
    for weight in branch:
        nn.init.normal_(weight, std=0.1)
    other = model(x, attention=strategy, top_k=6)
    assert other.points.isfinite().all() and not torch.allclose(other.depth, dense.depth, rtol=1e-6, atol=0)


@torch.inference_mode()
def test_in_the_compact_network_too(tmp_path):
    """A zero projection over all blocks is dense attention; another one is kept by the weights' file."""
    network = Network(NetworkConfig(56, 112, channels=64, encoder_blocks=1, alternating_blocks=2, stem=8, decoder=4))
    for p in network.parameters():
        p.add_(0.05 * torch.randn_like(p))
    x, see = torch.rand(2, 3, 3, 56, 112), torch.ones(1, 3, 3).bool().tril()
    branch = add_linear_branch(network)
    assert [tuple(weight.shape) for weight in branch] == [(64, 64)] * 2
    dense = network(x, see, see, attention="dense").points
    for weight in branch:
        weight.zero_()
    torch.testing.assert_close(network(x, see, see, attention="lite3r", top_k=6).points, dense, rtol=1e-4, atol=1e-5)
    for weight in branch:
        weight.normal_().copy_(weight.half())
    moved = network(x, see, see, attention="lite3r", top_k=6).points
    assert (moved - dense).norm() > 1e-3 * dense.norm()
    weights.save(network, tmp_path / "w")
    stored = weights.load(str(tmp_path / "w"))
    for weight, block in zip(branch, stored.global_blocks):
        assert torch.equal(block.proj_lin.weight, weight)


@torch.inference_mode()
def test_it_is_permutation_equivariant_where_the_backbone_is():
    model = tiny_backbone("pi3").double()
    for weight in add_linear_branch(model):
        nn.init.normal_(weight, std=0.1)
    x, order = torch.rand(1, 4, 3, 56, 56, dtype=torch.float64), [2, 0, 3, 1]
    out = model(x, attention="lite3r", top_k=2).depth
    torch.testing.assert_close(model(x[:, order], attention="lite3r", top_k=2).depth, out[:, order])


@torch.inference_mode()
def test_it_follows_visibility_but_for_its_choice_of_tokens():
    model = tiny_backbone("streamvggt")
    add_linear_branch(model)
    x = torch.rand(1, 3, 3, 56, 56)
    out = model(x, attention="lite3r", top_k=3).depth
    torch.testing.assert_close(model(x[:, :2], attention="lite3r", top_k=3).depth, out[:, :2])
    with pytest.raises(ValueError, match="sparse='tokens'.* works where all frames see all"):
        model(x, attention=Lite3R("tokens"))


def test_only_the_projections_need_gradients():
    model = tiny_backbone("vggt").requires_grad_(False)
    branch = add_linear_branch(model)
    assert len(branch) == 4 and all(weight.shape == (64, 64) for weight in branch)
    for strategy in STRATEGIES:
        model.zero_grad()
        model(torch.rand(1, 2, 3, 56, 56), attention=strategy, top_k=3).depth.sum().backward()
        assert all(weight.grad.norm() > 0 for weight in branch)
    assert all(p.grad is None for p in model.parameters() if not any(p is weight for weight in branch))


def test_checkpoints_may_hold_the_projections(tmp_path):
    trained, model = tiny_backbone("pi3"), tiny_backbone("pi3")
    branch = add_linear_branch(trained)
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    load_into(model, tmp_path / "trained.pt", "copy it again")
    for block, weight in zip(model.across_views, branch):
        assert torch.equal(block.attn.proj_lin.weight, weight)


@torch.inference_mode()
def test_models_without_the_branch_say_so():
    x = torch.rand(1, 2, 3, 56, 56)
    with pytest.raises(ValueError, match="no trained linear branch .*; load a checkpoint with one, or train it"):
        tiny_backbone("da3")(x, attention="lite3r")
    network, see = Network(NetworkConfig(56, 56, channels=64, stem=8, decoder=4)), torch.ones(1, 2, 2).bool()
    with pytest.raises(ValueError, match="no trained linear branch"):
        network(x, see, see, attention="lite3r")
    with pytest.raises(ValueError, match="no blocks across views"):
        add_linear_branch(BACKBONES["da3-mono"]())
    with pytest.raises(ValueError, match="engine.attention = 'lite3r': the weights 'compact' have no linear branch"):
        Engine(EngineConfig(device="cpu", attention="lite3r"))
    with pytest.raises(ValueError, match="'sage': choose one of blocks, tokens, dense"):
        Lite3R("sage")
    with pytest.raises(ValueError, match=r"keep 1.3: must be in \(0, 1\]"):
        Lite3R(keep=1.3)
