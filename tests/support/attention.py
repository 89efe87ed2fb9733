"""Inputs of attention, and what it must give: dense attention in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mtr.attention.segment import segment_attention
from mtr.tree.mask import FULL, Span, Tree, dense_mask
from mtr.tree.plan import Tile, tile_plan

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


def tree_of_one_chain(length: int) -> Tree:
    index = torch.arange(length)
    return Tree(torch.full((length,), length), index, index.numpy() - 1)
