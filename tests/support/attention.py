"""Inputs of attention, and what it must give: dense attention in float64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import mtr.attention.flex_kernels
from mtr.attention.flex import flex_mask
from mtr.attention.interface import attend
from mtr.attention.masks import TreeAttention
from mtr.recipe.sections import Backend
from mtr.tree.mask import FULL, Span, Tree, dense_mask
from mtr.tree.plan import tile_plan, varlen_plan

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


def difference(
    tree: Tree,
    span: Span,
    case: Case,
    plan: Any = None,
    dtype: torch.dtype = torch.float64,
    backend: Backend = "segment",
) -> dict[str, float]:
    """Of the output and each gradient to the float64 reference, relative to the largest element.

    Args:
        plan: or mask, in place of the one that the tree would get.
    """
    given = [x.to(tree.subtree_end.device) for x in inputs(case, len(tree.subtree_end), dtype)]
    mask, scale = dense_mask(tree, span), 1.7 * case.key_size**-0.5
    attention = with_plan(tree, span, backend, plan)
    ours = results(lambda q, k, v, s: attend(attention, span, q, k, v, scale, case.softcap, s).transpose(1, 2), given)
    theirs = results(
        lambda q, k, v, s: dense_attention(q, k, v, mask, scale, case.softcap, s), [x.double() for x in given]
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape and ours[name].dtype == dtype for name in ours)
    return {name: float((ours[name] - x).abs().max() / x.abs().max()) for name, x in theirs.items()}


def with_plan(tree: Tree, span: Span, backend: Backend, plan: Any = None) -> TreeAttention:
    """A pack's attention that holds this plan or mask already."""
    attention = TreeAttention(tree, [span], backend)
    keys: dict[str, tuple[Any, ...]] = {
        "segment": (tile_plan, span),
        "varlen": (varlen_plan, span),
        "flex": (flex_mask, span),
    }
    if plan is not None:
        attention._made[keys[backend]] = plan
    return attention


def run_flex_uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Flex's graphs, which only a GPU compiles, run operator by operator; they are appended to the list returned."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)

        def run(*tensors: Tensor) -> Any:
            with ThreadPoolExecutor(1) as beside:  # operators have no vmap, which torch's dense flex attention uses
                return beside.submit(torch.no_grad()(graph), *tensors).result()

        return run

    monkeypatch.setattr(mtr.attention.flex_kernels, "_compile", keep)
    monkeypatch.setattr(mtr.attention.flex_kernels, "_kernels", {})
    return graphs


def tree_of_one_chain(length: int) -> Tree:
    index = torch.arange(length)
    return Tree(torch.full((length,), length), index, index.numpy() - 1)
