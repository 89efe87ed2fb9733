"""Rows of trees become one row of tensors, which is one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mtr.attention.choice import pad_to_multiple_of as padding_of
from mtr.integrations.batch import Trees
from mtr.integrations.columns import as_layout
from mtr.tree.packing import build_packs, idle_pack


class TreeCollator:
    """Packs trees side by side: `Trainer(..., data_collator=TreeCollator())`.

    Its batches have one row, however many trees there are: memory grows with the tokens of
    `per_device_train_batch_size` trees.
    """

    def __init__(self, pad_to_multiple_of: int | None = None) -> None:
        """
        Args:
            pad_to_multiple_of: of the row's length; None: what attention needs on this machine.
        """
        needed = padding_of(["flex" if torch.cuda.is_available() else "segment"])
        self.pad_to_multiple_of = pad_to_multiple_of or needed

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Args:
            rows: as `TreeBuilder` makes them. Those without a trained turn add nothing.

        Returns:
            input_ids [1, T], attention_mask `Trees`, labels [1, 1 + sum of weights]

        Raises:
            UserError: columns of the rows are missing, or were changed.
        """
        layouts = [layout for layout in map(as_layout, rows) if layout.num_tokens]
        total = sum(layout.num_tokens for layout in layouts)
        pack = build_packs(layouts, total)[0][0] if layouts else idle_pack()
        trees = Trees.of(pack, self.pad_to_multiple_of)
        return {"input_ids": trees.batch.input_ids, "attention_mask": trees, "labels": trees.labels()}
