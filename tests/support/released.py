"""Configs of the sizes that models are released in, by what their classes have as defaults."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

_KEYS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "falcon_h1": {"lm_head_multiplier": 0.02, "ssm_multipliers": [0.5, 0.3, 0.2, 0.7, 0.4]},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.2, "attention_multiplier": 0.015},
    "granitemoehybrid": {"layer_types": (["linear_attention"] * 5 + ["full_attention", *["linear_attention"] * 2]) * 4},
    "hyperclovax": {"logits_scaling": 0.125},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "minimax": {"layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 4},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "nemotron_h": {"hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-ME*"},
    "phi3": {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1 + i / 48 for i in range(48)],
            "long_factor": [1.0 + i for i in range(48)],
        },
    },
}
"""Where the default is no hybrid, leaves something out that released models have, or does not fit itself."""


def released_config(family: str, **changes: Any) -> Any:
    keys = {**_KEYS.get(family, {}), **changes}
    if layers := keys.get("layer_types"):
        keys["num_hidden_layers"] = len(layers)
    return AutoConfig.for_model(family, **keys)
