"""What the selection of blocks costs in accuracy: fewer blocks, blocks shared by neighbouring queries or by all heads.

    python benchmarks/selection.py --sequences 96

The shipped weights, which were trained with 32 blocks for each head and query block, on held-out rendered sequences, the
same ones for each row. Prints Markdown.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from speed3r_ros.kernels.coarse import coarse_attention
from speed3r_ros.kernels.frames import Visible
from speed3r_ros.kernels.selected import selected_attention
from speed3r_ros.model.attention import STRATEGIES, Tokens, dense
from speed3r_ros.model.config import EngineConfig
from speed3r_ros.model.engine import Engine
from speed3r_ros.training.evaluate import evaluate_rendered, header, table_row


def speed3r(group: int, heads_share: bool) -> object:
    """The strategy with one selection for `group` neighbouring query blocks, and for all heads if they share it."""

    def strategy(q: Tokens, k: Tokens, v: Tokens, fine: Visible, coarse: Visible, specials: int, top_k: int) -> Tensor:
        compressed, index = coarse_attention(q.pooled, k.pooled, v.pooled, coarse, fine, top_k, group)
        if heads_share:  # the mean of the heads' scores is one wide head's score
            wide = [x.pooled.transpose(1, 2).flatten(2)[:, None] for x in (q, k)]
            _, index = coarse_attention(
                wide[0].double(), wide[1].double(), wide[1].double(), coarse, fine, top_k, group
            )
            index = index.expand(-1, q.pooled.shape[1], -1, -1).contiguous()
        return selected_attention(q.fine, k.fine, v.fine, index, compressed, q.gate, fine, specials, group)

    return strategy


ROWS = [  # group, heads share, top_k
    (1, False, 32),
    (2, False, 32),
    (4, False, 32),
    (1, True, 32),
    (1, False, 16),
    (4, False, 16),
    (1, False, 8),
    (4, False, 8),
]


@torch.no_grad()
def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--views", type=int, nargs="*", default=[8, 24])
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    engine = Engine(EngineConfig(precision=args.precision))
    print(header("views: selection"))
    for views in args.views:
        for group, share, top_k in ROWS:
            STRATEGIES["selection"] = speed3r(group, share)
            row = evaluate_rendered(
                engine.network, args.sequences, views, engine.device, "selection", top_k, seed=100 + views
            )
            name = f"{top_k} blocks for {'all heads' if share else 'each head'} and {group} query blocks"
            print(table_row(f"{views}: {name}", row), flush=True)
        STRATEGIES["selection"] = dense
        row = evaluate_rendered(engine.network, args.sequences, views, engine.device, "selection", seed=100 + views)
        print(table_row(f"{views}: dense", row), flush=True)


if __name__ == "__main__":
    main()
