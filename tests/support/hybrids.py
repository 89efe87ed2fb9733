"""Configs of tiny hybrids: layers with a recurrence, alone or beside attention."""

from __future__ import annotations

from typing import Any

_BASE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LINEAR = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
_DELTA: dict[str, Any] = {
    **_BASE,
    "num_hidden_layers": 4,
    "layer_types": _LINEAR,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
_CONVOLUTIONS: dict[str, Any] = {
    **_BASE,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "conv", "full_attention", "conv"],
}


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    # Gated DeltaNet
    "qwen3_5": ("Qwen3_5TextConfig", {**_DELTA, "head_dim": 16}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**_without(_DELTA, "intermediate_size"), **_EXPERTS, "head_dim": 16}),
    "qwen3_next": ("Qwen3NextConfig", {**_DELTA, **_EXPERTS, "head_dim": 16}),
    "olmo_hybrid": ("OlmoHybridConfig", {**_DELTA, "linear_num_key_heads": 4}),
    # Kimi Delta Attention
    "kimi_linear": (
        "KimiLinearConfig",
        {
            **_BASE,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "layer_types": _LINEAR,
            "linear_num_heads": 3,
            "linear_head_dim": 8,
            "linear_conv_kernel_dim": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": None,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    # Mamba-2
    "mamba2": (
        "Mamba2Config",
        {
            **_without(_BASE, "intermediate_size", "num_attention_heads", "num_key_value_heads"),
            "num_hidden_layers": 3,
            "num_heads": 6,
            "head_dim": 16,
            "state_size": 8,
            "expand": 2,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "bamba": ("BambaConfig", {**_BASE, **_MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [2]}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **_BASE,
            **_MAMBA,
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "position_embedding_type": "rope",
            "embedding_multiplier": 2.0,
            "logits_scaling": 1.5,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **_BASE,
            "layers_block_type": ["mamba", "attention", "mlp", "mamba", "moe", "mamba"],
            "head_dim": 16,
            "ssm_state_size": 8,
            "mamba_num_heads": 6,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        {**_BASE, **_MAMBA, "num_hidden_layers": 3, "mamba_d_ssm": 96, "mamba_rms_norm": True},
    ),
    "zamba2": (
        "Zamba2Config",
        {
            **_BASE,
            "num_hidden_layers": 5,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
            "num_mem_blocks": 1,
            "n_mamba_heads": 6,
            "mamba_headdim": 16,
            "mamba_ngroups": 2,
            "mamba_d_state": 8,
            "mamba_expand": 2,
            "chunk_size": 16,
        },
    ),
    # Short convolutions
    "lfm2": ("Lfm2Config", {**_CONVOLUTIONS, "block_multiple_of": 8}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            **_CONVOLUTIONS,
            "num_dense_layers": 1,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
    ),
    # Lightning attention
    "minimax": (
        "MiniMaxConfig",
        {
            **_BASE,
            "num_hidden_layers": 4,
            "layer_types": _LINEAR,
            "head_dim": 16,
            "block_size": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    # Selective scan
    "mamba": (
        "MambaConfig",
        {
            **_without(_BASE, "intermediate_size", "num_attention_heads", "num_key_value_heads"),
            "num_hidden_layers": 3,
            "state_size": 6,
            "time_step_rank": 5,
        },
    ),
    "falcon_mamba": (
        "FalconMambaConfig",
        {
            **_without(_BASE, "intermediate_size", "num_attention_heads", "num_key_value_heads"),
            "num_hidden_layers": 3,
            "state_size": 6,
            "time_step_rank": 5,
        },
    ),
    "jamba": (
        "JambaConfig",
        {
            **_BASE,
            "num_hidden_layers": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 6,
            "mamba_dt_rank": 5,
        },
    ),
    "zamba": (
        "ZambaConfig",
        {
            **_BASE,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "attention_head_dim": 24,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "n_mamba_heads": 2,
            "mamba_d_state": 6,
            "mamba_dt_rank": 5,
        },
    ),
    # RG-LRU
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {
            **_BASE,
            "num_hidden_layers": 4,
            "lru_width": 48,
            "attention_window_size": 24,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
    ),
}
"""The class of the config, and its options; see `support.models.tiny_config`."""
