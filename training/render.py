"""Batches of rendered multi-view sequences with exact geometry, made on the device that trains."""

from __future__ import annotations

import torch
from torch import Tensor

from speed3r_ros.kernels import raycast
from speed3r_ros.training.augment import augment
from speed3r_ros.training.scenes import BASIC_MOTIONS, MOTIONS, rays_of, sample_scene
from speed3r_ros.training.textures import Rng, TextureBank


class SceneDataset:
    """Endless random sequences.

    basic=True restricts it to the six basic motions, square pixels, ordinary speeds and sharp images, on which held-out results are
    quoted. samples: shading samples per pixel. held_out draws from textures and photographs never trained on.
    """

    def __init__(
        self,
        device: torch.device | str,
        seed: int,
        height: int = 168,
        width: int = 224,
        samples: int = 4,
        held_out: bool = False,
        textures_per_family: int = 24,
        basic: bool = False,
        verbose: bool = False,
    ) -> None:
        self.height, self.width, self.samples, self.basic = height, width, samples, basic
        self.random = Rng(device, seed)
        self.textures = TextureBank(device, seed + 7, textures_per_family, held_out)
        self.cast = raycast.raycast
        if self.random.d.type == "cuda":
            self._check_kernel(verbose)

    @torch.no_grad()
    def _check_kernel(self, verbose: bool) -> None:
        """Compare the kernel with its reference on a few frames; on a mismatch say so and use the reference."""
        scene = sample_scene(Rng(self.random.d, 5), 4, 2, self.height, self.width, self.textures.n, basic=True)
        arguments = scene, self.textures.data, self.height, self.width, self.samples
        (rgb, depth), (rgb_ref, depth_ref) = raycast.raycast(*arguments)[:2], raycast.raycast_reference(*arguments)[:2]
        wrong_depth = float(((depth - depth_ref).abs() > 1e-3 * depth_ref).float().mean())
        wrong_colour = float(((rgb - rgb_ref).abs() > 0.03).float().mean())
        good = wrong_depth < 2e-2 and wrong_colour < 6e-2
        if verbose or not good:
            print(
                f"ray caster against its reference: {wrong_depth:.1e} of depths and {wrong_colour:.1e} of colours differ"
                + ("" if good else "; using the reference"),
                flush=True,
            )
        if not good:
            self.cast = raycast.raycast_reference

    @torch.no_grad()
    def batch(self, sequences: int, views: int, motion: str | None = None) -> dict[str, Tensor]:
        """B sequences of N views: `img` (B, N, 3, H, W) in [0, 1], `depth` (B, N, H, W) along z, `R` (B, N, 3, 3) and
        `t` (B, N, 3) camera-to-world, `K` (B, 5) = fx, fy, cx, cy, k1, `ray` (B, H, W, 2), `motion` (B,) index into MOTIONS.

        Each sequence is scaled to mean depth 1.
        """
        code = None if motion is None else MOTIONS.index(motion)
        scene = sample_scene(self.random, sequences, views, self.height, self.width, self.textures.n, code, self.basic)
        rgb, depth = self.cast(scene, self.textures.data, self.height, self.width, self.samples)[:2]
        image = augment(rgb, sequences, views, self.random, motion_blur=not self.basic)
        depth = depth.unflatten(0, (sequences, views))
        scale = depth.mean((1, 2, 3)).view(-1, 1, 1)
        return dict(
            img=image.unflatten(0, (sequences, views)),
            depth=depth / scale[..., None],
            R=scene["R"],
            t=scene["t"] / scale,
            K=scene["K"],
            ray=rays_of(scene["K"], self.height, self.width),
            motion=scene["motion"],
        )

    def refresh(self) -> None:
        """Swap a few textures for new ones."""
        self.textures.refresh()


__all__ = ["BASIC_MOTIONS", "MOTIONS", "SceneDataset"]
