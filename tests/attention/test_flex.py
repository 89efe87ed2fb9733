"""Claims: flex attention under the block mask, outputs and gradients, is dense attention under the tree's mask, for
each span and head layout, with a soft cap and with sinks; nothing of a pack leads to a compilation.

Here the graphs that Inductor gets on a GPU run operator by operator; tests/test_gpu.py compiles them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.attention import CASES, SPANS, Case, difference, run_flex_uncompiled, tree_of_one_chain
from support.masks import random_chat, random_forest, tree_of
from support.models import load
from support.trees import DRAWING

import mtr.attention.flex_kernels
from mtr.attention.choice import fastest
from mtr.attention.flex import flex_mask
from mtr.attention.interface import use_own_attention, use_tree_attention
from mtr.attention.model_parts import text_config
from mtr.errors import UserError
from mtr.model.tree_model import TreeModel
from mtr.tree.batch import build_batch
from mtr.tree.layout import merge
from mtr.tree.mask import FULL, Span, Tree
from mtr.tree.packing import Pack


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    return run_flex_uncompiled(monkeypatch)


def flex_difference(tree: Tree, span: Span, case: Case, seen: Span | None = None) -> dict[str, float]:
    """`seen` breaks the mask."""
    return difference(tree, span, case, flex_mask(tree, seen or span, 16), backend="flex")


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name: str, span: Span) -> None:
    worst = flex_difference(random_forest(1, 20, 16), span, CASES[name])
    assert max(worst.values()) <= 1e-12, worst


def test_groups_that_are_no_power_of_two() -> None:
    worst = flex_difference(random_forest(1, 20, 16), FULL, Case(heads=6, key_heads=2))
    assert max(worst.values()) <= 1e-12, worst


def test_another_mask_is_seen() -> None:
    worst = flex_difference(random_forest(1, 40, 16), FULL, CASES["sinks"], seen=Span("sliding", 30))
    assert min(worst.values()) > 1e-2


def test_a_run_has_a_forward_and_a_backward_for_each_kind_of_layer(
    graphs: list[torch.fx.GraphModule], models: Callable[..., Path]
) -> None:
    """Measured by `auto`, packs of many lengths, evaluation and generation between: two spans, four kernels.

    The measurement asks for the kernels of the run itself.
    """
    model = load(models("gemma3"))
    use_tree_attention(model)
    tree_model = TreeModel(model.train(), "flex")
    chats = np.random.default_rng(0)
    packs = [build_batch(Pack((merge(random_chat(chats, 3, size)),)), 128) for size in (5, 40, 90, 20, 60)]
    config = text_config(model.config)
    fastest(["flex", "segment"], config, packs[0].tree, tree_model.spans, torch.float64)
    for batch in packs:
        tree_model(batch).backward()
    with torch.no_grad():
        for batch in packs[1:3]:
            tree_model(batch)
        use_own_attention(model)
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, pad_token_id=0)
        use_tree_attention(model)
    tree_model(packs[3]).backward()
    assert len({batch.input_ids.shape[1] for batch in packs}) >= 3
    assert len(graphs) == 4


def test_a_kernel_for_one_length_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the number of blocks burnt in, the kernel would be wrong for all others."""

    def specialized(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        int(inputs[-1].shape[0])
        return graph

    monkeypatch.setattr(mtr.attention.flex_kernels, "_compile", specialized)
    with pytest.raises(AssertionError, match="a kernel for one length only"):
        flex_difference(random_forest(1, 20, 16), FULL, CASES["sinks"])


def test_a_kernel_that_does_not_compile_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing runs on dense scores instead."""

    def fail(*_: object) -> None:
        raise RuntimeError("no valid triton configs")

    monkeypatch.setattr(mtr.attention.flex_kernels, "_compile", fail)
    with pytest.raises(UserError, match=r"model\.attention: flex .* no valid triton configs.*varlen"):
        flex_difference(random_forest(1, 20, 16), FULL, CASES["sinks"])


def test_a_pack_of_no_whole_blocks_is_refused() -> None:
    """The kernels check no bounds."""
    with pytest.raises(AssertionError, match="whole blocks of 128 tokens, not a pack of 7"):
        flex_mask(tree_of(DRAWING))


def test_heads_are_not_repeated(graphs: list[torch.fx.GraphModule]) -> None:
    """Groups of 7 reach the kernel as they are."""
    worst = flex_difference(random_forest(1, 20, 16), FULL, Case(heads=7, key_heads=1))
    assert max(worst.values()) <= 1e-12, worst
    shapes = [node.meta["val"].shape for node in graphs[0].graph.nodes if node.op == "placeholder"]
    assert [shape[1] for shape in shapes[:3]] == [7, 1, 1]


@pytest.mark.parametrize("span", [FULL, Span("sliding", 100)], ids=lambda span: span.kind)
def test_the_mask_has_the_memory_that_kernels_are_compiled_for(span: Span) -> None:
    """A compiled kernel asserts the strides of its inputs."""
    mask = flex_mask(tree_of_one_chain(512), span)
    assert all(x.is_contiguous() for x in mask.tensors)
