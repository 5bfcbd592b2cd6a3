"""Token merging and pruning against definitions by loops in float64, on fresh random inputs of awkward sizes."""

import os

import pytest
import torch

from speed3r_ros.kernels import merging
from speed3r_ros.kernels.frames import Visible, frame_attention, triton
from speed3r_ros.kernels.merging import (
    kept_tokens,
    match_tokens,
    match_tokens_reference,
    merge_tokens,
    merge_tokens_reference,
    merged_length,
    take_tokens,
    take_tokens_reference,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(
    triton is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1 before the start",
)
SMALL = {"BM": 16, "BN": 16, "BC": 16, "num_warps": 4, "num_stages": 2}


@pytest.fixture(autouse=True)
def seed():
    value = int(torch.randint(2**31, ()))
    torch.manual_seed(value)
    print("seed", value)


def draw(*shape, dtype=torch.float32):
    """Random values as an inner part of a larger buffer full of NaN."""
    buffer = torch.full((shape[0], shape[1] + 1, *shape[2:]), torch.nan, dtype=dtype, device=DEVICE)
    buffer[:, 1:] = torch.randn(shape, device=DEVICE).to(dtype)
    return buffer[:, 1:]


def rows_by_loops(x, frames, specials, ratio, group):
    x = x.double().cpu()
    length = x.shape[1] // frames
    patches, cells = length - specials, -(-(length - specials) // ratio)
    rows = torch.full(x.shape[:2], -1, dtype=torch.int32)
    for b in range(len(x)):
        for first in range(0, frames, group):
            destinations, others = [], []
            for t in range(first, min(first + group, frames)):
                for s in range(specials):
                    rows[b, t * length + s] = t * (specials + cells) + s
                for p in range(patches):
                    token, cell = t * length + specials + p, p // ratio
                    size = min(ratio, patches - cell * ratio)
                    if p % ratio == t % size:
                        rows[b, token] = t * (specials + cells) + specials + cell
                        destinations.append(token)
                    else:
                        others.append(token)
            for token in others:
                best, score = None, -torch.inf
                for other in destinations:
                    norm = x[b, other].norm().item()
                    cosine = (x[b, token] @ x[b, other]).item() / norm if norm else 0.0
                    if cosine > score:
                        best, score = other, cosine
                rows[b, token] = rows[b, best]
    return rows


CASES = [
    (1, 5, 2, 7, 3, 2, 20),  # b, frames, specials, patches, ratio, group, channels
    (2, 3, 0, 9, 2, 20, 16),  # the group is larger than the sequence
    (1, 1, 1, 1, 4, 20, 16),  # one patch
    (1, 4, 1, 6, 1, 2, 16),  # nothing to merge
    (1, 2, 1, 5, 7, 1, 33),  # one destination per frame
    (1, 7, 1, 13, 4, 3, 70),
]


@pytest.mark.parametrize("b, frames, specials, patches, ratio, group, channels", CASES)
def test_match_reference_is_its_definition(b, frames, specials, patches, ratio, group, channels):
    x = draw(b, frames * (specials + patches), channels)
    rows = match_tokens_reference(x.double(), frames, specials, ratio, group)
    assert torch.equal(rows.cpu(), rows_by_loops(x, frames, specials, ratio, group))


@needs_kernels
@pytest.mark.parametrize("sizes", [None, SMALL], ids=["default", "small"])
@pytest.mark.parametrize("b, frames, specials, patches, ratio, group, channels", CASES)
def test_match_kernel_is_its_definition(b, frames, specials, patches, ratio, group, channels, sizes):
    x = draw(b, frames * (specials + patches), channels)
    rows = merging.match_tokens_triton(x, frames, specials, ratio, group, sizes)
    assert torch.equal(rows.cpu(), rows_by_loops(x, frames, specials, ratio, group))


@needs_kernels
def test_match_kernel_in_16_bits():
    x = draw(1, 4 * 12, 64, dtype=torch.float16)
    assert torch.equal(merging.match_tokens_triton(x, 4, 2, 3, 4).cpu(), rows_by_loops(x, 4, 2, 3, 4))


@needs_kernels
@pytest.mark.parametrize("channels, sizes", [(16, None), (40, SMALL)])
def test_of_equally_similar_destinations_the_first_wins(channels, sizes):
    x = torch.where(torch.rand(1, 3 * 20, channels, device=DEVICE) < 0.5, -1.0, 1.0)  # equal norms: exact ties
    x = x[:, torch.randint(4, (x.shape[1],), device=DEVICE)]
    x[:, 7:9] = 0
    expected = rows_by_loops(x, 3, 2, 3, 3)
    assert torch.equal(merging.match_tokens_triton(x, 3, 2, 3, 3, sizes).cpu(), expected)
    assert torch.equal(match_tokens_reference(x, 3, 2, 3, 3).cpu(), expected)


MERGES = [
    (1, 3, 20, 7, 16, torch.float32),  # b, heads, tokens, rows, width, type
    (2, 1, 33, 5, 64, torch.float32),
    (1, 1, 1, 1, 16, torch.float32),
    (1, 17, 12, 30, 64, torch.float32),  # rows without tokens; more than one part of columns
    (1, 2, 40, 3, 32, torch.float16),
]


def means_by_loops(x, rows, count):
    x, rows = x.double().cpu(), rows.cpu()
    out = torch.zeros(*x.shape[:2], count, x.shape[3], dtype=torch.float64)
    for b in range(len(x)):
        for row in range(count):
            members = (rows[b] == row).nonzero().flatten()
            if len(members):
                out[b, :, row] = x[b, :, members].mean(1)
    return out


@pytest.mark.parametrize("b, heads, tokens, rows, width, dtype", MERGES)
def test_merge_reference_is_its_definition(b, heads, tokens, rows, width, dtype):
    x = draw(b, heads, tokens, width)
    table = torch.randint(rows, (b, tokens), dtype=torch.int32, device=DEVICE)
    expected = means_by_loops(x, table, rows)
    torch.testing.assert_close(merge_tokens_reference(x.double(), table, rows).cpu(), expected, rtol=1e-12, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize("b, heads, tokens, rows, width, dtype", MERGES)
def test_merge_kernel_is_its_definition(b, heads, tokens, rows, width, dtype):
    x = draw(b, heads, tokens, width, dtype=dtype)
    table = torch.randint(rows, (b, tokens), dtype=torch.int32, device=DEVICE)
    out = merging.merge_tokens_triton(x, table, rows)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(out.double().cpu(), means_by_loops(x, table, rows), rtol=tolerance, atol=tolerance)
    assert out.transpose(1, 2).is_contiguous()


@needs_kernels
@pytest.mark.parametrize("b, heads, tokens, rows, width, dtype", MERGES)
def test_take_kernel_copies(b, heads, tokens, rows, width, dtype):
    x = draw(b, heads, tokens, width, dtype=dtype)
    for batch in {1, b}:
        index = torch.randint(tokens, (batch, rows), dtype=torch.int32, device=DEVICE)
        out = merging.take_tokens_triton(x, index)
        expected = torch.stack([x[i][:, index[i % batch].long()] for i in range(b)])
        assert torch.equal(out, expected)
        assert torch.equal(take_tokens_reference(x, index), expected)
        assert out.transpose(1, 2).is_contiguous()


def test_nothing_is_lost_between_merging_and_unmerging():
    """Tokens alike within a row come back as they were, and every token is part of some row's output."""
    frames, specials, patches, ratio, heads, width = 4, 2, 10, 4, 2, 16
    length, kept = specials + patches, merged_length(specials + patches, specials, ratio)
    rows = match_tokens(torch.randn(1, frames * length, 32), frames, specials, ratio, 2)
    assert torch.equal(rows.unique(), torch.arange(frames * kept, dtype=torch.int32))
    values = torch.randn(1, heads, frames * kept, width, dtype=torch.float64)
    full = take_tokens(values, rows)
    torch.testing.assert_close(merge_tokens(full, rows, frames * kept), values)


def test_with_ratio_one_merged_attention_is_dense_attention():
    frames, length, specials = 3, 7, 2
    q, k, v = (torch.randn(1, 2, frames * length, 16, dtype=torch.float64) for _ in range(3))
    visible = torch.ones(1, frames, frames, dtype=torch.bool)

    def attend(q, k, v):
        return frame_attention(*(x.unflatten(2, (frames, -1)) for x in (q, k, v)), Visible(visible))[0].flatten(2, 3)

    rows = match_tokens(torch.randn(1, frames * length, 8), frames, specials, 1)
    out = take_tokens(attend(merge_tokens(q, rows, frames * length), k, v), rows)
    torch.testing.assert_close(out, attend(q, k, v))


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("frames, length, specials, stride", [(1, 5, 2, 3), (9, 7, 1, 4), (8, 3, 0, 1), (3, 2, 2, 2)])
def test_kept_tokens_are_their_definition(frames, length, specials, stride, stagger):
    expected = []
    for t in range(frames):
        for token in range(length):
            if t == 0 or token < specials or (((token - specials) - t) % stride if stagger else t % stride) == 0:
                expected.append(t * length + token)
    assert kept_tokens(frames, length, specials, stride, stagger).tolist() == [expected]


def test_wrong_arguments_are_named():
    x = torch.randn(1, 12, 8)
    with pytest.raises(ValueError, match="5"):
        match_tokens(x, 5, 1, 2)
    with pytest.raises(ValueError, match="special"):
        match_tokens(x, 3, 4, 2)
    with pytest.raises(ValueError, match="ratio"):
        match_tokens(x, 3, 1, 0)
    with pytest.raises(ValueError, match="rows"):
        merge_tokens(torch.randn(1, 2, 12, 16), torch.zeros(1, 11, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="index"):
        take_tokens(torch.randn(2, 2, 12, 16), torch.zeros(3, 11, dtype=torch.int32))
    with pytest.raises(ValueError, match="stride"):
        kept_tokens(3, 4, 1, 0)
