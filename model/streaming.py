"""What the engine drives: networks that take one frame at a time, made by name."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor, nn

from speed3r_ros.model import weights
from speed3r_ros.model.backbones.incremental import Incremental
from speed3r_ros.model.backbones.registry import load_backbone
from speed3r_ros.model.backbones.windowed import Windowed
from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.lite3r import has_linear_branch
from speed3r_ros.model.memory import Memory
from speed3r_ros.model.network import Prediction

BACKBONE_SIZE = 392, 504  # default (h, w): whole blocks of 56 pixels, about the resolution of their papers
ADAPTERS = {"incremental": Incremental, "windowed": Windowed}  # how backbones stream


class StreamingNetwork(Protocol):
    """A module (`torch.nn.Module`) that the engine can step through a stream.

    capturable: one CUDA graph can hold every step: fixed shapes, no synchronisation with the host.
    """

    capturable: bool

    @property
    def input_size(self) -> tuple[int, int]:
        """(h, w) of the images."""

    def precision(self, dtype: torch.dtype | str) -> StreamingNetwork:
        """Run matrix products in `dtype`, or in "fp8", from now on; itself."""

    def new_memory(self, window: int, anchors: int, bank: int, attention: str) -> Memory:
        """A memory for `step` with this attention. It lies where the weights lie, in the type of the products."""

    def step(
        self, image: Tensor, memory: Memory, rays: Tensor | None, attention: str, top_k: int, known: Tensor | None
    ) -> Prediction:
        """One new frame (3, H, W) in [0, 1], for which `memory.admit` has made room. Batch and frame axes of the result are 1.

        rays: (2, H, W), x/z and y/z of each pixel, valid where known: (1,) bool is True (None = True), or None when
        intrinsics are unknown. What it remembers lies in the memory. Poses are in the gauge of the memory's segment.
        """


def load_trained(config: EngineConfig) -> nn.Module:
    """The compact network or the backbone of these settings, by itself, with its weights, float32 on the CPU.

    ValueError with one line for weights that are missing or foreign, or lack what the attention needs.
    """
    if config.model == "compact":
        model = weights.load(config.weights or "compact")
    else:
        model = load_backbone(config.model, config.weights or None)
    if config.strategy == "lite3r" and not has_linear_branch(model):
        raise ValueError(
            f"engine.attention = 'lite3r': the weights {config.weights or config.model!r} have no linear branch; "
            "give engine.weights of a lite3r training, or use another attention"
        )
    return model


def load_network(config: EngineConfig, device: torch.device) -> StreamingNetwork:
    """The network of these settings as the engine drives it, still on the CPU. ValueError: see `load_trained`.

    device: where it will run. Compact's default size is the largest that it was trained at, on a CPU the smallest.
    """
    network = load_trained(config)
    if config.model != "compact":
        size = config.height or BACKBONE_SIZE[0], config.width or BACKBONE_SIZE[1]
        return ADAPTERS[config.streaming](network, size)
    height, width = network.trained_sizes[0 if device.type == "cpu" else -1]
    size = config.height or height, config.width or width
    if size not in network.trained_sizes:
        known = ", ".join(f"{h} x {w}" for h, w in network.trained_sizes)
        logging.getLogger(__name__).warning(
            "compact was not trained on images of %d x %d (height x width), only of %s: expect it to be less accurate",
            *size,
            known,
        )
    return network.resize(*size)
