"""The streaming engine: `push(frame) -> estimate`. A notebook can drive it; the node and the bag command do.

The network predicts poses in the gauge of a segment's first frame, which is trustworthy only over a segment's length.
So the engine chains segments: while a segment ends, its last keyframes also enter the next segment's memory, and what
they share (poses and depths of the same frames in both) gives the similarity that carries the world frame over.
Composition of keyframe-relative poses, with a periodic refresh of the cache, is LongStream's remedy against drift of
the gauge; the hand-over costs a second step on a few keyframes only.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from speed3r_ros.model.config import EngineConfig, check
from speed3r_ros.model.graph import GraphedStep
from speed3r_ros.model.memory import Memory
from speed3r_ros.model.quantised import Int8Linear, require_fp8_units
from speed3r_ros.model.streaming import StreamingNetwork, load_network
from speed3r_ros.model.types import Estimate, Frame, Tracking, resize_intrinsics

HANDOVER = 3  # keyframes shared by consecutive segments
FIELDS_OF_VIEW = 1.0, 170.0  # degrees, of rectified images; others ruin the scale for good
SMALLEST_SIDE = 32  # pixels
PARALLAX = 0.15  # baseline over median depth that makes a keyframe
GRID = 14  # stride in pixels of the points that measure overlap


@dataclass
class View:
    """What overlap and hand-over need of a past frame: pose, intrinsics and sparse points, in world units."""

    T_world_cam: np.ndarray  # (4, 4)
    K: np.ndarray  # (3, 3)
    points: np.ndarray  # (M, 3) in its camera


@dataclass
class Segment:
    """A memory and the similarity from its gauge to the world: x_world = R (scale x) + t."""

    memory: Memory
    T_world_gauge: np.ndarray
    scale: float = 1.0
    keyframes: int = 0


def select_device(config: EngineConfig) -> tuple[torch.device, torch.dtype | str]:
    """Device and matrix precision, a type or "fp8", that `auto` stands for here. ValueError for those that are not there."""
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ValueError(
            "engine.device = 'cuda': torch sees no CUDA GPU; use auto or cpu, or install a CUDA build of torch"
        )
    device = torch.device("cuda" if cuda and config.device != "cpu" else "cpu")
    int8 = device.type == "cpu" and Int8Linear.supported()
    if config.precision == "int8" and not int8:
        raise ValueError("engine.precision = 'int8': needs an x86 CPU with AVX2; use auto, bf16 or fp32")
    if config.precision == "fp8":
        require_fp8_units(device, "engine.precision")
    if config.precision != "auto":
        names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": "fp8", "int8": torch.int8}
        return device, names[config.precision]
    if config.model != "compact" and device.type == "cpu":
        return device, torch.float32
    bf16 = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return device, torch.bfloat16 if bf16 else torch.int8 if int8 else torch.float32


def ray_map(K: np.ndarray, height: int, width: int) -> np.ndarray:
    """x/z and y/z of every pixel: (2, H, W) float32."""
    u, v = np.meshgrid((np.arange(width) - K[0, 2]) / K[0, 0], (np.arange(height) - K[1, 2]) / K[1, 1])
    return np.stack([u, v]).astype(np.float32)


def solve_intrinsics(points: np.ndarray) -> np.ndarray:
    """Pinhole K (3, 3) of a local point map (3, H, W): least squares of each ray coordinate on its pixel coordinate."""
    _, height, width = points.shape
    K = np.eye(3)
    for axis, (size, pixels) in enumerate(((width, np.arange(width)), (height, np.arange(height)[:, None]))):
        ray = points[axis] / points[2]
        pixel = np.broadcast_to(pixels, ray.shape).astype(np.float64) - (size - 1) / 2
        slope = max((pixel * (ray - ray.mean())).sum() / (pixel * pixel).sum(), 1e-6)
        K[axis, axis] = 1 / slope
        K[axis, 2] = (size - 1) / 2 - ray.mean() / slope
    return K


def unusable(image: np.ndarray) -> str:
    """Why a frame (h, w, 3) carries no geometry, in one line, or ""."""
    grey = image.mean(2)
    mean, spread = float(grey.mean()), float(grey.std())
    if spread >= 4:
        return ""
    if mean < 16:
        return f"black frame (mean {mean:.0f} of 255): check the lens cap and the exposure"
    if mean > 239:
        return f"saturated frame (mean {mean:.0f} of 255): check the exposure"
    return f"frame without contrast (standard deviation {spread:.1f} of 255): the camera sees a plain surface or is blocked"


@dataclass(frozen=True)
class Answer:
    """What the network says of a frame, finite, in its segment's gauge and unit.

    points: (3, h, w) float32 in the camera. T_gauge_cam: (4, 4) float64, camera to gauge. sigma: (2,) float64 of translation
    and rotation. logit: (h, w) of confidence, on the device.
    """

    points: np.ndarray
    T_gauge_cam: np.ndarray
    sigma: np.ndarray
    logit: Tensor


def scaled(T: np.ndarray, scale: float) -> np.ndarray:
    """A pose (4, 4) with its translation in another unit."""
    out = T.copy()
    out[:3, 3] *= scale
    return out


def mean_transform(transforms: np.ndarray) -> np.ndarray:
    """Chordal mean of rigid transforms (M, 4, 4)."""
    T = transforms.mean(0)
    U, _, Vt = np.linalg.svd(T[:3, :3])
    T[:3, :3] = U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt
    return T


def share_in_view(source: View, target: View, size: tuple[int, int]) -> float:
    """Share of the source's points that lie in the target's image of this size (h, w)."""
    T = np.linalg.inv(target.T_world_cam) @ source.T_world_cam
    x = source.points @ T[:3, :3].T + T[:3, 3]
    z = np.maximum(x[:, 2], 1e-6)
    u, v = x[:, 0] / z * target.K[0, 0] + target.K[0, 2], x[:, 1] / z * target.K[1, 1] + target.K[1, 2]
    height, width = size
    return float(((x[:, 2] > 0) & (u > -0.5) & (u < width - 0.5) & (v > -0.5) & (v < height - 0.5)).mean())


class Engine:
    """Incremental reconstruction of one camera's stream, in bounded memory.

    Raises ValueError for settings, weights or devices that cannot work, with one line that says what to do.
    """

    def __init__(self, config: EngineConfig | None = None, network: StreamingNetwork | None = None) -> None:
        self.config = config or EngineConfig()
        check(self.config, "engine.")
        self.device, self.dtype = select_device(self.config)
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        self.network = (network or load_network(self.config, self.device)).to(self.device).precision(self.dtype).eval()
        self._spare = [self._new_memory(), self._new_memory()]
        self._graphs = self._capture() if self.device.type == "cuda" and self.network.capturable else {}
        self.reset()

    @property
    def input_size(self) -> tuple[int, int]:
        """(h, w) that every frame is resized to, and that estimates have."""
        return self.network.input_size

    def _new_memory(self) -> Memory:
        config = self.config
        return self.network.new_memory(config.window, config.anchors, config.bank, config.strategy)

    @torch.inference_mode()
    def _capture(self) -> dict[int, GraphedStep]:
        """A graph for each memory; without them, said with the reason, steps are launched kernel by kernel."""
        try:
            return {id(m): GraphedStep(self.network, m, self.config.strategy, self.config.top_k) for m in self._spare}
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(f"no CUDA graph ({reason}): each frame takes several times longer", stacklevel=2)
            return {}

    def reset(self) -> None:
        """Forget the past: the next frame defines a new world frame."""
        for memory in self._spare:
            memory.clear()
        self._segment = Segment(self._spare[0], np.eye(4))
        self._next = Segment(self._spare[1], np.eye(4))
        self._shared: list[
            tuple[View, np.ndarray, np.ndarray]
        ] = []  # view in the world; pose, points in the next gauge
        self._tracked = 0
        self._lost = 0
        self._last_keyframe: View | None = None
        self._K: np.ndarray | None = None
        self._sigma_before = np.zeros(2)  # accumulated over the closed segments

    def push(self, frame: Frame) -> Estimate:
        """Estimate of one frame. Cost and memory do not depend on how many came before.

        Raises ValueError when the image is not (H, W, 3) uint8 of at least 32 x 32, or K is not a finite pinhole matrix;
        the state is then unchanged. Raises FloatingPointError when what the network says is not finite: it has spoilt the
        memory, so that all frames until `reset` would fare the same.
        """
        image, K = self._prepare(frame)
        reason = unusable(image)
        if reason:
            self._lost += 1
            return Estimate(frame.stamp_ns, Tracking.LOST, lost_reason=reason)

        height, width = self.input_size
        pixels = torch.from_numpy(image).to(self.device).permute(2, 0, 1).float() / 255
        rays = None if K is None else torch.from_numpy(ray_map(K, height, width)).to(self.device)
        segment = self._segment
        out = self._step(segment, pixels, rays)
        points = out.points
        if K is None:
            K = solve_intrinsics(points)
            K = self._K = K if self._K is None else 0.9 * self._K + 0.1 * K
        T_gauge_cam = scaled(out.T_gauge_cam, segment.scale)
        if self._tracked == 0:
            segment.T_world_gauge = np.linalg.inv(T_gauge_cam)
        T_world_cam = segment.T_world_gauge @ T_gauge_cam
        depth = points[2] * np.float32(segment.scale)
        sparse = points[:, GRID // 2 :: GRID, GRID // 2 :: GRID].reshape(3, -1).T.astype(np.float64)
        view = View(T_world_cam, K, sparse * segment.scale)

        keyframe = self._is_keyframe(view)
        if keyframe:
            segment.memory.keep()
            segment.keyframes += 1
            self._last_keyframe = view
            self._hand_over(view, pixels, rays)
        sigma = np.hypot(out.sigma * [segment.scale, 1.0], self._sigma_before) * (1 + self._lost)
        self._tracked += 1
        self._lost = 0
        return Estimate(
            frame.stamp_ns,
            Tracking.TRACKING if self._tracked > 2 else Tracking.STARTING,
            T_world_cam=T_world_cam,
            depth=depth,
            confidence=out.logit.sigmoid().cpu().numpy(),
            K=K,
            image=image,
            is_keyframe=keyframe,
            pose_sigma=sigma,
        )

    def _prepare(self, frame: Frame) -> tuple[np.ndarray, np.ndarray | None]:
        image, K = frame.image, frame.K
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"image is {what}: expected uint8 (H, W, 3) RGB")
        size = image.shape[:2]
        if min(size) < SMALLEST_SIDE:
            raise ValueError(
                f"image is {size[1]} x {size[0]}: the smallest side must be at least {SMALLEST_SIDE} pixels"
            )
        if K is not None:
            K = np.asarray(K, dtype=np.float64)
            if K.shape != (3, 3) or not np.isfinite(K).all() or K[0, 0] <= 0 or K[1, 1] <= 0:
                raise ValueError(
                    f"K = {K.tolist()}: expected a finite 3 x 3 pinhole matrix with positive focal lengths, or None"
                )
            view = 2 * np.degrees(np.arctan2(size[1::-1], 2 * np.diag(K)[:2]))
            if not ((FIELDS_OF_VIEW[0] < view) & (view < FIELDS_OF_VIEW[1])).all():
                raise ValueError(
                    f"K = {K.tolist()} of {size[1]} x {size[0]} pixels: a field of view of {view[0]:.3g} x {view[1]:.3g} "
                    "degrees; give focal lengths in pixels of this image, or None"
                )
            K = resize_intrinsics(K, size, self.input_size)
        height, width = self.input_size
        shrink = size[0] >= height and size[1] >= width
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR)
        return resized, K

    @torch.inference_mode()
    def _step(self, segment: Segment, pixels: Tensor, rays: Tensor | None) -> Answer:
        """Advance a segment by one frame. Raises FloatingPointError."""
        segment.memory.admit()
        if graph := self._graphs.get(id(segment.memory)):
            out = graph(pixels, rays)
        else:
            out = self.network.step(pixels, segment.memory, rays, self.config.strategy, self.config.top_k, None)
        points = out.points[0, 0].float().cpu().numpy()
        pose = torch.cat([x.flatten().double() for x in (out.R, out.t, out.log_sigma)]).cpu().numpy()  # one copy
        if not (np.isfinite(points).all() and np.isfinite(pose).all()):
            raise FloatingPointError("the network's output is not finite: check camera_info and engine.precision")
        U, _, Vt = np.linalg.svd(pose[:9].reshape(3, 3))  # orthonormal in float64, so that long products stay rotations
        T = np.eye(4)
        T[:3, :3], T[:3, 3] = U @ Vt, pose[9:12]
        return Answer(points, T, np.exp(pose[12:]), out.confidence[0, 0])

    def _is_keyframe(self, view: View) -> bool:
        last = self._last_keyframe
        if last is None:
            return True
        overlap = min(share_in_view(*views, self.input_size) for views in ((view, last), (last, view)))
        baseline = np.linalg.norm(view.T_world_cam[:3, 3] - last.T_world_cam[:3, 3])
        return overlap < self.config.keyframe_overlap or baseline > PARALLAX * float(np.median(view.points[:, 2]))

    def _hand_over(self, view: View, pixels: Tensor, rays: Tensor | None) -> None:
        """Feed the last keyframes of a segment to the next one too; with enough of them, switch."""
        refresh = max(self.config.refresh, 2 * HANDOVER)
        if not self.config.refresh or self._segment.keyframes <= refresh - HANDOVER:
            return
        out = self._step(self._next, pixels, rays)
        self._next.memory.keep()
        self._next.keyframes += 1
        points = out.points[:, GRID // 2 :: GRID, GRID // 2 :: GRID].reshape(3, -1).T.astype(np.float64)
        self._shared.append((view, out.T_gauge_cam, points))
        if len(self._shared) < HANDOVER:
            return
        ratios = np.concatenate([view.points[:, 2] / points[:, 2] for view, _, points in self._shared])
        scale = float(np.median(ratios))
        transforms = [view.T_world_cam @ np.linalg.inv(scaled(T, scale)) for view, T, _ in self._shared]
        retired, self._segment = self._segment, self._next
        self._segment.scale, self._segment.T_world_gauge = scale, mean_transform(np.stack(transforms))
        retired.memory.clear()
        self._next = Segment(retired.memory, np.eye(4))
        self._shared = []
        self._sigma_before = np.hypot(self._sigma_before, out.sigma * [scale, 1.0])
