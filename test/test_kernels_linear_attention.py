"""Linear attention against definitions by loops in float64 and against autograd, on fresh random inputs of awkward sizes."""

import os

import pytest
import torch

from speed3r_ros.kernels import linear_attention as module
from speed3r_ros.kernels.frames import Visible, triton
from speed3r_ros.kernels.linear_attention import (
    key_states,
    key_states_reference,
    linear_attention,
    linear_attention_reference,
    read_states,
    read_states_reference,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(
    triton is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1 before the start",
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def seed():
    value = int(torch.randint(2**31, ()))
    torch.manual_seed(value)
    print("seed", value)


def error(out, expected):
    assert torch.isfinite(out).all()
    out, expected = out.double().cpu(), expected.double().cpu()
    return ((out - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def draw(*shape, dtype=torch.float32):
    """Random values as an inner part of a larger buffer full of NaN."""
    buffer = torch.full((shape[0], shape[1] + 1, *shape[2:]), torch.nan, dtype=dtype, device=DEVICE)
    buffer[:, 1:] = torch.randn(shape, device=DEVICE).to(dtype)
    return buffer[:, 1:]


def case(b, t, x, n, y, d, dtype=torch.float32, heads=2):
    """The last query frame sees nothing, and nobody sees the last key frame, unless there is only one."""
    q = draw(b, heads, t, x, d, dtype=dtype)
    k, v = (draw(b, heads, n, y, d, dtype=dtype) for _ in range(2))
    visible = torch.rand(b, t, n, device=DEVICE) < 0.6
    visible[:, :, 0] = True
    if n > 1:
        visible[:, :, -1] = False
    if t > 1:
        visible[:, -1] = False
    return q, k, v, visible


def by_loops(q, k, v, visible):
    (b, h, t), n = q.shape[:3], k.shape[2]
    q, k, v, visible = q.double().cpu(), k.double().cpu(), v.double().cpu(), visible.cpu()
    feature = lambda z: torch.where(z > 0, z + 1, z.exp())  # noqa: E731
    out = torch.zeros_like(q)
    for i in range(b):
        for j in range(h):
            for frame in range(t):
                seen = [m for m in range(n) if visible[i % len(visible), frame, m]]
                if seen:
                    keys, values = k[i, j, seen].flatten(0, 1), v[i, j, seen].flatten(0, 1)
                    weights = feature(q[i, j, frame]) @ feature(keys).T  # all pairs of tokens, unlike the module
                    out[i, j, frame] = weights / weights.sum(1, keepdim=True) @ values
    return out


SHAPES = [
    (1, 3, 5, 4, 7, 16, torch.float32),  # b, t, x, n, y, d, type
    (2, 2, 3, 5, 9, 32, torch.float32),
    (1, 1, 1, 1, 1, 16, torch.float32),
    (1, 2, 70, 2, 45, 16, torch.float32),
    (1, 2, 19, 3, 21, 64, torch.float16),
]


@pytest.mark.parametrize("b, t, x, n, y, d, dtype", SHAPES)
def test_reference_is_its_definition(b, t, x, n, y, d, dtype):
    q, k, v, visible = case(b, t, x, n, y, d)
    assert error(
        linear_attention_reference(q.double(), k.double(), v.double(), Visible(visible)), by_loops(q, k, v, visible)
    ) < (1e-12)


@needs_kernels
@pytest.mark.parametrize("b, t, x, n, y, d, dtype", SHAPES)
def test_kernel_is_its_definition(b, t, x, n, y, d, dtype):
    q, k, v, visible = case(b, t, x, n, y, d, dtype)
    for i in range(b):
        k[i, :, ~visible[i].any(0)] = torch.nan
    out = module.linear_attention_triton(q, k, v, Visible(visible))
    assert error(out, by_loops(q, k, v, visible)) < TOLERANCE[dtype]
    assert out.permute(0, 2, 3, 1, 4).is_contiguous()


@needs_kernels
@pytest.mark.parametrize("chunk", [1024, 16], ids=["whole", "chunks"])
@pytest.mark.parametrize("b, t, x, n, y, d, dtype", SHAPES)
def test_backward_is_autograd_through_the_reference(b, t, x, n, y, d, dtype, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module, "tile_sizes", lambda *_: (16, {"PRECISION": "ieee"}))
    *inputs, visible = case(b, t, x, n, y, d, dtype)
    inputs = [z.detach().requires_grad_() for z in inputs]
    doubles = [z.detach().double().requires_grad_() for z in inputs]
    out, expected = (
        module.linear_attention_triton(*inputs, Visible(visible)),
        linear_attention_reference(*doubles, Visible(visible)),
    )
    assert error(out.detach(), expected.detach()) < TOLERANCE[dtype]
    gradient = torch.randn(out.shape, device=DEVICE)
    out.backward(gradient.to(dtype))
    expected.backward(gradient.to(dtype).double())
    for a, b in zip(inputs, doubles):
        difference = (a.grad.double() - b.grad).norm()  # of a single key the gradient is zero
        assert difference < 2 * TOLERANCE[dtype] * b.grad.norm().clamp(min=0.01 * gradient.norm())


@needs_kernels
def test_gradients_without_strides():
    q, k, v, visible = case(1, 2, 5, 2, 3, 16)
    q = q.detach().requires_grad_()
    module.linear_attention_triton(
        q, k, v, Visible(visible)
    ).sum().backward()  # the incoming gradient is an expanded scalar
    again = q.detach().clone().requires_grad_()
    linear_attention_reference(again, k, v, Visible(visible)).sum().backward()
    torch.testing.assert_close(q.grad, again.grad, rtol=1e-5, atol=1e-6)


def test_derivatives_of_the_reference():
    q, k, v = (torch.randn(1, 1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    visible = torch.tensor([[[True, False], [True, True]]])
    torch.autograd.gradcheck(lambda *z: linear_attention_reference(*z, Visible(visible)), (q, k, v))


def test_a_running_sum_is_causal_attention():
    """The stream adds one state per frame, and takes off what leaves its window."""
    q, k, v = (torch.randn(1, 2, 6, 5, 16, dtype=torch.float64) for _ in range(3))
    age = torch.arange(6)[:, None] - torch.arange(6)
    whole = linear_attention(q, k, v, Visible(((age >= 0) & (age < 3))[None]))
    states, running = key_states(k, v), 0
    for t in range(6):
        running = running + states[:, :, t : t + 1]
        if t >= 3:
            running = running - states[:, :, t - 3 : t - 2]
        torch.testing.assert_close(read_states(q[:, :, t : t + 1], running), whole[:, :, t : t + 1])


def test_offline_all_frames_are_one():
    q, k, v = (torch.randn(1, 2, 4, 5, 16, dtype=torch.float64) for _ in range(3))
    whole = linear_attention(q, k, v, Visible(torch.ones(1, 4, 4, dtype=torch.bool)))
    flat = linear_attention(q.flatten(2, 3)[:, :, None], k, v, Visible(torch.ones(1, 1, 4, dtype=torch.bool)))
    torch.testing.assert_close(flat[:, :, 0], whole.flatten(2, 3))


@needs_kernels
def test_parts_are_their_references():
    q, k, v, _ = case(1, 3, 5, 3, 7, 16)
    states = module.key_states_triton(k, v)
    torch.testing.assert_close(states, key_states_reference(k, v), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.read_states_triton(q, states), read_states_reference(q, states))


def test_autocast_does_not_round_the_states():
    """As in training; on a GPU the kernels refuse rounded states."""
    q, k, v = torch.randn(3, 1, 2, 3, 16, 16, device=DEVICE)
    visible = Visible(torch.ones(1, 3, 3, dtype=torch.bool, device=DEVICE).tril())
    expected = linear_attention(q, k, v, visible)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(linear_attention(q, k, v, visible), expected)


def test_wrong_shapes_are_named():
    q, k = torch.randn(1, 2, 3, 5, 16), torch.randn(1, 2, 4, 5, 16)
    with pytest.raises(ValueError, match="visible"):
        linear_attention(q, k, k, Visible(torch.ones(1, 3, 5, dtype=torch.bool)))
    with pytest.raises(ValueError, match="fit"):
        key_states(k, k[..., :8])
    with pytest.raises(ValueError, match="states"):
        read_states(q, key_states(k, k))
