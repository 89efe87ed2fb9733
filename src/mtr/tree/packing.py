"""The views of a step become packs: which views form a tree, and which trees share a row.

    single_pass:  all views of a conversation form one tree, cut into runs where it would exceed max_tokens
      merge step: conversations of a step that share a prefix form one tree too

          S Q1 a         S ─┬─ Q1 ─┬─ a         k samples of a question, one long system prompt with tools
          S Q1 b            │      └─ b
          S Q2 c            └─ Q2 ─── c
    per_turn:     one view, one tree; unpacked, one tree a pack too

Grouping changes speed and memory only: each view keeps its targets and weights, wherever it goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mtr.tree.layout import Layout, Tree, View, count_pairs

Strategy = Literal["single_pass", "per_turn", "per_turn_unpacked"]
Merge = Literal["conversation", "step"]
_WORTHWHILE = 1 / 32
"""Share of its tokens that a conversation must have in common with a tree to join it: smaller trees pack better."""

_SHARES = (2, 1.4, 1.2, 1, 0.5, 0.25, 0)
"""Sizes of trees that are tried with several processes, as parts of what each would have of the fewest tokens. Above 1
for the prefixes that smaller trees repeat; 0 keeps all conversations apart."""


@dataclass(frozen=True)
class Pack:
    """Layouts that share one row."""

    layouts: tuple[Layout, ...]

    @property
    def num_tokens(self) -> int:
        return sum(layout.num_tokens for layout in self.layouts)


@dataclass(frozen=True)
class Cost:
    """Relative cost of running a layout, in units of one token's linear layers."""

    pair: float = 0.0
    """Of one query-key pair, summed over all layers."""
    target: float = 0.0
    """Of one target in the output head."""
    spans: tuple[tuple[int | None, float], ...] = ((None, 1.0),)
    """Windows of the attention layers, each with its share of the layers."""

    def of(self, layouts: Sequence[Layout]) -> float:
        total = 0.0
        for layout in layouts:
            pairs = (
                sum(share * count_pairs(layout.position_ids, span) for span, share in self.spans) if self.pair else 0.0
            )
            total += layout.num_tokens + self.pair * pairs + self.target * len(layout.predictor)
        return total


BY_TOKENS = Cost()


def build_layouts(views: Sequence[View], strategy: Strategy, max_tokens: int) -> list[Layout]:
    """The trees of one conversation, each of at most `max_tokens` tokens; none if there is no view."""
    return [tree.layout() for tree in _build_trees(views, strategy, max_tokens)]


def merge_conversations(
    conversations: Sequence[Sequence[View]],
    strategy: Strategy,
    merge: Merge,
    max_tokens: int,
    num_processes: int = 1,
) -> list[Layout]:
    """The trees of a whole step, each of at most `max_tokens` tokens.

    With several processes and `merge: step`, trees stay small enough to be shared out evenly: of several sizes the
    one is taken that leaves the busiest process the fewest tokens.
    """
    if strategy != "single_pass" or merge == "conversation":
        return [layout for views in conversations for layout in build_layouts(views, strategy, max_tokens)]
    order = sorted(conversations, key=_sort_key)
    best = _merge_neighbours(order, max_tokens, max_tokens)
    if num_processes > 1:
        share = sum(tree.num_tokens for tree in best) // num_processes
        limits = [min(int(share * part), max_tokens) for part in _SHARES]
        smaller = [_merge_neighbours(order, max_tokens, limit) for limit in limits]
        best = min([best, *smaller], key=lambda trees: _busiest(trees, num_processes))
    return [tree.layout() for tree in best]


def _build_trees(views: Sequence[View], strategy: Strategy, max_tokens: int) -> list[Tree]:
    trees: list[Tree] = []
    for view in views:
        assert view.num_tokens <= max_tokens, "max_length <= max_tokens keeps every view within a pack"
        if strategy != "single_pass" or not trees or not trees[-1].add(view, max_tokens):
            trees.append(Tree())
            trees[-1].add(view)
    return trees


def _sort_key(views: Sequence[View]) -> bytes:
    """Sorted by their last context, conversations are next to those that they share most with."""
    return views[-1].ids.astype(">u4").tobytes() if views else b""


def _merge_neighbours(conversations: Sequence[Sequence[View]], max_tokens: int, limit: int) -> list[Tree]:
    """Each conversation joins the tree of the one before where that saves enough tokens and stays within `limit`."""
    trees: list[Tree] = []
    for views in conversations:
        for tree in _build_trees(views, "single_pass", max_tokens):
            shared = trees[-1].shared_tokens(tree) if trees else 0
            if shared >= _WORTHWHILE * tree.num_tokens and trees[-1].num_tokens + tree.num_tokens - shared <= limit:
                trees[-1].add_all(tree)
            else:
                trees.append(tree)
    return trees


def _busiest(trees: Sequence[Tree], num_processes: int) -> int:
    """Tokens of the busiest process, if the largest tree always goes to the least loaded process."""
    loads = [0] * num_processes
    for size in sorted((tree.num_tokens for tree in trees), reverse=True):
        loads[loads.index(min(loads))] += size
    return max(loads)


def build_packs(
    layouts: Sequence[Layout],
    max_tokens: int,
    num_processes: int = 1,
    cost: Cost = BY_TOKENS,
    strategy: Strategy = "single_pass",
) -> list[list[Pack]]:
    """Packs for each process: the most expensive layout goes to the least loaded process, then first-fit decreasing.

    A process may end up with no pack. The result depends on the arguments alone, so every process can compute it.

    Args:
        strategy: `per_turn_unpacked` gives each layout a pack of its own.
    """
    costs = [cost.of([layout]) for layout in layouts]
    shares: list[list[Layout]] = [[] for _ in range(num_processes)]
    loads = [0.0] * num_processes
    for index in sorted(range(len(layouts)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        shares[least].append(layouts[index])
        loads[least] += costs[index]
    if strategy == "per_turn_unpacked":
        return [[Pack((layout,)) for layout in share] for share in shares]
    return [_first_fit(sorted(share, key=lambda x: -x.num_tokens), max_tokens) for share in shares]


def imbalance(packs: Sequence[Sequence[Pack]], cost: Cost) -> float:
    """Cost of the busiest process over the mean: 1 is perfect, 2 means that half of the time is spent waiting."""
    loads = [sum(cost.of(pack.layouts) for pack in share) for share in packs]
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def split_pack(pack: Pack, max_tokens: int) -> list[Pack]:
    """The targets of a pack in packs of at most `max_tokens`, or of its longest view's size if that is larger."""
    limit = max([max_tokens, *(view.num_tokens for layout in pack.layouts for _, view in layout.leaves)])
    layouts: list[Layout] = []
    for layout in pack.layouts:
        views = [view for _, view in layout.leaves]
        layouts += [layout] if layout.num_tokens <= limit else build_layouts(views, "single_pass", limit)
    return _first_fit(sorted(layouts, key=lambda x: -x.num_tokens), limit)


def idle_pack() -> Pack:
    """One token without targets, for a process that has to take part in a forward but has no pack."""
    token = np.zeros(1, np.int64)
    return Pack((Layout(token, token, token + 1, token - 1, token[:0], token[:0], np.zeros(0), leaves=()),))


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
