"""What a model is handed of a batch: trees, in the place of its attention mask.

    {"input_ids": [1, T], "attention_mask": Trees, "labels": [1, 1 + W]}

A row of trees is not a sequence: run as one, it would train without an error, and wrongly. Its mask is therefore none
that a model could leave out or take for one of padding: without `mtr`'s attention, reading it raises.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from mtr.errors import UserError
from mtr.tree.batch import Batch, build_batch
from mtr.tree.packing import Pack

_MOST_LABELS = 2**24


@dataclass(frozen=True)
class Trees:
    """A pack of trees, and what has to be known of it before it is computed."""

    batch: Batch
    weight_sum: float
    """W, of its targets."""
    longest: int
    """Tokens of its longest path."""
    largest_id: int

    @classmethod
    def of(cls, pack: Pack, pad_to_multiple_of: int) -> Trees:
        return cls(
            build_batch(pack, pad_to_multiple_of),
            float(sum(layout.weight.sum() for layout in pack.layouts)),
            max(int(layout.position_ids.max()) for layout in pack.layouts) + 1,
            max(int(layout.input_ids.max()) for layout in pack.layouts),
        )

    @property
    def whole(self) -> int | None:
        """W, if it is a whole number, which a trainer can count; else None."""
        nearest = round(self.weight_sum)
        return nearest if nearest <= _MOST_LABELS and np.isclose(nearest, self.weight_sum, rtol=1e-9) else None

    def labels(self) -> Tensor:
        """[1, 1 + W], the first one -100, which transformers leaves out: it counts labels to know how much a batch
        weighs, so there is one for each unit of weight. They are never as many as tokens, so no model can take them for
        those of a sequence."""
        count = 1 if self.whole is None else self.whole
        ignored = 2 if 1 + count == self.batch.input_ids.shape[1] else 1
        labels = torch.zeros(1, ignored + count, dtype=torch.int64)
        labels[0, :ignored] = -100
        return labels

    def to(self, device: torch.device, non_blocking: bool = True) -> Trees:
        return replace(self, batch=self.batch.to(device))

    def pin_memory(self, device: Any = None) -> Trees:
        return replace(self, batch=self.batch.pin_memory())

    def sum(self) -> Tensor:
        """Tokens, padding left out: what trainers count with a mask."""
        return torch.tensor(self.batch.num_tokens)

    def _refuse(self, *_: Any) -> NoReturn:
        raise UserError(
            "this batch holds trees, and the model would read it as one sequence: load the model with mtr.load, or "
            "train inside `with mtr.tree_attention(model):`; TRL's SFTTrainer needs mtr.TreeTrainerMixin, too; PEFT's "
            "prompt and prefix tuning, which put tokens before a sequence, cannot be used"
        )

    ndim = shape = dtype = device = property(_refuse)
    dim = size = bool = all = __getitem__ = _refuse
