"""Claims: the tree of a group is its views, no more and no less: every path is a view, every token sees its ancestors,
and the targets weigh what they weigh in the separate sequences, whatever the views share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trees import DRAWING, chats, check_layout, groups, same_views, targets_of_layouts, view, visible

from mtr.model.flops import visible_pairs
from mtr.tree.layout import Ints, Layout, Tree, View, merge, unroll
from mtr.tree.mask import FULL, Span


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
