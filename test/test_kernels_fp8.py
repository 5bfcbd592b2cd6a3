"""FP8 layers against a table of all E4M3 numbers and against autograd, on fresh random inputs of awkward sizes."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from speed3r_ros.kernels import fp8
from speed3r_ros.kernels.fp8 import (
    E4M3,
    fp8_linear,
    fp8_linear_reference,
    fp8_linear_straight_through,
    fp8_linear_straight_through_reference,
    library_fits,
    quantise_rows,
    quantise_rows_reference,
    scaled_product,
    scaled_product_reference,
)
from speed3r_ros.kernels.frames import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(
    triton is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1 before the start",
)
SMALL = {"BM": 16, "BN": 32, "BK": 32, "GROUP": 2, "num_warps": 4, "num_stages": 2}


@pytest.fixture(autouse=True)
def seed():
    value = int(torch.randint(2**31, ()))
    torch.manual_seed(value)
    print("seed", value)


def e4m3_by_table(x, factor):
    """Round x * factor to the nearest of all finite E4M3 numbers, ties to the even code."""
    table = []
    for code in range(127):  # sign 0; code 127 is NaN
        exponent, mantissa = code >> 3, code & 7
        table.append((mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    table = np.array(table)
    value = x.astype(np.float32) * factor.astype(np.float32)
    distance = np.abs(np.abs(value.astype(np.float64))[..., None] - table)
    code = distance.argmin(-1)
    tie = (distance == distance.min(-1, keepdims=True)).sum(-1) > 1
    code = np.where(tie & (code % 2 == 1), code + 1, code)
    return np.sign(value) * table[code]


def spread(*shape):
    """Rows whose entries span many powers of two, so that subnormal numbers and zeros come up."""
    x = torch.randn(shape, device=DEVICE) * torch.exp2(torch.randint(-14, 3, shape, device=DEVICE).float())
    return x * torch.exp2(torch.randint(-8, 9, (*shape[:-1], 1), device=DEVICE).float())


ROWS = [(1, 1), (3, 7), (5, 16), (2, 3, 33), (9, 384)]


def check_rounding(x, values, scale):
    assert values.dtype == E4M3 and values.shape == x.shape and scale.shape == x.shape[:-1]
    x = x.float().cpu().numpy()
    largest = np.abs(x).max(-1).clip(1e-12)
    expected = e4m3_by_table(x, (np.float32(448) / largest)[..., None])
    assert np.array_equal(values.float().cpu().numpy(), expected)
    assert np.array_equal(scale.cpu().numpy(), largest * np.float32(1 / 448))


@pytest.mark.parametrize("shape", ROWS)
def test_rounding_reference_is_its_definition(shape):
    x = spread(*shape)
    check_rounding(x, *quantise_rows_reference(x))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", ROWS)
def test_rounding_kernel_is_its_definition(shape, dtype):
    x = spread(*shape).to(dtype)
    check_rounding(x, *fp8.quantise_rows_triton(x))


@needs_kernels
def test_ties_zeros_and_strides():
    steps = torch.arange(-448, 449, device=DEVICE) / 16.0  # factor 16: many values lie between two E4M3 numbers
    x = torch.stack([steps, torch.zeros_like(steps), steps.flip(0)])
    for y in (x, x.T.contiguous().T, x.repeat(1, 2)[:, : x.shape[1]]):
        values, scale = fp8.quantise_rows_triton(y)
        check_rounding(x, values, scale)
        assert torch.equal(values.float(), quantise_rows_reference(x)[0].float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bad):
    x = torch.randn(3, 20, device=DEVICE)
    x[1, 4] = bad
    out = fp8_linear(x, *quantise_rows(torch.randn(2, 20, device=DEVICE)))
    assert out.isnan().tolist() == [[False, False], [True, True], [False, False]]


PRODUCTS = [(1, 1, 1), (5, 7, 3), (33, 40, 70), (17, 96, 31), (130, 64, 16)]  # M, K, N


def operands(m, k, n):
    x, w = torch.randn(m, k, device=DEVICE), torch.randn(n, k, device=DEVICE)
    return *quantise_rows_reference(x), *quantise_rows_reference(w), torch.randn(n, device=DEVICE)


def product_by_definition(x, x_scale, w, w_scale, bias):
    x, w = (y.double() * s.double()[:, None] for y, s in ((x, x_scale), (w, w_scale)))
    out = torch.einsum("mk,nk->mn", x, w)
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("m, k, n", PRODUCTS)
def test_product_reference_is_its_definition(m, k, n):
    *parts, bias = operands(m, k, n)
    for b in (bias, None):
        out = scaled_product_reference(*parts, b, torch.float64)
        torch.testing.assert_close(out, product_by_definition(*parts, b), rtol=1e-12, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("m, k, n", PRODUCTS)
def test_product_kernel_is_its_definition(m, k, n, dtype):
    *parts, bias = operands(m, k, n)
    for b in (bias, None):
        out = fp8.scaled_product_triton(*parts, b, dtype, SMALL)
        expected = product_by_definition(*parts, b)
        tolerance = 1e-3 if dtype == torch.float16 or DEVICE == "cuda" else 1e-5  # the units add in fewer bits
        assert (out.double() - expected).norm() <= tolerance * expected.norm()


@needs_kernels
@pytest.mark.parametrize("shape, n", [((2, 5, 40), 7), ((1, 1), 1), ((64,), 16)])
def test_layers_are_their_references(shape, n):
    x, weight, bias = torch.randn(shape, device=DEVICE), torch.randn(n, shape[-1], device=DEVICE), torch.randn(n)
    bias = bias.to(DEVICE)
    stored = quantise_rows(weight)
    out = fp8.fp8_linear_triton(x, *stored, bias)
    assert out.shape == (*shape[:-1], n)
    expected = fp8_linear_reference(x, *stored, bias)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fp8_linear_straight_through_reference(x, weight, bias), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fp8.fp8_linear_straight_through_triton(x, weight, bias), expected, rtol=1e-3, atol=1e-3)


def test_rounding_costs_little():
    x, weight = torch.randn(64, 512), torch.randn(128, 512)
    exact = F.linear(x, weight)
    error = (fp8_linear(x, *quantise_rows(weight)) - exact).norm() / exact.norm()
    assert 0.01 < error < 0.05  # two roundings to 4 bits


def straight_through_by_definition(x, weight, bias, gradient):
    """Outputs and gradients of a linear layer of the rounded operands."""
    rounded = [
        (v.double() * s.double()[..., None]).requires_grad_()
        for v, s in map(quantise_rows_reference, (x.detach(), weight.detach()))
    ]
    bias = bias.detach().double().requires_grad_()
    out = F.linear(*rounded, bias)
    out.backward(gradient.double())
    return [out.detach(), rounded[0].grad, rounded[1].grad, bias.grad]


@pytest.mark.parametrize(
    "layer",
    [
        fp8_linear_straight_through_reference,
        pytest.param(fp8.fp8_linear_straight_through_triton, marks=needs_kernels),
    ],
    ids=["reference", "kernels"],
)
@pytest.mark.parametrize("shape, n", [((2, 5, 40), 7), ((1, 1), 1), ((33, 16), 48)])
def test_gradients_pass_straight_through(layer, shape, n):
    x = torch.randn(shape, device=DEVICE).requires_grad_()
    weight = torch.randn(n, shape[-1], device=DEVICE).requires_grad_()
    bias = torch.randn(n, device=DEVICE).requires_grad_()
    gradient = torch.randn(*shape[:-1], n, device=DEVICE)
    expected = straight_through_by_definition(x, weight, bias, gradient)
    out = layer(x, weight, bias)
    out.backward(gradient)
    for a, b in zip((out.detach(), x.grad, weight.grad, bias.grad), expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 if DEVICE == "cuda" else 1e-4)


def test_torch_takes_only_what_it_takes():
    assert library_fits(1024, 3072, torch.bfloat16)
    assert not library_fits(1024, 11, torch.bfloat16)
    assert not library_fits(1023, 16, torch.bfloat16)
    assert not library_fits(1024, 3072, torch.float16)


def test_wrong_shapes_are_named():
    x, w = torch.randn(3, 16), torch.randn(5, 8)
    with pytest.raises(ValueError, match="weight"):
        fp8_linear(x, *quantise_rows(w))
    with pytest.raises(ValueError, match="bias"):
        fp8_linear_straight_through(x, torch.randn(5, 16), torch.randn(4))
    with pytest.raises(ValueError, match="scales"):
        values, scale = quantise_rows(x)
        scaled_product(values, scale, values, scale[:2], None, torch.float32)
