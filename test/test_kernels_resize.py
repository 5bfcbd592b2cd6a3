"""Bilinear resizing of maps with an embedding of places, against float64 definitions."""

import os

import pytest
import torch
import torch.nn.functional as F

from speed3r_ros.kernels import resize as module
from speed3r_ros.kernels.resize import resize, resize_reference, resize_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(
    module.triton is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1 before the start",
)
SIZES = {"PIXELS": 4, "CHANNELS": 16, "num_warps": 1}


def case(shape, size, dtype, embedded):
    """Maps with channels last, and the embedding or None."""
    x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    half = shape[1] // 2
    return x, tuple(torch.randn(n, half, device=DEVICE) for n in size[::-1]) if embedded else None


def by_definition(x, size, plane):
    """Float64, one pixel after another from its four neighbours."""
    (h, w), (H, W) = x.shape[2:], size
    x = x.double()
    out = torch.empty(*x.shape[:2], H, W, dtype=torch.float64, device=x.device)
    for i in range(H):
        for j in range(W):
            y, z = i * (h - 1) / max(H - 1, 1), j * (w - 1) / max(W - 1, 1)
            total = 0
            for r in {int(y), min(int(y) + 1, h - 1)}:
                for c in {int(z), min(int(z) + 1, w - 1)}:
                    total = total + max(0, 1 - abs(y - r)) * max(0, 1 - abs(z - c)) * x[:, :, r, c]
            out[:, :, i, j] = total
    if plane is not None:
        out[:, : x.shape[1] // 2] += plane[0].double().T[:, None]
        out[:, x.shape[1] // 2 :] += plane[1].double().T[:, :, None]
    return out


SHAPES = [
    ((2, 6, 5, 7), (10, 14)),
    ((1, 32, 3, 4), (5, 9)),
    ((3, 20, 4, 3), (4, 3)),  # the same size
    ((1, 8, 1, 5), (6, 1)),  # one row, one column
    ((2, 40, 7, 6), (3, 4)),  # smaller
]


@needs_kernels
@pytest.mark.parametrize("shape, size", SHAPES)
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_kernel_is_its_definition(shape, size, embedded, dtype, tolerance):
    x, plane = case(shape, size, dtype, embedded)
    right = by_definition(x, size, plane)
    for sizes in (None, SIZES):
        out = resize_triton(x, size, plane, sizes)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        assert (out.double() - right).norm() < tolerance * right.norm()


@pytest.mark.parametrize("shape, size", SHAPES)
@pytest.mark.parametrize("embedded", [False, True])
def test_reference_is_the_definition(shape, size, embedded):
    x, plane = case(shape, size, torch.float64, embedded)
    right = by_definition(x, size, plane)
    for y in (x, x.contiguous()):
        assert (resize_reference(y, size, plane) - right).norm() < 1e-6 * right.norm()


@needs_kernels
def test_kernel_reads_maps_as_they_lie_and_leaves_them():
    x, plane = case((2, 12, 6, 5), (11, 8), torch.float32, True)
    right = by_definition(x, (11, 8), plane)
    for y in (x.contiguous(), torch.randn(4, 12, 6, 10, device=DEVICE)[::2, :, :, ::2].copy_(x)):
        before = y.clone()
        out = resize_triton(y, (11, 8), plane)
        assert (out.double() - right).norm() < 1e-6 * right.norm() and torch.equal(y, before)
    assert resize_triton(x[:0], (11, 8), plane).shape == (0, 12, 11, 8)


def test_gradients_pass_through():
    x, plane = case((1, 4, 3, 3), (5, 4), torch.float32, True)
    x.requires_grad_()
    weight = torch.randn(1, 4, 5, 4, device=DEVICE)
    (grad,) = torch.autograd.grad((resize(x, (5, 4), plane) * weight).sum(), x)
    y = x.detach().double().requires_grad_()
    (right,) = torch.autograd.grad((F.interpolate(y, (5, 4), mode="bilinear", align_corners=True) * weight).sum(), y)
    assert (grad - right).norm() < 1e-5 * right.norm()


def test_what_does_not_fit_is_refused():
    x, plane = case((1, 6, 3, 3), (5, 4), torch.float32, True)
    assert resize(x, (3, 3)) is x
    for arguments in ((x[0], (5, 4)), (x, (0, 4)), (x, (4, 5), plane), (x[:, :5], (5, 4), plane)):
        with pytest.raises(ValueError, match="fit|least one pixel"):
            resize(*arguments)
