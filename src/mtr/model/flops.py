"""Floating-point operations of one forward and backward, counted from the model and the visible pairs of the tree.

A matmul with a frozen weight costs 4 FLOPs per parameter and token (forward, and the gradient of the input), with a
trainable one 6. Attention costs 6 (d + e) per head and visible pair, d and e the head sizes of key and value. The head
counts at predictors only, an expert for the tokens that are routed to it. Recomputation, norms and rotary embeddings
are left out: this is the work that is needed, not what a device spends on it.

    counter = FlopCounter(model)                      once
    counter.count(tokens, predictors, pairs)          each step: a few multiplications

`device_matrix_rate` measures what a device can do, for the share of it that a step reaches (MFU).
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mtr.attention.layers import head_shapes, layer_spans
from mtr.attention.model_parts import base_model, decoder, text_config
from mtr.tree.batch import Batch
from mtr.tree.layout import Ints, Layout, count_pairs
from mtr.tree.mask import Span
from mtr.tree.packing import Cost


class FlopCounter:
    """FLOPs per token, per predictor and per visible pair of a model. Create it after LoRA was added."""

    def __init__(self, model: Any) -> None:
        base = base_model(model)
        config = text_config(base.config)
        self.per_token = sum(_products(decoder(model), config))
        self.per_predictor = sum(_products(base.get_output_embeddings(), config))
        self.per_pair: dict[Span, float] = {}
        """By the span of a layer, summed over all layers of that span."""
        sizes, shapes = _head_sizes(decoder(model)), head_shapes(config)
        for layer, span in enumerate(layer_spans(config)):
            key, value = sizes.get(layer, (shapes.key_size, shapes.value_size))
            cost = 6.0 * shapes.heads * (key + value)
            self.per_pair[span] = self.per_pair.get(span, 0.0) + cost

    def count(self, tokens: int, predictors: int, pairs: Mapping[Span, int]) -> float:
        """
        Args:
            tokens: positions that the decoder computes, padding left out.
            predictors: positions at which the head is needed.
            pairs: visible query-key pairs, from `visible_pairs`, for each span of `per_pair`.
        """
        attention = sum(cost * pairs[span] for span, cost in self.per_pair.items())
        return self.per_token * tokens + self.per_predictor * predictors + attention

    def of_layouts(self, layouts: Iterable[Layout]) -> float:
        return sum(self._count(layout.position_ids, len(layout.predictor)) for layout in layouts)

    def of_batches(self, batches: Iterable[Batch]) -> float:
        """The same from batches; call it while they are on the host, so that it needs no device synchronization."""
        return sum(
            self._count(batch.position_ids[0, : batch.num_tokens].numpy(), len(batch.predictor)) for batch in batches
        )

    def _count(self, position_ids: Ints, predictors: int) -> float:
        pairs = {span: visible_pairs(position_ids, span) for span in self.per_pair}
        return self.count(len(position_ids), predictors, pairs)


def visible_pairs(position_ids: Ints, span: Span) -> int:
    """Query-key pairs that attention has to visit: a token sees its ancestors and itself, as far as the span goes."""
    if span.kind == "chunked":
        return int((position_ids % span.size + 1).sum())
    return count_pairs(position_ids, span.size if span.kind == "sliding" else None)


def _products(module: nn.Module, config: Any) -> Iterator[float]:
    """FLOPs per token of each matrix in a module; NaN where the config does not say how many experts are active."""
    adapted_experts: dict[str, int] = {}  # LoRA on fused experts holds all their factors in one matrix
    for name, part in module.named_modules():
        if "original_module" in name or isinstance(part, nn.Embedding):  # replaced by its trained copy; a look-up
            continue
        if hasattr(part, "lora_A") and getattr(part, "num_experts", 1) > 1:
            adapted_experts[f"{name}."] = int(part.num_experts)
        if isinstance(part, nn.Linear):  # by its declared sizes: a quantized weight has another shape
            stack = next((n for prefix, n in adapted_experts.items() if f"{prefix}lora_" in name), 1)
            size = part.in_features * part.out_features * _active_share(config, stack)
            yield size * (6 if part.weight.requires_grad else 4)
            continue
        for own, parameter in part.named_parameters(recurse=False):
            if parameter.dim() < 2 or own.endswith("bias") or own.startswith("lora_embedding_A"):
                continue
            share = _active_share(config, parameter.shape[0]) if parameter.dim() == 3 else 1.0
            yield parameter.numel() * share * (6 if parameter.requires_grad else 4)


def _active_share(config: Any, stack: int) -> float:
    """Of fused experts, the share that is active for a token."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if stack == 1 or stack not in {getattr(config, name, None) for name in names}:
        return 1.0
    active = (getattr(config, name, None) for name in ("num_experts_per_tok", "num_experts_per_token", "top_k_experts"))
    return next((k / stack for k in active if isinstance(k, int)), float("nan"))


def _head_sizes(module: nn.Module) -> dict[int, tuple[int, int]]:
    """(key, value) head sizes of each layer, as its attention module has them: they may differ by layer."""
    sizes = {}
    for part in module.modules():
        layer = getattr(part, "layer_idx", None)
        key = getattr(part, "qk_head_dim", None) or getattr(part, "head_dim", None)
        if isinstance(layer, int) and isinstance(key, int):
            value = getattr(part, "v_head_dim", None)
            sizes[layer] = (key, value if isinstance(value, int) else key)
    return sizes


@functools.lru_cache
def device_matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> dict[str, Any]:
    """The rate that square matmuls reach on a device, measured: what the MFU is a share of.

    Returns:
        `flops_per_second`, `size` and `dtype`.
    """
    size = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(one)
    products = 10

    def run() -> float:
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(one, other, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    run()
    taken = [run() for _ in range(3)]
    while sum(taken) < seconds:
        taken.append(run())
    # a GPU's clocks fall under load, so the median; on a CPU others only ever slow a product down, so the fastest
    one_run = sorted(taken)[len(taken) // 2] if device.type == "cuda" else min(taken)
    rate = products * 2 * size**3 / one_run
    return {"flops_per_second": rate, "size": size, "dtype": str(dtype).removeprefix("torch.")}


def cost_of(config: Any, trained_whole: bool) -> Cost:
    """Relative cost of a layout for a decoder, from its config: good enough to balance packs, not to count FLOPs.

    Args:
        trained_whole: full fine-tuning; matmuls with frozen weights cost two thirds of it, attention does not.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or 4 * width
    active = getattr(config, "num_experts_per_tok", None) or 1
    layer = 2 * width * size * (heads + groups) + 3 * width * inner * active
    spans = Counter(span.size or None for span in layer_spans(config))
    layers = spans.total()
    trained = 1.0 if trained_whole else 1.5
    return Cost(
        pair=2 * heads * size / layer * trained,
        target=config.vocab_size * width / (layer * layers),
        spans=tuple((span, number / layers) for span, number in spans.items()),
    )
