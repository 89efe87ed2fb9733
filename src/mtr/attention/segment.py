"""Attention over a tile plan: plain kernels on contiguous ranges, joined by their log-sum-exp.

Queries with several tiles get out = sum_i exp(lse_i - lse) out_i with lse = logsumexp(lse_i), tile by tile. The
backward hands the joined `out` and `lse` to each tile's kernel: P = exp(S - lse) and D = rowsum(dO * O) are then the
true ones, so each tile's gradients are exact parts of the sum, and no gradient of the lse is needed. Attention sinks
are one more term of the log-sum-exp.

Shapes: H query heads, K key heads (H a multiple of K), T tokens, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mtr.tree.plan import Tile

_MOST_SCORES = 2**24  # elements of the score matrix that the explicit kernel holds at once


class _Options(NamedTuple):
    scale: float
    softcap: float | None


class _Rows(NamedTuple):
    """What the backward needs of a tile's queries."""

    grad_out: Tensor
    query: Tensor
    out: Tensor
    lse: Tensor


def segment_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Sequence[Tile],
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a tree on the CPU.

    Args:
        query: [1, H, T, D]
        key: [1, K, T, D]
        value: [1, K, T, E]
        plan: from `tile_plan`
        scale: of the scores, before `softcap`
        sinks: [H] logits that take part in the softmax and carry no value

    Returns:
        [1, T, H, E], and the log-sum-exp of each row's scores and sink, [1, H, T].
    """
    width, options = value.shape[-1], _Options(scale, softcap)
    query, key, value = _of_one_size(query, key, value)
    dtype = _accumulator(query.dtype)
    by_token = query.new_empty((1, query.shape[2], query.shape[1], query.shape[3]), dtype=dtype)
    out, lse = by_token.transpose(1, 2), query.new_empty(query.shape[:-1], dtype=dtype)
    for tile in plan:
        part, part_lse = _attend(query[:, :, tile.start : tile.end], key, value, tile, options)
        rows_out, rows_lse = out[:, :, tile.start : tile.end], lse[:, :, tile.start : tile.end]
        if tile.own:
            rows_out.copy_(part)
            rows_lse.copy_(part_lse)
            continue
        total = torch.logaddexp(rows_lse, part_lse)
        rows_out.mul_((rows_lse - total).exp_().unsqueeze(-1))
        rows_out.addcmul_(part, (part_lse - total).exp_().unsqueeze(-1))
        rows_lse.copy_(total)
    if sinks is not None:
        with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1))
        out.mul_((lse - with_sinks).exp_().unsqueeze(-1))
        lse = with_sinks
    return by_token[..., :width].to(query.dtype), lse


def segment_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Sequence[Tile],
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in the dtype of `lse`; `grad_out` and `out` are [1, T, H, E]."""
    options, sizes = _Options(scale, softcap), [x.shape[-1] for x in (query, key, value)]
    query, key, value, out, grad_out = _of_one_size(query, key, value, out, grad_out)
    out, grad_out = out.transpose(1, 2), grad_out.transpose(1, 2)
    grads = [x.new_empty(x.shape, dtype=lse.dtype) for x in (query, key, value)]
    for tile in plan:
        rows, keys = slice(tile.start, tile.end), slice(tile.key_start, tile.key_end)
        at_rows = _Rows(*(x[:, :, rows] for x in (grad_out, query, out, lse)))
        parts = _attend_backward(at_rows, key, value, tile, options)
        for grad, part, at in zip(grads, parts, (rows, keys, keys), strict=True):
            if tile.own:  # own tiles come first and initialize the output
                grad[:, :, at] = part
            else:
                grad[:, :, at] += part
    grad_query, grad_key, grad_value = (grad[..., :size] for grad, size in zip(grads, sizes, strict=True))
    return grad_query, grad_key, grad_value


def _of_one_size(*given: Tensor) -> tuple[Tensor, ...]:
    """The kernel has one head size for keys and values, which latent attention (MLA) has not; zeros change nothing."""
    size = max(x.shape[-1] for x in given)
    return tuple(x if x.shape[-1] == size else pad(x, (0, size - x.shape[-1])) for x in given)


def _is_causal(tile: Tile) -> bool:
    return tile.own and tile.mask is None


def _attend(query: Tensor, key: Tensor, value: Tensor, tile: Tile, options: _Options) -> tuple[Tensor, Tensor]:
    """One tile: out [1, H, q, D] and its log-sum-exp [1, H, q]."""
    key, value = key[:, :, tile.key_start : tile.key_end], value[:, :, tile.key_start : tile.key_end]
    if options.softcap is not None:
        return _explicit(query, key, value, tile, options)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, _is_causal(tile), attn_mask=_additive(tile.mask, query), scale=options.scale
    )
    out = out.to(lse.dtype)
    if tile.mask is not None:  # the kernel returns 0 for rows without a visible key
        lse = lse.masked_fill(~tile.mask.any(dim=1), float("-inf"))
    return out, lse


def _attend_backward(
    at_rows: _Rows, key: Tensor, value: Tensor, tile: Tile, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """This tile's part of the gradients, given the joined `out` and `lse`."""
    key, value = key[:, :, tile.key_start : tile.key_end], value[:, :, tile.key_start : tile.key_end]
    if options.softcap is not None:
        return _explicit_backward(at_rows, key, value, tile, options)
    grad_out, query, out, lse = at_rows
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        0.0,
        _is_causal(tile),
        attn_mask=_additive(tile.mask, query),
        scale=options.scale,
    )
    return grads


def _explicit(query: Tensor, key: Tensor, value: Tensor, tile: Tile, options: _Options) -> tuple[Tensor, Tensor]:
    """With a soft cap on the scores, which the fused kernel lacks; computed a few query rows at a time."""
    outs, lses = [], []
    for rows in _row_chunks(query, key):
        scores, _ = _scores(query[:, :, rows], key, tile, rows, options)
        lse = torch.logsumexp(scores, dim=-1)
        weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)).exp()
        outs.append(weights @ _repeat(value, query).to(weights.dtype))
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _explicit_backward(
    at_rows: _Rows, key: Tensor, value: Tensor, tile: Tile, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, query, out, lse = at_rows
    dtype = lse.dtype
    keys, values = _repeat(key, query).to(dtype), _repeat(value, query).to(dtype)
    grad_out, out = grad_out.to(dtype), out.to(dtype)
    grad_query, grad_keys, grad_values = [], torch.zeros_like(keys), torch.zeros_like(values)
    for rows in _row_chunks(query, key):
        scores, slope = _scores(query[:, :, rows], key, tile, rows, options)
        weights = (scores - lse[:, :, rows].unsqueeze(-1)).exp()
        d_out = grad_out[:, :, rows]
        grad_values += weights.mT @ d_out
        delta = (d_out * out[:, :, rows]).sum(-1, keepdim=True)
        d_scores = weights * (d_out @ values.mT - delta) * slope * options.scale
        grad_query.append(d_scores @ keys)
        grad_keys += d_scores.mT @ query[:, :, rows].to(dtype)
    grad_key, grad_value = (x.view(1, key.shape[1], -1, *x.shape[2:]).sum(dim=2) for x in (grad_keys, grad_values))
    return torch.cat(grad_query, dim=2), grad_key, grad_value


def _scores(query: Tensor, key: Tensor, tile: Tile, rows: slice, options: _Options) -> tuple[Tensor, Tensor]:
    """Capped, masked scores [1, H, q, k] and the slope of the cap."""
    assert options.softcap is not None
    dtype = _accumulator(query.dtype)
    capped = torch.tanh(query.to(dtype) @ _repeat(key, query).to(dtype).mT * (options.scale / options.softcap))
    mask = tile.mask
    if _is_causal(tile):
        length = tile.end - tile.start
        mask = torch.ones(length, length, dtype=torch.bool).tril()
    scores = capped * options.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask[rows], float("-inf"))
    return scores, 1 - capped**2


def _row_chunks(query: Tensor, key: Tensor) -> list[slice]:
    step = max(1, _MOST_SCORES // (query.shape[1] * key.shape[2]))
    return [slice(i, min(i + step, query.shape[2])) for i in range(0, query.shape[2], step)]


def _repeat(x: Tensor, query: Tensor) -> Tensor:
    """Key or value heads repeated to the query's."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))[None, None]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
