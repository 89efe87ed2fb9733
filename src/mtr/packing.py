"""The views of a step become packs: which views form a tree, and which trees share a row.

    single_pass:  all views of a conversation form one tree, cut into runs where it would exceed max_tokens
    per_turn:     one view, one tree

Grouping changes speed and memory only: each view keeps its targets and weights, wherever it goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mtr.layout import Layout, Tree, View

Strategy = Literal["single_pass", "per_turn"]


@dataclass(frozen=True)
class Pack:
    """Layouts that share one row."""

    layouts: tuple[Layout, ...]

    @property
    def num_tokens(self) -> int:
        return sum(layout.num_tokens for layout in self.layouts)


def build_layouts(views: Sequence[View], strategy: Strategy, max_tokens: int) -> list[Layout]:
    """The trees of one conversation, each of at most `max_tokens` tokens; none if there is no view."""
    trees: list[Tree] = []
    for view in views:
        assert view.num_tokens <= max_tokens, "max_length <= max_tokens keeps every view within a pack"
        if strategy == "per_turn" or not trees or trees[-1].num_tokens + trees[-1].new_tokens(view.ids) > max_tokens:
            trees.append(Tree())
        trees[-1].add(view)
    return [tree.layout() for tree in trees]


def build_packs(layouts: Sequence[Layout], max_tokens: int, num_processes: int = 1) -> list[list[Pack]]:
    """Packs for each process: the largest layout goes to the least loaded process, then first-fit decreasing.

    A process may end up with no pack. The result depends on the arguments alone, so every process can compute it.
    """
    shares: list[list[Layout]] = [[] for _ in range(num_processes)]
    for layout in sorted(layouts, key=lambda x: -x.num_tokens):
        min(shares, key=lambda share: sum(x.num_tokens for x in share)).append(layout)
    return [_first_fit(share, max_tokens) for share in shares]


def _first_fit(layouts: Sequence[Layout], max_tokens: int) -> list[Pack]:
    bins: list[list[Layout]] = []
    room: list[int] = []
    for layout in layouts:
        index = next((i for i, left in enumerate(room) if left >= layout.num_tokens), None)
        if index is None:
            bins.append([])
            room.append(max_tokens)
            index = -1
        bins[index].append(layout)
        room[index] -= layout.num_tokens
    return [Pack(tuple(layouts)) for layouts in bins]
