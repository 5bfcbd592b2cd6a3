"""The fused pooling, QK-norm and rotation against the network's own layers and a float64 definition."""

import os

import pytest
import torch

from speed3r_ros.kernels import qkv as module
from speed3r_ros.kernels.qkv import prepare_tokens, prepare_tokens_reference
from speed3r_ros.model.network import GlobalBlock

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(
    module.triton is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1 before the start",
)


def case(frames, specials, blocks, heads, width, dtype=torch.float32):
    length = specials + 16 * blocks
    qkv = torch.randn(frames, length + 1, 3, heads, width, device=DEVICE).to(dtype)[:, 1:]
    weights = [1 + 0.2 * torch.randn(width, device=DEVICE) for _ in range(2)]
    return (
        qkv,
        *weights,
        *(torch.randn(1, n, 1, width, device=DEVICE) for n in (length, length, blocks, blocks)),
        specials,
    )


def test_reference_is_what_the_network_does():
    channels, width, specials, blocks = 64, 16, 3, 4
    length = specials + 16 * blocks
    layer = GlobalBlock(channels, width, 1.3, 0.5, specials)
    x = torch.randn(2, length, channels)
    tables = [torch.randn(1, n, 1, width) for n in (length, length, blocks, blocks)]
    _, q, k, v, q_g, k_g, v_g, _ = layer.before_global(x, None, *tables)
    qkv = layer.qkv(layer.norm1(x)).unflatten(-1, (3, -1, width))
    out = prepare_tokens_reference(qkv, layer.q_norm, layer.k_norm, *tables, specials)
    for a, b in zip(out, (q, k, v, q_g, k_g, v_g)):
        torch.testing.assert_close(a, b)
        assert a.unflatten(0, (1, 2)).transpose(1, 2).is_contiguous()


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 5, 3, 2, 16), (1, 0, 1, 1, 32), (2, 18, 2, 3, 64)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-3)])
def test_kernel_is_its_definition(shape, dtype, tolerance):
    arguments = case(*shape, dtype)
    expected = prepare_tokens_reference(arguments[0].double(), *arguments[1:])
    out = module.prepare_tokens_triton(*arguments)
    for a, b in zip(out, expected):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.double() - b).norm() < tolerance * b.norm()
        assert a.transpose(0, 1).is_contiguous()


@needs_kernels
def test_gradient_is_the_references():
    qkv, q_weight, k_weight, *rest = case(2, 3, 2, 2, 16)
    grads = []
    for run, dtype in ((module.PrepareTokens.apply, torch.float32), (prepare_tokens_reference, torch.float64)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (qkv, q_weight, k_weight)]
        out = run(*inputs, *rest)
        torch.manual_seed(0)
        loss = sum((x.double() * torch.randn(x.shape, device=DEVICE)).sum() for x in out)
        grads.append(torch.autograd.grad(loss, inputs))
    for a, b in zip(*grads):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


def test_wrong_shapes_are_named():
    arguments = case(1, 2, 2, 1, 16)
    with pytest.raises(ValueError, match="qkv"):
        prepare_tokens(arguments[0][:, :-1], *arguments[1:])
    with pytest.raises(ValueError, match="rotary"):
        prepare_tokens(*arguments[:5], arguments[3], *arguments[6:])
