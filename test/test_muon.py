"""The optimiser of the blocks' matrices, against torch's and against singular values."""

import pytest
import torch
from torch import nn

from speed3r_ros.training.muon import Muon, orthogonalise

SHAPES = (8, 8), (24, 8), (32, 8), (8, 32), (8, 8), (24, 8)


def test_orthogonalised_matrices_keep_their_singular_vectors():
    x = torch.randn(5, 16, 40, dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonalise(x) @ v.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.3 and values.max() < 1.3
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-9


def test_it_is_torchs_muon_of_each_matrix():
    """Queries, keys and values are three matrices to it; torch's, which computes in bfloat16, gets them apart."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    start = [p.detach().clone() for p in parameters]
    apart = [[nn.Parameter(x.clone()) for x in (p.split(8) if p.shape == (24, 8) else [p])] for p in start]
    settings = dict(lr=0.03, weight_decay=0.2, momentum=0.9)
    ours = Muon(parameters, **settings)
    theirs = torch.optim.Muon([x for parts in apart for x in parts], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(3):
        for p, parts in zip(parameters, apart):
            p.grad = torch.randn_like(p) * float(torch.rand(()) + 0.1)
            for x, g in zip(parts, p.grad.split(8) if len(parts) > 1 else [p.grad]):
                x.grad = g.clone()
        ours.step()
        theirs.step()
    for p, parts, before in zip(parameters, apart, start):
        moved = (p - before).norm()
        assert moved > 0.1 and (p - torch.cat(parts)).norm() < 0.03 * moved, p.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_change_nothing(bad):
    p = nn.Parameter(torch.randn(8, 16))
    muon = Muon([p], lr=0.1, weight_decay=0.1)
    p.grad = torch.randn(8, 16)
    muon.found_inf = torch.zeros(())
    before = p.detach().clone()
    muon.step()
    assert not torch.equal(p, before)
    before, momentum = p.detach().clone(), muon.state[p]["exp_avg"].clone()
    p.grad[0, 0] = bad
    muon.found_inf = torch.ones(())
    muon.step()
    assert torch.equal(p, before) and torch.equal(muon.state[p]["exp_avg"], momentum)
