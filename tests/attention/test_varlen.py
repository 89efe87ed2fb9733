"""Claims: attention over gathered rows, outputs and gradients, is dense attention under the tree's mask, for every span
and head layout, and with sinks. Here the kernel is the row-by-row reference; plan, gathering, sinks and the sum of the
keys' gradients are those of a GPU (tests/test_gpu.py runs the kernel itself).
"""

from __future__ import annotations

import numpy as np
import pytest
import support.attention
import torch
from support.attention import CASES, SPANS, Case, inputs, tree_of_one_chain, with_plan
from support.masks import random_chat, random_forest, tree_of
from support.trees import DRAWING

import mtr.attention.varlen
from mtr.attention.interface import attend
from mtr.tree.mask import FULL, Span, Tree
from mtr.tree.plan import VarlenPlan, varlen_plan

WITHOUT_CAP = {name: case for name, case in CASES.items() if case.softcap is None}


def difference(
    tree: Tree, span: Span, case: Case, plan: VarlenPlan | None = None, dtype: torch.dtype = torch.float64
) -> dict[str, float]:
    return support.attention.difference(tree, span, case, plan, dtype, "varlen")


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("name", WITHOUT_CAP)
def test_equals_dense_attention(name: str, span: Span) -> None:
    for seed in range(2):
        tree = random_forest(seed, 20, 16 if seed else 1)
        worst = difference(tree, span, CASES[name])
        assert max(worst.values()) <= 1e-12, (seed, worst)


@pytest.mark.parametrize("name", WITHOUT_CAP)
def test_long_chains_are_cut_by_the_window(name: str) -> None:
    tree = tree_of(random_chat(np.random.default_rng(0), 3, 80))
    for span in (Span("sliding", 24), Span("chunked", 40)):
        assert max(difference(tree, span, CASES[name]).values()) <= 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("name", WITHOUT_CAP)
def test_lower_precision_stays_near(name: str, dtype: torch.dtype, tolerance: float) -> None:
    for span in (FULL, Span("sliding", 24), Span("chunked", 16)):
        worst = difference(random_forest(2, 40), span, CASES[name], dtype=dtype)
        assert max(worst.values()) <= tolerance, (span, worst)


def test_gradients_of_shared_keys_are_summed_in_float32() -> None:
    """A trunk key that 64 branches see: adding up in bfloat16 would lose what is below 1/256 of the sum."""
    length, branches = 2, 64
    parent = np.array([-1, *[0] * branches])
    tree = Tree(torch.tensor([branches + 1, *range(2, branches + 2)]), torch.tensor([0, *[1] * branches]), parent)
    assert length + branches - 1 == len(parent)
    worst = difference(tree, FULL, CASES["one head each"], dtype=torch.bfloat16)
    assert worst["key"] < 6e-3
    assert worst["value"] < 6e-3


def test_plan_of_another_mask_is_seen() -> None:
    tree = random_forest(1, 40)
    causal = varlen_plan(tree_of_one_chain(len(tree.subtree_end)))
    assert max(difference(tree, FULL, CASES["sinks"], causal).values()) > 1e-2
    window = varlen_plan(tree, Span("sliding", 30))
    assert max(difference(tree, FULL, CASES["sinks"], window).values()) > 1e-2


def test_a_gradient_that_leaves_the_sink_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own log-sum-exp, without the sink, is not that of the weights."""
    backward = mtr.attention.varlen._reference_backward

    def without_sinks(result: mtr.attention.varlen._Result, *arguments: object) -> object:
        return backward(result._replace(lse=result.lse - 0.1), *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(mtr.attention.varlen, "_reference_backward", without_sinks)
    worst = difference(tree_of(DRAWING), FULL, CASES["sinks"])
    assert worst["out"] <= 1e-12
    assert min(worst[name] for name in ("query", "key", "value")) > 1e-3


def test_sinks_without_gradient() -> None:
    query, key, value, grad_out, sinks = inputs(CASES["sinks"], 7)
    attention = with_plan(tree_of(DRAWING), FULL, "varlen")
    out = attend(attention, FULL, query.requires_grad_(), key, value, 0.3, None, sinks)
    (grad,) = torch.autograd.grad(out, [query], grad_out.transpose(1, 2))
    assert grad.shape == query.shape
    assert sinks.grad is None
