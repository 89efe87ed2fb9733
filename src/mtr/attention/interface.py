"""How a tree's mask reaches the attention layers of a transformers model.

One attention function, registered with transformers, is handed the tree as a keyword argument, past every mask the
model would make itself, and picks the mask of its layer:

    decoder(..., tree=TreeAttention)  ->  attention layer i  ->  span of layer i  ->  backend

    flex     FlexAttention with a block mask: CUDA
    varlen   FlashAttention over paths with gathered keys: CUDA
    segment  plain attention over contiguous ranges: CPU
    sdpa     dense mask; eager  dense mask, the model's own function: references, and small trees

`mtr.attention.choice` picks the one that a run uses.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from mtr.attention.flex import flex_tree_attention
from mtr.attention.masks import TreeAttention
from mtr.attention.model_parts import base_model
from mtr.attention.segment import segment_attention
from mtr.attention.varlen import varlen_attention
from mtr.errors import UserError
from mtr.tree.mask import Span, Tree, block_mask, dense_mask
from mtr.tree.plan import tile_plan, varlen_plan

IMPLEMENTATION = "mtr_tree"
"""The name under which transformers knows the attention function."""

FLEX_BLOCK = 128
"""Queries and keys of a block of the block mask; packs for flex are padded to a multiple of it."""


def attend(
    tree: TreeAttention,
    span: Span,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one layer by the tree's backend; not for eager, which needs the layer's module.

    Args:
        query: [1, H, T, D]
        key: [1, K, T, D]
        value: [1, K, T, E]

    Returns:
        [1, T, H, E]
    """
    match tree.backend:
        case "segment":
            return segment_attention(query, key, value, tree.make(tile_plan, span), scale, softcap, sinks).transpose(
                1, 2
            )
        case "flex":
            mask = tree.make(block_mask, span, FLEX_BLOCK)
            return flex_tree_attention(query, key, value, mask, scale, softcap, sinks).transpose(1, 2)
        case "varlen":
            assert softcap is None, "varlen has no soft cap"
            return varlen_attention(query, key, value, tree.make(varlen_plan, span), scale, sinks)
        case "sdpa":
            assert softcap is None, "sdpa has no soft cap"
            assert sinks is None, "sdpa has no sinks"
            mask, groups = tree.make(dense_mask, span)[None, None], query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
            return scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2)
    raise AssertionError(f"{tree.backend} is the model's own function")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tree: TreeAttention | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]"""
    name = type(module).__name__
    if tree is None:
        raise UserError(f"{name} does not hand keyword arguments on to attention, so the tree mask would be lost")
    tree.calls += 1
    span = tree.spans[getattr(module, "layer_idx", 0) or 0]
    window = others.pop("sliding_window", None)
    assert window is None or span == Span("sliding", window), f"{name}: window {window}, expected {span}"
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if tree.backend == "eager":
        mask = tree.make(_additive_mask, span, query.dtype)
        own = sys.modules[type(module).__module__].eager_attention_forward
        extra = {k: v for k, v in {"softcap": softcap, "s_aux": s_aux}.items() if v is not None}
        out, _ = own(module, query, key, value, mask, scaling=scale, dropout=0.0, **extra, **others)
    else:
        query, key = (
            query.to(value.dtype),
            key.to(value.dtype),
        )  # autocast leaves norms and rotary embeddings in float32
        out = attend(tree, span, query, key, value, scale, softcap, s_aux)
    return out.contiguous(), None


def _additive_mask(tree: Tree, span: Span, dtype: torch.dtype) -> Tensor:
    """[1, 1, T, T]: eager attention adds its mask."""
    dense = dense_mask(tree, span)
    return torch.zeros(dense.shape, dtype=dtype, device=dense.device).masked_fill_(~dense, torch.finfo(dtype).min)[
        None, None
    ]


AttentionInterface.register(IMPLEMENTATION, _attend)


def use_own_attention(model: Any) -> None:
    """The model's own attention and causal mask, sdpa where supported: for generation and the per-turn reference."""
    base = base_model(model)
    base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")


def use_tree_attention(model: Any) -> None:
    base_model(model).set_attn_implementation(IMPLEMENTATION)
