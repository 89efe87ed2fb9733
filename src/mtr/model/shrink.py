"""A small config of the same architecture, for the probe: each kind of layer once, and sizes as small as they can be.

What decides how tokens see each other stays: kinds of layers and their order, windows, chunks, rotary embeddings, soft
caps, groups of heads, routing. Windows and chunks are so small that paths of the probe are longer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from mtr.attention.model_parts import text_config
from mtr.model.small_sizes import change, integer, put, shrink_part, shrink_sizes

_FIRST = ("first_k_dense_replace", "num_dense_layers")
"""So many layers at the start are of one kind."""
_LOOPS = ("loop_layer_index_start", "loop_layer_index_end")
"""Layers from the one to the other run more than once."""
_STEPS = ("decoder_sparse_step", "moe_layer_freq", "moe_layer_interval", "interleave_moe_layer_step")
_PERIODS = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))
_BEYOND = ("num_nextn_predict_layers", "num_mtp_layers")
"""Layers after the last, which predict more than one token and are not trained."""
_PROPERTIES = ("layer_types", "layers_block_type", "layers_num_experts")
_PATTERN = "hybrid_override_pattern"
_NUMBERS = r"\w+_(layers|layer_ids|layer_indices|idxs|layer_idxs)"


def shrink(config: Any, heads: bool = True) -> Any:
    """A config with small sizes and each kind of layer once.

    Towers for images and sound, through which no text goes, stay as they are: see `mtr.model.probe.small_model`.

    Args:
        heads: let heads be smaller, too, which not every model can do.
    """
    small, text = _shrink_text(config, heads), text_config(config)
    if text is config:
        return small
    whole = copy.deepcopy(config, {id(text): small})
    for name in ("hidden_size", "vocab_size"):
        if name in vars(whole) and getattr(whole, name) == getattr(text, name, None):
            put(whole, name, getattr(small, name))
    if integer(text, "pad_token_id") is not None:
        put(small, "pad_token_id", 0)  # stands for images where a token is one
    return whole


def _shrink_text(config: Any, heads: bool) -> Any:
    small = copy.deepcopy(text_config(config))
    layers = _own_keys(small)
    if layers:
        small.per_layer_config = None
    whole = copy.deepcopy(small)
    shrink_sizes(small, heads)
    kept = _keep_kinds(small, layers)
    for part in [value for value in vars(small).values() if hasattr(value, "to_dict")]:
        shrink_part(part)
    if layers:
        small.per_layer_config = {
            new: _shrunk(whole, small, layers[old], heads) for new, old in enumerate(kept) if layers[old]
        }
    put(small, "output_router_logits", False)
    vars(small).pop("quantization_config", None)
    for key in [key for key in vars(small) if key.endswith("_token_id") and getattr(small, key) is not None]:
        put(small, key, 1 if key == "eos_token_id" else None)
        if getattr(small, key) not in (None, 1):  # its class wants a number
            put(small, key, 0)
    return small


# --- layers with keys of their own ------------------------------------------------------------------------------------


def _own_keys(config: Any) -> list[dict[str, Any]]:
    """Of each layer, what it has in place of the keys for all layers; none where no layer has any."""
    if not getattr(config, "is_heterogeneous", False):
        return []
    common = copy.copy(config)
    common.per_layer_config = None
    every = vars(common)
    return [
        {name: value for name, value in vars(layer).items() if value not in (every.get(name), []) and name[0] != "_"}
        for layer in config.per_layer_config
    ]


def _shrunk(config: Any, small: Any, keys: dict[str, Any], heads: bool) -> dict[str, Any]:
    """The keys of one layer, as small as those of all layers are; heads stay as much wider."""
    layer = copy.deepcopy(config)
    for name, value in keys.items():
        put(layer, name, value)
    shrink_sizes(layer, heads)
    found = {name: getattr(layer, name) for name in keys}
    if "head_dim" in keys:
        found["head_dim"] = small.head_dim * keys["head_dim"] // config.head_dim
    return found


# --- kinds of layers --------------------------------------------------------------------------------------------------


def _keep_kinds(config: Any, layers: Sequence[dict[str, Any]]) -> list[int]:
    """In place: layers of a kind that came before are left out, two at least are kept.

    Args:
        layers: keys that each layer has to itself.

    Returns:
        Numbers of the layers that are kept.
    """
    count = integer(config, "num_hidden_layers") or 0
    kinds = [kind_of_layer(config, layer, count) for layer in range(count)]
    if layers:
        kinds = [(*kind, repr(keys)) for kind, keys in zip(kinds, layers, strict=True)]
    kept = sorted({kinds.index(kind) for kind in kinds} | set(range(min(2, count))) | set(_sharing(config)))
    if kept and _counts_by_period(config):
        kept = list(range(kept[-1] + 1))
    keep_layers(config, kept, count)
    return kept


def _sharing(config: Any) -> list[int]:
    """The first layers of those that share one block's weights: two, so that it is shared."""
    blocks = getattr(config, "layers_block_type", None) or []
    return [layer for layer, block in enumerate(blocks) if block == "hybrid"][:2]


def kind_of_layer(config: Any, layer: int, count: int) -> tuple[Any, ...]:
    """What tells a layer from others, by all that configs say of layers one by one."""
    found: list[Any] = [_sort(values[layer]) for _, values in _by_layer(config, count)]
    found += [layer in values for _, values in _numbers_of_layers(config, count)]
    found += [layer < first for _, first in _boundaries(config, count)]
    for period, offset in _PERIODS:
        if every := integer(config, period):
            found.append(layer % every == (integer(config, offset) or 0))
    found += [(layer + 1) % step == 0 for name in _STEPS if (step := integer(config, name))]
    return tuple(found)


def _sort(value: Any) -> Any:
    return bool(value) if isinstance(value, (int, float)) else value


def _by_layer(config: Any, count: int) -> list[tuple[str, Sequence[Any]]]:
    """Lists with an entry for each layer, those included that a class derives, and a string of letters."""
    names = dict.fromkeys([*vars(config), *_PROPERTIES])
    some = {name for name, _ in _numbers_of_layers(config, count)}
    found: list[tuple[str, Sequence[Any]]] = []
    for name in names:
        values = getattr(config, name, None)
        if not isinstance(values, (list, tuple, str) if name == _PATTERN else (list, tuple)) or len(values) != count:
            continue
        if name not in some and not name.endswith(("_token_id", "multipliers")):
            found.append((name, values))
    return found


def _numbers_of_layers(config: Any, count: int) -> list[tuple[str, list[int]]]:
    """Lists that name some of the layers by their numbers."""
    found = []
    for name, values in vars(config).items():
        if re.fullmatch(_NUMBERS, name) and isinstance(values, (list, tuple)) and name != "no_rope_layers":
            numbers = [value for value in values if type(value) is int]
            if len(numbers) == len(values) and len(set(numbers)) == len(numbers) and max(numbers, default=0) < count:
                found.append((name, numbers))
    return found


def _boundaries(config: Any, count: int) -> list[tuple[str, int]]:
    """Numbers of layers at the start, before something else begins."""
    found = [(name, value) for name in _FIRST if (value := integer(config, name)) is not None]
    if shared := integer(config, "num_kv_shared_layers"):
        found.append(("num_kv_shared_layers", count - shared))
    found += [(name, value) for name in _LOOPS if (value := integer(config, name))]
    if (first := integer(config, "n_input_layers")) is not None:
        found += [("n_input_layers", first), ("n_output_layers", count - (integer(config, "n_output_layers") or 0))]
    return found


def _counts_by_period(config: Any) -> bool:
    """Kinds of layers follow from their numbers, so that none can be left out before the last that is kept."""
    periods = [integer(config, name) for name, _ in _PERIODS]
    steps = [integer(config, name) for name in _STEPS]
    return any(periods) or any(step and step > 1 for step in steps) or bool(getattr(config, "block_types", None))


def keep_layers(config: Any, kept: list[int], count: int) -> None:
    by_layer, numbers = _by_layer(config, count), _numbers_of_layers(config, count)
    before = {name: sum(layer < first for layer in kept) for name, first in _boundaries(config, count)}
    for name in ("num_hidden_layers", "num_layers"):
        if integer(config, name) == count:
            put(config, name, len(kept))
    for name, values in by_layer:
        left = [values[layer] for layer in kept]
        put(config, name, "".join(left) if name == _PATTERN else left)
    for name, layers in numbers:
        put(config, name, [kept.index(layer) for layer in layers if layer in kept])
    for name, first in before.items():
        put(config, name, len(kept) - first if name in ("num_kv_shared_layers", "n_output_layers") else first)
    if "n_input_layers" in before:
        put(config, "n_recurrent_layers", before["n_output_layers"] - before["n_input_layers"])
    for name in _BEYOND:
        if integer(config, name):
            put(config, name, 0)
    change(config, "moe_layer_end_index", lambda last: min(last, len(kept) - 1))
