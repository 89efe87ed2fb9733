"""One assistant message in its inference context, as token ids."""

from __future__ import annotations

from dataclasses import dataclass

NOT_GENERATED = "no message comes before it, so inference never generates it"
WEIGHT_ZERO = "the message says so (weight 0)"
NOT_LAST = "train_on is last, and this is not the last turn"
CHOSEN = (NOT_GENERATED, WEIGHT_ZERO, NOT_LAST)
"""Reasons chosen by the data or the recipe; every other reason is a loss."""
INLINE_HISTORY = (
    "earlier thinking stands inline, which the template treats otherwise than thinking in a field; "
    "thinking: {history: respell} moves it there"
)
"""A note about a turn that loses nothing."""


def too_long(limit: int) -> str:
    """The reason of a turn that has more than `limit` tokens."""
    return f"longer than sequence.max_length ({limit})"


def fills(limit: int) -> str:
    """The reason of a turn whose completion cannot be cut to `limit` tokens, because its prompt has that many."""
    return f"its prompt alone fills sequence.max_length ({limit})"


@dataclass(frozen=True)
class Turn:
    """One assistant message in its inference context. Ids are empty where rendering failed or was not needed."""

    turn: int
    message_index: int
    prompt_ids: tuple[int, ...] = ()
    completion_ids: tuple[int, ...] = ()
    weight: float = 1.0
    reason: str | None = None
    """Why the turn is not trained; None when it is."""
    notes: tuple[str, ...] = ()
    """What the template dropped without making the turn wrong."""

    @property
    def trained(self) -> bool:
        return self.reason is None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)
