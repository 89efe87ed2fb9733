"""The families of models: every causal language model of the installed transformers that people fine-tune on chats, and
the image-text models whose text decoder is one.

A config is that of its class with the keys of `KEYS`, where its defaults are no model, or not what was released.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Family(NamedTuple):
    name: str
    """`model_type` of its config."""
    heading: str
    known: str
    """Checkpoints that people know, and what is special."""


DENSE, EXPERTS, WINDOWS, HYBRID, WRAPPER, OTHER = (
    "Dense attention",
    "Mixture of experts",
    "Windows, chunks, sinks",
    "Recurrent layers",
    "Image-text checkpoints",
    "Attention that no tree can be laid over",
)
HEADINGS = (DENSE, WINDOWS, EXPERTS, HYBRID, WRAPPER, OTHER)

_LISTED: dict[str, str] = {
    DENSE: """
        llama: Llama 2, 3, R1 distills on Llama
        qwen2: Qwen2.5, R1 distills on Qwen, QwQ
        qwen3: Qwen3
        mistral: Mistral 7B, Small, Nemo
        phi: Phi-2; part of a head rotated
        phi3: Phi-3, Phi-4, Phi-4-reasoning; fused projections
        gemma: Gemma
        vaultgemma: VaultGemma
        glm: GLM-4 9B
        glm4: GLM-4-0414, GLM-Z1
        granite: Granite 3; scaled attention, residuals, logits
        cohere: Command R; scaled logits
        olmo: OLMo; no weights in norms
        olmo2: OLMo 2
        smollm3: SmolLM3; layers without RoPE
        exaone: EXAONE 3.5, Deep
        exaone4: EXAONE 4; windows, layers without RoPE
        seed_oss: Seed-OSS
        apertus: Apertus; xIELU
        arcee: AFM-4.5B; squared ReLU
        ernie4_5: ERNIE 4.5 0.3B
        hunyuan_v1_dense: Hunyuan dense
        internlm3: InternLM3
        minicpm3: MiniCPM3; latent attention
        helium: Helium
        nanochat: nanochat
        hyperclovax: HyperCLOVA X SEED
        jais2: Jais 2
        bitnet: BitNet b1.58
        starcoder2: StarCoder2
        diffllama: DiffLlama; differential attention
        youtu: Youtu-LLM; latent attention
        ministral3: Ministral 3; queries scaled by position
        gpt2: GPT-2; learned positions
        gpt_neox: Pythia
        gpt_bigcode: StarCoder; one key head
        gptj: GPT-J
        opt: OPT; learned positions
        persimmon: Persimmon
        codegen: CodeGen
        iquestcoder: IQuest-Coder
        mellum: Mellum
        hrm_text: HRM; layers run repeatedly
    """,
    WINDOWS: """
        gemma2: Gemma 2; soft caps
        gemma3_text: Gemma 3 1B, 270M
        gemma3n_text: Gemma 3n; shared keys and values, per-layer inputs
        gemma4_text: Gemma 4; shared keys and values
        gpt_oss: gpt-oss; sinks
        cohere2: Command A, R7B
        olmo3: OLMo 3, 3-Think
        ministral: Ministral 8B
        llama4_text: Llama 4; chunks, layers without RoPE
        granite_swa: Granite with windows
        mimo_v2_flash: MiMo-V2-Flash; sinks
        afmoe: Trinity; windows, experts
    """,
    EXPERTS: """
        mixtral: Mixtral
        qwen2_moe: Qwen1.5-MoE
        qwen3_moe: Qwen3-30B-A3B, 235B
        deepseek_v2: DeepSeek-V2-Lite; latent attention
        deepseek_v3: DeepSeek-V3, R1, Moonlight, Kimi-K2
        glm4_moe: GLM-4.5, 4.6, Air
        glm4_moe_lite: GLM-4.7-Flash; latent attention
        ernie4_5_moe: ERNIE 4.5 MoE
        granitemoe: Granite 3 MoE
        granitemoeshared: Granite MoE with shared experts
        hunyuan_v1_moe: Hunyuan-A13B
        olmoe: OLMoE
        flex_olmo: FlexOlmo
        phimoe: Phi-3.5-MoE; router without its noise: of nearly tied experts one counts, unlike at inference
        dots1: dots.llm1
        minimax_m2: MiniMax-M2
        dbrx: DBRX
        jetmoe: JetMoE
        exaone_moe: K-EXAONE
        longcat_flash: LongCat-Flash; latent attention
        solar_open: Solar Open
        hy_v3: Hunyuan 3
        cohere2_moe: Command with experts
        sarvam_moe: Sarvam
    """,
    HYBRID: """
        qwen3_5_text: Qwen3.5, 3.6; Gated DeltaNet
        qwen3_5_moe_text: Qwen3.5 MoE; Gated DeltaNet
        qwen3_next: Qwen3-Next; Gated DeltaNet
        olmo_hybrid: OLMo Hybrid; Gated DeltaNet
        lara_mini: Lara Mini; Gated DeltaNet
        kimi_linear: Kimi-Linear; Kimi Delta Attention
        bailing_hybrid: Ling, Ring 2.5; Kimi Delta Attention
        minimax: MiniMax-01, M1; lightning attention
        nemotron_h: Nemotron-H, Nano 2, 3; Mamba-2
        bamba: Bamba; Mamba-2
        granitemoehybrid: Granite 4 H; Mamba-2
        falcon_h1: Falcon-H1; Mamba-2 beside attention
        zamba2: Zamba2; Mamba-2, shared attention
        mamba2: Mamba-2, Codestral Mamba
        lfm2: LFM2, LFM2.5; short convolutions
        lfm2_moe: LFM2 MoE; short convolutions
        lfm3: LFM3; short convolutions
        jamba: Jamba; Mamba-1
        mamba: Mamba
        falcon_mamba: Falcon-Mamba
        zamba: Zamba; Mamba-1
        recurrent_gemma: RecurrentGemma; RG-LRU
    """,
    WRAPPER: """
        qwen3_5: Qwen3.5, as shipped
        qwen3_5_moe: Qwen3.5 MoE, as shipped
        qwen3_vl: Qwen3-VL
        qwen3_vl_moe: Qwen3-VL MoE
        qwen2_5_vl: Qwen2.5-VL
        qwen2_vl: Qwen2-VL
        gemma3: Gemma 3 4B to 27B, as shipped
        gemma4: Gemma 4, as shipped
        mistral3: Mistral Small 3.1, 3.2, Magistral, as shipped
        llama4: Llama 4, as shipped
        glm4v: GLM-4.1V
        glm4v_moe: GLM-4.5V
        llava: LLaVA, Pixtral
        llava_next: LLaVA-NeXT
        internvl: InternVL 3
        idefics3: Idefics3
        smolvlm: SmolVLM
        aria: Aria
        cohere2_vision: Command A Vision
        aya_vision: Aya Vision
        lfm2_vl: LFM2-VL
        kimi_k25: Kimi-K2.5
        exaone4_5: EXAONE 4.5
        ernie4_5_vl_moe: ERNIE 4.5 VL
        paligemma: PaliGemma
        mllama: Llama 3.2 Vision; cross-attention
    """,
    OTHER: """
        bloom: BLOOM; ALiBi
        mpt: MPT; ALiBi
        falcon: Falcon
        stablelm: StableLM
        nemotron: Nemotron-4, Minitron
        gpt_neo: GPT-Neo
        rwkv: RWKV-4
        xlstm: xLSTM
        doge: Doge; dynamic masks
        zaya: ZAYA; convolutions inside attention
        inkling_text: Inkling
        deepseek_v32: DeepSeek-V3.2; indexer
        deepseek_v4: DeepSeek-V4; compressed attention
        glm_moe_dsa: GLM-5; indexer
        qwen4_exp_text: Qwen4 preview; indexer, n-gram tables
        minimax_m3_vl_text: MiniMax-M3; sparse attention
        axk2: A.X K2; indexer
    """,
}

FAMILIES = tuple(
    Family(name, heading, known)
    for heading, lines in _LISTED.items()
    for name, known in (line.strip().split(": ", 1) for line in lines.strip().splitlines())
)


def _by_turns(count: int, *kinds: str) -> list[str]:
    return [kinds[i % len(kinds)] for i in range(count)]


def _sections(theta: float, *sections: int) -> dict[str, Any]:
    """Rotary parameters of text among images: pairs of dimensions for time, height and width."""
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)}


_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
_LINEAR, _FULL = "linear_attention", "full_attention"
KEYS: dict[str, dict[str, Any]] = {
    "hyperclovax": {"logits_scaling": 0.125},
    "granite": {
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015,
        "embedding_multiplier": 12.0,
    },
    "ministral3": {
        "rope_parameters": {
            **_YARN,
            "llama_4_scaling_beta": 0.1,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    },
    "phi3": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0 + i / 48 for i in range(48)],
            "long_factor": [1.0 + i for i in range(48)],
        },
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
    },
    "qwen2_vl": {"text_config": {"rope_parameters": _sections(1e6, 16, 24, 24)}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _sections(1e6, 16, 24, 24)}},
    "glm4v": {"text_config": {"rope_parameters": {**_sections(1e4, 8, 12, 12), "partial_rotary_factor": 0.5}}},
    "glm4v_moe": {"text_config": {"rope_parameters": {**_sections(1e4, 8, 12, 12), "partial_rotary_factor": 0.5}}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _sections(5e5, 22, 22, 20)}},
    "minimax_m3_vl_text": {"layer_types": [_FULL] * 3 + ["minimax_m3_sparse"] * 57},
    "dbrx": {
        "attn_config": {"kv_n_heads": 8, "rope_theta": 500000.0, "clip_qkv": 8},
        "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4, "ffn_hidden_size": 3584, "hidden_size": 2048},
    },
    "deepseek_v2": {
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "first_k_dense_replace": 1,
        "n_routed_experts": 160,
    },
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8, "num_hidden_layers": 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "lfm2_moe": {"num_hidden_layers": 24, "layer_types": _by_turns(24, "conv", "conv", _FULL, "conv")},
    "lfm2": {"num_hidden_layers": 16, "layer_types": _by_turns(16, "conv", "conv", _FULL)},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "granitemoehybrid": {
        "num_hidden_layers": 40,
        "layer_types": _by_turns(40, *[_LINEAR] * 5, _FULL, _LINEAR, _LINEAR),
    },
    "qwen4_exp_text": {
        "eos_token_id": 1,
        "ple_layer_ids": [2, 5],
        "indexer_n_heads": 8,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
    },
    "minimax": {"layer_types": _by_turns(32, *[_LINEAR] * 7, _FULL)},
    "nemotron_h": {"hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-ME*"},
    "falcon_h1": {
        "mamba_rms_norm": True,
        "lm_head_multiplier": 0.0195,
        "ssm_multipliers": [0.5, 0.3, 0.2, 0.7, 0.4],
        "mlp_multipliers": [0.9, 0.3],
        "key_multiplier": 0.4,
        "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 0.7,
        "ssm_in_multiplier": 1.2,
        "ssm_out_multiplier": 0.3,
        "embedding_multiplier": 5.6,
    },
}


def config_of(name: str, **changes: Any) -> Any:
    """Of its real size, as it is released; also of a family that is not listed, with the defaults of its class."""
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **{**KEYS.get(name, {}), **changes})
