"""How a tree's mask reaches a transformers model, and which models may be used.

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
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from mtr.attention.flex import flex_tree_attention
from mtr.attention.segment import segment_attention
from mtr.attention.varlen import varlen_attention
from mtr.errors import UserError
from mtr.tree.mask import FULL, Span, Tree, block_mask, dense_mask
from mtr.tree.plan import tile_plan, varlen_plan

Backend = Literal["flex", "varlen", "segment", "sdpa", "eager"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
IMPLEMENTATION = "mtr_tree"
"""The name under which transformers knows the attention function."""

_EXACT_LAYERS = {"full_attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked"}
FLEX_BLOCK = 128
"""Queries and keys of a block of the block mask; packs for flex are padded to a multiple of it."""


class TreeAttention:
    """The masks of one pack for all layers, each made once and only if asked for."""

    def __init__(self, tree: Tree, spans: list[Span], backend: Backend) -> None:
        self.tree = tree
        self.spans = spans
        self.backend = backend
        self.calls = 0
        self._made: dict[tuple[Any, ...], Any] = {}

    def make(self, build: Callable[..., Any], *arguments: Any) -> Any:
        key = (build, *arguments)
        if key not in self._made:
            self._made[key] = build(self.tree, *arguments)
        return self._made[key]


class HeadShapes(NamedTuple):
    """What one layer's attention is given: heads and head sizes of queries and keys, and of values."""

    heads: int
    key_heads: int
    key_size: int
    value_size: int


def head_shapes(config: Any) -> HeadShapes:
    """From a text model's config; with latent attention (MLA) keys and values as they are after their expansion."""
    heads: int = config.num_attention_heads
    size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    if latent := getattr(config, "qk_nope_head_dim", None):
        return HeadShapes(heads, heads, latent + config.qk_rope_head_dim, getattr(config, "v_head_dim", None) or size)
    return HeadShapes(heads, getattr(config, "num_key_value_heads", None) or heads, size, size)


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
    """Attention of one layer by the tree's backend, one of those that need no module.

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
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves norms and rotations in float32
        out = attend(tree, span, query, key, value, scale, softcap, s_aux)
    return out.contiguous(), None


def _additive_mask(tree: Tree, span: Span, dtype: torch.dtype) -> Tensor:
    """[1, 1, T, T]: eager attention adds its mask."""
    dense = dense_mask(tree, span)
    return torch.zeros(dense.shape, dtype=dtype, device=dense.device).masked_fill_(~dense, torch.finfo(dtype).min)[
        None, None
    ]


AttentionInterface.register(IMPLEMENTATION, _attend)


def layer_spans(config: Any) -> list[Span]:
    """How far each layer sees, from a text model's config. Assumes `refusal(config)` found nothing."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = getattr(config, "layer_types", None)
    if not types:
        return [Span("sliding", window) if window else FULL] * config.num_hidden_layers
    sizes = {"full": 0, "sliding": window or 0, "chunked": getattr(config, "attention_chunk_size", None) or 0}
    kinds = [_EXACT_LAYERS[kind] for kind in types]
    return [Span(kind, sizes[kind]) if sizes[kind] else FULL for kind in kinds]  # type: ignore[arg-type]


def refusal(config: Any, max_length: int) -> str | None:
    """Why a model could not be exact, from its config alone; None if nothing speaks against it.

    What a config does not tell (a mixer that carries state, a mask that never arrives) `mtr.model.probe` finds.
    """
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; only decoder-only models have turns as paths of a tree"
    other = sorted(set(getattr(config, "layer_types", None) or []) - set(_EXACT_LAYERS))
    if other:
        return f"its layers of type {', '.join(other)} carry state along the row and ignore the mask"
    if getattr(config, "alibi", False):
        return "it uses ALiBi, which measures distance in the row and not in the conversation"
    if getattr(config, "output_router_logits", False):
        return "output_router_logits is on, and the auxiliary loss would see another token set; set it to false"
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        kind = rope.get("rope_type")
        limit: int = (
            rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None) or 0
        )
        if kind in ("dynamic", "longrope") and max_length > limit:
            return (
                f"its {kind} RoPE depends on the longest position of the batch beyond {limit}; "
                f"set sequence.max_length to at most {limit}"
            )
    return None
