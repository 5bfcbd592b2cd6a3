"""What every backbone returns, in one convention."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reconstruction:
    """Geometry of B sequences of N views at H x W pixels.

    T_world_cam: (B, N, 4, 4) camera-to-world, OpenCV axes (x right, y down, z forward); None from single-view models. World
        is what the backbone chose: see its class. points: (B, N, H, W, 3) in each camera's frame, None where neither points
        nor intrinsics are predicted. depth: (B, N, H, W) along the optical axis. confidence: (B, N, H, W) in [0, 1], the
        sigmoid of the head's output, None where there is none. K: (B, N, 3, 3) intrinsics in pixels as the backbone
        defines them, None where it predicts none. metric: lengths are metres, else of one unknown scale per sequence.
    raw: the heads' outputs under their official names, for comparison with the official code.
    """

    depth: Tensor
    points: Tensor | None = None
    confidence: Tensor | None = None
    T_world_cam: Tensor | None = None
    K: Tensor | None = None
    metric: bool = False
    raw: dict[str, Tensor] = field(default_factory=dict)

    def world_points(self) -> Tensor:
        """`points` in the world's frame, (B, N, H, W, 3). ValueError where points or poses are None."""
        missing = [name for name in ("points", "T_world_cam") if getattr(self, name) is None]
        if missing:
            raise ValueError(f"no world_points without {' and '.join(missing)}: take a backbone for several views")
        R, t = self.T_world_cam[..., :3, :3], self.T_world_cam[..., :3, 3]
        return torch.einsum("bnij,bnhwj->bnhwi", R, self.points) + t[:, :, None, None]


def rigid(R: Tensor, t: Tensor) -> Tensor:
    """Rotation (..., 3, 3) and translation (..., 3) -> transform (..., 4, 4)."""
    last = torch.zeros(*t.shape[:-1], 1, 4, dtype=t.dtype, device=t.device)
    last[..., 3] = 1
    return torch.cat([torch.cat([R, t[..., None]], -1), last], -2)


def invert(T: Tensor) -> Tensor:
    """Inverse of rigid transforms (..., 4, 4)."""
    R = T[..., :3, :3].mT
    return rigid(R, -(R @ T[..., :3, 3:])[..., 0])


def rotation_from_quaternion(q: Tensor) -> Tensor:
    """(..., 4) in the order x, y, z, w, of any length but zero -> (..., 3, 3)."""
    x, y, z, w = (q / q.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def quaternion_products(R: Tensor) -> Tensor:
    """(..., 3, 3) -> (..., 4, 4): of a rotation, four times the outer product of its quaternion (x, y, z, w) with itself.

    Of any other matrix, a symmetric one whose first eigenvector is the quaternion of the nearest rotation.
    """
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in R.unbind(-2))
    return torch.stack(
        [
            1 + a - e - i, b + d, c + g, h - f,
            b + d, 1 - a + e - i, f + h, c - g,
            c + g, f + h, 1 - a - e + i, d - b,
            h - f, c - g, d - b, 1 + a + e + i,
        ],
        -1,
    ).unflatten(-1, (4, 4))  # fmt: skip


def strongest_row(outer: Tensor) -> Tensor:
    """The vector (..., 4), of any length and sign, of outer products with itself (..., 4, 4): their best conditioned row."""
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*outer.shape[:-2], 1, 4)
    return outer.gather(-2, best)[..., 0, :]


def nearest_rotation(m: Tensor) -> Tensor:
    """The rotations nearest to matrices (..., 3, 3), in the sense of squares.

    Their quaternions are the first eigenvectors of symmetric 4 x 4 matrices (Bar-Itzhack, 2000), found here by repeated
    squaring: a singular value decomposition waits for the GPU, which a CUDA graph cannot hold.
    """
    size = m.double().flatten(-2).norm(dim=-1)[..., None, None].clamp(min=1e-300)
    products = quaternion_products(m.double() * (3**0.5 / size))
    power = products + 3 * torch.eye(4, dtype=products.dtype, device=m.device)  # all eigenvalues above zero
    for _ in range(32):
        power = power / power.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        power = power @ power
    return rotation_from_quaternion(strongest_row(power)).to(m.dtype)


def quaternion_from_rotation(R: Tensor) -> Tensor:
    """(..., 3, 3) -> (..., 4) of unit length in the order x, y, z, w, with w >= 0."""
    q = strongest_row(quaternion_products(R))
    return q / q.norm(dim=-1, keepdim=True) * torch.where(q[..., 3:] < 0, -1.0, 1.0)


def unproject(depth: Tensor, K: Tensor) -> Tensor:
    """Points (..., H, W, 3) of the camera's frame from depth (..., H, W) and K (..., 3, 3); pixel centres at integers."""
    v, u = torch.meshgrid(*(torch.arange(n, device=depth.device) for n in depth.shape[-2:]), indexing="ij")
    fx, fy, cx, cy = (K[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    return torch.stack([(u - cx) / fx, (v - cy) / fy, torch.ones_like(depth)], -1) * depth[..., None]


def intrinsics_from_fov(fov: Tensor, size: tuple[int, int]) -> Tensor:
    """Vertical and horizontal field of view (..., 2) in rad -> (..., 3, 3) in pixels, the centre at (W / 2, H / 2)."""
    height, width = size
    tangent = (fov / 2).tan().clamp(min=1e-6)
    K = torch.zeros(*fov.shape[:-1], 3, 3, dtype=fov.dtype, device=fov.device)
    K[..., 0, 0], K[..., 1, 1] = width / 2 / tangent[..., 1], height / 2 / tangent[..., 0]
    K[..., 0, 2], K[..., 1, 2], K[..., 2, 2] = width / 2, height / 2, 1
    return K
