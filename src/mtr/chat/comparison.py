"""How far pieces are trusted: turns that were put together from them are compared with renderings of the whole.

a kind's first conversations   all turns; a difference: everything is rendered whole from then on
later ones                     the last turn, which holds every piece, and a few others; a difference stops the run,
                               because turns that nobody compared have been used
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
"""Turns to train from which a conversation is put together from pieces."""
_COMPARED_FIRST = 400
"""Turns of one kind of conversation after which no more conversations are compared in all turns."""
_COMPARED_LATER = 3
"""Turns of each later one beside its last."""


class Comparison:
    """One for all conversations of a renderer."""

    def __init__(self, in_pieces: bool) -> None:
        self.in_pieces = in_pieces
        """Whether pieces are used at all; a difference ends it."""
        self.uncompared: Counter[Any] = Counter()
        """Turns that were used without a comparison, by the kind of conversation."""
        self._seen: Counter[Any] = Counter()

    def drafts(self, conversation: Conversation, whole: History, draft: Callable[[Before], D]) -> list[D]:
        """All turns of a conversation.

        Raises:
            UserError: a turn differs, after turns of the like were used that were not compared.
        """
        turns, pieces = conversation.turns, PieceHistory(whole)
        found = self._from_pieces(conversation, pieces, draft)
        if found is None:
            return _drafted(whole, turns, draft)
        chosen = self._chosen(pieces.kind, found)
        for i, other in zip(chosen, _drafted(whole, [turns[i] for i in chosen], draft), strict=True):
            if other == found[i]:
                continue
            if uncompared := self.uncompared[pieces.kind]:
                raise UserError(
                    f"{conversation.where}, message {turns[i]}: put together from pieces, its context is not what the "
                    f"template makes of the whole, and {uncompared:,} turns before it were not compared; "
                    "set data.rendering: whole and train again"
                )
            self.in_pieces = False
            return _drafted(whole, turns, draft)
        self.uncompared[pieces.kind] += len(turns) - len(chosen)
        return found

    def differing(self, conversation: Conversation, whole: History, draft: Callable[[Before], D]) -> list[int]:
        """Numbers of the turns that are not the same when they are put together from pieces and when rendered whole."""
        found = self._from_pieces(conversation, PieceHistory(whole), draft)
        if found is None:
            return []
        others = _drafted(whole, conversation.turns, draft)
        return [number for number, (one, other) in enumerate(zip(found, others, strict=True)) if one != other]

    def _from_pieces(
        self, conversation: Conversation, pieces: PieceHistory, draft: Callable[[Before], D]
    ) -> list[D] | None:
        """None for a conversation that is rendered whole."""
        trained = sum(conversation.messages[i].weight > 0 for i in conversation.turns)
        if not self.in_pieces or trained < _LONG:
            return None
        try:
            return _drafted(pieces, conversation.turns, draft)
        except TangledError:
            return None

    def _chosen(self, kind: Any, drafts: Sequence[Any]) -> Sequence[int]:
        turns, before = range(len(drafts)), self._seen[kind]
        self._seen[kind] += len(turns)
        if before < _COMPARED_FIRST:
            return turns
        last = [i for i in turns if not isinstance(drafts[i], str)][-1:]
        return sorted({*random.Random(crc32(repr(drafts[-1]).encode())).sample(turns, _COMPARED_LATER), *last})


def _drafted(history: History, turns: Sequence[int], draft: Callable[[Before], D]) -> list[D]:
    return [draft(history.before(index)) for index in turns]
