"""FlexAttention's kernels for a kind of layer, compiled once for packs of every length.

torch.compile around `flex_attention` keeps a graph for each shape and mask it has met, and past its limit goes on
without a kernel, on dense scores. Here the graphs are made directly: one forward and one backward for each `Kind`,
traced with a symbolic number of blocks and handed to Inductor. Nothing of a pack leads to a compilation, there is
nothing to fall back to, and the kernels know that lengths are whole blocks.

    _forward or _backward of a Kind  ->  graph of [1, heads, block * R, D]  ->  Inductor  ->  kernel

Shapes: H query heads, K key heads (H a multiple of K), R blocks, T = block * R tokens, D head size, E value head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtr.errors import UserError, one_line
from mtr.tree.mask import Span, predicate

_LIKELY_BLOCKS = 128
"""The length that Inductor has in mind where a choice depends on it."""
_MOST_KERNELS = 256
"""A model has a few kinds of layers; so many kernels mean that something else got into `Kind`."""

Kernel = Callable[..., Any]


class Kind(NamedTuple):
    """What a kernel is compiled for. No part of it depends on a pack."""

    span: Span
    block: int
    """Queries and keys of a block."""
    scale: float
    softcap: float | None
    heads: int
    key_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device
    sinks: bool


def kernel(kind: Kind, backward: bool, mask: Sequence[Any]) -> Kernel:
    """The compiled forward or backward; it takes tensors whose memory is that of [1, T, heads, size].

    forward: query [1, H, T, D], key [1, K, T, D], value [1, K, T, E], sinks [H] if there are any, mask
        -> out [1, H, T, E], lse [1, H, T]
    backward: grad_out, out [1, H, T, E], lse [1, H, T], query, key, value, mask -> gradients of query, key, value

    Args:
        mask: `BlockMask.as_tuple()`, then subtree_end and position_ids.

    Raises:
        UserError: the kernel cannot be compiled.
    """
    found = _kernels.get((kind, backward))
    if found is None:
        assert len(_kernels) < _MOST_KERNELS, f"flex attention compiles kernels without end: {kind}"
        try:
            with ThreadPoolExecutor(1) as beside:
                found = beside.submit(copy_context().run, _build, kind, backward, mask).result()
        except (AssertionError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a compiler raises
            raise UserError(
                f"model.attention: flex has no {'backward' if backward else 'forward'} kernel for {kind.heads}:"
                f"{kind.key_heads} heads of {kind.key_size} in {kind.dtype} here ({type(error).__name__}: "
                f"{one_line(error, 300)}); use varlen, or sdpa or eager, slowly"
            ) from error
        _kernels[kind, backward] = found
    return found


_kernels: dict[tuple[Kind, bool], Kernel] = {}


def _build(kind: Kind, backward: bool, mask: Sequence[Any]) -> Kernel:
    """In a thread of its own: inside an operator, autograd and modes like checkpointing's leave no room for tracing."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    device = torch.cuda.device(kind.device) if kind.device.type == "cuda" else nullcontext()
    with device, torch.no_grad():
        graph, inputs = _trace(kind, backward, mask)
        compiled = _compile(graph, inputs)
    assert not is_concrete_int(inputs[-1].shape[0]), "flex attention got a kernel for one length only"
    return compiled


def _compile(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Kernel:
    from torch._inductor import compile

    compiled: Kernel = compile(graph, [*inputs])
    return compiled


# --- graphs -----------------------------------------------------------------------------------------------------------


def _trace(kind: Kind, backward: bool, mask: Sequence[Any]) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """The graph for any number of blocks, and inputs of such a length without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())
    static, dynamic = DimDynamic.STATIC, DimDynamic.DYNAMIC
    blocks: Any = mode.from_tensor(
        torch.empty(_LIKELY_BLOCKS, 1, device="meta"),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=[dynamic, static]),
    ).shape[0]
    with mode:
        inputs = _inputs(kind, backward, mask, blocks)
        call = _backward if backward else _forward
        graph = make_fx(lambda *tensors: call(kind, mask, *tensors))(*inputs)
    return graph, inputs


def _inputs(kind: Kind, backward: bool, mask: Sequence[Any], blocks: Any) -> list[Tensor]:
    length = kind.block * blocks

    def empty(*shape: Any, dtype: torch.dtype = kind.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=kind.device)

    sizes = [(kind.heads, kind.key_size), (kind.key_heads, kind.key_size), (kind.key_heads, kind.value_size)]
    made = [empty(1, length, heads, size).transpose(1, 2) for heads, size in sizes]
    if backward:
        outs = [empty(1, length, kind.heads, kind.value_size).transpose(1, 2) for _ in range(2)]
        lse = empty(1, kind.heads, length, dtype=_accumulator(kind.dtype))
        made = [*outs, lse, *made]
    elif kind.sinks:
        made.append(empty(kind.heads, dtype=_accumulator(kind.dtype)))
    *block_tensors, end, position = (x for x in mask if isinstance(x, Tensor))
    made += [empty(1, 1, *[blocks] * (x.dim() - 2), dtype=x.dtype) for x in block_tensors]
    return [*made, *(empty(length, dtype=x.dtype) for x in (end, position))]


def _forward(kind: Kind, mask: Sequence[Any], query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Any:
    from torch._higher_order_ops.flex_attention import flex_attention

    sinks, rest = (rest[0], rest[1:]) if kind.sinks else (None, rest)
    block_mask, buffers = _block_mask(kind, mask, rest, query.shape[2])
    score_mod, _ = _score_mods(kind.softcap)
    options = _options(query, key, value)
    out, lse, *_ = flex_attention(query, key, value, score_mod, block_mask, kind.scale, options, (), buffers)
    lse = lse * math.log(2)  # the kernels' is of powers of two
    if sinks is not None:  # out / (1 + exp(sink - lse)): the sink takes its share of the softmax
        sinks = sinks.view(1, -1, 1)
        out = (out * torch.sigmoid(lse - sinks).unsqueeze(-1)).to(value.dtype)
        lse = torch.logaddexp(lse, sinks)
    return out, lse


def _backward(
    kind: Kind,
    mask: Sequence[Any],
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Tensor,
) -> Any:
    from torch._higher_order_ops.flex_attention import flex_attention_backward

    block_mask, buffers = _block_mask(kind, mask, rest, query.shape[2])
    options = _options(query, key, value)
    grads = flex_attention_backward(
        query,
        key,
        value,
        out,
        lse / math.log(2),
        grad_out,
        torch.zeros_like(lse),
        *_score_mods(kind.softcap),  # type: ignore[arg-type]
        block_mask,
        kind.scale,
        options,
        (),
        buffers,
    )
    return grads[:3]


def _block_mask(kind: Kind, mask: Sequence[Any], tensors: Sequence[Tensor], length: Any) -> tuple[Any, Any]:
    """`BlockMask.as_tuple` with these tensors and lengths, and the tensors of its predicate."""
    *given, end, position = tensors
    remaining = iter(given)
    blocks = [next(remaining) if isinstance(x, Tensor) else x for x in mask[:-2]]
    return (length, length, *blocks[2:-1], predicate(kind.span)), (end, position)


def _score_mods(softcap: float | None) -> tuple[Kernel, Kernel]:
    """The score's change, and the gradient of its inputs (score and four indices) given that of its output."""
    if softcap is None:
        return lambda score, *_: score, lambda score, b, h, q, k, grad: [grad, None, None, None, None]

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    def gradient(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, grad: Tensor) -> list[Tensor | None]:
        return [grad * (1 - torch.tanh(score / softcap) ** 2), None, None, None, None]

    return capped, gradient


def _options(query: Tensor, key: Tensor, value: Tensor) -> Any:
    """The kernels' options as `flex_attention` itself would set them, log-sum-exp wanted."""
    from torch.nn.attention import flex_attention as torchs

    options: Any = torchs._apply_kernel_options(query, key, value, True, None)
    if query.is_cuda and query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device)[0] == 10:
        options["bwd_num_warps"] = 8  # with Inductor's 4, a thread keeps 13 KB beside its registers
    return options


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """Of the log-sum-exp and the sinks."""
    return torch.promote_types(dtype, torch.float32)
