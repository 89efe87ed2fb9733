"""Claims: a config tells how far each layer sees, and what cannot be exact is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.models import ARCHITECTURES, EXACT, tiny_config

from mtr.attention.layers import layer_spans, refusal
from mtr.attention.model_parts import text_config
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
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"alibi": True}, "ALiBi"),
        ({"output_router_logits": True}, "output_router_logits"),
        ({"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 512}, "at most 512"),
        (
            {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 256}},
            "at most 256",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}, "max_position_embeddings": 512},
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
        {"alibi": False, "output_router_logits": False, "is_encoder_decoder": False},
        {"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 1024},
        {"rope_parameters": {"rope_type": "yarn"}, "max_position_embeddings": 16},
    ],
)
def test_nothing_to_refuse(keys: dict[str, Any]) -> None:
    assert refusal(config(**keys), 1024) is None


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_refusal_of_real_configs(kind: str) -> None:
    reason = refusal(text_config(tiny_config(kind)), 1024)
    assert (reason is None) == (kind in EXACT), reason
