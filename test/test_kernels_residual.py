"""The fused residual sum and layer norm against float64 definitions, and blocks on all kernels against plain torch."""

import os

import pytest
import torch
import torch.nn.functional as F

from speed3r_ros.kernels import qkv, residual
from speed3r_ros.kernels.residual import add_norm, add_norm_reference
from speed3r_ros.model.network import Block, GlobalBlock

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(
    residual.triton is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1 before the start",
)
SIZES = {"ROWS": 4, "COLUMNS": 128, "num_warps": 1}


def case(shape, dtype, branch, gamma):
    """x, branch, weight, bias, gamma."""
    x = 3 + 2 * torch.randn(shape, device=DEVICE)
    vectors = [1 + 0.3 * torch.randn(shape[-1], device=DEVICE) for _ in range(3)]
    return [
        x,
        torch.randn(shape, device=DEVICE).to(dtype) if branch else None,
        *vectors[:2],
        vectors[2] if gamma else None,
    ]


def double(inputs):
    return [None if x is None else x.double() for x in inputs]


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 5, 48), (7, 100), (1, 1, 384), (3, 1000)])
@pytest.mark.parametrize("branch, gamma", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-3)])
def test_kernel_is_its_definition(shape, branch, gamma, dtype, tolerance):
    x, z, weight, bias, factor = case(shape, dtype, branch, gamma)
    total, out = add_norm_reference(*double([x, z, weight, bias]), 1e-6, torch.float64, *double([factor]))
    for sizes in (None, SIZES) if shape[-1] <= 128 else (None,):
        a, b = residual.add_norm_triton(x, z, weight, bias, 1e-6, dtype, factor, sizes)
        assert a.dtype == torch.float32 and b.dtype == dtype
        assert (a.double() - total).norm() < 1e-6 * total.norm()
        assert (b.double() - out).norm() < tolerance * out.norm()
        assert branch or a is x


@needs_kernels
@pytest.mark.parametrize("sizes", [None, SIZES])
@pytest.mark.parametrize("branch, gamma", [(False, False), (True, False), (True, True)])
def test_gradients_are_the_references(branch, gamma, sizes, monkeypatch):
    if sizes:
        monkeypatch.setattr(residual, "sizes_of", lambda rows, channels: sizes)
    inputs = case((3, 7, 100), torch.float32, branch, gamma)
    grads, weights = [], []
    for run, convert, out in (
        (residual.AddNorm.apply, list, torch.float32),
        (residual.AddNorm.apply, list, torch.float32),
        (add_norm_reference, double, torch.float64),
    ):
        leaves = [None if x is None else x.detach().requires_grad_() for x in convert(inputs)]
        results = run(*leaves[:4], 1e-6, out, leaves[4])
        results = [results] if isinstance(results, torch.Tensor) else [y for y in results if y is not leaves[0]]
        weights = weights or [torch.randn_like(y) for y in results]
        loss = sum((y * w).sum() for y, w in zip(results, weights))
        grads.append(torch.autograd.grad(loss, [x for x in leaves if x is not None]))
    for a, again, b in zip(*grads):
        assert (a.double() - b).norm() < 1e-5 * b.norm()
        assert torch.equal(a, again)


@needs_kernels
def test_strided_arguments_are_read_as_what_they_hold():
    apart = [torch.randn(*shape, 2, device=DEVICE)[..., 0] for shape in ((3, 7, 20), (3, 7, 20), (20,), (20,), (20,))]
    grads, weights = [], [torch.randn(20, 3, 7, device=DEVICE).permute(1, 2, 0) for _ in range(2)]
    for run, convert in ((residual.AddNorm.apply, list), (add_norm_reference, double)):
        leaves = [x.detach().requires_grad_() for x in convert(apart)]
        results = run(*leaves[:4], 1e-6, leaves[0].dtype, leaves[4])
        grads.append([*results, *torch.autograd.grad(results, leaves, convert(weights))])
    for a, b in zip(*grads):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


@needs_kernels
@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_result_alone(used, monkeypatch):
    monkeypatch.setattr(qkv, "on_kernels", lambda _: True)
    inputs = case((5, 64), torch.float32, True, True)
    grads = []
    for run in (add_norm, add_norm_reference):
        leaves = [x.detach().requires_grad_() for x in inputs]
        run(*leaves[:4], 1e-6, torch.float32, leaves[4])[used].square().sum().backward()
        grads.append([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 1000)])
def test_sum_alone_is_its_definition_also_in_place(shape, gamma):
    x, branch, _, _, factor = case(shape, torch.float16, True, gamma)
    expected = residual.add_reference(*double([x, branch, factor]))
    out = residual.add_triton(x, branch, factor)
    assert out.dtype == torch.float32 and (out.double() - expected).norm() < 1e-6 * expected.norm()
    assert residual.add_triton(x, branch, factor, out=x) is x and torch.equal(x, out)


def test_gelu_of_exact_sums_by_tanh_beats_exact_gelu_of_rounded_sums():
    """Why `linear_gelu` may approximate where its sums are not rounded first."""
    sums = torch.randn(100_000, dtype=torch.float64)
    exact = F.gelu(sums)
    within = F.gelu(sums.float(), approximate="tanh").bfloat16()
    apart = F.gelu(sums.bfloat16().float()).bfloat16()
    assert 1.3 * (within.double() - exact).norm() < (apart.double() - exact).norm()


def test_wrong_shapes_are_named():
    x, branch, weight, bias, gamma = case((3, 8), torch.float32, True, True)
    with pytest.raises(ValueError, match="branch"):
        residual.add(x, branch[:2])
    with pytest.raises(ValueError, match="branch"):
        add_norm(x, branch[:2], weight, bias, 1e-6, x.dtype)
    with pytest.raises(ValueError, match="channel"):
        add_norm(x, branch, weight[:-1], bias, 1e-6, x.dtype)


@needs_kernels
@pytest.mark.parametrize("lowered", [False, True])
def test_blocks_on_kernels_are_blocks_in_plain_torch(lowered, monkeypatch):
    """Outputs and gradients of a frame block and a global block, also under autocast."""
    channels, width, specials, patches = 64, 32, 3, 32
    length = specials + patches
    blocks = [Block(channels, width, 1.0, 0.5).to(DEVICE), GlobalBlock(channels, width, 1.3, 0.5, specials).to(DEVICE)]
    inputs = torch.randn(2, 2, length, channels, device=DEVICE)
    tables = [torch.randn(1, n, 1, width, device=DEVICE) for n in (length, length, patches // 16, patches // 16)]
    results = []
    for kernels in (False, True):
        if kernels or DEVICE == "cpu":
            monkeypatch.setattr(qkv, "on_kernels", lambda _, kernels=kernels: kernels)
        x, branch = (y.detach().requires_grad_() for y in inputs)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=lowered):
            x1, branch1 = blocks[0](x, branch, *tables[:2])
            x2, *tokens, gate = blocks[1].before_global(x1, branch1, *tables)
            x3, branch3 = blocks[1].after(x2, tokens[0] * gate[..., :1] + tokens[1] * tokens[2])
        assert x3.dtype == torch.float32
        loss = (x3 + branch3).square().mean() + sum(y.float().sin().mean() for y in tokens[3:])
        parameters = [p for block in blocks for p in block.parameters()]
        results.append([x3 + branch3, *torch.autograd.grad(loss, [x, branch, *parameters])])
    for a, b in zip(*results):
        assert (a - b).norm() <= (0.06 if lowered else 1e-4) * b.norm() + 1e-6
