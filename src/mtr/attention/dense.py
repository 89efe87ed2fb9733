"""Attention with a mask of T x T: references, and what runs where nothing else does.

Shapes: H query heads, K key heads (H a multiple of K), T tokens, D head size, E value head size.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mtr.attention.masks import TreeAttention
from mtr.tree.mask import Span, Tree, dense_mask


def sdpa_attention(
    attention: TreeAttention, span: Span, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """query [1, H, T, D], key [1, K, T, D], value [1, K, T, E] -> [1, T, H, E]"""
    mask, groups = attention.make(dense_mask, span)[None, None], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2)


def own_attention(
    attention: TreeAttention,
    span: Span,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **options: Any,
) -> Tensor:
    """The eager function of the layer's own model; shapes as with `sdpa_attention`."""
    mask = attention.make(_additive_mask, span, query.dtype)
    own = sys.modules[type(module).__module__].eager_attention_forward
    out: Tensor = own(module, query, key, value, mask, dropout=0.0, **options)[0]
    return out


def _additive_mask(tree: Tree, span: Span, dtype: torch.dtype) -> Tensor:
    """[1, 1, T, T]: eager attention adds its mask."""
    dense = dense_mask(tree, span)
    return torch.zeros(dense.shape, dtype=dtype, device=dense.device).masked_fill_(~dense, torch.finfo(dtype).min)[
        None, None
    ]
