"""How many blocks does FlexAttention visit, and how many would the visible pairs need at least?

    python benchmarks/blocks.py --json benchmarks/results/blocks.json

Counted, not timed: the non-empty blocks of the block mask for one conversation of 8 turns of 200 + 1,500 + 300 tokens
(user, thinking, response), compared with pairs / block size squared, which is the minimum for any layout, and with one
sequence per turn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mtr.bench.synthetic import Shape, make_views
from mtr.files import write_json
from mtr.tree.layout import Layout
from mtr.tree.mask import Tree, block_mask
from mtr.tree.packing import build_layouts

BLOCK = 128


def blocks(layout: Layout) -> tuple[int, int]:
    """Number of non-empty blocks of a layout, and how many of them are only partly visible."""
    tree = Tree(torch.from_numpy(layout.subtree_end), torch.from_numpy(layout.position_ids), layout.parent)
    mask = block_mask(tree, block_size=BLOCK)
    assert mask.full_kv_num_blocks is not None
    partial, full = int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum())
    return partial + full, partial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument(
        "--words", type=int, nargs=3, default=[200, 1500, 300], metavar=("USER", "THINKING", "RESPONSE")
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    (views,) = make_views(Shape(arguments.turns, *arguments.words), 1, 4096)
    (tree,) = build_layouts(views, "single_pass", 2**20)
    apart = build_layouts(views, "per_turn", 2**20)
    visited, partial = blocks(tree)
    least = int((tree.position_ids + 1).sum()) / BLOCK**2
    result = {
        "turns": arguments.turns,
        "words": arguments.words,
        "block_size": BLOCK,
        "num_tokens": tree.num_tokens,
        "blocks": visited,
        "partial_blocks": partial,
        "pair_minimum": least,
        "over_minimum": visited / least - 1,
        "per_turn_blocks": sum(blocks(layout)[0] for layout in apart),
        "dense_causal_blocks": (-(-tree.num_tokens // BLOCK)) * (-(-tree.num_tokens // BLOCK) + 1) // 2,
    }
    print("\n".join(f"{name:<22}{value}" for name, value in result.items()))
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
