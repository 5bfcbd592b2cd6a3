"""The fused pooling, QK-norm and rotation against the network's own layers and a float64 definition."""

import os

import pytest
import torch

from speed3r_ros.kernels import qkv as module
from speed3r_ros.kernels.qkv import normalise_and_rotate, prepare_tokens, prepare_tokens_reference
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


def doubled(x):
    return x.double() if isinstance(x, torch.Tensor) else x


def draw_norm(kind, width):
    """Of no norm (0), an RMS norm (1), a layer norm (2)."""
    if kind == 0:
        return None
    norm = torch.randn(kind, width, device=DEVICE) * 0.2
    norm[0] += 1
    return norm.squeeze(0) if kind == 1 else norm


OPTIONS = [(kind, rotated) for kind in (0, 1, 2) for rotated in (True, False)]
SHAPES = [(2, 5, 3, 2, 16), (1, 0, 1, 1, 32), (2, 18, 2, 3, 64), (1, 1, 2, 4, 128)]


def arguments_of(shape, kind, rotated, dtype=torch.float32):
    """Of `prepare_tokens` and of `normalise_and_rotate`."""
    qkv, _, _, *tables, specials = case(*shape, dtype)
    norms = [draw_norm(kind, shape[-1]) for _ in range(2)]
    tables = tables if rotated else [None] * 4
    return (qkv, *norms, *tables, specials), (qkv, *norms, *tables[:2])


@needs_kernels
@pytest.mark.parametrize("kind, rotated", OPTIONS)
@pytest.mark.parametrize(
    "shape, dtype", [(s, torch.float32) for s in SHAPES[:2]] + [(s, torch.float16) for s in SHAPES[2:]]
)
def test_kernels_are_their_definitions(shape, dtype, kind, rotated):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    pooled, plain = arguments_of(shape, kind, rotated, dtype)
    for run, reference, arguments in (
        (module.prepare_tokens_triton, prepare_tokens_reference, pooled),
        (module.normalise_and_rotate_triton, module.normalise_and_rotate_reference, plain),
    ):
        expected = reference(*map(doubled, arguments))
        out = run(*arguments)
        for a, b in zip(out, expected):
            assert a.dtype == dtype and a.shape == b.shape
            assert (a.double() - b).norm() < tolerance * b.norm()
            assert run is not module.prepare_tokens_triton or a.transpose(0, 1).is_contiguous()
    assert out[2].data_ptr() == plain[0][:, :, 2].data_ptr()  # v stays where it is


@needs_kernels
@pytest.mark.parametrize("kind, rotated", OPTIONS)
def test_gradients_are_the_references(kind, rotated):
    pooled, plain = arguments_of((1, 3, 2, 2, 16), kind, rotated)
    for run, reference, arguments in (
        (module.PrepareTokens.apply, prepare_tokens_reference, pooled),
        (module.NormaliseAndRotate.apply, module.normalise_and_rotate_reference, plain),
    ):
        grads, weights = [], []
        for call, convert in ((run, lambda x: x), (run, lambda x: x), (reference, doubled)):
            inputs = [None if x is None else convert(x).detach().requires_grad_() for x in arguments[:3]]
            out = call(*inputs, *map(convert, arguments[3:]))
            weights = weights or [torch.randn_like(x) for x in out]
            loss = sum((x * w).sum() for x, w in zip(out, weights))
            grads.append(torch.autograd.grad(loss, [x for x in inputs if x is not None]))
        for a, again, b in zip(*grads):
            assert (a.double() - b).norm() < 1e-5 * b.norm()
            assert torch.equal(a, again)


@needs_kernels
def test_without_gradients_the_raw_values_are_overwritten(monkeypatch):
    monkeypatch.setattr(module, "on_kernels", lambda _: True)
    _, plain = arguments_of((2, 3, 2, 2, 16), 1, True)
    qkv = plain[0].clone()
    expected = module.normalise_and_rotate_reference(*plain)
    kept = module.normalise_and_rotate(qkv, plain[1].requires_grad_(), *plain[2:])
    assert torch.equal(qkv, plain[0]) and kept[0].requires_grad
    with torch.no_grad():
        out = module.normalise_and_rotate(qkv, *plain[1:])
    for i, (a, b) in enumerate(zip(out, expected)):
        torch.testing.assert_close(a, b)
        assert a.data_ptr() == qkv[:, :, i].data_ptr()


@pytest.mark.parametrize("run", [prepare_tokens_reference, pytest.param("kernel", marks=needs_kernels)])
def test_keys_and_values_go_into_their_slot_alone(run):
    run = module.prepare_tokens_triton if run == "kernel" else run
    arguments, _ = arguments_of((1, 3, 2, 2, 16), 1, True)
    heads, width = arguments[0].shape[3:]
    slot = module.Slot(
        torch.full((2, heads, 4, 35, width), torch.nan, device=DEVICE),
        torch.full((2, heads, 5, 2, width), torch.nan, device=DEVICE),
        torch.tensor([2], device=DEVICE),
    )
    expected = prepare_tokens_reference(*arguments)
    out = run(arguments[0].requires_grad_(), *arguments[1:], slot)
    assert not slot.fine.requires_grad and not slot.pooled.requires_grad
    for i, (a, b) in enumerate(zip(out, expected)):
        if i in (0, 3):
            torch.testing.assert_close(a, b)
            continue
        assert a.data_ptr() in (slot.fine[i - 1 if i < 3 else 0].data_ptr(), slot.pooled[(i - 4) % 2].data_ptr())
        torch.testing.assert_close(a[2:3], b)
        assert a[:2].isnan().all() and a[3:].isnan().all()


@pytest.mark.parametrize("run", [prepare_tokens_reference, pytest.param("kernel", marks=needs_kernels)])
def test_frames_go_into_their_part_of_larger_tensors_alone(run):
    run = module.prepare_tokens_triton if run == "kernel" else run
    (frames, specials, blocks, heads, width), first, total = (2, 5, 3, 2, 16), 1, 4
    arguments, _ = arguments_of((frames, specials, blocks, heads, width), 2, True)

    def room(*shape):
        return torch.full(shape, torch.nan, device=DEVICE).transpose(1, 2)

    length = specials + 16 * blocks
    q = room(total, length, heads, width)  # token by token
    whole = [q, *room(2, heads, total, length, width), *room(3, heads, total, blocks, width)]
    out = run(*arguments, out=tuple(x[first : first + frames] for x in whole))
    for x, part, expected in zip(whole, out, prepare_tokens_reference(*arguments)):
        assert part.data_ptr() == x[first].data_ptr() and part.stride() == x.stride()
        torch.testing.assert_close(x[first : first + frames], expected)
        assert x[:first].isnan().all() and x[first + frames :].isnan().all()


def test_wrong_shapes_are_named():
    arguments = case(1, 2, 2, 1, 16)
    with pytest.raises(ValueError, match="qkv"):
        prepare_tokens(arguments[0][:, :-1], *arguments[1:])
    with pytest.raises(ValueError, match="rotary"):
        prepare_tokens(*arguments[:5], arguments[3], *arguments[6:])
    with pytest.raises(ValueError, match="rotary"):
        normalise_and_rotate(*arguments[:4], arguments[4][:, 1:])
    with pytest.raises(ValueError, match="slot"):
        prepare_tokens(torch.cat([arguments[0]] * 2), *arguments[1:], module.Slot(*torch.zeros(3)))
    with pytest.raises(ValueError, match="norms"):
        normalise_and_rotate(*arguments[:2], arguments[2][1:], *arguments[3:5])
