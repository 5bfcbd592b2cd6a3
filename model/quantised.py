"""The precision of matrix products: which layers run in which type, and linear layers in 8 bits.

These are integers for CPUs that have no bf16, FP8 for GPUs that multiply it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speed3r_ros.kernels import fp8


class Int8Linear(nn.Module):
    """`nn.Linear` in int8, for inference on x86 CPUs: x (..., in) float32 -> (..., out) float32.

    Activations are rounded to 8 bits, with the scale and the zero point of each call; weights to 7 bits, once, with a scale
    for each output channel. AVX2 adds products in pairs into 16 bits: 2 * 255 * 63 fits, with 8 bits for both it does not,
    and 7 bits for the activations instead cost accuracy (docs/benchmarks.md).
    """

    takes = torch.float32

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        self._scale = weight.abs().amax(1).clamp(min=1e-12) / 63
        rounded = (weight / self._scale[:, None]).round().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zero = torch.zeros(len(weight), dtype=torch.int64)
        self._bias = None if layer.bias is None else layer.bias.detach().float()

    @staticmethod
    def supported() -> bool:
        """Whether this build of torch and this CPU run it, and faster than float32."""
        fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        return fast and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")

    def forward(self, x: Tensor) -> Tensor:
        """Not differentiable."""
        low, high = (float(y) for y in x.aminmax())
        low, high = min(low, 0.0), max(high, 1e-12)
        scale = (high - low) / 254  # not 255: the zero point is rounded too
        zero = round(-low / scale)
        rounded = torch.add(zero + 0.5, x, alpha=1 / scale).to(torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(
            rounded,
            scale,
            zero,
            self._weight,
            self._scale,
            self._zero,
            self._bias,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )


class Fp8Linear(nn.Module):
    """`nn.Linear` in E4M3 with scales per output and per token: x (..., in) -> (..., out) in x's type (Lite3R, section 3)."""

    takes = torch.bfloat16

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        values, scale = fp8.quantise_rows(layer.weight.detach())
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Not differentiable."""
        return fp8.fp8_linear(x, self.values, self.scale, self.bias)


class Fp8TrainingLinear(nn.Linear):
    """A linear layer that computes as `Fp8Linear` will, with gradients straight through the rounding (Lite3R, section 3).

    It shares weight and bias with the layer that it stands for, under the same names.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out) in x's type."""
        return fp8.fp8_linear_straight_through(x, self.weight, self.bias)


class WideBlock(nn.Module):
    """A transformer block: FP8 rounds its wide layers, unless it is part of what its model keeps in full precision."""


def wide_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """What FP8 rounds in a model, in inference and in training alike: its blocks' linear layers to qkv and of the MLP.

    Each comes with the module that holds it and its name there. Names that begin with one of `model.full_precision` are left out.
    FP8 pays for these; the square projection after attention is slower so (docs/benchmarks.md).
    """
    found = []
    for prefix, block in model.named_modules():
        if not isinstance(block, WideBlock) or prefix.startswith(model.full_precision):
            continue
        for path, layer in block.named_modules():
            if type(layer) is nn.Linear and not path.removeprefix("attn.").startswith(("gate", "proj")):
                holder, _, name = path.rpartition(".")
                found.append((block.get_submodule(holder), name, layer))
    return found


def set_precision(model: nn.Module, dtype: torch.dtype | str) -> None:
    """Store the weights of linear and convolutional layers as `dtype`, but for those under `model.full_precision`.

    "fp8": bfloat16, but the `wide_layers` in E4M3, for inference (Lite3R, section 3). ValueError: see `check_precision`.
    """
    check_precision(model, dtype)
    if dtype == "fp8":
        for holder, name, layer in wide_layers(model):  # from the weights as they are
            setattr(holder, name, Fp8Linear(layer))
        dtype = torch.bfloat16
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith(model.full_precision):
            module.to(dtype)


def train_in_fp8(model: nn.Module) -> int:
    """Let the `wide_layers` round as `set_precision` to "fp8" does, for training; returns how many there are."""
    layers = wide_layers(model)
    for holder, name, layer in layers:
        setattr(holder, name, Fp8TrainingLinear(layer))
    return len(layers)


def require_fp8_units(device: torch.device, setting: str) -> None:
    """Raise ValueError, one line that names the setting, unless the device multiplies FP8 in hardware."""
    if fp8.on_units(torch.empty(0, device=device)):
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"device {device.type!r}"
    raise ValueError(
        f"{setting} = 'fp8': {name} has no FP8 units, which come with NVIDIA GPUs of compute capability 8.9 and above; "
        "run on such a GPU, or in bf16"
    )


def check_precision(model: nn.Module, dtype: torch.dtype | str) -> None:
    """Raise ValueError if `model.precision(dtype)` cannot be.

    That is on a name other than "fp8", on a device without its units, and on weights that are in FP8 already.
    """
    if isinstance(dtype, str) and dtype != "fp8":
        raise ValueError(f"precision = {dtype!r}: give a torch.dtype or 'fp8'")
    if any(isinstance(module, Fp8Linear) for module in model.modules()):
        raise ValueError(
            f"precision = {dtype}: the weights are in 8 bits already and cannot go back; load the model anew"
        )
    if dtype == "fp8":
        require_fp8_units(next(model.parameters()).device, "precision")
