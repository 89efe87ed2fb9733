"""Sizes of a config cut to small ones by what they are, and consistent: heads and groups, ranks, states, experts.

What one size is to another stays where models rely on it: heads times their size, rotated parts of a head, the inner
size of a state-space mixer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

VOCABULARY = 128
_WINDOW = 24
_CHUNK = 16
_HIDDEN = 64
_HEAD = 16

_MOST = (
    (r"unpadded_vocab_size|vocab_size_per_layer_input|ngram_vocab_size_base|output_vocab_size", VOCABULARY),
    (r"(\w+_)?(intermediate|ffn|ffn_hidden)_size(_mlp)?|ffn_dim|dim_ff|dff|n_inner|router_hidden_size", 48),
    (r"sliding_window(_size)?|attention_(chunk|window)_size|window_size|local_attention|keep_window_size", _WINDOW),
    (r"rel_extent|index_block_size|log_scaling_n_floor", _WINDOW),
    (r"(mamba_)?chunk_size|block_size", _CHUNK),
    (r"(q|kv|o)_lora_rank|\w+_rank|hc_lowrank|hidden_size_per_layer_input|block_multiple_of", 16),
    (r"index_topk|indexer_budget|split_ngram_parts", 16),
    (r"(mamba_)?d_state|(ssm_)?state_size|index_topk_blocks", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"linear_(key_)?head_dim", 8),
    (r"linear_value_head_dim", 12),
    (r"n_group|num_expert_group|o_groups|topk_group|(\w+_)?n_shared_experts|(\w+_)?num_shared_experts", 2),
    (r"num_layers_per_stack|(H|L|L_bp)_cycles|n_recurrent_loops", 2),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|zero_expert_num", 8),
    (r"num_experts_per_tok(en)?|top_k_experts|moe_top_?k|moe_k", 2),
    (r"kv_n_heads", 1),
)
"""Names of integers, or of lists of them, and the most that they may be."""

_HEADS = (
    ("num_attention_heads", "num_kv_heads"),
    ("num_attention_heads", "num_global_key_value_heads"),
    ("num_attention_heads", "num_key_value_heads"),
    ("num_attention_heads_per_layer", "num_key_value_heads"),
    ("swa_num_attention_heads", "swa_num_key_value_heads"),
    ("linear_num_value_heads", "linear_num_key_heads"),
    ("linear_num_heads", ""),
    ("index_n_heads", ""),
    ("indexer_n_heads", "indexer_kv_heads"),
    ("mamba_n_heads", "mamba_n_groups"),
    ("n_mamba_heads", "mamba_ngroups"),
    ("mamba_num_heads", "n_groups"),
    ("num_heads", "n_groups"),
)
"""Numbers of heads, and of the groups that share keys, values or states."""

_HEAD_SIZES = (
    "head_dim",
    "swa_head_dim",
    "global_head_dim",
    "index_head_dim",
    "indexer_head_dim",
    "mamba_head_dim",
    "kv_channels",
    "dim_head",
)
_HEAD_PARTS = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_OF_HIDDEN = ("attention_hidden_size", "attention_head_dim", "lru_width", "word_embed_proj_dim", "ple_embed_dim")
"""Sizes that are in proportion to the hidden size."""


def shrink_sizes(config: Any, heads: bool = True) -> None:
    """In place; heads keep their sizes on demand."""
    before = copy.copy(config)
    _cap(config)
    put(config, "vocab_size", VOCABULARY)
    if integer(config, "topk_group") == integer(config, "n_group") == 2:
        put(config, "topk_group", 1)
    _fewer_heads(config, before)
    if heads:
        _smaller_heads(config, before)
    hidden = _shrink_hidden(config, before, heads)
    _shrink_mixers(config, hidden)


def shrink_part(config: Any) -> None:
    """A config within the config: of attention or experts, or of a tower for images or sound, which no text passes."""
    _cap(config)
    for name in ("num_hidden_layers", "num_blocks", "depth"):
        change(config, name, lambda count: min(count, 2))
    for name in [name for name in vars(config) if re.fullmatch(r"\w*hidden_size|embed_dim|\w+_channels?", name)]:
        change(config, name, lambda size: min(size, _HIDDEN))


def _cap(config: Any) -> None:
    for name in list(vars(config)):
        for pattern, most in _MOST:
            if re.fullmatch(pattern, name):
                change(config, name, _at_most(most))


def _at_most(most: int) -> Callable[[int], int]:
    return lambda size: min(size, most)


# --- heads ------------------------------------------------------------------------------------------------------------


def _fewer_heads(config: Any, before: Any) -> None:
    """At most two groups of at most two heads each."""
    for heads, groups in _HEADS:
        shared = integer(before, groups)
        if shared and change(config, groups, _at_most(2)):
            put(config, heads, getattr(before, heads, None))
        change(config, heads, _fewer(shared or 1))


def _smaller_heads(config: Any, before: Any) -> None:
    """Of a size that rotary embeddings can halve."""
    for name in (*_HEAD_SIZES, *_HEAD_PARTS):
        change(config, name, _at_most(_HEAD_PARTS[name]) if name in _HEAD_PARTS else partial(_head_size, config))
    _shrink_latent(config, before)
    old, new = integer(before, "head_dim"), integer(config, "head_dim")
    if old and new and _given(config, "head_dim"):
        _shrink_rope(config, old, new)


def _fewer(groups: int) -> Callable[[int], int]:
    """Of a number of heads, which share so many groups."""
    return lambda heads: min(groups, 2) * min(max(heads // groups, 1), 2)


def _head_size(config: Any, size: int) -> int:
    """Small, and with an even number of rotated dimensions."""
    for smaller in (_HEAD, 2 * _HEAD, 4 * _HEAD):
        rotated = [int(smaller * part) for part in _rotated_parts(config)]
        if smaller < size and all(count >= 2 and count % 2 == 0 for count in rotated):
            return smaller
    return size


def _shrink_latent(config: Any, before: Any) -> None:
    """Latent attention (MLA): the part of a head that is rotated, and what `head_dim` means there."""
    rope, nope, head = (integer(before, name) for name in ("qk_rope_head_dim", "qk_nope_head_dim", "head_dim"))
    if not (rope and nope):
        return
    parts = _rotated_parts(config)
    if head and parts and int(head * parts[0]) == rope != head:
        put(config, "qk_rope_head_dim", int((integer(config, "head_dim") or 0) * parts[0]))
    put(config, "qk_head_dim", (integer(config, "qk_rope_head_dim") or 0) + (integer(config, "qk_nope_head_dim") or 0))
    for size in ("qk_rope_head_dim", "qk_head_dim"):
        if head == integer(before, size):
            put(config, "head_dim", integer(config, size))


def _shrink_rope(config: Any, old: int, new: int) -> None:
    """For heads that were `old` wide."""
    change(config, "rotary_dim", lambda size: max(2, size * new // old // 2 * 2))
    for rope in _ropes(config):
        for name in rope:
            rope[name] = _scaled_rope(config, new, rope, name)


def _scaled_rope(config: Any, size: int, rope: dict[str, Any], name: str) -> Any:
    """Lists of rotary parameters that have an entry for each rotated pair, or add up to their number."""
    part = (_rotated_parts(config) or [1.0])[0]
    pairs = (integer(config, "qk_rope_head_dim") or int(size * part)) // 2
    value = rope[name]
    if name in ("long_factor", "short_factor"):
        return value[:pairs]
    if name == "original_max_position_embeddings" and "llama_4_scaling_beta" in rope:
        return _WINDOW  # queries grow with each so many positions
    if name == "mrope_section":
        parts = [part * pairs // sum(value) for part in value]
        rest = min(range(len(value)), key=lambda i: value.count(value[i]))  # those of height and width stay alike
        parts[rest] += pairs - sum(parts)
        return parts
    return value


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters, and those of the kinds of layers where they differ."""
    ropes = getattr(config, "rope_parameters", None) or {}
    return [ropes, *(value for value in ropes.values() if isinstance(value, dict))]


def _rotated_parts(config: Any) -> list[float]:
    """Of heads, by the kind of layer where that differs."""
    parts = [rope.get("partial_rotary_factor") for rope in _ropes(config)]
    return [part for part in (*parts, getattr(config, "partial_rotary_factor", None)) if isinstance(part, float)]


# --- widths -----------------------------------------------------------------------------------------------------------


def _shrink_hidden(config: Any, before: Any, smaller_heads: bool) -> int:
    """Heads times their size where it was that; returns it."""
    old = integer(before, "hidden_size") or _HIDDEN
    heads, kept = integer(before, "num_attention_heads"), integer(config, "num_attention_heads")
    head, small = integer(before, "head_dim") or 0, integer(config, "head_dim") or 0
    if heads and kept and not (head and small and _given(config, "head_dim")):
        head = old // heads
        small = _head_size(config, head) if smaller_heads else head
        _shrink_rope(config, head, small)
    new = kept * small if heads and kept and small and heads * head == old else min(old, _HIDDEN)
    for name in ("hidden_size", "d_model", "embedding_dim"):
        if integer(before, name) == old:
            put(config, name, new)
    for name in _OF_HIDDEN:
        change(config, name, lambda size: max(1, size * new // old))
    if kept and integer(before, "attention_head_dim"):
        put(config, "attention_head_dim", (integer(config, "attention_hidden_size") or new) // kept)
    return new


def _shrink_mixers(config: Any, hidden: int) -> None:
    """Heads of state-space mixers together are as wide as their inner size."""
    expand = getattr(config, "mamba_expand", None) or getattr(config, "expand", None) or 1
    inner = int(expand * hidden)
    for heads, size in (
        ("mamba_n_heads", "mamba_d_head"),
        ("n_mamba_heads", "mamba_headdim"),
        ("num_heads", "head_dim"),
    ):
        count = integer(config, heads)
        if count and integer(config, size) and heads in vars(config):
            put(config, size, inner // count)
    if integer(config, "mamba_d_ssm"):
        put(config, "mamba_d_ssm", inner)


# --- values -----------------------------------------------------------------------------------------------------------


def integer(config: Any, name: str) -> int | None:
    """None where there is none, or one for each layer."""
    value = getattr(config, name, None) if name else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _given(config: Any, name: str) -> bool:
    """Whether it is a key of the config, and not what its class derives from others."""
    return getattr(type(config), "attribute_map", {}).get(name, name) in vars(config)


def change(config: Any, name: str, new: Callable[[int], int]) -> bool:
    """An integer, or each one of a list; anything else stays. Whether there was one."""
    value = getattr(config, name, None) if name else None
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        put(config, name, [new(one) for one in value])
    elif value and integer(config, name):
        put(config, name, new(value))
    else:
        return False
    return True


def put(config: Any, name: str, value: Any) -> None:
    """Where the config's class lets it: some derive it from other keys."""
    try:
        setattr(config, name, value)
    except Exception:  # strict classes check types in ways of their own
        return
