"""Attention strategies against slow, independent float64 definitions, on fresh random inputs."""

import os

import numpy as np
import pytest
import torch

from speed3r_ros.kernels import coarse as coarse_kernels
from speed3r_ros.kernels import frames as frame_kernels
from speed3r_ros.kernels import selected as selected_kernels
from speed3r_ros.kernels.frames import Visible
from speed3r_ros.kernels.qkv import BLOCK
from speed3r_ros.model import attention
from speed3r_ros.model.attention import Layer, Tokens, dense, speed3r

HEADS, WIDTH, SPECIALS = 2, 8, 3
INTERPRETED = pytest.mark.skipif(
    frame_kernels.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and TRITON_INTERPRET=1 before the start",
)


def random_case(
    blocks: int, frames: int, resident: int, banked: int, seed: int, specials: int = SPECIALS, width: int = WIDTH
):
    g = torch.Generator().manual_seed(seed)
    length = specials + blocks * BLOCK

    def tokens(count, pooled_count, gate=False):
        fine = torch.randn(1, HEADS, count * length, width, generator=g, dtype=torch.float64)
        pooled = torch.randn(1, HEADS, pooled_count * blocks, width, generator=g, dtype=torch.float64)
        gates = torch.rand(1, HEADS, count * length, 2, generator=g, dtype=torch.float64) if gate else None
        return Tokens(fine, pooled, gates)

    q, k, v = tokens(frames, frames, True), tokens(resident, resident + banked), tokens(resident, resident + banked)
    fine = torch.rand(1, frames, resident, generator=g) < 0.6
    fine[:, :, 0] = True
    coarse = torch.cat([fine, torch.rand(1, frames, banked, generator=g) < 0.5], 2)
    return q, k, v, fine, coarse, length


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def speed3r_by_loops(q, k, v, fine, coarse, blocks, length, top_k, specials, shown=()):
    """One token at a time, with explicit lists of what it may see."""
    out = np.zeros(q.fine.shape[1:])
    qf, kf, vf, qp, kp, vp, gate = (
        x[0].numpy() for x in (q.fine, k.fine, v.fine, q.pooled, k.pooled, v.pooled, q.gate)
    )
    for h in range(HEADS):
        for t in range(fine.shape[1]):
            frames = [n for n in range(fine.shape[2]) if fine[0, t, n]]
            always = [n * length + s for n in frames for s in range(specials)]
            everything = [n * length + i for n in frames for i in range(length)]
            for i in range(length):
                row = t * length + i
                if i < specials:
                    keys = everything
                else:
                    g = (i - specials) // BLOCK
                    query = qp[h, t * blocks + g]
                    seen = [n * blocks + b for n in range(coarse.shape[2]) if coarse[0, t, n] for b in range(blocks)]
                    compressed = softmax(kp[h, seen] @ query / len(query) ** 0.5) @ vp[h, seen]
                    local = [n * blocks + b for n in frames if n not in shown for b in range(blocks)]
                    best = sorted(local, key=lambda j: -(kp[h, j] @ query))[:top_k]
                    best += [n * blocks + b for n in frames if n in shown for b in range(blocks)]
                    keys = always + [
                        (j // blocks) * length + specials + (j % blocks) * BLOCK + e for j in best for e in range(BLOCK)
                    ]
                attended = softmax(kf[h, keys] @ qf[h, row] / qf.shape[-1] ** 0.5) @ vf[h, keys]
                if i >= specials:
                    attended = gate[h, row, 0] * compressed + gate[h, row, 1] * attended
                out[h, row] = attended
    return out


@pytest.mark.parametrize("specials", [3, 4])
@pytest.mark.parametrize(
    "blocks, frames, resident, banked, top_k",
    [(3, 2, 4, 2, 2), (1, 1, 1, 0, 5), (2, 3, 3, 4, 1), (4, 1, 5, 1, 7), (2, 1, 3, 0, 100)],
)
def test_speed3r_is_its_definition(blocks, frames, resident, banked, top_k, specials):
    seed = int(torch.randint(2**31, ()))
    q, k, v, fine, coarse, length = random_case(blocks, frames, resident, banked, seed, specials)
    out = speed3r(q, k, v, Visible(fine), Visible(coarse), specials, top_k)[0].numpy()
    expected = speed3r_by_loops(q, k, v, fine, coarse, blocks, length, top_k, specials)
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-9, err_msg=f"seed {seed}")
    q.fine.requires_grad_()  # one frame that is not to be differentiated takes another way
    masked = speed3r(q, k, v, Visible(fine), Visible(coarse), specials, top_k)[0].detach().numpy()
    np.testing.assert_allclose(masked, expected, rtol=1e-9, atol=1e-9, err_msg=f"seed {seed}")


@pytest.mark.parametrize("on_triton", [False, pytest.param(True, marks=INTERPRETED)])
@pytest.mark.parametrize("specials", [0, 3])
@pytest.mark.parametrize(
    "blocks, frames, resident, banked, top_k, always",
    [(3, 2, 4, 2, 2, (0, 2)), (1, 1, 1, 0, 5, (0,)), (2, 3, 3, 0, 1, (1,)), (2, 1, 3, 1, 100, (0, 1, 2))],
)
def test_some_frames_are_always_shown(
    blocks, frames, resident, banked, top_k, always, specials, on_triton, monkeypatch
):
    """Those of the visible ones; blocks are chosen among the others."""
    seed = int(torch.randint(2**31, ()))
    q, k, v, fine, coarse, length = random_case(blocks, frames, resident, banked, seed, specials, 16)
    expected = speed3r_by_loops(q, k, v, fine, coarse, blocks, length, top_k, specials, always)
    if on_triton:
        for module in (coarse_kernels, selected_kernels):
            monkeypatch.setattr(module, "on_kernels", lambda x: True)
        q, k, v = (Tokens(*(y if y is None else y.float() for y in (x.fine, x.pooled, x.gate))) for x in (q, k, v))
    shown = fine & torch.isin(torch.arange(resident), torch.tensor(always))
    layer, tolerance = Layer(always=Visible(shown)), 1e-5 if on_triton else 1e-9
    out = speed3r(q, k, v, Visible(fine), Visible(coarse), specials, top_k, layer)[0].numpy()
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance, err_msg=f"seed {seed}")


@pytest.mark.parametrize("together", [1, 2, 3, 8])
def test_dense_attention_is_its_definition_however_many_frames_share_a_mask(monkeypatch, together):
    frames, resident, length = 5, 7, 6
    monkeypatch.setattr(attention, "ROWS", together * length + 1)
    q = torch.randn(2, 3, frames * length, 8)
    k, v = torch.randn(2, 2, 3, resident * length, 8)
    visible = torch.rand(2, frames, resident) < 0.5
    visible[..., 0] = True
    mask = torch.kron(visible, torch.ones(length, length)).bool()[:, None]
    scores = (q.double() @ k.double().mT / 8**0.5).masked_fill(~mask, -torch.inf)
    got = dense(Tokens(q), Tokens(k), Tokens(v), Visible(visible), Visible(visible), 0, 1)
    assert (got - scores.softmax(-1) @ v.double()).abs().max() < 1e-5


def test_selection_of_all_blocks_is_dense_attention():
    seed = int(torch.randint(2**31, ()))
    q, k, v, fine, coarse, length = random_case(3, 2, 4, 2, seed)
    only_selection = torch.zeros_like(q.gate)
    only_selection[..., 1] = 1
    sparse = speed3r(Tokens(q.fine, q.pooled, only_selection), k, v, Visible(fine), Visible(coarse), SPECIALS, top_k=12)
    torch.testing.assert_close(sparse, dense(q, k, v, Visible(fine), Visible(coarse), SPECIALS, 12), msg=f"seed {seed}")


def test_invisible_frames_have_no_influence():
    q, k, v, fine, coarse, length = random_case(2, 1, 4, 2, int(torch.randint(2**31, ())))
    for strategy in (dense, speed3r):
        before = strategy(q, k, v, Visible(fine), Visible(coarse), SPECIALS, 3)
        hidden_fine = ~fine[0, 0].repeat_interleave(length)
        hidden_coarse = ~coarse[0, 0].repeat_interleave(2)
        for x in (k, v):
            x.fine[:, :, hidden_fine] = 1e6
            x.pooled[:, :, hidden_coarse] = -1e6
        torch.testing.assert_close(strategy(q, k, v, Visible(fine), Visible(coarse), SPECIALS, 3), before)
