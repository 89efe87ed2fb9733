"""Claims: the tree of a group is its views, no more and no less: every path is a view, every token sees its ancestors,
and the targets weigh what they weigh in the separate sequences, whatever the views share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtr.flops import visible_pairs
from mtr.layout import Ints, Layout, Tree, View, merge, path_to, unroll
from mtr.mask import FULL, Span

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


def test_drawing() -> None:
    layout = merge(DRAWING)
    assert layout.input_ids.tolist() == [10, 11, 12, 13, 14, 15, 11]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 1, 2]
    assert layout.parent.tolist() == [-1, 0, 1, 2, 3, 0, 5]
    assert layout.subtree_end.tolist() == [7, 5, 5, 5, 5, 7, 7]
    triples = sorted(zip(layout.predictor.tolist(), layout.target_id.tolist(), layout.weight.tolist(), strict=True))
    assert triples == [(0, 15, 1.0), (2, 13, 1.0), (3, 14, 1.0), (5, 11, 1.0)]
    assert [leaf for leaf, _ in layout.leaves] == [6, 4]


def test_no_thinking_is_one_path() -> None:
    layout = merge([view([1], [2, 3]), view([1, 2, 3, 4], [5])])
    assert layout.parent.tolist() == [-1, 0, 1, 2, 3]
    assert layout.subtree_end.tolist() == [5] * 5
    assert layout.predictor.tolist() == [0, 1, 3]
    assert layout.target_id.tolist() == [2, 3, 5]


def test_one_token_predicts_several_successors() -> None:
    layout = merge([view([1], [2], 0.5), view([1], [3]), view([1], [3], 0.25)])
    triples = sorted(zip(layout.predictor.tolist(), layout.target_id.tolist(), layout.weight.tolist(), strict=True))
    assert triples == [(0, 2, 0.5), (0, 3, 1.25)]
    assert layout.num_tokens == 3


def test_different_first_tokens_are_sibling_roots() -> None:
    layout = merge([view([1], [2]), view([3], [4])])
    assert sorted(layout.parent.tolist()) == [-1, -1, 0, 2]
    assert layout.subtree_end.tolist() == [2, 2, 4, 4]


@given(groups)
@settings(max_examples=250, deadline=None)
def test_layout_is_the_tree_of_its_views(views: list[View]) -> None:
    layout = merge(views)
    check_layout(layout, views)
    assert same_views(unroll(layout), views)


@given(groups)
@settings(max_examples=60, deadline=None)
def test_tree_grows_by_what_it_says(views: list[View]) -> None:
    tree = Tree()
    for one in views:
        before = tree.num_tokens
        grown = merge([*(other for other, *_ in tree._views), one]).num_tokens
        if before:
            assert not tree.add(one, grown - 1), "one token too few"
        assert tree.num_tokens == before
        assert tree.add(one, grown)
        assert tree.num_tokens == grown
        assert tree.add(one, grown), "it is there already"
    assert tree.layout().num_tokens == tree.num_tokens


@given(groups, groups)
@settings(max_examples=60, deadline=None)
def test_what_two_trees_share_is_what_their_union_saves(one: list[View], other: list[View]) -> None:
    trees = [Tree(), Tree(), Tree()]
    for tree, views in zip(trees, (one, other, [*one, *other]), strict=True):
        for each in views:
            tree.add(each)
    shared = trees[0].num_tokens + trees[1].num_tokens - trees[2].num_tokens
    assert trees[0].shared_tokens(trees[1]) == trees[1].shared_tokens(trees[0]) == shared


@given(chats(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_order_of_views_changes_no_target(views: list[View], random: object) -> None:
    shuffled = list(views)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert targets_of_layouts(merge(shuffled)) == targets_of_layouts(merge(views))
    assert merge(shuffled).num_tokens == merge(views).num_tokens


def test_trunk_comes_first() -> None:
    """Of two children the larger subtree is laid out first, so that the trunk is one run."""
    views = [view([1], [8, 8, 8]), view([1], [9, 9, 9, 9])]
    for order in (views, views[::-1]):
        assert merge(order).input_ids.tolist() == [1, 9, 9, 9, 9, 8, 8, 8]


@given(groups, st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_visible_pairs(views: list[View], span: int) -> None:
    layout = merge(views)
    position = layout.position_ids
    seen = visible(layout)
    assert visible_pairs(position, FULL) == seen.sum()
    assert (
        visible_pairs(position, Span("sliding", span)) == (seen & (position[:, None] - position[None, :] < span)).sum()
    )


def shifted(values: Ints, at: int, by: int) -> Ints:
    changed = values.copy()
    changed[at] += by
    return changed


def swapped_weights(layout: Layout) -> Layout:
    return replace(layout, weight=layout.weight * np.where(np.arange(len(layout.weight)) == 0, 2.0, 1.0))


BREAKS: dict[str, Callable[[Layout], Layout]] = {
    # the classic error: the answer after the thinking is predicted by the token before the copy in the trunk
    "predictor": lambda x: replace(x, predictor=np.where(x.predictor == 5, 0, x.predictor)),
    "predictor shifted": lambda x: replace(x, predictor=x.predictor + 1),
    "first target of the branch left out": lambda x: replace(
        x, predictor=x.predictor[1:], target_id=x.target_id[1:], weight=x.weight[1:]
    ),
    "target": lambda x: replace(x, target_id=shifted(x.target_id, 0, 1)),
    "weight": swapped_weights,
    "position": lambda x: replace(x, position_ids=shifted(x.position_ids, 5, 1)),
    "position is the index": lambda x: replace(x, position_ids=np.arange(x.num_tokens)),
    "subtree_end": lambda x: replace(x, subtree_end=shifted(x.subtree_end, 3, 1)),
    "subtree_end too near": lambda x: replace(x, subtree_end=shifted(x.subtree_end, 0, -1)),
    "plain causal": lambda x: replace(x, subtree_end=np.full(x.num_tokens, x.num_tokens)),
    "parent": lambda x: replace(x, parent=shifted(x.parent, 5, 1)),
    "input": lambda x: replace(x, input_ids=shifted(x.input_ids, 6, 1)),
}


def test_check_accepts_the_unbroken_drawing() -> None:
    check_layout(merge(DRAWING), DRAWING)


@pytest.mark.parametrize("name", BREAKS)
def test_check_sees_what_is_broken(name: str) -> None:
    with pytest.raises(AssertionError):
        check_layout(BREAKS[name](merge(DRAWING)), DRAWING)


def test_unroll_reads_the_tree_and_not_the_leaves() -> None:
    layout = merge(DRAWING)
    broken = replace(layout, input_ids=shifted(layout.input_ids, 5, 1))
    assert not same_views(unroll(broken), DRAWING)


@pytest.mark.parametrize("bad", [view([], [1]), view([1], [])])
def test_prompt_and_completion_are_needed(bad: View) -> None:
    with pytest.raises(AssertionError):
        merge([bad])
