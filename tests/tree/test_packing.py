"""Claims: grouping changes no target: cut trees, per-turn trees and packs hold each target with its weight, none is
over its budget, and every process computes the same packs.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trees import chats, check_layout, groups, same_views, targets_of_layouts, targets_of_views, view

from mtr.tree.layout import Layout, View, merge, unroll
from mtr.tree.packing import Pack, build_layouts, build_packs


@given(groups, st.integers(0, 12))
@settings(max_examples=150, deadline=None)
def test_cut_trees_keep_all_targets(views: list[View], room: int) -> None:
    budget = max(one.num_tokens for one in views) + room
    layouts = build_layouts(views, "single_pass", budget)
    assert all(layout.num_tokens <= budget for layout in layouts)
    assert targets_of_layouts(*layouts) == targets_of_views(views)
    unrolled = [one for layout in layouts for one in unroll(layout)]
    assert same_views(unrolled, views)
    for layout in layouts:
        check_layout(layout, [one for _, one in layout.leaves])


@given(chats())
@settings(max_examples=40, deadline=None)
def test_room_for_all_is_one_tree(views: list[View]) -> None:
    (layout,) = build_layouts(views, "single_pass", sum(one.num_tokens for one in views))
    assert np.array_equal(layout.input_ids, merge(views).input_ids)


def test_tree_is_cut_only_where_it_must_be() -> None:
    views = [view([1, 2], [3, 4]), view([1, 2], [5, 6]), view([1, 2], [7, 8])]
    assert [x.num_tokens for x in build_layouts(views, "single_pass", 8)] == [8]
    assert [x.num_tokens for x in build_layouts(views, "single_pass", 7)] == [6, 4]
    assert [x.num_tokens for x in build_layouts(views, "single_pass", 5)] == [4, 4, 4]


@given(groups)
@settings(max_examples=60, deadline=None)
def test_per_turn_is_one_view_a_tree(views: list[View]) -> None:
    layouts = build_layouts(views, "per_turn", 100)
    assert [len(layout.leaves) for layout in layouts] == [1] * len(views)
    assert [layout.num_tokens for layout in layouts] == [one.num_tokens for one in views]
    assert all((layout.parent == np.arange(layout.num_tokens) - 1).all() for layout in layouts)
    assert targets_of_layouts(*layouts) == targets_of_views(views)


def test_no_view_no_tree() -> None:
    assert build_layouts([], "single_pass", 10) == []
    assert build_packs([], 10, 2) == [[], []]


def test_view_over_the_budget_is_refused() -> None:
    with pytest.raises(AssertionError):
        build_layouts([view([1, 2], [3])], "single_pass", 2)


def chain(tokens: int, first: int) -> Layout:
    return merge([view([first], range(1, tokens))])


@st.composite
def layout_lists(draw: st.DrawFn) -> list[Layout]:
    sizes = draw(st.lists(st.integers(2, 20), max_size=12))
    return [chain(size, 100 + i) for i, size in enumerate(sizes)]


def names(packs: list[list[Pack]]) -> list[list[list[int]]]:
    return [[[int(layout.input_ids[0]) for layout in pack.layouts] for pack in share] for share in packs]


@given(layout_lists(), st.integers(20, 50), st.integers(1, 16))
@settings(max_examples=150, deadline=None)
def test_packs_hold_every_layout_once(layouts: list[Layout], budget: int, processes: int) -> None:
    packs = build_packs(layouts, budget, processes)
    assert len(packs) == processes
    held = [id(layout) for share in packs for pack in share for layout in pack.layouts]
    assert sorted(held) == sorted(map(id, layouts))
    assert all(0 < pack.num_tokens <= budget for share in packs for pack in share)
    assert names(packs) == names(build_packs(layouts, budget, processes))


@given(layout_lists(), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_load_is_even(layouts: list[Layout], processes: int) -> None:
    """Two processes differ by no more than the largest layout."""
    loads = [sum(pack.num_tokens for pack in share) for share in build_packs(layouts, 50, processes)]
    assert max(loads) - min(loads) <= max((layout.num_tokens for layout in layouts), default=0)


def test_more_processes_than_layouts() -> None:
    layouts = [chain(3, 100), chain(5, 101)]
    assert names(build_packs(layouts, 8, 4)) == [[[101]], [[100]], [], []]
    assert names(build_packs(layouts, 8, 1)) == [[[101, 100]]]
    assert names(build_packs(layouts, 7, 1)) == [[[101], [100]]]


def test_first_fit_fills_the_gaps() -> None:
    layouts = [chain(size, 100 + size) for size in (2, 6, 4, 7)]
    assert names(build_packs(layouts, 10)) == [[[107, 102], [106, 104]]]
