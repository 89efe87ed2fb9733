"""The mask of a tree, in every form a kernel wants it. One line is the truth:

    visible(q, k) = (k <= q) & (q < subtree_end[k])

A token attends to its ancestors and itself, which covers branches, several trees in a pack and padding. A sliding
window or a chunk adds a condition on position ids (depths), never on indices.

    dense   T x T boolean reference
    block   FlexAttention's sparse form, straight from subtree_end

(`mtr.tree.plan` has the forms for kernels that take no mask.)

Shapes: T tokens of a pack, B block size. `True` = may attend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Span(NamedTuple):
    """How far back a layer sees along a path, in positions."""

    kind: Literal["full", "sliding", "chunked"] = "full"
    size: int = 0


FULL = Span()


@dataclass(frozen=True)
class Tree:
    """What a mask needs to know of a pack."""

    subtree_end: Tensor
    """[T] int64"""
    position_ids: Tensor
    """[T] int64"""
    parent: NDArray[np.int64]
    """[T] on the host; -1 at a root"""


def predicate(span: Span = FULL) -> Callable[..., Tensor]:
    """Of (b, h, q, k, subtree_end, position_ids): a token sees itself and its ancestors, as far as the span goes."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor, end: Tensor, position: Tensor) -> Tensor:
        return (k <= q) & (q < end[k])

    def within_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor, end: Tensor, position: Tensor) -> Tensor:
        return visible(b, h, q, k, end, position) & (position[q] - position[k] < span.size)

    def within_chunk(b: Tensor, h: Tensor, q: Tensor, k: Tensor, end: Tensor, position: Tensor) -> Tensor:
        return visible(b, h, q, k, end, position) & (position[q] // span.size == position[k] // span.size)

    return {"full": visible, "sliding": within_window, "chunked": within_chunk}[span.kind]


def mask_mod(tree: Tree, span: Span = FULL) -> MaskMod:
    """The predicate of one tree, in FlexAttention's signature."""
    visible = predicate(span)

    def of_tree(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(b, h, q, k, tree.subtree_end, tree.position_ids)

    return of_tree


def dense_mask(tree: Tree, span: Span = FULL) -> Tensor:
    """[T, T] boolean: the reference, and the mask of the dense backends."""
    index = torch.arange(len(tree.subtree_end), device=tree.subtree_end.device)
    zero = index.new_zeros(())
    return mask_mod(tree, span)(zero, zero, index[:, None], index[None, :])


def block_mask(tree: Tree, span: Span = FULL, block_size: int = 128) -> BlockMask:
    """FlexAttention's block mask without a T x T intermediate.

    For row block i and column block j < i, some pair is visible when max(end[j]) > i * B, and every pair when
    min(end[j]) >= (i + 1) * B. With a window or chunk the position ranges of the blocks give a superset of the
    blocks, which the predicate then cuts exactly.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length, device = len(tree.subtree_end), tree.subtree_end.device
    blocks = -(-length // block_size)
    row = torch.arange(blocks, device=device)[:, None]
    column = torch.arange(blocks, device=device)[None, :]
    lowest_end, highest_end = _block_range(tree.subtree_end, blocks, block_size)
    some = (column <= row) & (highest_end[None, :] > row * block_size)
    every = (column < row) & (lowest_end[None, :] >= (row + 1) * block_size)
    if block_size == 1:
        every |= column == row
    if span.kind != "full":
        low, high = _block_range(tree.position_ids, blocks, block_size)
        if span.kind == "sliding":
            some &= low[:, None] - high[None, :] < span.size
            every &= high[:, None] - low[None, :] < span.size
        else:
            low, high = low // span.size, high // span.size
            some &= (low[:, None] <= high[None, :]) & (low[None, :] <= high[:, None])
            every &= (low[:, None] == high[None, :]) & (high[:, None] == low[None, :])
    partial, whole = some & ~every, every & some
    kv, full_kv, q, full_q = (_ordered(x) for x in (partial, whole, partial.T, whole.T))
    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=kv[0],
        kv_indices=kv[1],
        full_kv_num_blocks=full_kv[0],
        full_kv_indices=full_kv[1],
        q_num_blocks=q[0],
        q_indices=q[1],
        full_q_num_blocks=full_q[0],
        full_q_indices=full_q[1],
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=mask_mod(tree, span),
    )


def _block_range(values: Tensor, blocks: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each block; the last one may be short."""
    missing = blocks * block_size - len(values)
    if missing:
        values = torch.cat([values, values[-1:].expand(missing)])
    low, high = values.view(blocks, block_size).aminmax(dim=1)
    return low, high


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Block counts and indices of each row, as BlockMask keeps them: [1, 1, rows], [1, 1, rows, columns]."""
    counts = dense.sum(dim=-1, dtype=torch.int32)
    indices = torch.argsort(dense.to(torch.int32), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None]
