"""One prepared optimizer step, and the counts of what went into it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mtr.data.conversation import SkippedRow
from mtr.prepare.counts import Counts
from mtr.tree.batch import Batch


@dataclass(frozen=True)
class Step:
    """One optimizer step as one process sees it."""

    batches: tuple[Batch, ...]
    """Packs of this process; may be empty."""
    weight_sum: float
    """Of all processes."""
    counts: Counts
    """Of all processes."""
    position: int
    """Rows of the data consumed once the step is done."""
    epoch: float
    rows: tuple[str, ...] = ()
    """File and row of each conversation, those without a trained turn included."""
    rounds: int = 0
    """The largest number of packs that any process has."""
    imbalance: float = 1.0
    """Cost of the busiest process over the mean of all processes."""
    rejects: tuple[SkippedRow, ...] = ()
    """Rows of the step that were skipped."""

    def pinned(self, device: torch.device) -> Step:
        """With batches in pinned memory where they will be copied to CUDA."""
        if device.type != "cuda":
            return self
        return replace(self, batches=tuple(batch.pin_memory() for batch in self.batches))
