"""What attention and FP8 cost the compact network in accuracy, on held-out rendered sequences, the same ones for each row.

    python benchmarks/accuracy.py --weights runs/lite3r/weights        # on a GPU with FP8 units
    python benchmarks/accuracy.py --sequences 1 --views 2              # on a CPU, float32 alone

Rows of `lite3r` are for weights that have its projections (docs/training.md): as trained, and with the projections at zero,
which leaves its chosen blocks alone. Intrinsics unknown. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy

import torch

from kernels import CUDA
from speed3r_ros.kernels import fp8
from speed3r_ros.model import weights
from speed3r_ros.model.network import Network
from speed3r_ros.training.evaluate import evaluate_rendered, header, table_row
from speed3r_ros.training.render import SPLITS

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp8": "fp8"}


def without_linear_branch(network: Network) -> Network:
    """A copy whose projections are zero."""
    network = copy.deepcopy(network)
    for block in network.across_views:
        block.proj_lin.weight.data.zero_()
    return network


@torch.no_grad()
def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="compact", help="name or folder")
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--views", type=int, nargs="*", default=[8, 24])
    parser.add_argument("--splits", nargs="*", default=list(SPLITS), choices=list(SPLITS))
    args = parser.parse_args()
    device = torch.device("cuda" if CUDA else "cpu")
    network = weights.load(args.weights).eval()
    kinds = [("dense", "dense", network), ("speed3r", "speed3r", network)]
    if network.across_views[0].proj_lin is not None:
        kinds.append(("lite3r", "lite3r", network))
        kinds.append(("lite3r, chosen blocks alone", "lite3r", without_linear_branch(network)))
    names = ["float32"]
    if CUDA:
        names = ["bf16", "fp8"] if fp8.on_units(torch.empty(0, device=device)) else ["bf16"]
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, {args.sequences} sequences a row\n")
    print(header("split, views: attention, precision"))
    for split in args.splits:
        for views in args.views:
            for name in names:
                for kind, attention, source in kinds:
                    measured = copy.deepcopy(source).to(device).precision(PRECISIONS[name])
                    row = evaluate_rendered(
                        measured, args.sequences, views, device, attention, seed=100 + views, split=split
                    )
                    print(table_row(f"{split}, {views}: {kind}, {name}", row), flush=True)


if __name__ == "__main__":
    main()
