"""How a tree's mask reaches the attention layers of a transformers model.

One attention function, registered with transformers, is handed the tree as a keyword argument, past every mask the
model would make itself, and picks the mask of its layer:

    decoder(..., tree=TreeHandle)  ->  attention layer i  ->  span of layer i  ->  backend

    flex     FlexAttention with a block mask: CUDA
    varlen   FlashAttention over paths with gathered keys: CUDA
    segment  plain attention over contiguous ranges: CPU
    sdpa     dense mask; eager  dense mask, the model's own function: references, and small trees

`mtr.attention.choice` picks the one that a run uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from mtr.attention.autocast import without_autocast
from mtr.attention.dense import own_attention, sdpa_attention
from mtr.attention.flex import flex_backward, flex_forward, flex_mask
from mtr.attention.layers import layer_spans
from mtr.attention.masks import TreeAttention, TreeHandle, distinct
from mtr.attention.model_parts import base_model, decoder, text_config
from mtr.attention.op import BACKWARD, FORWARD, tree_attention
from mtr.attention.segment import segment_backward, segment_forward
from mtr.attention.varlen import varlen_backward, varlen_forward
from mtr.errors import UserError
from mtr.tree.mask import Span
from mtr.tree.plan import tile_plan, varlen_plan

IMPLEMENTATION = "mtr_tree"
"""The name under which transformers knows the attention function."""


# --- the operator's kernels -------------------------------------------------------------------------------------------


def attend(
    attention: TreeAttention,
    span: Span,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one layer by the tree's backend; not for eager, which needs the layer's module.

    Args:
        query: [1, H, T, D]
        key: [1, K, T, D]
        value: [1, K, T, E]

    Returns:
        [1, T, H, E]
    """
    if attention.backend == "sdpa":
        assert softcap is None, "sdpa has no soft cap"
        assert sinks is None, "sdpa has no sinks"
        return sdpa_attention(attention, span, query, key, value, scale)
    handle = TreeHandle(attention).tensor
    return tree_attention(query, key, value, handle, attention.spans.index(span), scale, softcap, sinks)


def forward(
    attention: TreeAttention,
    span: Span,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out [1, T, H, E] and its log-sum-exp [1, H, T], by the pack's backend."""
    match attention.backend:
        case "segment":
            return segment_forward(query, key, value, attention.make(tile_plan, span), scale, softcap, sinks)
        case "flex":
            return flex_forward(query, key, value, attention.make(flex_mask, span), scale, softcap, sinks)
        case "varlen":
            assert softcap is None, "varlen has no soft cap"
            return varlen_forward(query, key, value, attention.make(varlen_plan, span), scale, sinks)
    raise AssertionError(f"{attention.backend} has no kernel of ours")


def backward(
    attention: TreeAttention,
    span: Span,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given that of `out`."""
    given = (grad_out, query, key, value, out, lse)
    match attention.backend:
        case "segment":
            return segment_backward(*given, attention.make(tile_plan, span), scale, softcap)
        case "flex":
            return flex_backward(*given, attention.make(flex_mask, span), scale, softcap)
        case "varlen":
            return varlen_backward(*given, attention.make(varlen_plan, span), scale)
    raise AssertionError(f"{attention.backend} has no kernel of ours")


@torch.library.impl(FORWARD, "default")
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor,
    span: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    attention = _entered(handle)
    with without_autocast(query):
        out, lse = forward(attention, attention.spans[span], query, key, value, scale, softcap, sinks)
    return out.contiguous(), lse


@torch.library.impl(BACKWARD, "default")
def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    handle: Tensor,
    span: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    attention = TreeHandle.attention(handle)
    with without_autocast(query):
        grads = backward(attention, attention.spans[span], grad_out, query, key, value, out, lse, scale, softcap)
    grad_query, grad_key, grad_value = (_by_token(grad, query.dtype) for grad in grads)
    return grad_query, grad_key, grad_value


def _entered(handle: Tensor) -> TreeAttention:
    """The pack, for a layer's attention, which is counted."""
    attention = TreeHandle.attention(handle)
    attention.calls += 1
    return attention


def _by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, heads, T, D] with the memory of [1, T, heads, D], as projections want it."""
    x = x.transpose(1, 2)
    x = x.to(dtype, memory_format=torch.contiguous_format) if x.dtype != dtype else x.contiguous()
    return x.transpose(1, 2)


# --- transformers -----------------------------------------------------------------------------------------------------


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tree: TreeHandle | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]

    torch.compile traces it: of `tree` only the tensor differs between the packs of a run.
    """
    name = type(module).__name__
    if tree is None:
        raise UserError(f"{name} does not hand keyword arguments on to attention, so the tree mask would be lost")
    window = others.pop("sliding_window", None)
    assert window is None or window == getattr(module, "mtr_window", 0), f"{name}: another window, {window}"
    index: int = getattr(module, "mtr_span", 0)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if tree.backend == "eager":
        options = {k: v for k, v in {"softcap": softcap, "s_aux": s_aux}.items() if v is not None}
        return _eager(tree.tensor, index, module, query, key, value, scaling=scale, **options, **others), None
    # autocast leaves norms and rotary embeddings in float32
    query, key = query.to(value.dtype), key.to(value.dtype)
    if tree.backend == "sdpa":
        return _sdpa(tree.tensor, index, query, key, value, scale, softcap, s_aux), None
    return tree_attention(query, key, value, tree.tensor, index, scale, softcap, s_aux), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _sdpa(handle: Tensor, index: int, *arguments: Any) -> Tensor:
    attention = _entered(handle)
    return attend(attention, attention.spans[index], *arguments).contiguous()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _eager(handle: Tensor, index: int, *arguments: Any, **options: Any) -> Tensor:
    attention = _entered(handle)
    return own_attention(attention, attention.spans[index], *arguments, **options).contiguous()


AttentionInterface.register(IMPLEMENTATION, _attend)


def use_own_attention(model: Any) -> None:
    """The model's own attention and causal mask, sdpa where supported: for generation and the per-turn reference."""
    text = decoder(model)
    text.set_attn_implementation("sdpa" if text._supports_sdpa else "eager")
    _scale_by_place(base_model(model), True)


def forget_rows(model: Any) -> None:
    """Let dynamic RoPE, which grows with the longest row so far, compute the next row as the first one."""
    for module in base_model(model).modules():
        kinds = getattr(module, "rope_type", None)
        prefixes = (
            {"": kinds} if isinstance(kinds, str) else {f"{layer}_": kind for layer, kind in (kinds or {}).items()}
        )
        for prefix, kind in prefixes.items():
            if "dynamic" in kind:
                first = getattr(module, f"{prefix}original_inv_freq")
                setattr(module, f"{prefix}inv_freq", first.to(getattr(module, f"{prefix}inv_freq").device, copy=True))
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


@contextmanager
def with_own_attention(model: Any) -> Iterator[None]:
    """Within it, the model's own attention; then what was there before."""
    text = decoder(model)
    before = text.config._attn_implementation
    use_own_attention(model)
    try:
        yield
    finally:
        text.set_attn_implementation(before)
        _scale_by_place(base_model(model), before != IMPLEMENTATION)


def use_tree_attention(model: Any) -> None:
    """Attention over the tree that the decoder is handed; each layer is told which of the model's spans is its own."""
    base = base_model(model)
    decoder(base).set_attn_implementation(IMPLEMENTATION)
    _scale_by_place(base, False)
    spans = layer_spans(text_config(base.config))
    for module in base.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and number < len(spans):
            span = spans[number]
            module.mtr_span = distinct(spans).index(span)
            module.mtr_window = span.size if span.kind == "sliding" else 0


def _scale_by_place(base: Any, on: bool) -> None:
    """Whether queries grow with their place in the row, which they do from `mtr.attention.layers.scale_start` on."""
    for module in base.modules():
        if hasattr(module, "attn_temperature_tuning"):
            module.attn_temperature_tuning = on and text_config(base.config).attn_temperature_tuning
