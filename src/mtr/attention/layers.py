"""What a config says of its attention layers: how far each one sees, its heads, whether a tree is exact for them."""

from __future__ import annotations

from typing import Any, NamedTuple

from mtr.tree.mask import FULL, Span

_EXACT_LAYERS = {"full_attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked"}


class HeadShapes(NamedTuple):
    """Numbers of heads and head sizes of one layer's attention."""

    heads: int
    key_heads: int
    key_size: int
    value_size: int


def head_shapes(config: Any) -> HeadShapes:
    """From a text model's config; for latent attention (MLA), of the expanded keys and values."""
    heads: int = config.num_attention_heads
    size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    if latent := getattr(config, "qk_nope_head_dim", None):
        return HeadShapes(heads, heads, latent + config.qk_rope_head_dim, getattr(config, "v_head_dim", None) or size)
    return HeadShapes(heads, getattr(config, "num_key_value_heads", None) or heads, size, size)


def score_scale(config: Any) -> float:
    """By which a layer multiplies its scores, where the config tells; else the usual one of its head size."""
    if multiplier := getattr(config, "attention_multiplier", None):
        return float(multiplier)
    return float((getattr(config, "query_pre_attn_scalar", None) or head_shapes(config).key_size) ** -0.5)


def layer_spans(config: Any) -> list[Span]:
    """How far each layer sees, from a text model's config. Assumes `refusal(config)` found nothing."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = getattr(config, "layer_types", None)
    if not types:
        return [Span("sliding", window) if window else FULL] * config.num_hidden_layers
    sizes = {"full": 0, "sliding": window or 0, "chunked": getattr(config, "attention_chunk_size", None) or 0}
    kinds = [_EXACT_LAYERS.get(kind, "full") for kind in types]  # a recurrent layer has no span of its own
    return [Span(kind, sizes[kind]) if sizes[kind] else FULL for kind in kinds]  # type: ignore[arg-type]


def refusal(config: Any, max_length: int) -> str | None:
    """Why a model cannot be exact, from its config alone; None if nothing in it rules that out.

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
