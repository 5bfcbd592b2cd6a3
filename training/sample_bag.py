"""Render the sample bag that ships in `resource/`: a hand-held loop of some metres in a furnished room, with exact truth.

python -m speed3r_ros.training.sample_bag resource/sample_bag
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import cv2
import numpy as np
import torch
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from torch import Tensor
from tqdm import tqdm

from speed3r_ros.convert import bag_types, info_from_K, ns_to_stamp
from speed3r_ros.kernels.raycast import raycast
from speed3r_ros.mapping.files import folder_written_whole
from speed3r_ros.mapping.trajectory import NANO, Trajectory
from speed3r_ros.training.scenes import eul, sample_scene
from speed3r_ros.training.textures import Rng, TextureBank

HEIGHT, WIDTH, RATE, FRAMES = 240, 320, 12, 216
FOCAL = WIDTH / 2 / math.tan(math.radians(35))
START_NS = 1_700_000_000 * NANO
FRAME_ID = "camera_optical_frame"
SEED, EXPOSURE, GAMMA = 25, 0.42, 0.6


def path() -> tuple[Tensor, Tensor]:
    """Camera-to-world R (N, 3, 3), t (N, 3) in metres: a loop of 4 m, looking ahead and to the sides, with a walker's sway."""
    s = torch.linspace(0, 2 * math.pi, FRAMES, dtype=torch.float64)
    t = torch.stack([0.8 * s.sin(), 0.02 * (9 * s).sin(), 0.55 * (1 - s.cos())], -1)
    yaw = math.radians(32) * (s + 0.4).sin() + 0.01 * (7 * s).sin()
    pitch = math.radians(6) * (2 * s).sin() + 0.008 * (9 * s).cos() - math.radians(4)
    return eul(yaw, pitch, 0.02 * (5 * s).sin()), t


def render(seed: int = SEED, every: int = 1) -> tuple[np.ndarray, Tensor, Tensor, np.ndarray]:
    """Images (N, H, W, 3) uint8 RGB, R, t and K (3, 3)."""
    R, t = path()
    R, t = R[::every], t[::every]
    K = torch.tensor([[FOCAL, FOCAL, (WIDTH - 1) / 2, (HEIGHT - 1) / 2, 0.0]])
    random = Rng("cpu", seed)
    textures = TextureBank("cpu", seed, 2)
    cameras = R[None].float(), t[None].float(), K, torch.zeros(1, dtype=torch.long)
    scene = sample_scene(random, 1, len(R), HEIGHT, WIDTH, textures.n, cameras=cameras)
    images = []
    for i in tqdm(range(len(R)), desc="rendering", unit="frame"):
        one = dict(scene, cam=scene["cam"][:, i : i + 1])
        rgb = raycast(one, textures.data, HEIGHT, WIDTH, 4).rgb
        images.append(rgb[0].permute(1, 2, 0).numpy())
    linear = np.stack(images)
    linear *= EXPOSURE / linear.mean()
    display = (linear / (1 + 0.35 * linear)).clip(0, 1) ** GAMMA
    return (255 * display + 0.5).astype(np.uint8), R, t, np.array([[FOCAL, 0, K[0, 2]], [0, FOCAL, K[0, 3]], [0, 0, 1]])


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    images, R, t, K = render()
    store = get_typestore(Stores.ROS2_JAZZY)
    truth = Trajectory()
    with folder_written_whole(folder) as partial:
        partial.rmdir()  # the writer makes its own folder
        writer = Writer(partial, version=9, storage_plugin=StoragePlugin.MCAP)
        with writer:
            kinds = {
                "/camera/image_raw/compressed": "sensor_msgs/msg/CompressedImage",
                "/camera/camera_info": "sensor_msgs/msg/CameraInfo",
            }
            topics = {topic: writer.add_connection(topic, kind, typestore=store) for topic, kind in kinds.items()}

            def write(topic: str, message: object, stamp_ns: int) -> None:
                writer.write(topics[topic], stamp_ns, store.serialize_cdr(message, kinds[topic]))

            for i, image in enumerate(images):
                stamp = START_NS + i * NANO // RATE
                jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
                header = bag_types.make("std_msgs/msg/Header", stamp=ns_to_stamp(stamp, bag_types), frame_id=FRAME_ID)
                write("/camera/camera_info", info_from_K(K, WIDTH, HEIGHT, stamp, FRAME_ID, bag_types), stamp)
                message = bag_types.make(
                    "sensor_msgs/msg/CompressedImage",
                    header=header,
                    format="rgb8; jpeg compressed bgr8",
                    data=jpeg.reshape(-1),
                )
                write("/camera/image_raw/compressed", message, stamp)
                T = np.eye(4)
                T[:3, :3], T[:3, 3] = R[i].numpy(), t[i].numpy()
                truth.append(stamp, T)
        truth.write_tum(partial / "groundtruth.tum")


if __name__ == "__main__":
    main()
