"""What happened to rows, turns and tokens, counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """What happened to rows, turns and tokens; adds up over steps."""

    conversations: int = 0
    """With a trained turn."""
    turns: int = 0
    """Trained."""
    tokens: int = 0
    """Tokens that the device processes, padding left out."""
    supervised_tokens: int = 0
    per_turn_tokens: int = 0
    """Tokens that one pass per turn would process."""
    trees: int = 0
    untrained_turns: Counter[str] = field(default_factory=Counter)
    """By reason."""
    untrained_rows: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    """Trained turns by a note that came up, e.g. what the template left out."""
    remarks: Counter[str] = field(default_factory=Counter)
    """Rows by what is odd about their data."""
    skipped_rows: Counter[str] = field(default_factory=Counter)
    """Bad rows, and rows outside the limits of data.filter, by reason."""

    def reasons(self) -> str:
        """The most common reasons why turns and rows are not trained, for a message."""
        turns = [f"{n} turns: {reason}" for reason, n in self.untrained_turns.most_common(3)]
        rows = [f"{n} rows: {reason}" for reason, n in self.skipped_rows.most_common(3)]
        return "; ".join(turns + rows) or "no turns"

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
