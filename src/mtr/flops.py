"""Floating-point operations of one forward and backward, counted from the model and the tree.

A product with a frozen weight costs 4 FLOP per parameter and token (forward, and the gradient of the input), with a
trained one 6. Attention costs 6 (d + e) per head and visible pair, d and e the head sizes of key and value. The head
counts at predictors only. Recomputation, norms and rotations are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mtr.attention import layer_spans
from mtr.layout import Layout, count_pairs
from mtr.mask import Span
from mtr.model import base_model, decoder, text_config


def count_flops(model: Any, layouts: Sequence[Layout]) -> float:
    """Of all layouts together."""
    config = text_config(base_model(model).config)
    tokens = sum(layout.num_tokens for layout in layouts)
    predictors = sum(len(layout.predictor) for layout in layouts)
    head = base_model(model).get_output_embeddings()
    linear = _per_token(decoder(model), config) * tokens + _per_token(head, config) * predictors
    attention = sum(sum(_pairs(layout, span) for layout in layouts) * _per_pair(config) for span in layer_spans(config))
    return linear + attention


def _per_token(module: nn.Module, config: Any) -> float:
    """FLOP of the matrix products of a module for one token."""
    experts = next(
        (n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(config, key, None))),
        0,
    )
    active = getattr(config, "num_experts_per_tok", None) or 1
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    total = 0.0
    for name, parameter in module.named_parameters():
        if "original_module" in name:  # replaced by the copy of it that is trained whole
            continue
        if parameter.dim() < 2 or (id(parameter) in embeddings and not isinstance(module, nn.Linear)):
            continue
        share = active / experts if parameter.dim() == 3 and parameter.shape[0] == experts else 1.0
        total += parameter.numel() * share * (6 if parameter.requires_grad else 4)
    return total


def _per_pair(config: Any) -> float:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "qk_rope_head_dim", None)
    key = config.qk_nope_head_dim + rope if rope and hasattr(config, "qk_nope_head_dim") else size
    value = getattr(config, "v_head_dim", None) or size
    return float(6 * config.num_attention_heads * (key + value))


def _pairs(layout: Layout, span: Span) -> int:
    if span.kind == "chunked":
        return int((layout.position_ids % span.size + 1).sum())
    return count_pairs(layout, span.size or None)
