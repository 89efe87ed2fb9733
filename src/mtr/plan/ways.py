"""The two ways to compute turns, one pass over a conversation or one for each turn, in whole numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mtr.model.flops import FlopCounter, Flops, visible_pairs
from mtr.tree.layout import Layout, count_pairs
from mtr.tree.mask import Span

History = Literal["kept", "dropped", "mixed", "single"]
"""What later prompts hold of a turn. kept: all that was generated, so a conversation's turns are one path; dropped:
something else, most often the response without its thinking; mixed: now the one, now the other, as where thinking is
kept within a tool loop; single: no conversation has two trained turns."""


@dataclass
class Way:
    """What one of the two ways computes; adds up over steps."""

    tokens: int = 0
    """Positions, padding left out."""
    predictors: int = 0
    trees: int = 0
    pairs: int = 0
    """Query-key pairs that full attention visits."""
    visible: Counter[Span] = field(default_factory=Counter)
    """The same by the span of layers, for FLOPs."""

    def add(self, layouts: Sequence[Layout], spans: Sequence[Span]) -> None:
        for layout in layouts:
            self.tokens += layout.num_tokens
            self.predictors += len(layout.predictor)
            self.pairs += count_pairs(layout.position_ids)
            for span in spans:
                self.visible[span] += visible_pairs(layout.position_ids, span)
        self.trees += len(layouts)

    def flops(self, counter: FlopCounter) -> Flops:
        return counter.count(self.tokens, self.predictors, self.visible)
