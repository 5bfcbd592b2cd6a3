"""Batches of rendered multi-view sequences with exact geometry."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from speed3r_ros.kernels import raycast
from speed3r_ros.training.augment import augment
from speed3r_ros.training.motions import MOTIONS
from speed3r_ros.training.scenes import rays_of, sample_scene
from speed3r_ros.training.textures import Rng, TextureBank
from speed3r_ros.training.world import WorldConfig, moving, sample_exposure, sample_world

SPLITS = {"rooms": None, "world": WorldConfig()}  # held-out test distributions by name


Tables = dict[str, Tensor]


def sample_tables(
    world: WorldConfig | None,
    families: Tensor,
    r: Rng,
    coin: random.Random,
    size: tuple[int, int, int, int],
    code: int | None = None,
) -> Tables:
    """Tables of `kernels.raycast` and truth of new scenes, on the CPU, where r is.

    By thousands of small operations, which a GPU would wait for. world: see `SceneDataset`. families (M,): of the textures.
    size: sequences, views, height, width. code: index into MOTIONS.
    """
    if world is None:
        return sample_scene(r, *size, len(families), code, basic=True)
    return sample_world(r, coin, world, families, *size, code)


class SceneDataset:
    """Endless random sequences. Scenes are sampled on the CPU; textures, rendering and the sensor are on the device.

    world: what they are drawn from: None for `rooms`, the first test distribution (furnished rooms, six motions, square pixels,
    sharp images), on which older results are quoted. samples: shading samples per pixel; one knows no motion blur.
    held_out draws from textures and photographs never trained on.
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
        world: WorldConfig | None = None,
        verbose: bool = False,
    ) -> None:
        self.height, self.width, self.samples, self.world = height, width, samples, world
        self.layout, self.random, self.coin = Rng("cpu", seed), Rng(device, seed + 1), random.Random(seed)
        self.textures = TextureBank(device, seed + 7, textures_per_family, held_out, outdoor=world is not None)
        if verbose and self.textures.photos is None:
            print("no photographs for textures, noise instead: pip install 'speed3r_ros[train]'", flush=True)
        self.cast = raycast.raycast
        if self.random.d.type == "cuda":
            self._check_kernel(verbose)

    def sample(self, sequences: int, views: int, code: int | None = None) -> Tables:
        """`sample_tables` by this dataset's own draws."""
        size = sequences, views, self.height, self.width
        return sample_tables(self.world, self.textures.families, self.layout, self.coin, size, code)

    def place(self, tables: Tables) -> Tables:
        """The same on the device, without waiting for it."""
        if self.random.d.type != "cuda":
            return tables
        return {name: table.pin_memory().to(self.random.d, non_blocking=True) for name, table in tables.items()}

    @torch.no_grad()
    def _check_kernel(self, verbose: bool) -> None:
        """Compare the kernel with its reference on a few frames; on a mismatch say so and use the reference."""
        size = 4, 2, self.height, self.width
        scene = sample_tables(self.world, self.textures.families, Rng("cpu", 5), random.Random(5), size)
        arguments = self.place(scene), self.textures.data, self.height, self.width, self.samples
        found, right = raycast.raycast(*arguments), raycast.raycast_reference(*arguments)
        same = torch.isclose(found.depth, right.depth, rtol=1e-3, atol=0)  # infinity is itself
        wrong_depth = float((~same).float().mean())
        wrong_colour = float(((found.rgb - right.rgb).abs() > 0.03).float().mean())
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
        """`render` of new scenes, all with this motion, or with random ones."""
        return self.render(self.sample(sequences, views, None if motion is None else MOTIONS.index(motion)))

    @torch.no_grad()
    def render(self, tables: Tables) -> dict[str, Tensor]:
        """B sequences of N views: `img` (B, N, 3, H, W) in [0, 1], `depth` (B, N, H, W) along z, `R` (B, N, 3, 3) and
        `t` (B, N, 3) camera-to-world, `K` (B, 5) = fx, fy, cx, cy, k1, `ray` (B, H, W, 2), `motion` (B,) index into MOTIONS.

        Each sequence is scaled to mean depth 1. `valid` (B, N, H, W) is False where depth is not to be learnt: on sky,
        whose depth is infinite (`sky`), and on what moves (`moving`). `judged` is True: the right confidence is known everywhere.
        """
        scene = self.place(tables)
        sequences, views = scene["t"].shape[:2]
        seen = self.cast(scene, self.textures.data, self.height, self.width, self.samples)
        if self.world is None:
            image = augment(seen.rgb, sequences, views, self.random, motion_blur=False)
        else:
            gain, grain = sample_exposure(self.random, self.world, sequences, views, self.height, self.width)
            image = augment(seen.rgb, sequences, views, self.random, motion_blur=False, gain=gain, grain=grain)
        depth, index = (x.unflatten(0, (sequences, views)) for x in (seen.depth, seen.index))
        sky = depth.isinf()
        mobile = moving(index) if self.world else torch.zeros_like(sky)
        valid = ~sky & ~mobile
        total = torch.where(valid, depth, 0.0).sum((1, 2, 3))
        scale = (total / valid.sum((1, 2, 3)).clamp_min(1)).clamp_min(1e-3).view(-1, 1, 1)
        return dict(
            img=image.unflatten(0, (sequences, views)),
            depth=depth / scale[..., None],
            valid=valid,
            judged=torch.ones_like(valid),
            sky=sky,
            moving=mobile,
            R=scene["R"],
            t=scene["t"] / scale,
            K=scene["K"],
            ray=rays_of(scene["K"], self.height, self.width),
            motion=scene["motion"],
        )

    def refresh(self) -> None:
        """Swap a few textures for new ones."""
        self.textures.refresh()


__all__ = ["MOTIONS", "SPLITS", "SceneDataset", "WorldConfig"]
