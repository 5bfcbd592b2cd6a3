"""Which layers of a backbone bear a long key stride: the probe behind Spark3R's layer maps (model/spark3r.py).

    python benchmarks/layer_sensitivity.py --backbone pi3 --checkpoint PATH --images FOLDER    # on a GPU, some 300 frames
    python benchmarks/layer_sensitivity.py --tiny                                              # on a CPU, to see that it runs

Every layer gets the stride 32, then one layer at a time 256: it is sensitive if the error grows by more than 5 %. Which error
the paper took is not published; here it is the median distance of points, in the first camera's frame and relative to their
distance from it, from those of dense attention. Prints Markdown, and the option that uses the map.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import torch
from strategies import sequence
from torch import Tensor

from speed3r_ros.model.backbones.blocks import patch_grid
from speed3r_ros.model.backbones.checkpoints import SINGLE_VIEW
from speed3r_ros.model.backbones.pi3 import Pi3, Pi3Config
from speed3r_ros.model.backbones.registry import BACKBONES, load_backbone
from speed3r_ros.model.backbones.results import Reconstruction, invert
from speed3r_ros.model.spark3r import Spark3R, probe


def read(folder: Path, height: int, width: int, count: int) -> Tensor:
    """The first images of a folder, by name, as (1, N, 3, H, W) in [0, 1]. ValueError if there are none, or one is none."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg"))[:count]
    if not paths:
        raise ValueError(f"{folder}: no *.png or *.jpg in it; give a folder of a sequence's frames")
    images = []
    for path in paths:
        image = cv2.imread(str(path))
        if image is None:
            raise ValueError(f"{path}: not an image; take it out of the folder")
        images.append(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)[..., ::-1].copy())
    return torch.stack([torch.from_numpy(x) for x in images]).permute(0, 3, 1, 2)[None] / 255


def points(out: Reconstruction) -> Tensor:
    """Points of all views in the first camera's frame, every 7th pixel, (X, 3)."""
    T = invert(out.T_world_cam[0, :1])[0]
    return out.world_points()[0, :, ::7, ::7].flatten(0, 2) @ T[:3, :3].mT + T[:3, 3]


@torch.inference_mode()
def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several_views = [name for name in BACKBONES if name not in SINGLE_VIEW]
    parser.add_argument("--backbone", choices=several_views, default="pi3")
    parser.add_argument("--checkpoint")
    parser.add_argument("--images", type=Path)
    parser.add_argument(
        "--size", type=int, nargs=2, default=(392, 504), help="height and width, multiples of 14 pixels"
    )
    parser.add_argument("--views", type=int, default=300)
    parser.add_argument("--stride", type=int, default=32)
    parser.add_argument("--raised", type=int, default=256)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        torch.manual_seed(0)
        model, images = Pi3(Pi3Config(128, 2, 1, 5, 8, 5, 1, 64)).eval(), sequence(9, 56, 56, torch.device("cpu"))
        args.stride, args.raised = 2, 8
    elif args.checkpoint and args.images:
        try:
            patch_grid(*args.size)
            images = read(args.images, *args.size, args.views)
            model = load_backbone(args.backbone, args.checkpoint)
        except (ValueError, OSError) as error:
            parser.exit(1, f"{parser.prog}: {error}\n")
        if not torch.cuda.is_available():
            parser.exit(1, f"{parser.prog}: torch sees no CUDA GPU; to see that it runs, give --tiny\n")
        model, images = model.precision(torch.bfloat16).cuda(), images.cuda()
    else:
        parser.error("give --checkpoint and --images, or --tiny")
    truth = points(model(images, attention="dense"))

    def error(strategy: Spark3R) -> float:
        moved = points(model(images, attention=strategy)) - truth
        return float((moved.norm(dim=1) / truth.norm(dim=1).clamp(min=1e-6)).median())

    sensitive, ratios = probe(error, len(model.across_views), args.stride, args.raised)
    print(f"{args.backbone}, {images.shape[1]} views, strides {args.stride} and {args.raised}\n")
    print("| layer | error, times that without the longer stride |\n|---|---|")
    for layer, ratio in enumerate(ratios):
        print(f"| {layer} | {ratio:.3f}{' (sensitive)' if layer in sensitive else ''} |")
    print(f"\nSpark3R(sensitive=frozenset({sorted(sensitive)}))")


if __name__ == "__main__":
    main()
