"""Recorded sequences in every layout, written with known poses and depth."""

import json
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

DISTORTION = [0.2624, -0.9531, -0.0054, 0.0026, 1.1633]  # of freiburg1


def smooth_images(rng, count, size):
    """(N, h, w, 3) uint8 that survive JPEG and resizing."""
    coarse = rng.integers(0, 255, (count, 6, 8, 3)).astype(np.uint8)
    return [cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC) for image in coarse]


def random_poses(rng, count):
    """(N, 4, 4) camera-to-world, far from the origin."""
    T = np.tile(np.eye(4), (count, 1, 1))
    T[:, :3, :3] = Rotation.from_rotvec(rng.normal(0, 0.3, (count, 3))).as_matrix()
    T[:, :3, 3] = rng.normal(0, 0.5, (count, 3)) + [10, -5, 3]
    return T


def random_depth(rng, count, size, unit):
    """(N, h, w) uint16: blocks between 0.5 and 4 m, a fifth of them without depth."""
    coarse = rng.uniform(0.5, 4, (count, 12, 16)) / unit * (rng.random((count, 12, 16)) > 0.2)
    return [cv2.resize(depth, size[::-1], interpolation=cv2.INTER_NEAREST).astype(np.uint16) for depth in coarse]


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image)


def tum_line(stamp, T):
    values = [*T[:3, 3], *Rotation.from_matrix(T[:3, :3]).as_quat()]
    return f"{stamp:.6f} " + " ".join(f"{value:.9f}" for value in values)


def write_listing(folder: Path, rng, count, size, with_depth=True, layout="ours", unit=0.0002, name="rgb"):
    """TUM RGB-D ("tum", 640 x 480 only) or rgb.txt, poses.txt, intrinsics.json ("ours"); truth as (poses, depths, K, D)."""
    poses, stamps = random_poses(rng, count), 100 + np.arange(count) / 10 + rng.uniform(0, 0.01, count)
    images, depths = smooth_images(rng, count, size), random_depth(rng, count, size, unit)
    K = np.array([[517.3, 0, 318.6], [0, 516.5, 255.3], [0, 0, 1.0]])
    K[0] *= size[1] / 640
    K[1] *= size[0] / 480
    for i in range(count):
        write(folder / f"rgb/{i:03}.png", images[i])
        if with_depth:
            write(folder / f"depth/{i:03}.png", depths[i])
    jitter = rng.uniform(-0.015, 0.015, count)
    (folder / "rgb.txt").write_text(
        "# stamp file\n" + "".join(f"{s:.6f} rgb/{i:03}.png\n" for i, s in enumerate(stamps))
    )
    if with_depth:
        lines = [f"{s + d:.6f} depth/{i:03}.png\n" for i, (s, d) in enumerate(zip(stamps, jitter))]
        (folder / "depth.txt").write_text("".join(rng.permutation(lines)))
    truth = "groundtruth.txt" if layout == "tum" else "poses.txt"
    lines = [tum_line(s - d, T) for s, d, T in zip(stamps, jitter, poses)]
    lines += [tum_line(s + 0.05, T) for s, T in zip(stamps, random_poses(rng, count))]  # of no image
    (folder / truth).write_text("\n".join(sorted(lines)) + "\n")
    if layout != "tum":
        settings = dict(
            fx=K[0, 0], fy=K[1, 1], cx=K[0, 2], cy=K[1, 2], width=size[1], height=size[0], depth_scale_m=unit
        )
        (folder / "intrinsics.json").write_text(json.dumps(settings | dict(distortion=dict(coeffs=DISTORTION))))
    return poses, depths if with_depth else None, K, DISTORTION


def write_seven_scenes(folder: Path, rng, count, registered):
    """640 x 480; truth as (poses, depths in mm, K of the depth images, none)."""
    poses, size = random_poses(rng, count), (480, 640)
    images, depths = smooth_images(rng, count, size), random_depth(rng, count, size, 0.001)
    for i in range(count):
        depths[i][:40] = 65535
        write(folder / f"frame-{i:06}.color.png", images[i])
        write(folder / f"frame-{i:06}.depth{'.proj' if registered else ''}.png", depths[i])
        (folder / f"frame-{i:06}.pose.txt").write_text(
            "\n".join("\t ".join(f"{x:.8e}" for x in row) for row in poses[i])
        )
    f = 525.0 if registered else 585.0
    return poses, depths, np.array([[f, 0, 320], [0, f, 240], [0, 0, 1.0]]), []


def write_scannetpp(folder: Path, rng, count):
    """An iPhone folder with depth of a quarter of the size; truth as (poses, depths in mm, K of the images, none)."""
    poses, size = random_poses(rng, count), (192, 256)
    images, depths = smooth_images(rng, count, size), random_depth(rng, count, (48, 64), 0.001)
    K = np.array([[200.0, 0, 127.5], [0, 201.0, 95.5], [0, 0, 1]])
    frames = {}
    for i in range(count):
        write(folder / f"iphone/rgb/frame_{i:06}.jpg", images[i])
        write(folder / f"iphone/depth/frame_{i:06}.png", depths[i])
        frames[f"frame_{i:06}"] = dict(aligned_pose=poses[i].tolist(), intrinsic=K.tolist(), timestamp=i / 60)
    frames["frame_000099"] = frames["frame_000000"]  # of an image that was not extracted
    (folder / "iphone/pose_intrinsic_imu.json").write_text(json.dumps(frames))
    return poses, depths, K, []
