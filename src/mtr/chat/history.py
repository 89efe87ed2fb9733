"""What the template makes of the messages before a turn: rendered whole, or put together from pieces.

A prompt is a rendering of everything before the turn, so N turns cost N histories, and a template that looks ahead from
every message costs more still. But a history grows at its end. Cut before the content of user messages and tool
results, its text is made of pieces that stay as they are while the conversation goes on:

    S U1 | A1 U2 | C1 R1 C2 R2 A2 U3 | C3 R3 | C4 R4 | A3        S system, U user, A answer, C tool call, R its result
    start  stretch     stretch         rounds          newest

A stretch goes on from one user message to the next and is rendered as history, its loop of tool calls closed. In the
newest stretch, a round goes on from one tool result to the next and is rendered in the open loop, where templates keep
thinking that they drop later.

Each piece is rendered in two contexts: at the start of the conversation or loop, and after parts that stand for all
that came before. It must be the same in both, so that a counter or a flag that the template carries along is seen, and
it must leave the text before it as it was; if not, the conversation is rendered whole. What is newest follows the same
few parts; where it changes the text before it (an answer that closes a loop), it is rendered with more, in the end with
all. This is still a claim about the template, and none is trusted with it: `mtr.chat.comparison`.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mtr.chat.completion import TAG
from mtr.chat.template import RefusedError, Template
from mtr.data.conversation import Message

_CUT = "mtr cuts the text here"


class TangledError(Exception):
    """A piece depends on more than what is near; no text that was put together from pieces may be used."""


class History:
    """One conversation as its template is given it; every prompt is rendered whole."""

    def __init__(self, template: Template, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> None:
        self.template = template
        self.messages = messages
        self.tools = tools

    def before(self, count: int) -> Before:
        return Before(self, count)

    def render(self, count: int, own: Mapping[str, Any] | None) -> str:
        """The first `count` messages, and then a turn's own message; if there is none, the generation prompt.

        Raises:
            RefusedError: the template raises, with its own words.
        """
        return self._render(range(count), own)

    def _render(self, kept: Sequence[int], own: Mapping[str, Any] | None) -> str:
        messages = [self.messages[i] for i in kept]
        return self.template.render(messages if own is None else [*messages, own], self.tools, generation=own is None)


@dataclass(frozen=True)
class Before:
    """The messages before one turn."""

    history: History
    count: int

    @property
    def last(self) -> Mapping[str, Any]:
        return self.history.messages[self.count - 1]

    def prompt(self) -> str:
        """They and the generation prompt: what inference feeds."""
        return self.history.render(self.count, None)

    def then(self, message: Mapping[str, Any]) -> str:
        """They and one more message."""
        return self.history.render(self.count, message)


@dataclass(frozen=True)
class _Cut:
    """A place where the text is cut, and few messages after which it goes on as after all of them."""

    at: int
    """The message before whose content the cut is."""
    contexts: tuple[tuple[int, ...], ...]
    """Messages before that one: those that stand for all, and the fewest."""
    pieces: tuple[str, ...]
    """What the template makes of all messages, up to the cut."""


class PieceHistory(History):
    """The same text, put together from pieces that are rendered once. All its methods may raise TangledError."""

    def __init__(self, whole: History) -> None:
        super().__init__(whole.template, whole.messages, whole.tools)
        self._at_users: list[_Cut] = []
        self._at_results: defaultdict[int, list[_Cut]] = defaultdict(list)
        """Cuts within a stretch, by its user message."""
        self._texts: dict[tuple[int, ...], str | None] = {}

    @cached_property
    def _users(self) -> list[int]:
        """The first user message of each stretch."""
        return [i for i, (before, role) in enumerate(self._steps) if role == "user" and before != "user"]

    @cached_property
    def _results(self) -> list[int]:
        """The first tool result of each round."""
        return [i for i, (before, role) in enumerate(self._steps) if role == "tool" and before == "assistant"]

    @property
    def _steps(self) -> Iterator[tuple[str, str]]:
        return itertools.pairwise(["", *(message["role"] for message in self.messages)])

    @cached_property
    def _features(self) -> list[set[Any]]:
        return [_features(message) for message in self.messages]

    @property
    def kind(self) -> frozenset[Any]:
        """All that a template may act upon."""
        return frozenset[Any]().union(*self._features)

    def render(self, count: int, own: Mapping[str, Any] | None) -> str:
        for newest in (self._newest_result, self._newest_user):
            try:
                if (cut := newest(count)) is not None:
                    context = cut.contexts[0]
                    text = self._after(cut, context, self._render((*context, *range(cut.at, count)), own))
                    if text is not None:
                        return "".join((*cut.pieces, text))
            except RefusedError:
                continue
        return super().render(count, own)

    def _newest_user(self, count: int) -> _Cut | None:
        """The last cut between two stretches, after stretches that stand for all before it; None if there is none."""
        users = self._users[: bisect_left(self._users, count)]
        if not users:
            return None
        head = tuple(range(users[0]))
        if not self._at_users:
            self._at_users.append(_Cut(users[0], (head,), (self._text_to((*head, users[0])),)))
        for k in range(len(self._at_users), len(users)):
            earlier = self._standing_for(self._shortened(*ends) for ends in itertools.pairwise(users[: k + 1]))
            self._at_users.append(self._next(self._at_users[-1], users[k], (*head, *earlier), head))
        return self._at_users[len(users) - 1]

    def _newest_result(self, count: int) -> _Cut | None:
        """The last cut within a loop, after its question and rounds that stand for all; None if there are few."""
        stretch = self._newest_user(count)
        results = self._results_in(stretch.at, count) if stretch else []
        if stretch is None or len(results) < 3:
            return None
        cuts, question = self._at_results[stretch.at], (*stretch.contexts[0], *range(stretch.at, results[0] - 1))
        for j in range(len(cuts), len(results)):
            earlier, call = self._standing_for(_rounds(results[: j + 1])), results[j] - 1
            cuts.append(
                self._next(cuts[-1] if j else stretch, results[j], (*question, *earlier, call), (*question, call))
            )
        return cuts[len(results) - 1]

    def _shortened(self, start: int, end: int) -> tuple[int, ...]:
        """A stretch with only those rounds that stand for all."""
        results = self._results_in(start, end)
        if not results:
            return tuple(range(start, end))
        return (*range(start, results[0] - 1), *self._standing_for(_rounds([*results, end + 1])))

    def _standing_for(self, parts: Iterable[Sequence[int]]) -> list[int]:
        """Messages of the last parts that together have all that there is: what a template may remember of them."""
        kept: list[int] = []
        known: set[Any] = set()
        for part in reversed(list(parts)):
            features = set[Any]().union(*(self._features[i] for i in part))
            if not features <= known:
                known |= features
                kept = [*part, *kept]
        return kept

    def _results_in(self, start: int, end: int) -> list[int]:
        return self._results[bisect_left(self._results, start) : bisect_left(self._results, end)]

    def _next(self, cut: _Cut, at: int, *contexts: tuple[int, ...]) -> _Cut:
        """The cut after this one, with the piece between them."""
        messages = range(cut.at, at + 1)
        found = {self._after(cut, context, self._text_to((*context, *messages))) for context in cut.contexts}
        piece = found.pop()
        if found or piece is None:
            raise TangledError
        return _Cut(at, contexts, (*cut.pieces, piece))

    def _after(self, cut: _Cut, context: tuple[int, ...], text: str) -> str | None:
        """What is new in a text since a cut; None if what came before it has changed."""
        start = self._text_to((*context, cut.at))
        return text[len(start) :] if text.startswith(start) else None

    def _text_to(self, kept: tuple[int, ...]) -> str:
        """The text up to the content of the last of these messages."""
        if kept not in self._texts:
            self._texts[kept] = None
            messages = [*(self.messages[i] for i in kept[:-1]), {**self.messages[kept[-1]], "content": _CUT}]
            text = self.template.render(messages, self.tools, generation=True)
            if text.count(_CUT) == 1:
                self._texts[kept] = text.partition(_CUT)[0]
        found = self._texts[kept]
        if found is None:
            raise RefusedError("its text cannot be cut")
        return found


def _features(message: Mapping[str, Any]) -> set[Any]:
    """What a template may act upon: its fields, for calls and answers apart, and thinking wherever it stands."""
    kind = message["role"], bool(message.get("tool_calls"))
    found = {(kind, key) for key, value in message.items() if value}
    said = Message(message)
    return found | {(kind, "any thinking")} if said.thinking or TAG.search(said.content) else found


def _rounds(results: Sequence[int]) -> Iterator[range]:
    """From each call that is answered to the next one."""
    return (range(first - 1, after - 1) for first, after in itertools.pairwise(results))
