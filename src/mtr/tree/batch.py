"""A pack becomes tensors. Layouts follow one another as sibling trees; padding tokens see only themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtr.tree.layout import Ints
from mtr.tree.mask import Tree
from mtr.tree.packing import Pack


@dataclass(frozen=True)
class Batch:
    """One row of T tokens with N targets."""

    input_ids: Tensor
    """[1, T] int64"""
    position_ids: Tensor
    """[1, T] int64"""
    subtree_end: Tensor
    """[T] int64"""
    parent: Ints
    """[T] on the host"""
    predictor: Tensor
    """[N] int64"""
    target_id: Tensor
    """[N] int64"""
    weight: Tensor
    """[N] float64"""
    num_tokens: int
    """Tokens of the layouts, padding left out."""
    rows: tuple[str, ...] = ()
    """File and row of each conversation in it."""
    pack: Pack | None = None
    """What it was made from, where it may have to be split."""

    @property
    def tree(self) -> Tree:
        return Tree(self.subtree_end, self.position_ids[0], self.parent)

    def to(self, device: torch.device) -> Batch:
        """On the device. From pinned memory the host does not wait for the copy, nor for what the device does first."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """In pages that CUDA can copy from by itself."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**{**vars(self), **changed})


def build_batch(pack: Pack, pad_to_multiple_of: int = 1, pad_token_id: int = 0) -> Batch:
    """Concatenate the layouts of a pack, each shifted to where it starts."""
    columns: dict[str, list[Ints]] = {
        name: [] for name in ("input_ids", "position_ids", "subtree_end", "parent", "predictor", "target_id")
    }
    start = 0
    for layout in pack.layouts:
        columns["input_ids"].append(layout.input_ids)
        columns["position_ids"].append(layout.position_ids)
        columns["subtree_end"].append(layout.subtree_end + start)
        columns["parent"].append(np.where(layout.parent < 0, -1, layout.parent + start))
        columns["predictor"].append(layout.predictor + start)
        columns["target_id"].append(layout.target_id)
        start += layout.num_tokens
    padding = -start % pad_to_multiple_of
    columns["input_ids"].append(np.full(padding, pad_token_id))
    columns["position_ids"].append(np.zeros(padding, np.int64))
    columns["subtree_end"].append(np.arange(start, start + padding) + 1)
    columns["parent"].append(np.full(padding, -1))
    joined = {name: np.concatenate(parts).astype(np.int64) for name, parts in columns.items()}
    tensors = {name: torch.from_numpy(values) for name, values in joined.items()}
    return Batch(
        input_ids=tensors["input_ids"][None],
        position_ids=tensors["position_ids"][None],
        subtree_end=tensors["subtree_end"],
        parent=joined["parent"],
        predictor=tensors["predictor"],
        target_id=tensors["target_id"],
        weight=torch.from_numpy(np.concatenate([layout.weight for layout in pack.layouts])),
        num_tokens=start,
        rows=tuple(dict.fromkeys(view.where for layout in pack.layouts for _, view in layout.leaves if view.where)),
    )
