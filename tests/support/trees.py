"""Views to merge, and what must hold of the layouts that come of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mtr.tree.layout import Layout, View, path_to

Weights = dict[tuple[tuple[int, ...], int], float]
"""Of each (what comes before, target)."""


def view(prompt: Sequence[int], completion: Sequence[int], weight: Any = 1.0, turn: int = 0) -> View:
    weights = np.broadcast_to(np.asarray(weight, np.float64), len(completion)).copy()
    return View(np.array(prompt, np.int64), np.array(completion, np.int64), weights, turn)


@st.composite
def free_views(draw: st.DrawFn) -> list[View]:
    """Views over few token ids: they share prefixes, contain each other and repeat."""
    ids = st.integers(0, draw(st.integers(0, 2)))
    count = draw(st.integers(1, 6))
    views = []
    for turn in range(count):
        prompt = draw(st.lists(ids, min_size=1, max_size=6))
        completion = draw(st.lists(ids, min_size=1, max_size=5))
        size = len(completion)
        weights = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=size, max_size=size))
        views.append(view(prompt, completion, weights, turn))
    return views


@st.composite
def chats(draw: st.DrawFn) -> list[View]:
    """Views of a conversation whose template drops the thinking of earlier turns, as the paper has them."""
    ids = st.integers(0, 3)
    history = draw(st.lists(ids, min_size=1, max_size=4))
    views = []
    for turn in range(draw(st.integers(1, 4))):
        thinking = draw(st.lists(ids, max_size=5))
        answer = draw(st.lists(ids, min_size=1, max_size=4))
        views.append(view(history, thinking + answer, draw(st.sampled_from([0.5, 1.0])), turn))
        history = history + answer + draw(st.lists(ids, min_size=1, max_size=3))
    return views


groups = st.one_of(free_views(), chats())


def targets_of_views(views: Sequence[View]) -> Weights:
    """In the separate sequences."""
    found: Weights = defaultdict(float)
    for one in views:
        ids, first = one.ids.tolist(), len(one.prompt_ids)
        for i, weight in enumerate(one.weights.tolist()):
            if weight > 0:
                found[tuple(ids[: first + i]), ids[first + i]] += weight
    return found


def targets_of_layouts(*layouts: Layout) -> Weights:
    found: Weights = defaultdict(float)
    for layout in layouts:
        for predictor, target, weight in zip(layout.predictor, layout.target_id, layout.weight, strict=True):
            found[tuple(layout.input_ids[path_to(layout, int(predictor))].tolist()), int(target)] += weight
    return found


def visible(layout: Layout) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    q, k = np.indices((layout.num_tokens, layout.num_tokens))
    seen: np.ndarray[tuple[int, int], np.dtype[np.bool_]] = (k <= q) & (q < layout.subtree_end[k])
    return seen


def check_layout(layout: Layout, views: Sequence[View]) -> None:
    """Assert that the layout is the tree of the views."""
    paths = [path_to(layout, index) for index in range(layout.num_tokens)]
    assert layout.position_ids.tolist() == [len(path) - 1 for path in paths], "a position is no depth"
    seen = visible(layout)
    for index, path in enumerate(paths):
        assert np.flatnonzero(seen[index]).tolist() == path.tolist(), "visible is not ancestor"
    contexts = [tuple(layout.input_ids[path].tolist()) for path in paths]
    prefixes = {tuple(one.ids[: i + 1].tolist()) for one in views for i in range(one.num_tokens)}
    assert len(set(contexts)) == len(contexts), "two tokens have one path"
    assert set(contexts) == prefixes, "the paths are not the prefixes of the views"
    assert (layout.weight > 0).all()
    assert len(set(zip(layout.predictor, layout.target_id, strict=True))) == len(layout.predictor), "a target twice"
    assert targets_of_layouts(layout) == targets_of_views(views), "other targets"


def same_views(ones: Sequence[View], others: Sequence[View]) -> bool:
    def plain(one: View) -> tuple[list[int], list[int], list[float], int]:
        return one.prompt_ids.tolist(), one.completion_ids.tolist(), one.weights.tolist(), one.turn

    return [*map(plain, ones)] == [*map(plain, others)]


# The drawing of layout.py, ids: H1 = 10, A1 = 11, H2 = 12, T2 = 13, A2 = 14, T1 = 15.
DRAWING = [view([10], [15, 11], turn=0), view([10, 11, 12], [13, 14], turn=1)]
