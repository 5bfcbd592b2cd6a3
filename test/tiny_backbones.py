"""Every official backbone in a size that a CPU runs in no time, with random weights."""

import torch
from torch import nn

from speed3r_ros.model.backbones.blocks import LayerScale
from speed3r_ros.model.backbones.da3 import Da3, Da3Config, Da3Mono, Da3Nested
from speed3r_ros.model.backbones.pi3 import Pi3, Pi3Config, Pi3X, Speed3RPi3
from speed3r_ros.model.backbones.tracker import TrackerConfig
from speed3r_ros.model.backbones.vggt import Vggt, VggtConfig

PI3 = dict(
    channels=128, heads=2, encoder_blocks=2, table=5, decoder_blocks=6, head_blocks=2, camera_channels=64,
    metric_channels=64, metric_heads=2, metric_blocks=1, upsample=(32, 32, 32), last_channels=8,
)  # fmt: skip
VGGT = VggtConfig(128, 2, 2, 5, 4, 4, 1, 4, 32, (8, 8, 8, 8), (0, 1, 2, 3), TrackerConfig(8, 16))
ANY = Da3Config(128, 2, 6, 2, (2, 3, 4, 5), 32, (8, 8, 8, 8), table=5)
MONO = Da3Config(128, 2, 4, None, (0, 1, 2, 3), 32, (8, 8, 8, 8), table=5)
BACKBONES = {
    "pi3": lambda: Pi3(Pi3Config(**PI3)),
    "pi3x": lambda: Pi3X(Pi3Config(**PI3)),
    "speed3r-pi3": lambda: Speed3RPi3(Pi3Config(**{**PI3, "registers": 0})),
    "vggt": lambda: Vggt(VGGT),
    "streamvggt": lambda: Vggt(VGGT, causal=True),
    "da3": lambda: Da3(ANY),
    "da3-mono": lambda: Da3Mono(MONO),
    "da3-nested": lambda: Da3Nested(ANY, MONO),
}
ACROSS_VIEWS = ("pi3", "pi3x", "speed3r-pi3", "vggt", "da3", "da3-nested")  # those that any strategy fits


def tiny_backbone(name: str, seed: int | None = None) -> nn.Module:
    """With blocks that matter: untrained ones change their input by a hundredth."""
    torch.manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)
    model = BACKBONES[name]().eval()
    for module in model.modules():
        if isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, 0.5)
    return model
