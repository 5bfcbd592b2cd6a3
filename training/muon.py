"""Muon: matrices move along their momentum with all singular values brought near 1 (Jordan et al., 2024).

Updates have the size of AdamW's, so that both share a learning rate (Liu et al., "Muon is scalable for LLM training", 2025,
section 2.2). `torch.optim.Muon` does the same for one matrix after the other, and cannot skip a step on the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic iteration
ITERATIONS = 5
ADAMW_SIZE = 0.2  # root mean square of AdamW's updates, in learning rates


def orthogonalise(x: Tensor) -> Tensor:
    """Matrices (N, A, B), A <= B -> with singular values of about 0.7 to 1.2, by Newton-Schulz; in bf16 on a GPU."""
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def as_matrices(x: Tensor) -> Tensor:
    """A parameter (A, B) as what is orthogonalised (N, a, b), a <= b: queries, keys and values apart where A = 3 B."""
    rows, columns = x.shape
    if rows == 3 * columns:
        return x.unflatten(0, (3, columns))
    return (x.mT if rows > columns else x)[None]


def as_parameter(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `as_matrices`, a view."""
    if len(x) > 1:
        return x.flatten(0, 1)
    return x[0] if x[0].shape == shape else x[0].mT


class Muon(torch.optim.Optimizer):
    """Muon for matrices (A, B), those of one shape at once; all must have gradients.

    found_inf: like that of `torch.optim.AdamW(fused=True)`, a tensor: where it is 1, a step changes nothing.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        (self.group,) = self.param_groups
        alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for p in self.group["params"]:
            alike[as_matrices(p).shape[1:]].append(p)
        self.stacks: list[tuple[list[nn.Parameter], Tensor]] = []  # parameters and their momentum
        for found in alike.values():
            momenta = torch.cat([torch.zeros_like(as_matrices(p)) for p in found])
            self.stacks.append((found, momenta))
            for p, x in zip(found, self._apart(found, momenta)):
                self.state[p]["exp_avg"] = x

    @staticmethod
    def _apart(parameters: list[nn.Parameter], stack: Tensor) -> list[Tensor]:
        """Views (A, B) of a stack of matrices, of each parameter."""
        parts = stack.split([len(as_matrices(p)) for p in parameters])
        return [as_parameter(x, p.shape) for p, x in zip(parameters, parts)]

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters."""
        lr, decay, beta = (self.group[name] for name in ("lr", "weight_decay", "momentum"))
        for parameters, momenta in self.stacks:
            gradient = torch.cat([as_matrices(p.grad) for p in parameters])
            keep = gradient.new_ones(()) if self.found_inf is None else 1 - self.found_inf
            gradient = torch.where(keep > 0, gradient, 0.0)
            momenta.lerp_(gradient, (1 - beta) * keep)
            update = orthogonalise(gradient.lerp(momenta, beta)).float()
            update *= ADAMW_SIZE * max(update.shape[1:]) ** 0.5
            update += decay * torch.cat([as_matrices(p) for p in parameters])
            torch._foreach_sub_(parameters, self._apart(parameters, update.mul_(lr * keep)))
