"""Claims: attention over tiles, outputs and gradients, is dense attention under the tree's mask, for every span, head
layout, soft cap and with sinks.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.attention import CASES, SPANS, difference, inputs, tree_of_one_chain, with_plan
from support.masks import random_chat, random_forest, tree_of
from support.trees import DRAWING

import mtr.attention.segment
from mtr.attention.interface import attend
from mtr.tree.mask import FULL, Span
from mtr.tree.plan import tile_plan


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name: str, span: Span) -> None:
    for seed in range(2):
        tree = random_forest(seed, 20, 16 if seed else 1)
        worst = difference(tree, span, CASES[name])
        assert max(worst.values()) <= 1e-12, (seed, worst)


@pytest.mark.parametrize("name", CASES)
def test_branches_that_share_tiles(name: str) -> None:
    tree = tree_of(random_chat(np.random.default_rng(2), 9, 30))
    assert any(not t.own and t.end - t.start > 60 for t in tile_plan(tree)), "no tile of several branches"
    assert max(difference(tree, FULL, CASES[name]).values()) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_long_chains_are_cut_by_the_window(name: str) -> None:
    tree = tree_of(random_chat(np.random.default_rng(0), 3, 80))
    assert len(tree.subtree_end) > 400
    for span in (Span("sliding", 24), Span("chunked", 40)):
        assert max(difference(tree, span, CASES[name]).values()) <= 1e-12


def test_scores_are_made_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft cap's own kernel gives the same in chunks of rows."""
    monkeypatch.setattr(mtr.attention.segment, "_MOST_SCORES", 500)
    for span in SPANS[:3]:
        assert max(difference(random_forest(1, 40), span, CASES["soft cap"]).values()) <= 1e-12


def test_dropped_tile_is_seen() -> None:
    tree = tree_of(DRAWING)
    plan = tile_plan(tree)
    assert max(difference(tree, FULL, CASES["grouped heads"], plan).values()) <= 1e-12
    rest = [tile for tile in plan if tile.own]
    assert len(rest) == len(plan) - 1
    assert min(difference(tree, FULL, CASES["grouped heads"], rest).values()) > 1e-3


def test_plan_of_another_mask_is_seen() -> None:
    tree = random_forest(1, 40)
    length = len(tree.subtree_end)
    causal = tile_plan(tree_of_one_chain(length))
    assert max(difference(tree, FULL, CASES["sinks"], causal).values()) > 1e-2
    assert max(difference(tree, FULL, CASES["sinks"], tile_plan(tree, Span("sliding", 30))).values()) > 1e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_lower_precision_stays_near(name: str, dtype: torch.dtype, tolerance: float) -> None:
    for span in (FULL, Span("sliding", 24), Span("chunked", 16)):
        worst = difference(random_forest(2, 40), span, CASES[name], dtype=dtype)
        assert max(worst.values()) <= tolerance, (span, worst)


def test_sinks_without_gradient() -> None:
    tree = tree_of(DRAWING)
    query, key, value, grad_out, sinks = inputs(CASES["sinks"], 7)
    attention = with_plan(tree, FULL, "segment")
    out = attend(attention, FULL, query.requires_grad_(), key, value, 0.3, None, sinks)
    (grad,) = torch.autograd.grad(out, [query], grad_out.transpose(1, 2))
    assert grad.shape == query.shape
    assert sinks.grad is None


def test_inputs_stay_as_they_are() -> None:
    given = inputs(CASES["sinks"], 7)
    query, key, value, _, sinks = given
    before = [x.clone() for x in given]
    attend(with_plan(tree_of(DRAWING), FULL, "segment"), FULL, query, key, value, 0.3, None, sinks)
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))
