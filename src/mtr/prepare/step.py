"""One prepared step, and what is counted of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mtr.data.conversation import SkippedRow
from mtr.tree.batch import Batch


@dataclass
class Counts:
    """What happened to rows, turns and tokens; adds up over steps."""

    conversations: int = 0
    """With a trained turn."""
    turns: int = 0
    """Trained."""
    tokens: int = 0
    """Physical: what the device processes."""
    supervised_tokens: int = 0
    per_turn_tokens: int = 0
    """What one pass per turn would process."""
    trees: int = 0
    untrained_turns: Counter[str] = field(default_factory=Counter)
    """By reason."""
    untrained_rows: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    """Turns that are trained, with something to know about them."""
    skipped_rows: Counter[str] = field(default_factory=Counter)
    """Bad rows and those outside the recipe's limits, by reason."""

    def reasons(self) -> str:
        """The most common reasons why turns and rows are not trained, for a message."""
        turns = [f"{n} turns: {reason}" for reason, n in self.untrained_turns.most_common(3)]
        rows = [f"{n} rows: {reason}" for reason, n in self.skipped_rows.most_common(3)]
        return "; ".join(turns + rows) or "no turns"

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Step:
    """What one process needs of one step."""

    batches: tuple[Batch, ...]
    """Of this process; may be empty."""
    weight_sum: float
    """Of all processes."""
    counts: Counts
    """Of all processes."""
    position: int
    """Rows taken when the step is done."""
    epoch: float
    rows: tuple[str, ...] = ()
    """File and row of each conversation, those without a trained turn included."""
    rounds: int = 0
    """Most packs that any process has."""
    imbalance: float = 1.0
    """Cost of the costliest process over the mean of all."""
    rejects: tuple[SkippedRow, ...] = ()
    """Rows of the step that were passed over."""
