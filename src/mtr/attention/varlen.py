"""Attention over the rows of a varlen plan: FlashAttention's kernels, each path with its keys gathered.

    query [T] as it is      ->  rows of cu_seq_q      key, value [T] -> gathered [G] by kv_index, rows of cu_seq_k

Every row is causal attention aligned at the bottom right, so queries are computed once and the pairs are the tree's.
The gathered keys are not saved: the backward gathers them again, and accumulates their gradients in float32, because a
trunk's keys take part in every branch.

Attention sinks are one more term of the log-sum-exp. The backward hands the kernel the `out` and `lse` that include
it: P = exp(S - lse) and D = rowsum(dO * O) are then the true ones, so no gradient of the lse is needed.

On CUDA the kernel is torch's FlashAttention (FA2, or what `torch.nn.attention.activate_flash_attention_impl` has put
in its place) in float16 or bfloat16. Elsewhere the rows are computed one by one from the definition: a
reference with which the plan and everything around the kernel can be tested on any machine.

Shapes: H query heads, K key heads (H a multiple of K), T tokens, G gathered keys, D head size, E value head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mtr.tree.plan import VarlenPlan

MAX_HEAD_SIZE = 256
"""The largest head size of FlashAttention's kernels."""


def varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, scale: float, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of a tree.

    Args:
        query: [1, H, T, D]
        key: [1, K, T, D]
        value: [1, K, T, E]
        plan: from `varlen_plan`
        sinks: [H] logits that take part in the softmax and carry no value

    Returns:
        [1, T, H, E], and the log-sum-exp of each row's scores and sink, [1, H, T].
    """
    width, size = value.shape[-1], _kernel_size(query, value)
    kernel = _flash if query.is_cuda else _reference
    rows, keys, values = (_rows_of(x, size) for x in (query, key, value))
    out, lse = kernel(rows, keys[plan.kv_index], values[plan.kv_index], plan, scale)
    if sinks is not None:
        with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out = (out * (lse - with_sinks).exp().T.unsqueeze(-1)).to(out.dtype)
        lse = with_sinks
    return out[None, ..., :width], lse[None]


def varlen_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: VarlenPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `grad_out` and `out` are [1, T, H, E]."""
    size = _kernel_size(query, value)
    kernel = _flash_backward if query.is_cuda else _reference_backward
    grads_out, outs = (_widened(x[0], size).contiguous() for x in (grad_out, out))
    result = _Result(grads_out, outs, lse[0])
    rows, keys, values = (_rows_of(x, size) for x in (query, key, value))
    grad_query, *grads = kernel(result, rows, keys[plan.kv_index], values[plan.kv_index], plan, scale)
    grad_key, grad_value = (
        x.new_zeros(x.shape, dtype=lse.dtype).index_add_(0, plan.kv_index, grad.to(lse.dtype)).to(x.dtype)
        for x, grad in zip((keys, values), grads, strict=True)
    )
    given = zip((grad_query, grad_key, grad_value), (query, key, value), strict=True)
    return tuple(grad[None, ..., : x.shape[-1]].transpose(1, 2) for grad, x in given)  # type: ignore[return-value]


def _kernel_size(query: Tensor, value: Tensor) -> int:
    """The kernel has one head size, a multiple of 8."""
    return -(-max(query.shape[-1], value.shape[-1]) // 8) * 8


def _rows_of(x: Tensor, size: int) -> Tensor:
    """[1, heads, T, D] -> [T, heads, size]"""
    return _widened(x[0].transpose(0, 1), size)


def _widened(x: Tensor, size: int) -> Tensor:
    """Zeros change neither scores nor values."""
    return x if x.shape[-1] == size else pad(x, (0, size - x.shape[-1]))


class _Result(NamedTuple):
    """What the backward needs from the forward."""

    grad_out: Tensor
    """[T, H, D]"""
    out: Tensor
    """[T, H, D]"""
    lse: Tensor
    """[H, T]"""


def _window(plan: VarlenPlan) -> dict[str, Any]:
    """The kernel's arguments: a window counts the keys before the query and implies causality."""
    if not plan.window:
        return {"is_causal": True}
    return {"is_causal": False, "window_size_left": plan.window - 1, "window_size_right": 0}


def _flash(query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, scale: float) -> tuple[Tensor, Tensor]:
    """query [T, H, D], key and value [G, K, D] -> out [T, H, D], lse [H, T] in float32."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        plan.cu_seq_q,
        plan.cu_seq_k,
        plan.max_q,
        plan.max_k,
        dropout_p=0.0,
        return_debug_mask=False,
        scale=scale,
        **_window(plan),
    )
    return out, lse


def _flash_backward(
    result: _Result, query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        result.grad_out,
        query,
        key,
        value,
        result.out,
        result.lse,
        plan.cu_seq_q,
        plan.cu_seq_k,
        plan.max_q,
        plan.max_k,
        dropout_p=0.0,
        rng_state=torch.zeros(2, dtype=torch.uint64, device=query.device),  # for dropout, which is 0
        unused=torch.empty(0, device=query.device),
        scale=scale,
        **_window(plan),
    )
    return grads


def _reference(query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, scale: float) -> tuple[Tensor, Tensor]:
    """As `_flash`, row by row."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1::-1], dtype=dtype)
    for q, k, mask in _rows(plan):
        keys, values = (_by_head(x[k], query.shape[1]).to(dtype) for x in (key, value))
        scores = (query[q].transpose(0, 1).to(dtype) @ keys.mT * scale).masked_fill(~mask, float("-inf"))
        lse[:, q] = scores.logsumexp(dim=-1)
        out[q] = (scores.softmax(dim=-1) @ values).transpose(0, 1).to(out.dtype)
    return out, lse


def _reference_backward(
    result: _Result, query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = result.lse.dtype
    grads = tuple(torch.empty_like(x, dtype=dtype) for x in (query, key, value))
    for q, k, mask in _rows(plan):
        grad_out, out, queries = (x[q].transpose(0, 1).to(dtype) for x in (result.grad_out, result.out, query))
        keys, values = (_by_head(x[k], query.shape[1]).to(dtype) for x in (key, value))
        weights = (queries @ keys.mT * scale - result.lse[:, q, None]).exp().masked_fill(~mask, 0.0)
        grad_scores = weights * (grad_out @ values.mT - (grad_out * out).sum(-1, keepdim=True)) * scale
        grads[0][q] = (grad_scores @ keys).transpose(0, 1)
        for grad, by_head in ((grads[1], grad_scores.mT @ queries), (grads[2], weights.mT @ grad_out)):
            grad[k] = by_head.view(key.shape[1], -1, *by_head.shape[1:]).sum(dim=1).transpose(0, 1)
    return grads[0].to(query.dtype), grads[1], grads[2]


def _rows(plan: VarlenPlan) -> Iterator[tuple[slice, slice, Tensor]]:
    """The queries and keys of each row, and what they see of each other, [queries, keys]."""
    cu_q, cu_k = plan.cu_seq_q.tolist(), plan.cu_seq_k.tolist()
    for q, k in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        num_q, num_k = q[1] - q[0], k[1] - k[0]
        distance = (torch.arange(num_q) + num_k - num_q)[:, None] - torch.arange(num_k)[None, :]
        yield slice(*q), slice(*k), (distance >= 0) & (distance < (plan.window or num_k + 1))


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[keys, K, D] -> [H, keys, D]"""
    return x.repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1)
