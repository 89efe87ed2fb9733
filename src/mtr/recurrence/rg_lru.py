"""The real-gated linear recurrent unit of Griffin (arXiv 2402.19427, section 2.4) over a tree, level by level.

For each channel one number that a token decays and adds to:

    h = a h + x          the output is h

The block around it convolves its input first. Both are done in line by the block, which is left as it is: while it runs
over a tree, its convolution and its scan are others.

Shapes: n rows of L tokens, W channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mtr.attention.masks import TreeAttention, TreeHandle
from mtr.errors import UserError

Scan = Callable[[list[Tensor], Tensor | None], tuple[Tensor, Tensor]]
Along = Callable[[Scan, Callable[[list[Tensor]], Tensor], Sequence[Tensor]], Tensor]
"""(scan, decay, inputs) -> out, along the paths of a tree: `mtr.recurrence.diagonal.scan_chunks` with its plan"""


def rg_lru(x: Tensor, gate: Tensor, along: Along) -> Tensor:
    """
    Args:
        x: [1, T, W]
        gate: [1, T, W] a, between 0 and 1

    Returns:
        [1, T, W] in float32 or float64
    """
    wide = torch.promote_types(x.dtype, torch.float32)

    def scan(rows: list[Tensor], before: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs, gates, valid = (row.transpose(0, 1) for row in rows)
        if before is None:
            before = inputs.new_zeros(inputs.shape[1:])
        # a place without a token keeps the state
        out, last = _Scan.apply(inputs, gates + (1 - valid), before)  # type: ignore[no-untyped-call]
        return out.transpose(0, 1), last

    def decay(rows: list[Tensor]) -> Tensor:
        inputs, *others = rows
        return scan([torch.zeros_like(inputs), *others], torch.ones_like(inputs[:, 0]))[1]

    return along(scan, decay, [x.to(wide), gate.to(wide), x.new_ones(1, x.shape[1], 1, dtype=wide)])


class _Scan(torch.autograd.Function):
    """x and a [L, n, W], state before [n, W] -> states after the tokens [L, n, W], and after the last one [n, W]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        gate = gate.contiguous()
        states = x.clone(memory_format=torch.contiguous_format)
        state = before
        for factor, written in zip(gate, states, strict=True):
            state = written.addcmul_(factor, state)
        ctx.save_for_backward(gate, states, before)
        return states, state.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, states, before = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        grad[-1] += grad_state
        for k in range(len(grad) - 1, 0, -1):
            grad[k - 1].addcmul_(gate[k], grad[k])
        return grad, grad * torch.cat([before[None], states[:-1]]), gate[0] * grad[0]


# --- the block --------------------------------------------------------------------------------------------------------


Convolve = Callable[[TreeAttention, Callable[[Tensor], Tensor], Tensor, int], Tensor]
"""(pack, convolution of a row, [1, W, T], its width) -> [1, W, T]"""
Recurrence = Callable[[TreeAttention, Tensor, Tensor], Tensor]
"""(pack, x, gate) -> `rg_lru`"""


def block_over_tree(forward: Callable[..., Any], convolve: Convolve, scan: Recurrence) -> Callable[..., Any]:
    """The forward of a block with a convolution `conv_1d` and a scan `rg_lru._rnn_scan`."""

    @functools.wraps(forward)
    def call(self: Any, *arguments: Any, tree: TreeHandle | None = None, **options: Any) -> Any:
        if tree is None:
            return forward(self, *arguments, **options)
        return follow(self, tree, *arguments, **options)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def follow(self: Any, tree: TreeHandle, *arguments: Any, **options: Any) -> Any:
        pack, by_row, width = tree.entered(), self.conv_1d.forward, self.conv_1d.weight.shape[-1]

        def convolved(x: Tensor) -> Tensor:
            return convolve(pack, lambda x: by_row(x)[..., : x.shape[-1]], x, width)  # it pads at both ends

        def scanned(hidden_states: Tensor, recurrent_gate: Tensor, reset: Tensor, **_: Any) -> tuple[Tensor, None]:
            out = scan(pack, hidden_states, recurrent_gate * ~reset)
            return out.to(hidden_states.dtype), None

        with (
            _instead(self.conv_1d, "forward", convolved) as has_convolved,
            _instead(self.rg_lru, "_rnn_scan", scanned) as has_scanned,
        ):
            out = forward(self, *arguments, **options)
        if not (has_convolved and has_scanned):
            raise UserError(_moved(type(self).__name__))
        return out

    return call


@contextmanager
def _instead(module: Any, name: str, function: Callable[..., Any]) -> Iterator[list[bool]]:
    """Another method of this module meanwhile; what is yielded is empty until it is called."""
    used: list[bool] = []

    def call(*arguments: Any, **options: Any) -> Any:
        used.append(True)
        return function(*arguments, **options)

    own = module.__dict__.get(name)
    setattr(module, name, call)
    try:
        yield used
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


def _moved(block: str) -> str:
    import transformers

    return (
        f"{block} of transformers {transformers.__version__} does not call its conv_1d and rg_lru._rnn_scan, where its "
        "state would be taken along the tree; use another version of transformers, or set sequence.strategy to per_turn"
    )
