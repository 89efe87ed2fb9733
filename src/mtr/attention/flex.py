"""FlexAttention over a tree: soft caps in the score, sinks by the log-sum-exp.

A block mask says which blocks of 128 x 128 to visit and the predicate which pairs within them. The kernels are
compiled by `mtr.attention.flex_kernels`, and the same for packs of every length.

Shapes: H query heads, K key heads (H a multiple of K), T tokens, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mtr.attention.flex_kernels import Kind, kernel
from mtr.tree.mask import FULL, Span, Tree, block_mask

FLEX_BLOCK = 128
"""Queries and keys of a block of the block mask; packs for flex are padded to a multiple of it."""
_LEAST_HEAD_SIZE = 16
"""Of the kernels' matrix products; smaller heads are widened by zeros, which change nothing."""


class FlexMask(NamedTuple):
    """What the kernels take of a pack, for layers of one span."""

    span: Span
    block: int
    parts: tuple[Any, ...]
    """`BlockMask.as_tuple()`, then subtree_end and position_ids, [T] int32."""

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in self.parts if isinstance(x, Tensor)]


def flex_mask(tree: Tree, span: Span = FULL, block: int = FLEX_BLOCK) -> FlexMask:
    """The block mask of a pack whose length is a multiple of the block."""
    length = len(tree.subtree_end)
    assert length % block == 0, f"flex attention takes whole blocks of {block} tokens, not a pack of {length}"
    of_tokens = (x.to(torch.int32) for x in (tree.subtree_end, tree.position_ids))
    parts = (*block_mask(tree, span, block).as_tuple(), *of_tokens)
    return FlexMask(span, block, tuple(x.contiguous() if isinstance(x, Tensor) else x for x in parts))


def flex_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: FlexMask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a tree.

    Args:
        query: [1, H, T, D]
        key: [1, K, T, D]
        value: [1, K, T, E]
        scale: of the scores, before `softcap`
        sinks: [H] logits that take part in the softmax and carry no value

    Returns:
        [1, T, H, E], and the log-sum-exp of each row's scores and sink, [1, H, T].
    """
    width = value.shape[-1]
    rows = [_by_token(x) for x in (query, key, value)]
    run = kernel(_kind(rows, mask, scale, softcap, sinks is not None), False, mask.parts)
    if sinks is not None:
        rows.append(sinks.to(torch.promote_types(query.dtype, torch.float32)))
    out, lse = run(*rows, *mask.tensors)
    return out.transpose(1, 2)[..., :width], lse


def flex_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: FlexMask,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `grad_out` and `out` are [1, T, H, E]."""
    rows = [_by_token(x) for x in (query, key, value)]
    outs = [_by_token(x.transpose(1, 2)) for x in (grad_out, out)]
    run = kernel(_kind(rows, mask, scale, softcap), True, mask.parts)
    grads = run(*outs, lse, *rows, *mask.tensors)
    grad_query, grad_key, grad_value = (
        grad[..., : x.shape[-1]] for grad, x in zip(grads, (query, key, value), strict=True)
    )
    return grad_query, grad_key, grad_value


def _kind(
    rows: Sequence[Tensor], mask: FlexMask, scale: float, softcap: float | None, with_sinks: bool = False
) -> Kind:
    query, key, value = rows
    _, heads, length, key_size = query.shape
    assert length % mask.block == 0, f"{length} tokens are no whole blocks of {mask.block}"
    return Kind(
        span=mask.span,
        block=mask.block,
        scale=scale,
        softcap=softcap,
        heads=heads,
        key_heads=key.shape[1],
        key_size=key_size,
        value_size=value.shape[-1],
        dtype=query.dtype,
        device=query.device,
        sinks=with_sinks,
    )


def _by_token(x: Tensor) -> Tensor:
    """[1, heads, T, size] with the memory of [1, T, heads, size], for which the kernels are compiled."""
    missing = _LEAST_HEAD_SIZE - x.shape[-1]
    if missing > 0:
        x = pad(x, (0, missing))
    return x.transpose(1, 2).contiguous().transpose(1, 2)
