"""Claims: a small config has every kind of layer of the large one in its order, numbers that belong to layers follow
them, sizes fit each other, and the model is small; what decides how tokens see each other stays.
"""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from support.families.catalogue import config_of

from mtr.attention.model_parts import decoder
from mtr.model.probe import small_model
from mtr.model.shrink import shrink


def kinds(config: Any, *names: str) -> set[tuple[Any, ...]]:
    """Of layers, by lists with an entry for each."""
    lists = [getattr(config, name) for name in names]
    assert {len(values) for values in lists} == {config.num_hidden_layers}
    return set(zip(*lists, strict=True))


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen3_next", ["layer_types"]),
        ("granitemoehybrid", ["layer_types"]),
        ("lfm2", ["layer_types"]),
        ("zamba2", ["layers_block_type"]),
        ("nemotron_h", ["layer_types"]),
        ("jamba", ["layer_types", "layers_num_experts"]),
        ("recurrent_gemma", ["layers_block_type"]),
        ("bailing_hybrid", ["layer_types", "mlp_layer_types"]),
        ("llama4_text", ["layer_types", "no_rope_layers"]),
        ("glm4_moe_lite", ["mlp_layer_types"]),
        ("gemma3n_text", ["layer_types", "activation_sparsity_pattern"]),
    ],
)
def test_every_kind_of_layer_is_kept(family: str, names: list[str]) -> None:
    config = config_of(family)
    small = shrink(config)
    assert small.num_hidden_layers <= 8 < config.num_hidden_layers
    found, wanted = kinds(small, *names), kinds(config, *names)
    if family == "jamba":  # numbers of experts are smaller
        found, wanted = ({(kind, count > 1) for kind, count in pairs} for pairs in (found, wanted))
    assert found == wanted


def test_numbers_that_belong_to_layers_follow_them() -> None:
    bamba = shrink(config_of("bamba"))
    assert (bamba.num_hidden_layers, bamba.attn_layer_indices) == (3, [2])
    zamba = shrink(config_of("zamba2"))
    assert zamba.hybrid_layer_ids == [i for i, kind in enumerate(zamba.layers_block_type) if kind == "hybrid"]
    assert len(zamba.hybrid_layer_ids) == 2, "the block is shared"
    assert shrink(config_of("deepseek_v3")).first_k_dense_replace == 2
    llama4 = shrink(config_of("llama4_text", moe_layers=[1, 3, 5], num_hidden_layers=6))
    assert 0 < len(llama4.moe_layers) < llama4.num_hidden_layers


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_have_layers_to_share_them_with(family: str) -> None:
    config = config_of(family, num_kv_shared_layers=10)
    small = shrink(config)
    types = small.layer_types
    first = small.num_hidden_layers - small.num_kv_shared_layers
    assert set(types[:first]) == set(types[first:]) == {"sliding_attention", "full_attention"}


def test_layers_with_heads_of_their_own_keep_them() -> None:
    """Heads of Gemma 4's full attention are twice as wide."""
    small = shrink(config_of("gemma4_text"))
    sizes = {kind: layer.head_dim for kind, layer in zip(small.layer_types, small.per_layer_config, strict=True)}
    assert sizes["full_attention"] == 2 * sizes["sliding_attention"] == 32


def test_what_decides_how_tokens_see_each_other_stays() -> None:
    gemma = shrink(config_of("gemma2"))
    assert (gemma.attn_logit_softcapping, gemma.final_logit_softcapping, gemma.sliding_window) == (50.0, 30.0, 24)
    qwen = shrink(config_of("qwen3_5_text", rope_parameters={
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
    }))  # fmt: skip
    assert sum(qwen.rope_parameters["mrope_section"]) == qwen.head_dim * 0.25 / 2
    assert (qwen.num_attention_heads, qwen.num_key_value_heads) == (4, 2)
    assert shrink(config_of("minimax")).block_size == 16
    assert shrink(config_of("mamba2")).chunk_size == 16
    phi = shrink(config_of("phi3"))
    assert phi.rope_parameters["rope_type"] == "longrope"
    assert phi.rope_parameters["original_max_position_embeddings"] == 4096
    assert shrink(config_of("ministral3")).rope_parameters["original_max_position_embeddings"] < 100


FAMILIES = (
    "afmoe", "aria_text", "axk1", "bamba", "cohere2_moe", "deepseek_v3", "deepseek_v32", "deepseek_v4", "doge",
    "dory", "ernie4_5_moe", "falcon", "falcon_h1", "falcon_mamba", "gemma3", "gemma3n_text", "gemma4", "glm4_moe",
    "gpt2", "gptj", "gpt_oss", "granitemoehybrid", "hy_v4", "inkling2_text", "jamba", "jetmoe", "kimi_linear",
    "laguna", "lara_mini", "lfm2_moe", "lfm3", "llama4", "longcat_flash", "mamba2", "mimo_v2_flash",
    "minicpm3", "ministral3", "nemotron_h", "olmo_hybrid", "opt", "phi4_multimodal", "phimoe", "qwen2_5_vl",
    "qwen3_5_moe", "qwen3_vl", "recurrent_gemma", "rwkv", "smollm3", "starcoder2", "xlstm", "youtu", "zamba",
    "zamba2", "zaya",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_small(family: str) -> None:
    config = config_of(family)
    model = small_model(shrink(config))
    assert sum(parameter.numel() for parameter in decoder(model).parameters()) < 2_000_000


def test_a_config_that_stays_large_is_refused() -> None:
    with pytest.raises(ValueError, match=r"its config cannot be made small: [\d,]+ parameters are left"):
        small_model(transformers.LlamaConfig(num_hidden_layers=2))
