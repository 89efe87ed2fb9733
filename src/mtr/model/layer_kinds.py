"""What each layer of a model mixes tokens with, from its config: attention, a recurrence, both, or nothing."""

from __future__ import annotations

from typing import Any

from mtr.model.shrink import kind_of_layer

_RECURRENT = ("linear_attention", "mamba", "recurrent", "conv")
_WITHOUT_ATTENTION = (*_RECURRENT, "mlp", "moe")


def layer_kinds(config: Any) -> list[str]:
    """A name for each layer, as transformers has them in `layer_types`; from a text model's config.

    A model without such a list has attention in every layer or, like Mamba, in none.
    """
    for name in ("layer_types", "layers_block_type"):
        if types := getattr(config, name, None):
            return list(types)
    kind = "full_attention" if getattr(config, "num_attention_heads", None) else "linear_attention"
    return [kind] * int(config.num_hidden_layers)


def attends(kind: str) -> bool:
    """Whether a layer of this kind has attention over tokens, alone or beside a recurrence."""
    return kind not in _WITHOUT_ATTENTION


def recurs(kind: str) -> bool:
    """Whether a layer of this kind carries a state from token to token, alone or beside attention."""
    return kind in _RECURRENT or kind.startswith("hybrid")


def kinds_of_layers(config: Any) -> list[tuple[Any, ...]]:
    """What tells layers of different cost apart: how they mix tokens, and all else that a config says of single layers.
    How far attention sees makes no difference.
    """
    count, mixing = int(config.num_hidden_layers), layer_kinds(config)
    found = []
    for layer, own in enumerate(mixing):
        others = tuple(part for part in kind_of_layer(config, layer, count) if part != own)
        found.append((attends(own), recurs(own), "" if attends(own) else own, *others))
    return found
