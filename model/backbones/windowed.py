"""Streaming with backbones that were trained on whole sequences: the last frames are recomputed together, each time.

For each new frame the backbone runs once on the window and the anchors (at most window + anchors + 1 views), and only
the new frame's prediction is kept. The run has a gauge of its own, and mostly a scale; the views that were there before
(`alignment.align`) carry its result over to the segment's. What was said of past frames does not change.

The memory holds whole images, not the tokens of `model.memory.Memory`: these networks' keys and values depend on all
views of a run, so that cached ones would belong to another run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speed3r_ros.model.attention import Strategy
from speed3r_ros.model.backbones.alignment import Similarity, Views, align, median_depth
from speed3r_ros.model.backbones.blocks import PATCH, patch_grid
from speed3r_ros.model.backbones.da3 import Da3, Da3Nested
from speed3r_ros.model.backbones.pi3 import Pi3X, Speed3RPi3
from speed3r_ros.model.backbones.results import Reconstruction
from speed3r_ros.model.backbones.vggt import Vggt
from speed3r_ros.model.memory import Schedule
from speed3r_ros.model.network import Prediction

FLOOR = (0.01, 0.005)  # least expected errors: translation in units of depth, rotation in rad; assumed, not measured
LEAST_CONFIDENCE = 0.05


class ImageMemory:
    """Images of the window's frames and of the anchors, with what aligns new runs to them, in fixed storage.

    Which frames stay is `Schedule`'s policy, without the bank. The segment's first frame stays if it was kept and there
    are at least two anchors.
    """

    def __init__(self, size: tuple[int, int], window: int, anchors: int, device: torch.device | str = "cpu") -> None:
        slots, (height, width) = window + anchors + 1, size
        self.schedule = Schedule(window, anchors, 1)  # its bank holds frame numbers alone, and is not read
        samples = len(range(PATCH // 2, height, PATCH)) * len(range(PATCH // 2, width, PATCH))
        self._images = torch.zeros(slots, 3, height, width, device=device)
        self._T = torch.zeros(slots, 4, 4, dtype=torch.float64, device=device)
        self._depth, self._confidence = torch.zeros(2, slots, samples, dtype=torch.float64, device=device)
        self._K = torch.zeros(slots, 3, 3, device=device)
        self._known = torch.zeros(slots, dtype=torch.bool, device=device)

    @property
    def bytes(self) -> int:
        """Storage in bytes, constant."""
        parts = self._images, self._T, self._depth, self._confidence, self._K, self._known
        return sum(x.numel() * x.element_size() for x in parts)

    def clear(self) -> None:
        """Open a new segment."""
        self.schedule.clear()

    def admit(self) -> None:
        """Make room for a new frame. Call once before `Windowed.step`."""
        self.schedule.admit()

    def keep(self) -> None:
        """The newest frame is a keyframe: it will outlive the window."""
        self.schedule.keep()

    @property
    def slots(self) -> Tensor:
        """Slots of the resident frames in the order of time, the newest last."""
        return torch.tensor([slot for _, slot in self.schedule.resident], device=self._T.device)

    def put(self, image: Tensor, K: Tensor | None, known: Tensor | None) -> None:
        """Store the newest frame: image (3, H, W), intrinsics (3, 3) valid where known (1,), or None."""
        slot = self.schedule.current
        self._images[slot] = image
        self._known[slot] = False
        if K is not None:
            self._K[slot], self._known[slot] = K, known[0]

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, 3, H, W), intrinsics (N, 3, 3) and where they are known (N,) of the resident frames."""
        slots = self.slots
        return self._images[slots], self._K[slots], self._known[slots]

    def put_geometry(self, views: Views) -> None:
        """Store what was found of the newest frame, a single view in the segment's gauge."""
        slot = self.schedule.current
        self._T[slot], self._depth[slot], self._confidence[slot] = views.T[0], views.depth[0], views.confidence[0]

    def geometry(self) -> Views:
        """What was found of the resident frames but the newest, in the segment's gauge."""
        past = self.slots[:-1]
        return Views(self._T[past], self._depth[past], self._confidence[past])


def intrinsics(rays: Tensor) -> Tensor:
    """K (3, 3) in pixels, centres at integers, of the rays x/z, y/z (2, H, W) of a pinhole camera."""
    K = torch.eye(3, dtype=rays.dtype, device=rays.device)
    for axis, ray in enumerate((rays[0].mean(0), rays[1].mean(1))):
        K[axis, axis] = (len(ray) - 1) / (ray[-1] - ray[0])
        K[axis, 2] = -ray[0] * K[axis, axis]
    return K


def sampled(out: Reconstruction) -> Views:
    """The views of a run of one sequence, with one pixel of each patch."""
    start = PATCH // 2
    depth, confidence = (x[0, :, start::PATCH, start::PATCH].flatten(1).double() for x in (out.depth, out.confidence))
    return Views(out.T_world_cam[0].double(), depth, confidence)


class Windowed(nn.Module):
    """A backbone for several views behind the interface of `streaming.StreamingNetwork`.

    model: see `registry`. size: (h, w) of all images. ValueError if the model sees single views only, or if the size
    does not fit it.
    """

    capturable = False  # the number of views grows until the window is full

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        if not hasattr(model, "across_views"):
            raise ValueError(f"{type(model).__name__} finds no poses: choose a backbone for several views")
        if not isinstance(model, Speed3RPi3):  # which resizes images itself
            patch_grid(*size)
        self.model, self.input_size = model, tuple(size)
        self._options: dict[str, object] = {}
        if isinstance(model, (Da3, Da3Nested)):
            self._options["reference"] = "first"  # a gauge that does not change with what the frames show
        elif isinstance(model, Vggt):
            self._options["point_head"] = False  # its points are not read

    def precision(self, dtype: torch.dtype | str) -> Windowed:
        """See the backbone's. ValueError on integers, which it does not run in."""
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise ValueError(f"precision {dtype}: backbones run in float32, bfloat16 or 'fp8'")
        self.model.precision(dtype)
        return self

    def new_memory(self, window: int, anchors: int, bank: int = 0, attention: str | Strategy = "dense") -> ImageMemory:
        """An empty memory on the device of the weights; of any bank and attention it takes no notice."""
        return ImageMemory(self.input_size, window, anchors, next(self.model.parameters()).device)

    @torch.inference_mode()
    def step(
        self,
        image: Tensor,
        memory: ImageMemory,
        rays: Tensor | None = None,
        attention: str | Strategy = "dense",
        top_k: int = 32,
        known: Tensor | None = None,
    ) -> Prediction:
        """One new frame (3, H, W) in [0, 1], for which the memory has made room.

        rays: (2, H, W) of x/z, y/z per pixel, valid where known: (1,) bool is True, or None when intrinsics are
        unknown. Where known they are the points' rays; Pi3X reads them too. attention, top_k: see `model.strategies`.

        The prediction is in the gauge of the segment's first frame; its unit is the metre if the backbone's is, else
        the first frame's median depth. Poses are float64, there are no descriptors. log_sigma is the logarithm of what
        the shared frames differ by after alignment (root mean square), and of `FLOOR`, both over the new frame's mean
        confidence. ValueError on an image or rays of another size.
        """
        for name, x, channels in (("image", image, 3), ("rays", rays, 2)):
            if x is not None and x.shape != (channels, *self.input_size):
                raise ValueError(f"{name} is {tuple(x.shape)}: expected {(channels, *self.input_size)}")
        if rays is not None and known is None:
            known = torch.ones(1, dtype=torch.bool, device=image.device)
        memory.put(image, None if rays is None else intrinsics(rays), known)
        out = self._run(*memory.inputs(), attention, top_k)
        run, past = sampled(out), memory.geometry()
        to_segment = self._to_segment(run, past, out.metric)

        scale, newest = to_segment.scale, Views(*(x[-1:] for x in (run.T, run.depth, run.confidence)))
        T = to_segment.of(newest.T)
        memory.put_geometry(Views(T, newest.depth * scale, newest.confidence))
        points = out.points[0, -1].permute(2, 0, 1) * scale
        if rays is not None:
            points = torch.where(known, torch.cat([rays * points[2:], points[2:]]), points)
        sigma = to_segment.spread.hypot(run.T.new_tensor(FLOOR)) / newest.confidence.mean().clamp(min=LEAST_CONFIDENCE)
        return Prediction(
            points[None, None],
            out.confidence[:, -1:].logit(1e-6),
            T[None, :, :3, :3],
            T[None, :, :3, 3],
            sigma.log()[None, None],
        )

    def _run(self, images: Tensor, K: Tensor, known: Tensor, attention: str | Strategy, top_k: int) -> Reconstruction:
        options = dict(self._options, attention=attention, top_k=top_k)
        if isinstance(self.model, Pi3X):
            half = torch.zeros_like(K)
            half[:, :2, 2] = 0.5  # its pixel centres
            options |= dict(K=(K + half)[None], has_K=known[None])
        return self.model(images[None], **options)

    @staticmethod
    def _to_segment(run: Views, past: Views, metric: bool) -> Similarity:
        """From the gauge of a run, whose last view is the new one, to the segment's."""
        if len(past.T):
            shared = Views(*(x[:-1] for x in (run.T, run.depth, run.confidence)))
            return align(shared, past, with_scale=not metric)
        scale = run.T.new_ones(()) if metric else 1 / median_depth(run)
        R, t = run.T[0, :3, :3].mT, run.T[0, :3, 3]
        return Similarity(scale, R, -scale * R @ t, run.T.new_zeros(2))
