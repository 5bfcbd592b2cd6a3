"""Distillation: a student learns a teacher's geometry (Speed3R, section 1.4), or its attention (Lite3R, section 3)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed3r_ros.model.attention import SOME_LAYER, Layer, Strategy, Tokens
from speed3r_ros.model.backbones.blocks import DinoV2
from speed3r_ros.model.backbones.pi3 import Pi3, Speed3RPi3
from speed3r_ros.model.backbones.results import Reconstruction
from speed3r_ros.model.backbones.vggt import Vggt
from speed3r_ros.model.network import Network, Prediction
from speed3r_ros.training.losses import mean_depth, mean_where, relative_poses, sequence_scale

HUBER = 0.1  # of relative translations, in units of mean depth
LARGEST = 10.0  # a term above is left out: the teacher failed on a sequence (released code)
ENCODER = ("stem1", "stem2", "patch_embed", "position", "ray_embed", "patch_norm", "encoder")
PI3_HEADS, VGGT_HEADS = ("conf_decoder", "conf_head"), ("point_head", "track_head")


@dataclass(frozen=True)
class Geometry:
    """What teacher and student have in common, for B sequences of T views.

    points: (B, T, 3, H, W) in each camera's frame, up to one scale per sequence. R: (B, T, 3, 3), t: (B, T, 3)
    camera-to-world. confidence: (B, T, H, W) logit, log_sigma: (B, T, 2), of the compact network only, else None.
    """

    points: Tensor
    R: Tensor
    t: Tensor
    confidence: Tensor | None = None
    log_sigma: Tensor | None = None


def geometry(out: Prediction | Reconstruction) -> Geometry:
    """Of the output of the compact network or of an official backbone."""
    if isinstance(out, Prediction):
        return Geometry(out.points, out.R, out.t, out.confidence, out.log_sigma)
    T = out.T_world_cam.float()
    return Geometry(out.points.float().permute(0, 1, 4, 2, 3), T[..., :3, :3], T[..., :3, 3])


def normals(points: Tensor) -> Tensor:
    """Unit normals (..., 3, H - 1, W - 1) of point maps (..., 3, H, W), from differences to the right and down."""
    here = points[..., :-1, :-1]
    across = torch.linalg.cross(points[..., :-1, 1:] - here, points[..., 1:, :-1] - here, dim=-3)
    return F.normalize(across, dim=-3, eps=1e-9)


def distillation_loss(student: Geometry, teacher: Geometry, valid: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Speed3R's loss of a student against its teacher, whose answer is brought to mean depth 1; and figures to log.

    L1 of points over the teacher's depth, after one robust scale per sequence; 1 - cosine of normals; 0.1 times (100
    Huber of relative translations + angle of relative rotations) over all ordered pairs of views. valid: (B, T, H, W)
    bool, pixels that count. Ours: where both have them, confidence and log_sigma follow the teacher's (weight 0.05 and
    0.02), because they are read from features that change.
    """
    unit = mean_depth(teacher.points[:, :, 2], valid).view(-1, 1, 1, 1, 1)
    target, t_target = teacher.points / unit, teacher.t / unit[..., 0, 0]
    z_true = target[:, :, 2]
    R, t = relative_poses(student.R, student.t)
    R_true, t_true = relative_poses(teacher.R, t_target)
    scale = sequence_scale(student.points[:, :, 2], z_true, valid, t, t_true).clamp(1e-3, 1e3)
    points = student.points * scale.view(-1, 1, 1, 1, 1)
    nearness = ((points - target).abs().sum(2) / z_true.clamp_min(1e-3)).clamp(max=LARGEST)
    point = mean_where(nearness, valid)
    corner = valid[..., :-1, :-1] & valid[..., 1:, :-1] & valid[..., :-1, 1:]
    normal = mean_where(1 - (normals(points) * normals(target)).sum(2), corner)

    views = R.shape[1]
    share = (1 - torch.eye(views, dtype=R.dtype, device=R.device)) / (
        len(R) * views * (views - 1)
    )  # of each ordered pair of views
    chord = ((R - R_true).square().sum((-1, -2)) + 1e-10).sqrt() / 8**0.5
    angle = (2 * chord.clamp(max=1 - 1e-6).asin() * share).sum()
    huber = F.huber_loss(scale.view(-1, 1, 1, 1) * t, t_true, reduction="none", delta=HUBER)
    translation = (huber.mean(-1) * share).sum()
    camera = 0.1 * (100 * translation + angle)
    total = point + normal + torch.where(camera < LARGEST, camera, 0 * camera)
    if student.confidence is not None and teacher.confidence is not None:
        total = total + 0.05 * F.binary_cross_entropy_with_logits(student.confidence, teacher.confidence.sigmoid())
        total = total + 0.02 * (student.log_sigma - teacher.log_sigma).abs().clamp(max=LARGEST).mean()
    figures = dict(loss=total, points=point, normals=normal, translation=translation, rot_deg=angle.rad2deg())
    return total, {name: value.detach() for name, value in figures.items()}


@dataclass(frozen=True)
class Recorded(Strategy):
    """Another strategy, which also keeps its outputs (B, H, T * L, D) of all layers in `outputs`.

    in_blocks: the order of tokens; a teacher's must be its student's.
    """

    strategy: Strategy
    in_blocks: bool = True
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def follows_visibility(self) -> bool:
        """See `Strategy`."""
        return self.strategy.follows_visibility

    def __call__(
        self,
        q: Tokens,
        k: Tokens,
        v: Tokens,
        fine: object,
        coarse: object,
        specials: int,
        top_k: int,
        layer: Layer = SOME_LAYER,
    ) -> Tensor:
        """See `Strategy.__call__`."""
        out = self.strategy(q, k, v, fine, coarse, specials, top_k, layer)
        self.outputs.append(out)
        return out


def attention_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over layers of the mean squared difference of attention outputs; the teacher's are constants (Lite3R)."""
    return torch.stack([F.mse_loss(a.float(), b.detach().float()) for a, b in zip(student, teacher)]).mean()


def freeze_untrained(model: nn.Module, random: bool = False) -> None:
    """Freeze the image encoder, unless its weights are random, and heads that the loss does not read."""
    if isinstance(model, Network):
        model.match_scale.requires_grad_(False)
        frozen = ("describe", *(() if random else ENCODER))
    else:
        frozen = VGGT_HEADS if isinstance(model, Vggt) else PI3_HEADS
    for name, part in model.named_children():
        if name in frozen:
            part.requires_grad_(False)
    for part in model.modules():
        if isinstance(part, DinoV2):
            part.requires_grad_(False)


def speed3r_student(teacher: nn.Module) -> nn.Module:
    """A student with the teacher's weights: Pi3 becomes Speed3R-Pi3, others are copied.

    Pi3's even decoder blocks are those inside frames, its odd ones those across views; gates are new, and there are no
    register tokens (released code).
    """
    if type(teacher) is not Pi3:
        return copy.deepcopy(teacher)
    student = Speed3RPi3(replace(teacher.config, registers=0))
    state = {}
    for key, value in teacher.state_dict().items():
        head, *rest = key.split(".", 2)
        if head == "decoder":
            kind, number = ("local", "global")[int(rest[0]) % 2], int(rest[0]) // 2
            key = f"{kind}_decoder.{number}.{rest[1]}"
        if head != "register_token":
            state[key] = value
    missing, unknown = student.load_state_dict(state, strict=False)
    if unknown or any(".gate." not in key for key in missing):
        raise ValueError(f"the teacher's weights do not fit Speed3R-Pi3: {(unknown or missing)[0]}")
    return student.eval()
