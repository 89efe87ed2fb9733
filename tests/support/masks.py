"""Trees as a mask sees them, drawn at random."""

from __future__ import annotations

import numpy as np

from mtr.tree.batch import build_batch
from mtr.tree.layout import View, merge
from mtr.tree.mask import FULL, Span, Tree
from mtr.tree.packing import Pack
from mtr.tree.plan import Tile
from support.trees import view


def tree_of(*groups_of_views: list[View], padding_to: int = 1) -> Tree:
    return build_batch(Pack(tuple(merge(views) for views in groups_of_views)), padding_to).tree


def random_chat(rng: np.random.Generator, turns: int, size: int) -> list[View]:
    """Thinking of earlier turns dropped, now and then none; segments of up to `size` tokens."""
    history = list(rng.integers(0, 50, rng.integers(1, size + 1)))
    views = []
    for turn in range(turns):
        thinking = list(rng.integers(0, 50, rng.integers(0, size + 1)))
        answer = list(rng.integers(0, 50, rng.integers(1, size + 1)))
        views.append(view(history, thinking + answer, 1.0, turn))
        history = history + answer + list(rng.integers(0, 50, rng.integers(1, size + 1)))
    return views


def random_forest(seed: int, size: int = 12, padding_to: int = 1) -> Tree:
    rng = np.random.default_rng(seed)
    chats = [random_chat(rng, int(rng.integers(1, 5)), size) for _ in range(rng.integers(1, 4))]
    return tree_of(*chats, padding_to=padding_to)


SPANS = [FULL, Span("sliding", 1), Span("sliding", 5), Span("sliding", 70), Span("chunked", 4), Span("chunked", 33)]


def plain_causal(tree: Tree, span: Span = FULL) -> list[Tile]:
    length = len(tree.subtree_end)
    return [Tile(0, length, 0, length)]
