"""Claims: segments partition the row up to its padding and are cut at every fork and nowhere else, so that each
continues the last token of the one above it; a convolution's plan has the path of every token before it; levels hold
each segment once, in rows of similar length, each below its own parent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forests import chain_of_forks, forests, num_used
from support.masks import tree_of
from support.trees import DRAWING

from mtr.recurrence.segments import Segments, convolution_plan, level_plan, segments
from mtr.tree.mask import Tree

TREES = st.one_of(forests(1), forests(4), forests(16))


def children_of(parent: Any) -> list[int]:
    return [int((parent == token).sum()) for token in range(len(parent))]


def check_segments(found: Segments, tree: Tree) -> None:
    parent, children = tree.parent, children_of(tree.parent)
    assert found.start[0] == 0
    assert found.start[1:].tolist() == found.end[:-1].tolist()
    assert found.end[-1] == found.num_tokens == num_used(tree)
    assert (found.start < found.end).all()
    for number, (start, end, above, depth) in enumerate(
        zip(found.start, found.end, found.above, found.depth, strict=True)
    ):
        for token in range(start, end - 1):
            assert (children[token], parent[token + 1]) == (1, token), "a fork inside a segment"
        if parent[start] < 0:
            assert (above, depth) == (-1, 0)
            continue
        assert above < number
        assert parent[start] == found.end[above] - 1, "the segment above does not end at the parent"
        assert depth == found.depth[above] + 1
        assert children[parent[start]] > 1, "cut without a fork"


@settings(deadline=None, max_examples=40)
@given(TREES)
def test_segments_are_cut_at_every_fork(tree: Tree) -> None:
    check_segments(segments(tree), tree)


def test_the_drawing() -> None:
    found = segments(tree_of(DRAWING, padding_to=16))
    assert [found.start.tolist(), found.end.tolist()] == [[0, 1, 5], [1, 5, 7]]
    assert [found.above.tolist(), found.depth.tolist()] == [[-1, 0, 0], [0, 1, 1]]


def test_a_segment_with_a_fork_inside_is_noticed() -> None:
    tree = chain_of_forks(2, 4)
    found = segments(tree)
    joined = Segments(*(np.delete(x, 1) for x in (found.start, found.end, found.above, found.depth)))
    joined.end[0] = found.end[1]
    with pytest.raises(AssertionError, match="a fork inside a segment"):
        check_segments(joined, tree)
    found.above[2] = 1
    with pytest.raises(AssertionError, match="the segment above does not end at the parent"):
        check_segments(found, tree)


@settings(deadline=None, max_examples=40)
@given(TREES, st.integers(1, 4))
def test_a_convolution_sees_the_path_of_each_token(tree: Tree, width: int) -> None:
    plan = convolution_plan(tree, width)
    gather, keep = plan.gather.tolist(), plan.keep.tolist()
    assert len(keep) == plan.num_tokens == num_used(tree)
    for token, place in enumerate(keep):
        ancestor = token
        for back in range(width):
            assert gather[place - back] == (plan.num_tokens if ancestor < 0 else ancestor)
            ancestor = -1 if ancestor < 0 else int(tree.parent[ancestor])


@settings(deadline=None, max_examples=40)
@given(TREES)
def test_levels_hold_every_segment_below_its_parent(tree: Tree) -> None:
    found, plan = segments(tree), level_plan(tree)
    assert plan.gather[plan.back].tolist() == list(range(plan.num_tokens))
    number_of = {int(start): number for number, start in enumerate(found.start)}
    place, above, seen = 0, list[int](), list[int]()
    for depth, level in enumerate(plan.levels):
        here: list[int] = []
        for (rows, length), continued in level:
            for row in range(rows):
                tokens = plan.gather[place : place + length].tolist()
                place += length
                number = number_of[tokens[0]]
                size = int(found.end[number] - found.start[number])
                assert tokens[:size] == list(range(found.start[number], found.end[number]))
                assert tokens[size:] == [plan.num_tokens] * (length - size)
                assert length < 2 * size, "mostly padding"
                here.append(number)
                assert found.depth[number] == depth
                assert (continued is None) == (depth == 0)
                if continued is not None:
                    assert above[int(continued[row])] == found.above[number]
        above = here
        seen += here
    assert place == len(plan.gather)
    assert sorted(seen) == list(range(len(found.start)))
