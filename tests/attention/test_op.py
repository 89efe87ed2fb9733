"""Claims: attention is one operator. Compiled layers hold it in one graph that serves every pack, autograd finds each
pack again, and what a checkpoint keeps of it is not computed twice.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.attention import CASES, inputs, run_flex_uncompiled, with_plan
from support.masks import random_chat, random_forest
from support.models import load
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

import mtr.attention.interface
from mtr.attention.choice import pad_to_multiple_of
from mtr.attention.interface import use_tree_attention
from mtr.attention.masks import TreeHandle, _alive
from mtr.attention.model_parts import decoder
from mtr.model.checkpointing import checkpoint_activations
from mtr.model.tree_model import TreeModel
from mtr.recipe.sections import Backend, Checkpointing
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import merge
from mtr.tree.mask import FULL
from mtr.tree.packing import Pack

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own
Models = Callable[..., Path]
Result = tuple[float, dict[str, Tensor]]
KERNELS = {"segment": "segment_forward", "varlen": "varlen_forward", "flex": "flex_forward"}


class Graphs:
    """A backend for torch.compile that counts its forward graphs and runs them operator by operator."""

    def __init__(self) -> None:
        self.forward = 0
        self.backend = aot_autograd(fw_compiler=self._count, bw_compiler=self._run, inference_compiler=self._count)

    def _count(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.forward += 1
        return self._run(graph, _)

    @staticmethod
    def _run(graph: torch.fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(graph.forward)


def pack(seed: int, size: int, padding_to: int = 1) -> Batch:
    return build_batch(Pack((merge(random_chat(np.random.default_rng(seed), 3, size)),)), padding_to)


def trained(tree_model: TreeModel, batch: Batch) -> Result:
    tree_model.zero_grad(set_to_none=True)
    loss = tree_model(batch)
    loss.backward()
    return loss.item(), gradients(tree_model)


def gradients(tree_model: TreeModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in tree_model.named_parameters() if p.grad is not None}


def compile_attention(tree_model: TreeModel) -> Graphs:
    """No break is allowed. Whole layers: tests/model/test_compiled.py."""
    torch.compiler.reset()
    graphs = Graphs()
    for layer in decoder(tree_model.model).layers:
        layer.self_attn.compile(backend=graphs.backend, fullgraph=True, dynamic=True)
    return graphs


def assert_same(ours: Result, theirs: Result) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-13)
    assert ours[1].keys() == theirs[1].keys()
    assert theirs[1]
    for name, wanted in theirs[1].items():
        assert (ours[1][name] - wanted).abs().max() <= 1e-12 * wanted.abs().max(), name


@pytest.mark.parametrize(("kind", "backend"), [("gemma3", "segment"), ("gpt_oss", "varlen")])
def test_compiled_attention_has_one_graph_for_all_packs(kind: str, backend: Backend, models: Models) -> None:
    """One for each span of its layers, and once more without gradients."""
    model = load(models(kind))
    use_tree_attention(model)
    tree_model = TreeModel(model.train(), backend)
    packs = [pack(seed, size) for seed, size in enumerate((10, 20, 15, 30))]
    plain = [trained(tree_model, batch) for batch in packs]
    graphs = compile_attention(tree_model)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for batch, wanted in zip(packs, plain, strict=True):
            assert_same(trained(tree_model, batch), wanted)
        assert graphs.forward == 2
        with torch.no_grad():
            assert [tree_model(batch).item() for batch in packs] == pytest.approx([loss for loss, _ in plain])
        assert graphs.forward == 4


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
def test_packs_that_are_alive_together(compiled: bool, models: Models) -> None:
    """The backward of the first comes after the forward of the second, and each finds its own."""
    model = load(models("qwen3"))
    use_tree_attention(model)
    tree_model = TreeModel(model.train(), "segment")
    first, second = pack(0, 10), pack(1, 20)
    plain = [trained(tree_model, batch) for batch in (first, second)]
    if compiled:
        compile_attention(tree_model)
    before = set(_alive)
    losses = [tree_model(batch) for batch in (first, second)]
    gc.collect()
    assert len(set(_alive) - before) == 2
    for loss, wanted in zip(losses, plain, strict=True):
        tree_model.zero_grad(set_to_none=True)
        loss.backward()
        assert_same((loss.item(), gradients(tree_model)), wanted)
    del losses, loss
    assert set(_alive) <= before, "a pack outlives its graph"


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("backend", KERNELS)
def test_what_is_kept_is_not_computed_twice(
    backend: Backend, mode: Checkpointing, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers: attention runs twice, or four times where all of a layer is recomputed."""
    calls: list[int] = []
    kernel = getattr(mtr.attention.interface, KERNELS[backend])

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return kernel(*arguments)

    monkeypatch.setattr(mtr.attention.interface, KERNELS[backend], counted)
    run_flex_uncompiled(monkeypatch)
    model = load(models("qwen3"))
    use_tree_attention(model)
    batch = pack(0, 10, pad_to_multiple_of([backend]))
    plain = trained(TreeModel(model.train(), "segment"), batch)
    calls.clear()
    checkpoint_activations(model, mode)
    assert_same(trained(TreeModel(model, backend), batch), plain)
    assert len(calls) == (4 if mode == "full" else 2)


@pytest.mark.parametrize("backend", ["segment", "varlen"])
def test_torch_finds_the_operator_sound(backend: Backend) -> None:
    """Its schema, its shapes without data and its autograd, as torch itself checks them."""
    attention = with_plan(random_forest(0, 8), FULL, backend)
    handle = TreeHandle(attention)
    query, key, value, _, sinks = inputs(CASES["sinks"], len(attention.tree.parent))
    given = [x.requires_grad_() for x in (query, key, value, sinks)]
    torch.library.opcheck(torch.ops.mtr.tree_attention.default, (*given[:3], handle.tensor, 0, 0.3, None, given[3]))


def test_a_pack_that_is_gone_is_an_error() -> None:
    query, key, value, _ = inputs(CASES["grouped heads"], 5)
    with pytest.raises(RuntimeError, match="a pack that no longer exists"):
        torch.ops.mtr.tree_attention(query, key, value, torch.tensor(-1), 0, 0.3)
