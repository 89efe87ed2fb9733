"""FlexAttention over a tree: one kernel for packs of every length, soft caps in the score, sinks by the log-sum-exp.

A block mask says which blocks of 128 x 128 to visit and the predicate which pairs within them. The kernel is compiled
for the first pack's length, and at the second length once more for all others: a model's scale and soft cap never
change, so they stay constants of the kernel, while compiling for each length anew would cost seconds a pack.

Shapes: H query heads, K key heads (H a multiple of K), T tokens, D head size, E value head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def flex_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of a tree, by `mask` from `block_mask`.

    Args:
        query: [1, H, T, D]
        key: [1, K, T, D]
        value: [1, K, T, E]
        scale: of the scores, before `softcap`
        sinks: [H] logits that take part in the softmax and carry no value

    Returns:
        [1, H, T, E]
    """
    from torch.nn.attention.flex_attention import AuxRequest

    groups = query.shape[1] // key.shape[1]
    if groups & (groups - 1):  # the kernel wants groups of a power of two
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out, aux = _kernel()(
        query,
        key,
        value,
        score_mod=_capped(softcap) if softcap is not None else None,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=sinks is not None),
    )
    if sinks is not None:  # out / (1 + exp(sink - lse)): the sink takes its share of the softmax
        out = (out * torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype).view(1, -1, 1)).unsqueeze(-1)).to(value.dtype)
    result: Tensor = out
    return result


@functools.cache
def _kernel() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """The same function for the same cap, so that it is compiled once."""

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped
