"""Guards rendering in pieces: turns assembled from pieces are compared with their full renderings.

a kind's first conversations   all turns; after a difference, everything is rendered in full
later ones                     the last turn, which contains every piece, and a few others; a difference stops the
                               run, because turns that were not compared have been used
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from zlib import crc32

from mtr.chat.history import Before, History, PieceHistory, TangledError
from mtr.data.conversation import Conversation
from mtr.errors import UserError

D = TypeVar("D")
"""A turn as text, or the reason why there is none."""

_LONG = 32
"""Conversations with at least so many turns to train are rendered in pieces."""
_COMPARED_FIRST = 400
"""Once so many turns of one kind of conversation were seen, later conversations are compared in a few turns only."""
_COMPARED_LATER = 3
"""Turns of each later conversation that are compared, besides its last."""


class Comparison:
    """Renders in pieces and compares; one instance for all conversations of a renderer."""

    def __init__(self, in_pieces: bool) -> None:
        self.in_pieces = in_pieces
        """Whether pieces are used at all; turned off by a difference."""
        self.uncompared: Counter[Any] = Counter()
        """Turns that were used without a comparison, by the kind of conversation."""
        self._seen: Counter[Any] = Counter()

    def drafts(
        self, conversation: Conversation, turns: Sequence[int], full: History, draft: Callable[[Before], D]
    ) -> list[D]:
        """The first turns of a conversation, or all.

        Args:
            turns: the messages that they are.
            draft: makes a turn of the messages before it.

        Raises:
            UserError: a turn differs, and earlier turns of its kind were used without a comparison.
        """
        pieces = PieceHistory(full)
        found = self._from_pieces(conversation, turns, pieces, draft)
        if found is None:
            return _drafted(full, turns, draft)
        chosen = self._chosen(pieces.kind, found)
        for i, other in zip(chosen, _drafted(full, [turns[i] for i in chosen], draft), strict=True):
            if other == found[i]:
                continue
            if uncompared := self.uncompared[pieces.kind]:
                raise UserError(
                    f"{conversation.where}, message {turns[i]}: rendered in pieces, its context differs from the full "
                    f"rendering, and {uncompared:,} earlier turns were not compared; set data.rendering: whole and "
                    "train again"
                )
            self.in_pieces = False
            return _drafted(full, turns, draft)
        self.uncompared[pieces.kind] += len(turns) - len(chosen)
        return found

    def differing(
        self, conversation: Conversation, turns: Sequence[int], full: History, draft: Callable[[Before], D]
    ) -> list[int]:
        """Numbers of the turns that differ between rendering in pieces and rendering in full."""
        found = self._from_pieces(conversation, turns, PieceHistory(full), draft)
        if found is None:
            return []
        others = _drafted(full, turns, draft)
        return [number for number, (one, other) in enumerate(zip(found, others, strict=True)) if one != other]

    def _from_pieces(
        self, conversation: Conversation, turns: Sequence[int], pieces: PieceHistory, draft: Callable[[Before], D]
    ) -> list[D] | None:
        """None for a conversation that is rendered in full."""
        trained = sum(conversation.messages[i].weight > 0 for i in turns)
        if not self.in_pieces or trained < _LONG:
            return None
        try:
            return _drafted(pieces, turns, draft)
        except TangledError:
            return None

    def _chosen(self, kind: Any, drafts: Sequence[Any]) -> Sequence[int]:
        """Numbers of the turns to compare."""
        turns, before = range(len(drafts)), self._seen[kind]
        self._seen[kind] += len(turns)
        if before < _COMPARED_FIRST:
            return turns
        last = [i for i in turns if not isinstance(drafts[i], str)][-1:]
        return sorted({*random.Random(crc32(repr(drafts[-1]).encode())).sample(turns, _COMPARED_LATER), *last})


def _drafted(history: History, turns: Sequence[int], draft: Callable[[Before], D]) -> list[D]:
    return [draft(history.before(index)) for index in turns]
