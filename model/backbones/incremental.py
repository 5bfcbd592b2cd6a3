"""Published backbones as streams: a frame is computed once, against the memory, without any training for it.

Blocks inside frames and heads run on the new frame alone. A block across views puts the frame's keys and values into the
memory, where they stay as they are, and its queries attend to what the memory grants: what the backbone's own `forward`
computes under the same `Sight`. Backbones that learnt to see all views at once lose some quality so (docs/backbones.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speed3r_ros.kernels.qkv import BLOCK
from speed3r_ros.model.attention import Layer, Strategy
from speed3r_ros.model.backbones.blocks import MultiView, patch_grid
from speed3r_ros.model.backbones.results import invert
from speed3r_ros.model.memory import Memory
from speed3r_ros.model.network import Prediction, compute_dtype
from speed3r_ros.model.strategies import strategy_for

SIGMA_T, SIGMA_R = 0.05, 0.02  # assumed, times the median depth and in rad: no backbone predicts the error of its poses


class Incremental(nn.Module):
    """A backbone behind the interface of `streaming.StreamingNetwork`.

    size: (h, w) of the frames. ValueError with one line where it does not fit.
    """

    capturable = True

    def __init__(self, backbone: MultiView, size: tuple[int, int]) -> None:
        super().__init__()
        self.backbone, self.input_size = backbone, size
        self.grid = patch_grid(*backbone.working_size(*size))

    def precision(self, dtype: torch.dtype | str) -> Incremental:
        """Run the backbone's matrix products in `dtype`: see its `precision`."""
        self.backbone.precision(dtype)
        return self

    def new_memory(self, window: int, anchors: int, bank: int, attention: str | Strategy) -> Memory:
        """A memory for `step` with this attention, in the type of the matrix products."""
        blocks, patches = self.backbone.across_views, self.grid[0] * self.grid[1]
        first, strategy, sensitive = blocks[0].attn, strategy_for(attention), self.backbone.sensitive
        return Memory(
            len(blocks),
            first.heads,
            self.backbone.specials + patches,
            patches // BLOCK if strategy.in_blocks else 0,
            first.proj.out_features // first.heads,
            window,
            anchors,
            bank,
            compute_dtype(first.qkv),
            first.proj.weight.device,
            {"origin": (4, 4), **self.backbone.state(window + anchors + 1)},
            strategy.parts(self.backbone.specials, [Layer(i, i in sensitive) for i in range(len(blocks))]),
        )

    def step(
        self,
        image: Tensor,
        memory: Memory,
        rays: Tensor | None = None,
        attention: str | Strategy = "dense",
        top_k: int = 32,
        known: Tensor | None = None,
    ) -> Prediction:
        """One new frame (3, H, W) in [0, 1] against the memory. Arguments: see `Network.step`.

        Poses are relative to the segment's first frame. With known intrinsics, points keep their depth and lie on the rays.
        """
        if rays is not None and known is None:
            known = torch.ones(1, dtype=torch.bool, device=image.device)
        out = self.backbone.step(image, memory, rays, known, attention, top_k)
        origin = memory.of_first("origin", out.T_world_cam[0, 0])
        T = invert(origin) @ out.T_world_cam
        points, depth = out.points.movedim(-1, 2), out.depth.unsqueeze(2)
        if rays is not None:
            points = torch.where(known, torch.cat([rays * depth, depth], 2), points)
        median = out.depth.flatten(2).median(-1).values
        log_sigma = torch.stack([SIGMA_T * median, torch.full_like(median, SIGMA_R)], -1).log()
        return Prediction(points, out.confidence.logit(), T[..., :3, :3], T[..., :3, 3], log_sigma)
