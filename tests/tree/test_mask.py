"""Claims: every form of the mask is the same mask. Literal matrices pin the dense reference; the block mask equals the
one torch makes from the predicate.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import SPANS, random_forest, tree_of
from support.trees import DRAWING, check_layout, groups, view
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from mtr.model.flops import visible_pairs
from mtr.tree.layout import View, merge
from mtr.tree.mask import FULL, Span, Tree, block_mask, dense_mask, mask_mod


def matrix(drawing: str) -> list[list[bool]]:
    return [[mark == "x" for mark in line.split()] for line in drawing.strip().splitlines()]


FULL_DRAWING = """
x . . . . . .
x x . . . . .
x x x . . . .
x x x x . . .
x x x x x . .
x . . . . x .
x . . . . x x
"""
SLIDING_DRAWING = """
x . . . . . .
x x . . . . .
. x x . . . .
. . x x . . .
. . . x x . .
x . . . . x .
. . . . . x x
"""
CHUNKED_DRAWING = """
x . . . . . .
x x . . . . .
. . x . . . .
. . x x . . .
. . . . x . .
x . . . . x .
. . . . . . x
"""


@pytest.mark.parametrize(
    ("span", "drawing"),
    [(FULL, FULL_DRAWING), (Span("sliding", 2), SLIDING_DRAWING), (Span("chunked", 2), CHUNKED_DRAWING)],
)
def test_literal_masks(span: Span, drawing: str) -> None:
    assert dense_mask(tree_of(DRAWING), span).tolist() == matrix(drawing)


def test_sibling_trees_and_padding_are_blocks_of_their_own() -> None:
    tree = tree_of([view([1], [2])], [view([1], [2])], padding_to=6)
    drawing = """
    x . . . . .
    x x . . . .
    . . x . . .
    . . x x . .
    . . . . x .
    . . . . . x
    """
    assert dense_mask(tree).tolist() == matrix(drawing)


@given(groups, st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_span_is_measured_along_the_path(views: list[View], size: int) -> None:
    """Windows and chunks count ancestors, so they are what each separate sequence has."""
    layout = merge(views)
    check_layout(layout, views)
    tree = tree_of(views)
    sliding, chunked = dense_mask(tree, Span("sliding", size)), dense_mask(tree, Span("chunked", size))
    for row, depth in enumerate(layout.position_ids.tolist()):
        assert int(sliding[row].sum()) == min(depth + 1, size)
        assert int(chunked[row].sum()) == depth % size + 1


# --- block mask -------------------------------------------------------------------------------------------------------

TENSORS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


def torchs_own(tree: Tree, span: Span, block_size: int) -> BlockMask:
    length = len(tree.subtree_end)
    return create_block_mask(mask_mod(tree, span), 1, 1, length, length, device="cpu", BLOCK_SIZE=block_size)


@pytest.mark.parametrize("padding_to", [1, 128])
@pytest.mark.parametrize("block_size", [1, 7, 16, 64, 128])
def test_block_mask_is_torchs_own(block_size: int, padding_to: int) -> None:
    lengths = set()
    for seed in range(8):
        tree = random_forest(seed, 30, padding_to)
        lengths.add(len(tree.subtree_end) % block_size)
        ours, theirs = block_mask(tree, FULL, block_size), torchs_own(tree, FULL, block_size)
        for name in TENSORS:
            one, other = getattr(ours, name), getattr(theirs, name)
            assert one.dtype == other.dtype, name
            assert torch.equal(one, other), f"{name}, seed {seed}"
        assert ours.shape == theirs.shape
        assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    assert padding_to > 1 or block_size == 1 or len(lengths) > 2, "odd lengths were not tried"


def listed(counts: Tensor | None, indices: Tensor | None, block_size: int, length: int) -> Tensor:
    """[T, T]: whether the block of a pair is listed."""
    assert counts is not None
    assert indices is not None
    blocks = torch.zeros(counts.shape[-1], indices.shape[-1], dtype=torch.bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        blocks[row, indices[0, 0, row, :count].long()] = True
    spread = blocks.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    return spread[:length, :length]


def what_flex_sees(mask: BlockMask, dense: Tensor, block_size: int) -> Tensor:
    """The predicate within partial blocks, everything within full ones."""
    length = len(dense)
    partial = listed(mask.kv_num_blocks, mask.kv_indices, block_size, length)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, block_size, length)
    assert not (partial & full).any()
    return full | (partial & dense)


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
@pytest.mark.parametrize("span", SPANS[1:], ids=str)
def test_block_mask_of_windows_loses_and_adds_nothing(span: Span, block_size: int) -> None:
    for seed in range(6):
        tree = random_forest(seed, 30, 64 if seed % 2 else 1)
        dense, mask = dense_mask(tree, span), block_mask(tree, span, block_size)
        assert torch.equal(what_flex_sees(mask, dense, block_size), dense), seed
        index = torch.arange(len(dense))
        zero = index.new_zeros(())
        assert torch.equal(mask.mask_mod(zero, zero, index[:, None], index[None, :]), dense)


def test_window_leaves_blocks_out() -> None:
    """The superset is no excuse: a narrow window on a long path visits a diagonal of blocks."""
    tree = tree_of([view(range(1000), range(24))])
    mask = block_mask(tree, Span("sliding", 16), 16)
    assert int(mask.kv_num_blocks.sum()) == 64 + 63
    mask = block_mask(tree, Span("chunked", 32), 16)
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) == 64 + 32  # type: ignore[union-attr]


def test_missing_block_is_seen() -> None:
    tree = random_forest(1, 30)
    dense, mask = dense_mask(tree), block_mask(tree, FULL, 16)
    mask.kv_num_blocks[0, 0, -1] -= 1
    assert not torch.equal(what_flex_sees(mask, dense, 16), dense)


def test_blocks_of_the_eight_turn_shape() -> None:
    """H = 200, T = 1500, A = 300: blocks of 128 are within 12 % of the visible pairs."""
    rng = np.random.default_rng(0)
    history: list[int] = []
    views = []
    for turn in range(8):
        history = history + list(rng.integers(0, 10**6, 200))
        thinking, answer = list(rng.integers(0, 10**6, 1500)), list(rng.integers(0, 10**6, 300))
        views.append(view(history, thinking + answer, 1.0, turn))
        history = history + answer
    mask = block_mask(tree_of(views))
    assert mask.full_kv_num_blocks is not None
    partial, full = int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum())
    least = visible_pairs(merge(views).position_ids, FULL) / 128**2
    assert least == pytest.approx(2924, abs=1)
    assert least <= partial + full <= 1.12 * least
    assert partial <= 500
