"""One streaming step as a CUDA graph: captured once for each memory, replayed for every frame."""

from __future__ import annotations

import torch
from torch import Tensor

from speed3r_ros.model.memory import Memory
from speed3r_ros.model.network import Prediction
from speed3r_ros.model.streaming import StreamingNetwork


class GraphedStep:
    """A network's `step` on a fixed memory, replayed. Launching hundreds of small kernels takes longer than running them.

    The memory is cleared by the capture. Raises RuntimeError when the capture fails.
    """

    def __init__(self, network: StreamingNetwork, memory: Memory, attention: str, top_k: int) -> None:
        device = memory.fine.device
        self._image = torch.zeros(3, *network.input_size, device=device)
        self._rays = torch.zeros(2, *network.input_size, device=device)
        self._known = torch.zeros(1, dtype=torch.bool, device=device)

        def step() -> Prediction:
            return network.step(self._image, memory, self._rays, attention, top_k, self._known)

        memory.admit()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # libraries choose their algorithms outside the capture
            for _ in range(3):
                step()
        torch.cuda.current_stream(device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = step()
        memory.clear()

    def __call__(self, image: Tensor, rays: Tensor | None) -> Prediction:
        """The prediction for image (3, H, W) and rays (2, H, W) or None; overwritten by the next call."""
        self._image.copy_(image)
        if rays is not None:
            self._rays.copy_(rays)
        self._known.fill_(rays is not None)
        self._graph.replay()
        return self._out
