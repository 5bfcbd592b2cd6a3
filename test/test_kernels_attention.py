"""Attention kernels against float64 definitions that know nothing of tiles, on fresh random inputs of awkward sizes.

Without a GPU they run through Triton's interpreter, which has no bfloat16 products; float16 stands in there.
"""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speed3r_ros.kernels import coarse as coarse_module
from speed3r_ros.kernels import frames as frames_module
from speed3r_ros.kernels import selected as selected_module
from speed3r_ros.kernels.coarse import coarse_attention, coarse_attention_reference
from speed3r_ros.kernels.frames import Visible, frame_attention, frame_attention_reference
from speed3r_ros.kernels.gathered import on_gathered
from speed3r_ros.kernels.selected import selected_attention, selected_attention_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(
    frames_module.triton is None or (DEVICE == "cpu" and not INTERPRETED),
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


def softmax_attention(q, k, v, mask):
    """(R, D), (J, D), (J, D), (R, J) bool in float64; rows that see nothing get zeros."""
    out = torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    for r in range(len(q)):
        j = mask[r].nonzero().flatten()
        if len(j):
            out[r] = (k[j] @ q[r] / q.shape[1] ** 0.5).softmax(0) @ v[j]
    return out


# -------------------------------------------------------------------------------------------------------------- frames


def frames_case(b, t, x, n, y, d, dtype=torch.float32, heads=2):
    q, k, v = draw(b, heads, t, x, d, dtype=dtype), *(draw(b, heads, n, y, d, dtype=dtype) for _ in range(2))
    visible = torch.rand(b, t, n, device=DEVICE) < 0.6
    unseen = ~visible.any(1)
    for i in range(b):
        k[i, :, unseen[i]] = torch.nan
        v[i, :, unseen[i]] = torch.inf
    return q, k, v, Visible(visible)


def frames_by_rows(q, k, v, visible):
    visible = visible.table
    (b, h, t, x, d), y = q.shape, k.shape[3]
    q, k, v = (z.double().cpu().flatten(2, 3) for z in (q, k, v))
    mask = visible.cpu().repeat_interleave(x, 1).repeat_interleave(y, 2)
    rows = [softmax_attention(q[i, j], k[i, j], v[i, j], mask[i]) for i in range(b) for j in range(h)]
    return torch.stack(rows).view(b, h, t, x, d)


@pytest.mark.parametrize("b, t, x, n, y", [(1, 3, 5, 4, 7), (2, 1, 3, 5, 9), (1, 1, 1, 1, 1), (1, 4, 9, 3, 33)])
def test_frames_reference_is_its_definition(b, t, x, n, y):
    q, k, v, visible = frames_case(b, t, x, n, y, 16)
    out, lse = frame_attention_reference(q.double(), k.double(), v.double(), visible)
    assert error(out, frames_by_rows(q, k, v, visible)) < 1e-12
    blind = ~visible.table.any(2)[:, None, :, None].expand_as(lse)
    assert torch.equal(lse == -torch.inf, blind)


@needs_kernels
@pytest.mark.parametrize(
    "b, t, x, n, y, d, splits, dtype",
    [
        (1, 3, 5, 4, 7, 16, 1, torch.float32),
        (2, 1, 3, 5, 9, 32, 3, torch.float32),
        (1, 1, 1, 1, 1, 16, None, torch.float32),
        (1, 2, 40, 3, 33, 16, None, torch.float32),
        (1, 40, 1, 5, 3, 16, None, torch.float32),  # every bit of a word
        (2, 3, 13, 4, 21, 64, 2, torch.float16),
    ],
)
def test_frames_kernel_is_its_definition(b, t, x, n, y, d, splits, dtype):
    q, k, v, visible = frames_case(b, t, x, n, y, d, dtype)
    out, lse = frames_module.frame_attention_triton(q, k, v, visible, splits=splits)
    assert error(out, frames_by_rows(q, k, v, visible)) < TOLERANCE[dtype]
    expected = frame_attention_reference(q.double(), k.double(), v.double(), visible)[1]
    assert torch.equal(lse == -torch.inf, expected == -torch.inf)
    finite = expected > -torch.inf
    assert (lse - expected)[finite].abs().max() < 10 * TOLERANCE[dtype] if finite.any() else True


@needs_kernels
@pytest.mark.parametrize(
    "b, t, x, n, y, d, dtype",
    [
        (1, 3, 5, 4, 7, 16, torch.float32),
        (2, 2, 3, 5, 9, 32, torch.float32),
        (1, 2, 40, 3, 33, 16, torch.float32),
        (2, 3, 13, 4, 21, 32, torch.float16),
    ],
)
def test_frames_gradient_is_the_references(b, t, x, n, y, d, dtype):
    *tokens, visible = frames_case(b, t, x, n, y, d, dtype)
    weight, weight_lse = torch.randn(b, 2, t, x, d, device=DEVICE), torch.randn(b, 2, t, x, device=DEVICE)
    grads = []
    clean = [z.nan_to_num(0, 0, 0).double() for z in tokens]
    for run, drawn in ((frames_module.FrameAttention.apply, tokens), (frame_attention_reference, clean)):
        inputs = [z.detach().requires_grad_() for z in drawn]
        out, lse = run(*inputs, visible)
        loss = (out.double() * weight).sum() + (lse.double().masked_fill(lse == -torch.inf, 0) * weight_lse).sum()
        grads.append(torch.autograd.grad(loss, inputs))
    for out, expected in zip(*grads):
        assert out.dtype == dtype and error(out, expected) < TOLERANCE[dtype]


# -------------------------------------------------------------------------------------------------------------- coarse


def tables(b, t, n, m):
    """Every frame sees one resident frame at least; the second one is seen by nobody."""
    fine = torch.rand(b, t, n, device=DEVICE) < 0.6
    fine[:, :, 0] = True
    fine[:, :, 1:2] = False
    return fine, torch.cat([fine, torch.rand(b, t, m - n, device=DEVICE) < 0.5], 2)


def coarse_case(b, t, n, m, g, d, dtype=torch.float32, heads=2):
    fine, coarse = tables(b, t, n, m)
    q, k, v = draw(b, heads, t * g, d, dtype=dtype), *(draw(b, heads, m * g, d, dtype=dtype) for _ in range(2))
    hidden = ~coarse.any(1).repeat_interleave(g, 1)
    for i in range(b):
        k[i, :, hidden[i]] = torch.nan
        v[i, :, hidden[i]] = torch.nan
    return q, k, v, Visible(coarse), Visible(fine)


def coarse_by_rows(q, k, v, coarse, fine, top_k, group):
    """Attention, and the choice as sorted lists, best first by explicit comparison of (score, number)."""
    coarse, fine = coarse.table, fine.table
    b, h, rows, d = q.shape
    t, n = fine.shape[1:]
    g = rows // t
    q, k, v, fine, coarse = (z.double().cpu() if z.is_floating_point() else z.cpu() for z in (q, k, v, fine, coarse))
    mask = coarse.repeat_interleave(g, 1).repeat_interleave(g, 2)
    groups, keep = -(-g // group), min(top_k, n * g)
    out, index = torch.zeros(b, h, rows, d), torch.full((b, h, t * groups, keep), -1, dtype=torch.int32)
    for i in range(b):
        for j in range(h):
            out[i, j] = softmax_attention(q[i, j], k[i, j], v[i, j], mask[i])
            for row in range(t * groups):
                frame, first = row // groups, row % groups * group
                query = q[i, j, frame * g + first : frame * g + min(first + group, g)].mean(0)
                seen = [a * g + c for a in range(n) if fine[i, frame, a] and coarse[i, frame, a] for c in range(g)]
                best = sorted(sorted(seen, key=lambda a: (-(k[i, j, a] @ query).item(), a))[:keep])
                index[i, j, row, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return out, index


COARSE = [
    (1, 2, 3, 4, 5, 16, 2, 1, torch.float32),  # b, t, n, m, g, d, top_k, group, type
    (2, 1, 2, 2, 1, 16, 7, 1, torch.float32),
    (1, 1, 3, 3, 18, 32, 33, 4, torch.float32),
    (1, 1, 1, 1, 17, 16, 5, 2, torch.float32),
    (1, 1, 4, 9, 3, 64, 3, 1, torch.float16),
    (1, 2, 9, 9, 5, 16, 2, 1, torch.float32),  # fewer blocks than frames
]


@pytest.mark.parametrize("b, t, n, m, g, d, top_k, group, dtype", COARSE)
def test_coarse_reference_is_its_definition(b, t, n, m, g, d, top_k, group, dtype):
    q, k, v, coarse, fine = coarse_case(b, t, n, m, g, d)
    case = q.double(), k.double(), v.double(), coarse, fine
    out, index = coarse_attention_reference(*case, top_k, group)
    expected, best = coarse_by_rows(*case, top_k, group)
    assert error(out, expected) < 1e-6 and torch.equal(index.cpu(), best)


@needs_kernels
@pytest.mark.parametrize("tile", [1, 4, 16])
@pytest.mark.parametrize("b, t, n, m, g, d, top_k, group, dtype", COARSE)
def test_coarse_kernel_is_its_definition(b, t, n, m, g, d, top_k, group, dtype, tile):
    case = coarse_case(b, t, n, m, g, d, dtype)
    out, index = coarse_module.coarse_attention_triton(*case, top_k, group, tile)
    expected, best = coarse_by_rows(*case, top_k, group)
    assert error(out, expected) < TOLERANCE[dtype]
    if group == 1 or dtype == torch.float32:  # a mean of queries is rounded to their type
        assert torch.equal(index.cpu(), best)


@needs_kernels
@pytest.mark.parametrize("group, dtype", [(1, torch.float32), (2, torch.float16)])
def test_coarse_gradient_is_the_references(group, dtype):
    *tokens, coarse, fine = coarse_case(2, 2, 3, 5, 5, 16, dtype)
    weight = torch.randn(tokens[0].shape, device=DEVICE)
    clean = [z.nan_to_num(0, 0, 0).double() for z in tokens]
    grads = []
    for run, drawn in ((coarse_module.CoarseAttention.apply, tokens), (coarse_attention_reference, clean)):
        inputs = [z.detach().requires_grad_() for z in drawn]
        out, index = run(*inputs, coarse, fine, 2, group)
        assert not index.requires_grad
        grads.append(torch.autograd.grad((out.double() * weight).sum(), inputs))
    for out, expected in zip(*grads):
        assert out.dtype == dtype and error(out, expected) < TOLERANCE[dtype]


@needs_kernels
@pytest.mark.parametrize("top_k, tile, frames", [(3, 1, 3), (11, 1, 3), (3, 2, 3), (11, 2, 3), (2, 2, 5)])
def test_of_equal_scores_the_lower_number_wins(top_k, tile, frames):
    q, k, v, coarse, fine = coarse_case(1, 1, frames, frames, 6, 16)
    q.copy_(torch.randint(-3, 4, q.shape))  # small integers: sums are exact, and many are equal
    k.copy_(torch.randint(-1, 2, k.shape)[:, :, torch.randint(3, k.shape[2:3])])
    expected = coarse_by_rows(q, k, v.nan_to_num(), coarse, fine, top_k, 1)[1]
    assert torch.equal(
        coarse_module.coarse_attention_triton(q, k, v.nan_to_num(), coarse, fine, top_k, 1, tile)[1].cpu(), expected
    )
    assert torch.equal(coarse_attention_reference(q, k, v, coarse, fine, top_k)[1].cpu(), expected)


@needs_kernels
@pytest.mark.parametrize("tile, splits", [(1, None), (1, 3), (2, 5), (8, 2)])
@pytest.mark.parametrize(
    "n, m, g, top_k, dtype",
    [
        (40, 44, 5, 4, torch.float32),  # more stored maxima than groups of them
        (1, 1, 7, 32, torch.float32),  # one frame, fewer blocks than asked for
        (1, 6, 3, 2, torch.float16),
        (40, 40, 6, 40, torch.float16),
    ],
)
def test_choice_of_one_new_frame_is_its_definition(n, m, g, top_k, dtype, tile, splits):
    case = coarse_case(1, 1, n, m, g, 16, dtype, heads=1)
    tuning = {"tile": tile, "splits": splits}
    out, index, lse = coarse_module.attend_and_choose(*case, top_k, 1, **tuning)
    exact = [x.double() for x in case[:3]]
    expected, best = coarse_attention_reference(*exact, *case[3:], top_k)
    assert error(out, expected) < TOLERANCE[dtype]
    assert torch.equal(index, best)
    q, k, v = (x.unflatten(2, (-1, g)) for x in exact)
    assert (lse - frame_attention_reference(q, k, v, case[3])[1]).abs().max() < 10 * TOLERANCE[dtype]
    again = coarse_module.attend_and_choose(*case, top_k, 1, **tuning)
    assert all(torch.equal(x, y) for x, y in zip((out, index, lse), again))


@needs_kernels
@pytest.mark.parametrize("top_k, tile, spread", [(5, 1, 1), (5, 1, 30), (150, 1, 2), (5, 2, 1), (17, 4, 30)])
def test_of_many_equal_scores_the_lower_number_wins(top_k, tile, spread):
    q, k, v, coarse, fine = coarse_case(1, 1, 40, 41, 6, 16, heads=1)
    q.copy_(torch.randint(-spread, spread + 1, q.shape))
    k.copy_(torch.randint(-1, 2, k.shape)[:, :, torch.randint(9, k.shape[2:3])])
    v = v.nan_to_num()
    expected = coarse_attention_reference(q, k, v, coarse, fine, top_k)[1]
    assert torch.equal(coarse_module.coarse_attention_triton(q, k, v, coarse, fine, top_k, 1, tile)[1], expected)


@needs_kernels
@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_choice_ends_where_scores_are_no_numbers(tile, bad):
    q, k, v, coarse, fine = coarse_case(1, 1, 2, 2, 5, 16)
    q[:, :, 2] = bad
    index = coarse_module.coarse_attention_triton(q, k, v, coarse, fine, 3, 1, tile)[1].cpu()
    good = [0, 1, 3, 4]
    assert torch.equal(index[:, :, good], coarse_by_rows(q, k, v, coarse, fine, 3, 1)[1][:, :, good])


# ------------------------------------------------------------------------------------------------------------ selected


def selected_case(b, t, n, g, s, d, top_k, group, dtype=torch.float32, share=0.0, heads=2):
    """share: of the frames that are seen, shown whole."""
    length = s + 16 * g
    fine = tables(b, t, n, n)[0]
    shown = fine & (torch.rand(fine.shape, device=DEVICE) < share)
    q = draw(b, heads, t * length, d, dtype=dtype)
    k, v = (draw(b, heads, n * length, d, dtype=dtype) for _ in range(2))
    hidden = ~fine.any(1).repeat_interleave(length, 1)
    for i in range(b):
        k[i, :, hidden[i]] = torch.nan
        v[i, :, hidden[i]] = torch.inf
    compressed = draw(b, heads, t * g, d, dtype=dtype)
    gate = torch.rand(b, t * length, heads, 2, device=DEVICE).to(dtype).transpose(1, 2)
    index = torch.full((b, heads, t * -(-g // group), min(top_k, n * g)), -1, dtype=torch.int32, device=DEVICE)
    for i in range(b):
        for j in range(heads):
            for row in range(index.shape[2]):
                seen = (fine & ~shown)[i, row // -(-g // group)].repeat_interleave(g).nonzero().flatten()
                best = seen[torch.randperm(len(seen), device=DEVICE)][: index.shape[-1]].sort().values
                index[i, j, row, : len(best)] = best
    return q, k, v, index, compressed, gate, Visible(fine), s, group, Visible(shown) if share else None


def selected_by_rows(q, k, v, index, compressed, gate, fine, s, group, shown):
    fine = fine.table
    (b, h, rows, d), (t, n) = q.shape, fine.shape[1:]
    length = rows // t
    g = (length - s) // 16
    q, k, v, compressed, gate = (z.double().cpu() for z in (q, k, v, compressed, gate))
    fine, index, out = fine.cpu(), index.cpu(), torch.zeros(b, h, rows, d, dtype=torch.float64)
    for i in range(b):
        for j in range(h):
            mask = torch.zeros(rows, n * length, dtype=torch.bool)
            for row in range(rows):
                frame, token = row // length, row % length
                for a in fine[i, frame].nonzero().flatten().tolist():
                    whole = token < s or shown is not None and shown.table[i, frame, a]
                    mask[row, a * length : a * length + (length if whole else s)] = True
                if token >= s:
                    for block in index[i, j, frame * -(-g // group) + (token - s) // 16 // group].tolist():
                        if block >= 0:
                            first = block // g * length + s + block % g * 16
                            mask[row, first : first + 16] = True
            out[i, j] = softmax_attention(q[i, j], k[i, j], v[i, j], mask)
            for row in range(rows):
                frame, token = row // length, row % length
                if token >= s:
                    coarse = compressed[i, j, frame * g + (token - s) // 16]
                    out[i, j, row] = gate[i, j, row, 0] * coarse + gate[i, j, row, 1] * out[i, j, row]
    return out


SELECTED = [
    (1, 2, 3, 2, 3, 16, 2, 1, torch.float32, 0),  # b, t, n, g, s, d, top_k, group, type, share
    (2, 1, 2, 1, 1, 16, 9, 1, torch.float32, 0),
    (1, 1, 1, 5, 0, 32, 3, 2, torch.float32, 0),
    (1, 1, 3, 3, 2, 64, 7, 4, torch.float16, 0),
    (2, 1, 3, 3, 2, 16, 2, 2, torch.float32, 0.5),
    (1, 1, 4, 3, 1, 16, 3, 1, torch.float16, 0.5),
    (1, 2, 3, 2, 0, 32, 5, 1, torch.float32, 1),
]
selected_cases = pytest.mark.parametrize("case", SELECTED, ids=lambda case: "-".join(map(str, case)))


@selected_cases
def test_selected_reference_is_its_definition(case):
    drawn = selected_case(*case[:-2], share=case[-1])
    double = [z.double() if torch.is_tensor(z) and z.is_floating_point() else z for z in drawn]
    assert error(selected_attention_reference(*double), selected_by_rows(*drawn)) < 1e-12


@needs_kernels
@pytest.mark.parametrize("passed_on", [False, True])
@selected_cases
def test_selected_kernel_is_its_definition(case, passed_on):
    drawn = selected_case(*case)
    out = selected_module.selected_attention_triton(*drawn, passed_on=passed_on)
    assert error(out, selected_by_rows(*drawn)) < TOLERANCE[case[-2]]
    assert out.transpose(1, 2).is_contiguous()


@needs_kernels
def test_heads_that_take_turns_give_the_same(monkeypatch):
    case = selected_case(1, 2, 3, 2, 1, 16, 2, 1, share=0.5)
    expected = selected_module.selected_attention_triton(*case, passed_on=True)
    monkeypatch.setattr(selected_module, "WORKSPACE", 1)
    assert torch.equal(selected_module.selected_attention_triton(*case, passed_on=True), expected)


@pytest.mark.parametrize("on_triton", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize("t, n, g, s, group, share", [(3, 3, 2, 5, 1, 0.5), (4, 4, 3, 0, 2, 0), (1, 2, 2, 1, 1, 0)])
@pytest.mark.parametrize("sequences", [1, 2])
def test_selected_attention_may_be_written_over_its_queries(
    monkeypatch, sequences, t, n, g, s, group, share, on_triton
):
    monkeypatch.setattr(selected_module, "on_kernels", lambda _: on_triton)
    monkeypatch.setattr(selected_module, "WORKSPACE", 1)  # heads take turns
    case = selected_case(sequences, t, n, g, s, 16, 2, group, share=share)
    case[6].table[:, :, 0] = True  # for a single sequence on a CPU, each frame sees one
    q, k, v = (x.nan_to_num(0, 0, 0) for x in case[:3])
    expected = selected_by_rows(q, k, v, *case[3:])
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # token by token
    out = selected_attention(q, k, v, *case[3:], out=q)
    assert out.data_ptr() == q.data_ptr() and torch.equal(out, q)
    assert error(out, expected) < TOLERANCE[torch.float32]


def test_selected_attention_that_is_differentiated_is_written_over_nothing():
    q, *case = selected_case(1, 2, 2, 1, 1, 16, 2, 1)
    with pytest.raises(ValueError, match="gradients are recorded"):
        selected_attention(q.requires_grad_(), *case, out=q)


@needs_kernels
@pytest.mark.parametrize(
    "t, n, g, s, top_k, share", [(1, 5, 3, 5, 4, 0), (1, 1, 2, 5, 9, 1), (2, 3, 2, 1, 3, 0.5), (1, 4, 2, 0, 3, 0)]
)
def test_selected_attention_begun_before_the_choice_is_its_definition(t, n, g, s, top_k, share):
    case = selected_case(1, t, n, g, s, 16, top_k, 1, share=share)
    q, k, v, *_, fine, specials, _, _ = case
    begun = selected_module.begin(q, k, v, fine, specials)
    assert (begun.passed_on is not None) == (t == 1 and s > 0)
    out = selected_attention(*case, begun=begun)
    assert error(out, selected_by_rows(*case)) < TOLERANCE[torch.float32]
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize("t, n, g, s, top_k, group", [(1, 4, 3, 2, 3, 1), (3, 3, 2, 4, 5, 1), (4, 6, 5, 0, 2, 2)])
def test_selected_attention_of_copies_is_its_definition(t, n, g, s, top_k, group, share):
    """What a CPU runs where no gradient is asked for."""
    case = selected_case(1, t, n, g, s, 16, top_k, group, share=share)
    case[6].table[0, :, 0] = True  # each frame sees one
    case = [x.nan_to_num(0, 0, 0) if torch.is_tensor(x) and x.is_floating_point() else x for x in case]
    case = [
        x.cpu() if torch.is_tensor(x) else x if isinstance(x, int) or x is None else Visible(x.table.cpu())
        for x in case
    ]
    assert on_gathered(case[0], case[6])
    assert error(selected_attention(*case), selected_by_rows(*case)) < TOLERANCE[torch.float32]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that operations make."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@torch.no_grad()
def test_memory_on_a_cpu_grows_no_faster_than_the_frames():
    largest = {}
    for frames in (8, 16):
        q, k, v = torch.randn(3, 1, 2, frames * (1 + 16 * 6), 16)
        pooled, every = torch.randn(3, 1, 2, frames * 6, 16), Visible(torch.ones(1, frames, frames, dtype=torch.bool))
        with Largest() as seen:
            compressed, index = coarse_attention(*pooled, every, every, 4)
            selected_attention(q, k, v, index, compressed, torch.rand(*q.shape[:3], 2), every, 1)
        largest[frames] = seen.elements
    assert largest[16] <= 2 * largest[8]


@needs_kernels
@selected_cases
def test_selected_gradient_is_the_references(case):
    q, k, v, index, compressed, gate, *rest = selected_case(*case)
    tokens = [q, k, v, compressed, gate]
    weight = torch.randn(q.shape, device=DEVICE)
    clean = [z.nan_to_num(0, 0, 0).double() for z in tokens]
    grads = []
    for run, drawn in ((selected_module.SelectedAttention.apply, tokens), (selected_attention_reference, clean)):
        inputs = [z.detach().requires_grad_() for z in drawn]
        out = run(*inputs[:3], index, *inputs[3:], *rest)
        grads.append(torch.autograd.grad((out.double() * weight).sum(), inputs))
    for out, expected in zip(*grads):
        assert out.dtype == case[-2] and error(out, expected) < TOLERANCE[case[-2]]


@needs_kernels
def test_gates_alone_get_their_gradient_from_one_new_frame(monkeypatch):
    monkeypatch.setattr(selected_module, "on_kernels", lambda _: True)
    q, k, v, index, compressed, gate, *rest = selected_case(1, 1, 3, 2, 3, 16, 2, 1)
    begun = selected_module.begin_selected(q, k, v, *rest[:2])
    assert begun is not None
    grads = []
    for run, options in ((selected_attention, {"begun": begun}), (selected_attention_reference, {})):
        inputs = [compressed.detach().requires_grad_(), gate.detach().requires_grad_()]
        out = run(q, k, v, index, *inputs, *rest, **options)
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
    for a, b in zip(*grads):
        assert error(a, b) < TOLERANCE[torch.float32]


# --------------------------------------------------------------------------------------------------------------- whole


def test_wrong_shapes_are_named():
    q, k = torch.randn(1, 2, 3, 5, 16), torch.randn(1, 2, 4, 5, 16)
    with pytest.raises(ValueError, match="three axes"):
        Visible(torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="visible"):
        frame_attention(q, k, k, Visible(torch.ones(1, 3, 5, dtype=torch.bool)))
    with pytest.raises(ValueError, match="fit"):
        frame_attention(q, k, k[..., :8], Visible(torch.ones(1, 3, 4, dtype=torch.bool)))
    case = selected_case(1, 1, 2, 2, 1, 16, 2, 1)
    with pytest.raises(ValueError, match="gate"):
        selected_attention(*case[:5], case[5][:, :1], *case[6:])
    with pytest.raises(ValueError, match=r"shown has shape \(1, 1, 3\), expected fine's \(1, 1, 2\)"):
        selected_attention(*case[:-1], Visible(torch.ones(1, 1, 3, dtype=torch.bool, device=DEVICE)))
    with pytest.raises(ValueError, match="top_k"):
        coarse_attention(*coarse_case(1, 1, 2, 2, 2, 16), 0)
