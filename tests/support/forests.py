"""Packs of random trees that fork at and around the borders of chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from hypothesis import strategies as st

from mtr.recurrence.chunks import ChunkPlan
from mtr.recurrence.diagonal import scan_chunks
from mtr.recurrence.levels import scan_levels
from mtr.recurrence.segments import LevelPlan
from mtr.tree.layout import View
from mtr.tree.mask import Tree
from support.masks import tree_of
from support.trees import view


def near(*borders: int) -> st.SearchStrategy[int]:
    """One, two and three, and each border with its neighbours."""
    return st.sampled_from(sorted({1, 2, 3, *(b + d for b in borders for d in (-1, 0, 1) if b + d > 0)}))


@st.composite
def forests(draw: st.DrawFn, chunk: int = 4, most_views: int = 5) -> Tree:
    """Up to three trees, padded or not. Branches begin after any token, and have one token or more."""
    fresh = itertools.count()
    lengths = near(chunk, 2 * chunk)
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        paths = [[next(fresh) for _ in range(1 + draw(lengths))]]
        for _ in range(draw(st.integers(0, most_views - 1))):
            above = draw(st.sampled_from(paths))
            shared = above[: min(draw(lengths), len(above))]
            paths.append([*shared, *(next(fresh) for _ in range(draw(lengths)))])
        groups.append([_view(path, turn) for turn, path in enumerate(paths)])
    return tree_of(*groups, padding_to=draw(st.sampled_from([1, 8, 64])))


def _view(ids: list[int], turn: int) -> View:
    return view(ids[:1], ids[1:], 1.0, turn)


def chain_of_forks(turns: int, length: int) -> Tree:
    """A trunk with a branch of this length after every turn."""
    fresh = itertools.count()
    trunk = [next(fresh) for _ in range(length)]
    views = []
    for turn in range(turns):
        views.append(_view([*trunk, *(next(fresh) for _ in range(length))], turn))
        trunk = [*trunk, *(next(fresh) for _ in range(length))]
    return tree_of(views)


def forked_branches() -> Tree:
    trunk = [1, 2, 3]
    left, right = [*trunk, 4, 5, 6], [*trunk, 7, 8, 9, 10]
    tails = [[*left, 11, 12, 13], [*left, 14, 15, 16, 17], [*right, 18, 19, 20, 21, 22], [*right, 23, 24, 25]]
    return tree_of([view(ids[:1], ids[1:], 1.0, turn) for turn, ids in enumerate(tails)])


def num_used(tree: Tree) -> int:
    """Tokens without the padding."""
    return int(np.flatnonzero(tree.parent >= 0)[-1]) + 1


CHUNKED = st.sampled_from([1, 4, 16, 64]).flatmap(lambda size: st.tuples(forests(size), st.just(size)))
"""Trees, and sizes of their chunks."""


def _continued(plan: ChunkPlan, another: Callable[[torch.Tensor], torch.Tensor]) -> ChunkPlan:
    levels = tuple(level._replace(above=another(level.above)) for level in plan.levels)
    return replace(plan, above=torch.cat([level.above for level in levels]), levels=levels)


WRONG_STATES: dict[str, Callable[[ChunkPlan], ChunkPlan]] = {
    "end of the chunk above": lambda plan: replace(plan, used=plan.valid.sum(1)[plan.above]),
    "one token too early": lambda plan: replace(plan, used=(plan.used - 1).clamp(min=1)),
    "a sibling's": lambda plan: _continued(plan, lambda above: above.roll(1)),
    "the root's": lambda plan: _continued(plan, torch.zeros_like),
}
"""Faults of a plan: the state that a chunk continues is that of another place."""


def _another_above(plan: LevelPlan, another: Callable[[torch.Tensor], torch.Tensor]) -> LevelPlan:
    levels = tuple(
        tuple(rows if rows.above is None else rows._replace(above=another(rows.above)) for rows in level)
        for level in plan.levels
    )
    return replace(plan, levels=levels)


def _filled_with_tokens(plan: LevelPlan) -> LevelPlan:
    return replace(plan, gather=torch.where(plan.gather == plan.num_tokens, plan.num_tokens - 1, plan.gather))


WRONG_LEVELS: dict[str, Callable[[LevelPlan], LevelPlan]] = {
    "state of a sibling": lambda plan: _another_above(plan, lambda above: above.roll(1)),
    "state of the first segment": lambda plan: _another_above(plan, torch.zeros_like),
    "padding that moves a state": _filled_with_tokens,
}
"""The same for levels of segments."""


# --- ways along a tree, as recurrences without matrices take them -----------------------------------------------------


def by_levels(plan: LevelPlan) -> Callable[..., torch.Tensor]:
    return lambda scan, _, inputs: scan_levels(scan, inputs, plan)


def by_chunks(plan: ChunkPlan) -> Callable[..., torch.Tensor]:
    return partial(scan_chunks, plan=plan)
