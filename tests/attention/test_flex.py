"""Claims: flex attention under the block mask, outputs and gradients, is dense attention under the tree's mask, for
each span and head layout, with a soft cap and with sinks; packs of all lengths share a kernel.

Here torch's own uncompiled flex attention runs, with its check for a GPU passed by; tests/test_gpu.py compiles it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.attention import CASES, SPANS, Case, dense_attention, difference_to_dense, inputs
from support.masks import random_forest
from torch import Tensor
from torch.nn.attention import flex_attention as torchs

import mtr.attention.flex
from mtr.attention.flex import flex_tree_attention
from mtr.tree.mask import FULL, Span, Tree, block_mask, dense_mask

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # of torch's own tracing
]


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtr.attention.flex, "_kernel", lambda: torchs.flex_attention)
    monkeypatch.setattr(torchs, "_validate_device", lambda *_: None)
    torch.compiler.reset()  # one model has one scale and one cap; here each case has its own


def difference(tree: Tree, span: Span, case: Case, seen: Span | None = None) -> dict[str, float]:
    """`seen` breaks the mask."""
    mask = block_mask(tree, seen or span, 16)

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
        return flex_tree_attention(q, k, v, mask, scale, case.softcap, sinks)

    return difference_to_dense(attend, tree, span, case)


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name: str, span: Span) -> None:
    worst = difference(random_forest(1, 20, 16), span, CASES[name])
    assert max(worst.values()) <= 1e-12, worst


def test_groups_that_are_no_power_of_two() -> None:
    worst = difference(random_forest(1, 20, 16), FULL, Case(heads=6, key_heads=2))
    assert max(worst.values()) <= 1e-12, worst


def test_another_mask_is_seen() -> None:
    worst = difference(random_forest(1, 40, 16), FULL, CASES["sinks"], seen=Span("sliding", 30))
    assert min(worst.values()) > 1e-2


def test_one_function_for_one_cap() -> None:
    """A new function would be compiled anew."""
    assert mtr.attention.flex._capped(5.0) is mtr.attention.flex._capped(5.0)
    assert torch.equal(mtr.attention.flex._capped(5.0)(torch.tensor(1e9), *[torch.tensor(0)] * 4), torch.tensor(5.0))


@pytest.mark.parametrize("span", [FULL, Span("sliding", 24)], ids=str)
def test_packs_of_every_length_share_two_compilations(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the first length, one for all others, though each pack brings a predicate of its own."""
    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(1)
        return module.forward

    kernel = torch.compile(torchs.flex_attention, backend=backend)
    monkeypatch.setattr(mtr.attention.flex, "_kernel", lambda: kernel)
    with torch.no_grad():
        for seed, size in enumerate((20, 60, 90, 40)):
            tree = random_forest(seed, size, 128)
            case = CASES["soft cap"]
            query, key, value, _ = inputs(case, len(tree.subtree_end))
            out = flex_tree_attention(query, key, value, block_mask(tree, span), 0.3, case.softcap)
            wanted = dense_attention(query, key, value, dense_mask(tree, span), 0.3, case.softcap, None)
            assert (out - wanted).abs().max() <= 1e-12
    assert len(graphs) == 2
