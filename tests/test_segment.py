"""Claims: attention over tiles, outputs and gradients, is dense attention under the tree's mask, for every span, head
layout, soft cap and with sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_layout import DRAWING
from test_mask import random_chat, random_forest, tree_of
from torch import Tensor

import mtr.segment
from mtr.mask import FULL, Span, Tree, dense_mask
from mtr.plan import Tile, tile_plan
from mtr.segment import segment_attention

SPANS = [FULL, Span("sliding", 2), Span("sliding", 9), Span("sliding", 70), Span("chunked", 8), Span("chunked", 90)]


class Case(NamedTuple):
    """H query heads, K key heads, D head size of keys, E of values."""

    heads: int = 4
    key_heads: int = 2
    key_size: int = 8
    value_size: int = 8
    softcap: float | None = None
    sinks: bool = False


CASES = {
    "grouped heads": Case(),
    "one head each": Case(key_heads=4),
    "one key head": Case(key_heads=1),
    "narrow values": Case(key_heads=4, key_size=12, value_size=8),
    "wide values": Case(key_size=8, value_size=16),
    "soft cap": Case(softcap=1.5),
    "sinks": Case(sinks=True),
    "sinks, soft cap, narrow values": Case(heads=6, key_size=12, softcap=2.0, sinks=True),
}


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The reference, as the definition has it."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value
    return scores.softmax(-1) @ value


def inputs(case: Case, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key, value, the gradient of the output, and sinks where the case has them."""
    generator = torch.Generator().manual_seed(0)
    heads = [(case.heads, case.key_size), (case.key_heads, case.key_size), (case.key_heads, case.value_size)]
    shapes = [(1, count, length, size) for count, size in [*heads, (case.heads, case.value_size)]]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    sinks = [torch.randn(case.heads, generator=generator, dtype=torch.float64)] if case.sinks else []
    return [x.to(dtype) for x in (*made, *sinks)]


def results(attend: Callable[..., Tensor], given: list[Tensor]) -> dict[str, Tensor]:
    """The output and the gradients of query, key, value and sinks."""
    query, key, value, grad_out, *sinks = (x.clone() for x in given)
    leaves = [x.requires_grad_() for x in (query, key, value, *sinks)]
    out = attend(query, key, value, sinks[0] if sinks else None)
    grads = torch.autograd.grad(out, leaves, grad_out)
    return dict(zip(("out", "query", "key", "value", "sinks"), (out.detach(), *grads), strict=False))


def difference_to_dense(
    attend: Callable[..., Tensor], tree: Tree, span: Span, case: Case, dtype: torch.dtype = torch.float64
) -> dict[str, float]:
    """Of the output and each gradient to the float64 reference, relative to the largest element.

    Args:
        attend: query, key, value, scale, sinks -> output, [1, H, T, E].
    """
    given = inputs(case, len(tree.subtree_end), dtype)
    mask, scale = dense_mask(tree, span), 1.7 * case.key_size**-0.5
    ours = results(lambda q, k, v, s: attend(q, k, v, scale, s), given)
    theirs = results(
        lambda q, k, v, s: dense_attention(q, k, v, mask, scale, case.softcap, s), [x.double() for x in given]
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape and ours[name].dtype == dtype for name in ours)
    return {name: float((ours[name] - x).abs().max() / x.abs().max()) for name, x in theirs.items()}


def difference(
    tree: Tree, span: Span, case: Case, plan: list[Tile] | None = None, dtype: torch.dtype = torch.float64
) -> dict[str, float]:
    tiles = tile_plan(tree, span) if plan is None else plan

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
        return segment_attention(q, k, v, tiles, scale, case.softcap, sinks)

    return difference_to_dense(attend, tree, span, case, dtype)


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
    monkeypatch.setattr(mtr.segment, "_MOST_SCORES", 500)
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


def tree_of_one_chain(length: int) -> Tree:
    index = torch.arange(length)
    return Tree(torch.full((length,), length), index, index.numpy() - 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_lower_precision_stays_near(name: str, dtype: torch.dtype, tolerance: float) -> None:
    for span in (FULL, Span("sliding", 24), Span("chunked", 16)):
        worst = difference(random_forest(2, 40), span, CASES[name], dtype=dtype)
        assert max(worst.values()) <= tolerance, (span, worst)


def test_sinks_without_gradient() -> None:
    tree = tree_of(DRAWING)
    query, key, value, grad_out, sinks = inputs(CASES["sinks"], 7)
    out = segment_attention(query.requires_grad_(), key, value, tile_plan(tree), 0.3, None, sinks)
    (grad,) = torch.autograd.grad(out, [query], grad_out)
    assert grad.shape == query.shape
    assert sinks.grad is None


def test_inputs_stay_as_they_are() -> None:
    given = inputs(CASES["sinks"], 7)
    query, key, value, _, sinks = given
    before = [x.clone() for x in given]
    segment_attention(query, key, value, tile_plan(tree_of(DRAWING)), 0.3, None, sinks)
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))
