"""The last stage of a backbone: heads that read each view by itself, of all views together or a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor

from speed3r_ros.model.backbones.blocks import by_frames
from speed3r_ros.model.backbones.results import Reconstruction


def per_view(values: Tensor, views: int) -> Tensor:
    """Values of B sequences (B,) -> the same for each of their views, (B * N,)."""
    return values[:, None].expand(-1, views).flatten()


@dataclass(frozen=True)
class Heads:
    """Heads that have not run yet, and what they read, once the views have met.

    tokens: (F, ...) each, of F = B * N frames. read: chunks of them (f, ...) -> outputs (f, ...). assemble: outputs with any
    leading axes -> geometry with the same. views: N. chunk: frames that `read` takes at a time. raw: outputs of whole
    sequences, (B, ...).
    """

    tokens: tuple[Tensor, ...]
    read: Callable[..., tuple[Tensor, ...]]
    assemble: Callable[..., Reconstruction]
    views: int
    chunk: int
    raw: dict[str, Tensor] = field(default_factory=dict)

    def whole(self) -> Reconstruction:
        """The geometry of all views, (B, N, ...)."""
        outputs = by_frames(self.read, self.chunk, *self.tokens)
        out = self.assemble(*(x.unflatten(0, (-1, self.views)) for x in outputs))
        return replace(out, raw=out.raw | self.raw)

    def parts(self) -> Iterator[Reconstruction]:
        """The same without the axis B, (f, ...), a chunk of frames at a time in their order, so that maps of all views
        need not be in memory at once."""
        for tokens in zip(*(x.split(self.chunk) for x in self.tokens)):
            yield self.assemble(*self.read(*tokens))
