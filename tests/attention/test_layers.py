"""Claims: a config tells how far each layer sees, and what cannot be exact is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from support.models import ARCHITECTURES, tiny_config

from mtr.attention.interface import use_own_attention, use_tree_attention, with_own_attention
from mtr.attention.layers import layer_spans, refusal, scale_start
from mtr.attention.model_parts import text_config
from mtr.model.probe import probe
from mtr.model.shrink import shrink
from mtr.tree.mask import FULL, Span


def config(**keys: Any) -> Any:
    return SimpleNamespace(**{"num_hidden_layers": 2, "model_type": "test", **keys})


@pytest.mark.parametrize(
    ("keys", "spans"),
    [
        ({}, [FULL, FULL]),
        ({"sliding_window": None}, [FULL, FULL]),
        ({"sliding_window": 9}, [Span("sliding", 9)] * 2),
        ({"sliding_window": 9, "use_sliding_window": False}, [FULL, FULL]),
        ({"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}, [Span("sliding", 9), FULL]),
        ({"sliding_window": None, "layer_types": ["sliding_attention", "full_attention"]}, [FULL, FULL]),
        ({"sliding_window": 9, "layer_types": ["linear_attention", "hybrid_sliding"]}, [FULL, Span("sliding", 9)]),
        (
            {"attention_chunk_size": 7, "layer_types": ["full_attention", "chunked_attention"]},
            [FULL, Span("chunked", 7)],
        ),
    ],
)
def test_layer_spans(keys: dict[str, Any], spans: list[Span]) -> None:
    assert layer_spans(config(**keys)) == spans


def test_layer_spans_of_real_configs() -> None:
    assert layer_spans(tiny_config("llama")) == [FULL, FULL]
    assert layer_spans(tiny_config("gemma3")) == [Span("sliding", 24), FULL, Span("sliding", 24)]
    assert layer_spans(tiny_config("gpt_oss")) == [Span("sliding", 24), FULL]


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"layer_types": ["indexed_attention", "full_attention"]}, "indexed_attention"),
        ({"alibi": True}, "ALiBi"),
        ({"attn_temperature_tuning": True, "no_rope_layers": [1, 0], "floor_scale": 1024}, "max_length below 1024"),
        ({"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 512}, "at most 512"),
        (
            {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 256}},
            "at most 256",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}, "max_position_embeddings": 512},
            "at most 512",
        ),
        (
            {
                "rope_parameters": {"rope_type": "longrope"},
                "original_max_position_embeddings": 512,
                "max_position_embeddings": 4096,
            },
            "at most 512",
        ),
    ],
)
def test_refusal_names_the_reason(keys: dict[str, Any], word: str) -> None:
    reason = refusal(config(**keys), 1024)
    assert reason is not None
    assert word in reason


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"layer_types": ["full_attention", "sliding_attention", "chunked_attention"]},
        {"layer_types": ["linear_attention", "conv", "hybrid", "full_attention"]},
        {"alibi": False, "output_router_logits": True},
        {"attn_temperature_tuning": True, "no_rope_layers": [1, 0], "floor_scale": 1025},
        {"attn_temperature_tuning": True, "no_rope_layers": [1, 1], "floor_scale": 8},
        {"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 1024},
        {"rope_parameters": {"rope_type": "yarn"}, "max_position_embeddings": 16},
    ],
)
def test_nothing_to_refuse(keys: dict[str, Any]) -> None:
    assert refusal(config(**keys), 1024) is None


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_nothing_to_refuse_in_real_configs(kind: str) -> None:
    assert refusal(text_config(tiny_config(kind)), 1024) is None


@pytest.mark.parametrize("scale", [64, 200])
def test_llama4_scales_queries_by_the_place_in_the_row(scale: int) -> None:
    """From the place on that is said to be the first, and in its own forward only."""
    small = shrink(transformers.Llama4TextConfig(floor_scale=scale, attn_scale=10.0))
    assert scale_start(small) == scale
    assert (probe(small) > 1e-2) == (scale < 150), "paths of the probe are 150 tokens long"
    model = transformers.AutoModelForCausalLM.from_config(small)
    scaled = [layer.self_attn for layer in model.model.layers]
    use_tree_attention(model)
    assert not any(attention.attn_temperature_tuning for attention in scaled)
    use_own_attention(model)
    assert all(attention.attn_temperature_tuning for attention in scaled)
    use_tree_attention(model)
    with with_own_attention(model):  # as for generation before training
        assert all(attention.attn_temperature_tuning for attention in scaled)
    assert not any(attention.attn_temperature_tuning for attention in scaled)
