"""Floating-point operations of one forward and backward, counted from the model and the visible pairs of the tree.

A matmul or convolution with a frozen weight costs 4 FLOPs per parameter and token (forward, and the gradient of the
input), with a trainable one 6. Attention costs 6 (d + e) per head and visible pair, d and e the head sizes of key and
value, in the layers that have it; a recurrent layer what `mtr.model.recurrent_flops` says. The head counts at
predictors only, an expert for the tokens that are routed to it. Recomputation, norms and rotary embeddings are left
out: this is the work that is needed, not what a device spends on it.

    counter = FlopCounter(model)                      once
    counter.count(tokens, predictors, pairs)          each step: a few multiplications

`device_matrix_rate` measures what a device can do, for the share of it that a step reaches (MFU).
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from mtr.attention.layers import common_value, head_shapes, layer_spans
from mtr.attention.model_parts import base_model, decoder, output_embeddings, text_config
from mtr.model.layer_kinds import attends, layer_kinds, recurs
from mtr.model.recurrent_flops import recurrence_flops
from mtr.tree.batch import Batch
from mtr.tree.layout import Ints, Layout, count_pairs
from mtr.tree.mask import Span
from mtr.tree.packing import Cost

_ELEMENTWISE = ("bias", "A_log")
"""How names of parameters end that are no factors of a product; a state's decay may be a matrix."""


@dataclass(frozen=True)
class Flops:
    """Of a forward and backward, by what they are spent on."""

    linear: float = 0.0
    """Products with weights, convolutions among them, of all but the output head."""
    attention: float = 0.0
    recurrence: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.recurrence + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Flops)))


class FlopCounter:
    """FLOPs per token, per predictor and per visible pair of a model. Create it after LoRA was added."""

    def __init__(self, model: Any) -> None:
        base = base_model(model)
        config = text_config(base.config)
        self.per_token = sum(_products(decoder(model), config))
        """Of products with weights."""
        self.recurrence_per_token = _recurrence(decoder(model), config)
        self.per_predictor = sum(_products(output_embeddings(model), config))
        self.per_pair = _per_pair(decoder(model), config)
        """By the span of a layer, summed over all layers of that span that have attention."""

    def count(self, tokens: int, predictors: int, pairs: Mapping[Span, int]) -> Flops:
        """
        Args:
            tokens: positions that the decoder computes, padding left out.
            predictors: positions at which the head is needed.
            pairs: visible query-key pairs, from `visible_pairs`, for each span of `per_pair`.
        """
        return Flops(
            self.per_token * tokens,
            sum(cost * pairs[span] for span, cost in self.per_pair.items()),
            self.recurrence_per_token * tokens,
            self.per_predictor * predictors,
        )

    def by_part(self, layouts: Iterable[Layout]) -> Flops:
        return sum((self._count(layout.position_ids, len(layout.predictor)) for layout in layouts), Flops())

    def of_layouts(self, layouts: Iterable[Layout]) -> float:
        return self.by_part(layouts).total

    def of_batches(self, batches: Iterable[Batch]) -> float:
        """The same from batches; call it while they are on the host, so that it needs no device synchronization."""
        return sum(
            self._count(batch.position_ids[0, : batch.num_tokens].numpy(), len(batch.predictor)).total
            for batch in batches
        )

    def _count(self, position_ids: Ints, predictors: int) -> Flops:
        pairs = {span: visible_pairs(position_ids, span) for span in self.per_pair}
        return self.count(len(position_ids), predictors, pairs)


def _recurrence(module: nn.Module, config: Any) -> float:
    """FLOPs per token of all recurrences; NaN if the config has more recurrent layers than are known."""
    found = [flops for part in module.modules() if (flops := recurrence_flops(part)) is not None]
    return sum(found) if len(found) >= sum(map(recurs, layer_kinds(config))) else float("nan")


def _per_pair(module: nn.Module, config: Any) -> dict[Span, float]:
    costs: dict[Span, float] = {}
    sizes = _head_sizes(module)
    for layer, (span, kind) in enumerate(zip(layer_spans(config), layer_kinds(config), strict=True)):
        if attends(kind):
            shapes = head_shapes(config)
            key, value = sizes.get(layer, (shapes.key_size, shapes.value_size))
            costs[span] = costs.get(span, 0.0) + 6.0 * shapes.heads * (key + value)
    return costs


def visible_pairs(position_ids: Ints, span: Span) -> int:
    """Query-key pairs that attention has to visit: a token sees its ancestors and itself, as far as the span goes."""
    if span.kind == "chunked":
        return int((position_ids % span.size + 1).sum())
    return count_pairs(position_ids, span.size if span.kind == "sliding" else None)


def _products(module: nn.Module, config: Any) -> Iterator[float]:
    """FLOPs per token of each matrix in a module; NaN where the config does not say how many experts are active."""
    adapted_experts: dict[str, int] = {}  # LoRA on fused experts holds all their factors in one matrix
    shared: dict[str, float] = {}  # a block that several layers share may hold an adapter for each of them
    for name, part in module.named_modules():
        if "original_module" in name or isinstance(part, nn.Embedding):  # replaced by its trained copy; a look-up
            continue
        if hasattr(part, "lora_A") and getattr(part, "num_experts", 1) > 1:
            adapted_experts[f"{name}."] = int(part.num_experts)
        if name.endswith("adapter_list"):
            shared[f"{name}."] = 1 / max(1, sum(any(True for _ in adapter.parameters()) for adapter in part.children()))
        if isinstance(part, nn.Linear):  # by its declared sizes: a quantized weight has another shape
            stack = next((n for prefix, n in adapted_experts.items() if f"{prefix}lora_" in name), 1)
            size = part.in_features * part.out_features * _active_share(config, stack)
            size *= next((share for prefix, share in shared.items() if name.startswith(prefix)), 1.0)
            yield size * (6 if part.weight.requires_grad else 4)
            continue
        for own, parameter in part.named_parameters(recurse=False):
            if parameter.dim() < 2 or own.endswith(_ELEMENTWISE) or own.startswith("lora_embedding_A"):
                continue
            stacked = parameter.dim() == 3 and not isinstance(part, nn.Conv1d)
            share = _active_share(config, parameter.shape[0]) if stacked else 1.0
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
        if recurrence_flops(part) is not None:  # it has heads of its own, beside attention in the same layer too
            continue
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

    Recurrent layers cost the same for every token, wherever it is in a tree; only layers with attention have pairs.

    Args:
        trained_whole: full fine-tuning; matmuls with frozen weights cost two thirds of it, attention does not.
    """
    width, heads = config.hidden_size, common_value(config, "num_attention_heads") or 0
    size = common_value(config, "head_dim") or width // max(heads, 1)
    groups = common_value(config, "num_key_value_heads") or heads
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or 4 * width
    active = getattr(config, "num_experts_per_tok", None) or 1
    layer = 2 * width * size * (heads + groups) + 3 * width * inner * active
    layers = int(config.num_hidden_layers)
    pairs = zip(layer_spans(config), layer_kinds(config), strict=True)
    spans = Counter(span.size or None for span, kind in pairs if attends(kind))
    trained = 1.0 if trained_whole else 1.5
    return Cost(
        pair=2 * heads * size / layer * trained if spans else 0.0,
        target=config.vocab_size * width / (layer * layers),
        spans=tuple((span, number / layers) for span, number in spans.items()),
    )
