"""What a config says of its attention layers: how far each one sees, its heads, whether a tree is exact for them."""

from __future__ import annotations

from typing import Any, NamedTuple

from mtr.tree.mask import FULL, Span

_REACH = {"sliding_attention": "sliding", "hybrid_sliding": "sliding", "chunked_attention": "chunked"}
"""Of the kinds of layers that do not attend to the whole path."""
_BY_PLACE = (
    "indexed_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "minimax_m3_sparse",
)
"""Kinds of layers that choose or merge keys by their place in the row, with no say of the mask."""


class HeadShapes(NamedTuple):
    """Numbers of heads and head sizes of one layer's attention."""

    heads: int
    key_heads: int
    key_size: int
    value_size: int


def common_value(config: Any, key: str) -> Any:
    """A key of a config, None where it has none; where layers have their own (Gemma 4's head_dim), the largest."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        return max(getattr(layer, key) for layer in config.per_layer_config)


def head_shapes(config: Any) -> HeadShapes:
    """From a text model's config; for latent attention (MLA), of the expanded keys and values."""
    heads: int = common_value(config, "num_attention_heads")
    size: int = common_value(config, "head_dim") or config.hidden_size // heads
    if latent := getattr(config, "qk_nope_head_dim", None):
        return HeadShapes(heads, heads, latent + config.qk_rope_head_dim, getattr(config, "v_head_dim", None) or size)
    return HeadShapes(heads, common_value(config, "num_key_value_heads") or heads, size, size)


def score_scale(config: Any) -> float:
    """By which a layer multiplies its scores, where the config tells; else the usual one of its head size."""
    if multiplier := getattr(config, "attention_multiplier", None):
        return float(multiplier)
    return float((getattr(config, "query_pre_attn_scalar", None) or head_shapes(config).key_size) ** -0.5)


def layer_spans(config: Any) -> list[Span]:
    """How far each layer sees, from a text model's config; one without attention counts as seeing all."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = getattr(config, "layer_types", None)
    if not types:
        return [Span("sliding", window) if window else FULL] * config.num_hidden_layers
    sizes = {"full": 0, "sliding": window or 0, "chunked": getattr(config, "attention_chunk_size", None) or 0}
    kinds = [_REACH.get(kind, "full") for kind in types]  # a recurrent layer has no span of its own
    return [Span(kind, sizes[kind]) if sizes[kind] else FULL for kind in kinds]  # type: ignore[arg-type]


def refusal(config: Any, max_length: int) -> str | None:
    """Why turns cannot share a row, from a text model's config alone; None if nothing in it rules that out.

    What a config does not tell (a state that does not follow the tree, a mask that never arrives) `mtr.model.probe`
    finds.

    Args:
        max_length: tokens of the longest turn.
    """
    by_place = [kind for kind in _BY_PLACE if kind in (getattr(config, "layer_types", None) or [])]
    if by_place:
        return (
            f"its layers of type {', '.join(by_place)} choose or merge keys by their place in the row, "
            "which is that of the conversation only where a turn has a row of its own"
        )
    if getattr(config, "alibi", False):
        return "it uses ALiBi, which measures distance in the row and not in the conversation"
    start = scale_start(config)
    if start is not None and max_length >= start:
        return (
            f"its queries grow with their place in the row from token {start} on (attn_temperature_tuning); "
            f"set sequence.max_length below {start}"
        )
    for kind, limit in changing_ropes(config):
        if max_length > limit:
            return (
                f"its {kind} RoPE depends on the longest turn of the row if that is beyond {limit} tokens; "
                f"set sequence.max_length to at most {limit}"
            )
    return None


def scale_start(config: Any) -> int | None:
    """The first place in a row where queries are scaled by it, in layers without rotary embeddings (Llama 4)."""
    if getattr(config, "attn_temperature_tuning", False) and not all(getattr(config, "no_rope_layers", None) or [1]):
        return int(config.floor_scale)
    return None


def changing_ropes(config: Any) -> list[tuple[str, int]]:
    """Rotary embeddings that are others for a row beyond a length: their types, and that length."""
    ropes = getattr(config, "rope_parameters", None) or {}
    found = []
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        if (kind := rope.get("rope_type")) in ("dynamic", "longrope"):
            names = ("original_max_position_embeddings", "max_position_embeddings")
            given = [rope.get(names[0]), *(getattr(config, name, None) for name in names)]
            found.append((kind, next((limit for limit in given if limit), 0)))
    return found
