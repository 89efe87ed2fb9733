"""Claims: the plans of the kernels without masks cover each visible pair once and no other, for every tree and span."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import SPANS, random_forest, tree_of
from support.trees import DRAWING, groups, view
from torch import Tensor

from mtr.model.flops import visible_pairs
from mtr.tree.layout import View, merge
from mtr.tree.mask import FULL, Span, dense_mask
from mtr.tree.plan import Piece, Tile, VarlenPlan, chains, tile_plan, varlen_plan

spans = st.one_of(st.just(FULL), st.builds(Span, st.sampled_from(["sliding", "chunked"]), st.integers(1, 12)))
forests = st.lists(groups, min_size=1, max_size=3)

# --- chains -----------------------------------------------------------------------------------------------------------


def test_chains_of_the_drawing() -> None:
    trunk, branch = chains(merge(DRAWING).parent)
    assert trunk == (0, 5, 0, ())
    assert branch == (5, 7, 1, (Piece(0, 1, 0),))


@given(forests, st.sampled_from([1, 4, 16]))
@settings(max_examples=100, deadline=None)
def test_chains_are_the_row_and_hold_their_paths(forest: list[list[View]], padding_to: int) -> None:
    tree = tree_of(*forest, padding_to=padding_to)
    found = chains(tree.parent)
    assert [i for chain in found for i in range(chain.start, chain.end)] == list(range(len(tree.parent)))
    for chain in found:
        path, token = [], int(tree.parent[chain.start])
        while token >= 0:
            path.append(token)
            token = int(tree.parent[token])
        assert [i for piece in chain.above for i in range(piece.start, piece.end)] == path[::-1]
        assert chain.position == len(path) == tree.position_ids[chain.start]
        assert all(piece.position == tree.position_ids[piece.start] for piece in chain.above)


# --- rows of a varlen batch -------------------------------------------------------------------------------------------


def covered_by_rows(plan: VarlenPlan, length: int) -> Tensor:
    """[T, T]: how often the rows visit each pair, causal and aligned at the bottom right."""
    counts = torch.zeros(length, length, dtype=torch.int64)
    cu_q, cu_k, keys = plan.cu_seq_q.tolist(), plan.cu_seq_k.tolist(), plan.kv_index.tolist()
    assert (cu_q[0], cu_q[-1], cu_k[0], cu_k[-1]) == (0, length, 0, len(keys))
    for (q, q_end), (k, k_end) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        assert 0 < q_end - q <= plan.max_q
        assert q_end - q <= k_end - k <= plan.max_k
        for i in range(q, q_end):
            seen = keys[k : k_end - (q_end - 1 - i)]
            for key in seen[-plan.window :] if plan.window else seen:
                counts[i, key] += 1
    return counts


@given(forests, st.sampled_from([1, 4, 16]), spans)
@settings(max_examples=200, deadline=None)
def test_rows_visit_each_visible_pair_once(forest: list[list[View]], padding_to: int, span: Span) -> None:
    tree = tree_of(*forest, padding_to=padding_to)
    dense = dense_mask(tree, span)
    assert torch.equal(covered_by_rows(varlen_plan(tree, span), len(dense)), dense.long())


def test_rows_of_the_drawing() -> None:
    plan = varlen_plan(tree_of(DRAWING))
    assert plan.cu_seq_q.tolist() == [0, 5, 7]
    assert plan.cu_seq_k.tolist() == [0, 5, 8]
    assert plan.kv_index.tolist() == [0, 1, 2, 3, 4, 0, 5, 6]
    assert (plan.max_q, plan.max_k, plan.window) == (5, 5, 0)
    assert plan.cu_seq_q.dtype == plan.cu_seq_k.dtype == torch.int32


@given(groups)
@settings(max_examples=50, deadline=None)
def test_pairs_of_the_rows_are_the_trees(views: list[View]) -> None:
    plan = varlen_plan(tree_of(views))
    q, k = (x.diff().long() for x in (plan.cu_seq_q, plan.cu_seq_k))
    assert int((q * k - q * (q - 1) // 2).sum()) == visible_pairs(merge(views).position_ids, FULL)


def test_a_row_out_of_place_is_seen() -> None:
    tree = tree_of(DRAWING)
    plan = varlen_plan(tree)
    moved = VarlenPlan(**{**vars(plan), "kv_index": plan.kv_index.roll(1)})
    assert not torch.equal(covered_by_rows(moved, 7), dense_mask(tree).long())


def test_keys_out_of_reach_are_not_gathered() -> None:
    tree = tree_of([view(range(4000), range(96)), view(range(4000), range(100, 196))])
    full, sliding, chunked = (varlen_plan(tree, span) for span in (FULL, Span("sliding", 64), Span("chunked", 64)))
    assert len(full.kv_index) == 4096 + 4096
    assert len(sliding.kv_index) == 4096 + 63 + 96
    assert len(chunked.kv_index) == 4096 + 32 + 96


# --- tiles ------------------------------------------------------------------------------------------------------------


def covered(plan: list[Tile], length: int) -> Tensor:
    """[T, T]: how often the tiles visit each pair."""
    counts = torch.zeros(length, length, dtype=torch.int64)
    for tile in plan:
        shape = (tile.end - tile.start, tile.key_end - tile.key_start)
        seen = torch.ones(shape, dtype=torch.int64)
        if tile.own and tile.mask is None:
            assert tile.end == tile.key_end
            seen = seen.tril()
        if tile.mask is not None:
            assert tile.mask.shape == shape
            seen = seen * tile.mask
        counts[tile.start : tile.end, tile.key_start : tile.key_end] += seen
    return counts


@given(forests, st.sampled_from([1, 4, 16]), spans)
@settings(max_examples=200, deadline=None)
def test_tiles_visit_each_visible_pair_once(forest: list[list[View]], padding_to: int, span: Span) -> None:
    tree = tree_of(*forest, padding_to=padding_to)
    dense = dense_mask(tree, span)
    assert torch.equal(covered(tile_plan(tree, span), len(dense)), dense.long())


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_tiles_of_long_chains(span: Span) -> None:
    """Chains longer than the window and than the least block of queries."""
    for seed in range(8):
        tree = random_forest(seed, 150, 32 if seed % 2 else 1)
        dense = dense_mask(tree, span)
        assert torch.equal(covered(tile_plan(tree, span), len(dense)), dense.long()), seed


@pytest.mark.parametrize("span", [FULL, Span("sliding", 20), Span("chunked", 20)], ids=str)
def test_own_tiles_come_first_and_are_the_row(span: Span) -> None:
    """They touch each token for the first time, as query and as key; later tiles add."""
    tree = random_forest(3, 60, 16)
    plan = tile_plan(tree, span)
    own = [tile for tile in plan if tile.own]
    assert plan[: len(own)] == own
    assert all((tile.start, tile.end) == (tile.key_start, tile.key_end) for tile in own)
    assert [i for tile in own for i in range(tile.start, tile.end)] == list(range(len(tree.subtree_end)))
    assert all(tile.start < tile.end and tile.key_start < tile.key_end <= tile.start for tile in plan[len(own) :])


def test_branches_of_a_trunk_share_tiles() -> None:
    """Of 16 forks the keys visited fall to what groups of about 1,024 queries need."""
    history: list[int] = list(range(60))
    views = []
    for turn in range(16):
        fresh = 10_000 * (turn + 1)
        views.append(view(history, range(fresh, fresh + 210), 1.0, turn))
        history = history + list(range(fresh + 150, fresh + 270))
    tree = tree_of(views)
    alone = sum(sum(p.end - p.start for p in chain.above) for chain in chains(tree.parent))
    plan = [tile for tile in tile_plan(tree) if not tile.own]
    assert sum(tile.key_end - tile.key_start for tile in plan) < 0.45 * alone
    assert max(tile.end - tile.start for tile in plan) > 600
    assert max(tile.end - tile.start for tile in plan) <= 1024


def test_many_small_branches_are_planned_in_a_moment() -> None:
    """One prompt, thousands of one-token completions: the plan takes linear time."""
    tree = tree_of([view(range(50), [100 + i]) for i in range(4000)])
    began = time.perf_counter()
    plan = tile_plan(tree)
    assert time.perf_counter() - began < 2
    assert sum(not tile.own for tile in plan) <= 5


def test_dropped_tile_is_seen() -> None:
    tree = tree_of(DRAWING)
    plan = tile_plan(tree)
    assert [tile for tile in plan if not tile.own] == [Tile(5, 7, 0, 1)]
    assert not torch.equal(covered(plan[:-1], 7), dense_mask(tree).long())


def test_work_of_a_window_is_the_window() -> None:
    """Keys out of reach are not visited: the scores computed stay linear in the length."""
    tree = tree_of([view(range(4000), range(96))])
    for span in (Span("sliding", 64), Span("chunked", 64)):
        scores = sum((t.end - t.start) * (t.key_end - t.key_start) for t in tile_plan(tree, span))
        assert scores <= 2 * 4096 * 64
