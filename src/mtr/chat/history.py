"""The rendering of the messages before a turn, in full or assembled from pieces.

A prompt is a rendering of everything before the turn, so N turns render N histories, and a template that loops over all
messages for each message is slower still. But a history only grows at its end. Cut before the content of user messages
and tool results, its text consists of pieces that do not change as the conversation continues:

    S U1 | A1 U2 | C1 R1 C2 R2 A2 U3 | C3 R3 | C4 R4 | A3        S system, U user, A answer, C tool call, R its result
    start  stretch     stretch         rounds          newest

A stretch runs from one user message to the next and is rendered as history, its loop of tool calls closed. In the
newest stretch, a round runs from one tool result to the next and is rendered in the open loop, where templates keep
thinking that they drop later.

Each piece is rendered in two contexts: at the start of the conversation or loop, and after parts that represent all
that came before. It must be the same in both, which catches counters and flags that the template carries along, and it
must not change the text before it; otherwise the conversation is rendered in full. The newest messages are rendered
after the same few parts; where they change the text before them (an answer that closes a loop), they are rendered with
more context, in the end with all of it. That pieces are enough is an assumption about the template, so
`mtr.chat.comparison` checks it.
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
    """A piece depends on distant messages, so no text assembled from pieces may be used."""


class History:
    """One conversation as its template is given it; every prompt is rendered in full."""

    def __init__(self, template: Template, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> None:
        self.template = template
        self.messages = messages
        self.tools = tools

    def before(self, count: int) -> Before:
        return Before(self, count)

    def render(self, count: int, own: Mapping[str, Any] | None) -> str:
        """The first `count` messages, followed by a turn's own message, or else by the generation prompt.

        Raises:
            RefusedError: the template raises; with its error message.
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
        """These messages and the generation prompt: what inference is fed."""
        return self.history.render(self.count, None)

    def then(self, message: Mapping[str, Any]) -> str:
        """These messages and one more."""
        return self.history.render(self.count, message)


@dataclass(frozen=True)
class Cut:
    """A place where the text is cut, and a few messages after which it continues as after all of them."""

    at: int
    """The message before whose content the cut is."""
    contexts: tuple[tuple[int, ...], ...]
    """Messages before that one, twice: those that represent all, and as few as possible."""
    pieces: tuple[str, ...]
    """The rendering of all messages, up to the cut."""


class PieceHistory(History):
    """The same text, assembled from pieces that are rendered once. All methods may raise TangledError."""

    def __init__(self, full: History) -> None:
        super().__init__(full.template, full.messages, full.tools)
        self._at_users: list[Cut] = []
        self._at_results: defaultdict[int, list[Cut]] = defaultdict(list)
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
        """All features of the messages that a template may act upon; conversations with the same ones are of a kind."""
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

    def _newest_user(self, count: int) -> Cut | None:
        """The last cut between two stretches, after stretches that represent all before it; None if there is none."""
        users = self._users[: bisect_left(self._users, count)]
        if not users:
            return None
        head = tuple(range(users[0]))
        if not self._at_users:
            self._at_users.append(Cut(users[0], (head,), (self._text_to((*head, users[0])),)))
        for k in range(len(self._at_users), len(users)):
            earlier = self._representatives(self._shortened(*ends) for ends in itertools.pairwise(users[: k + 1]))
            self._at_users.append(self._next(self._at_users[-1], users[k], (*head, *earlier), head))
        return self._at_users[len(users) - 1]

    def _newest_result(self, count: int) -> Cut | None:
        """The last cut within a loop, after its question and rounds that represent all; None if there are few."""
        stretch = self._newest_user(count)
        results = self._results_in(stretch.at, count) if stretch else []
        if stretch is None or len(results) < 3:
            return None
        cuts, question = self._at_results[stretch.at], (*stretch.contexts[0], *range(stretch.at, results[0] - 1))
        for j in range(len(cuts), len(results)):
            earlier, call = self._representatives(_rounds(results[: j + 1])), results[j] - 1
            cuts.append(
                self._next(cuts[-1] if j else stretch, results[j], (*question, *earlier, call), (*question, call))
            )
        return cuts[len(results) - 1]

    def _shortened(self, start: int, end: int) -> tuple[int, ...]:
        """A stretch with only those rounds that represent all."""
        results = self._results_in(start, end)
        if not results:
            return tuple(range(start, end))
        return (*range(start, results[0] - 1), *self._representatives(_rounds([*results, end + 1])))

    def _representatives(self, parts: Iterable[Sequence[int]]) -> list[int]:
        """Messages of the last parts that together have all features: what a template may remember of them."""
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

    def _next(self, cut: Cut, at: int, *contexts: tuple[int, ...]) -> Cut:
        """The cut after this one, with the piece between them."""
        messages = range(cut.at, at + 1)
        found = {self._after(cut, context, self._text_to((*context, *messages))) for context in cut.contexts}
        piece = found.pop()
        if found or piece is None:
            raise TangledError
        return Cut(at, contexts, (*cut.pieces, piece))

    def _after(self, cut: Cut, context: tuple[int, ...], text: str) -> str | None:
        """The part of a text that follows a cut; None if the text before the cut has changed."""
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
    """What a template may act upon: fields, with calls and answers kept apart, and thinking wherever it is."""
    kind = message["role"], bool(message.get("tool_calls"))
    found = {(kind, key) for key, value in message.items() if value}
    parsed = Message(message)
    return found | {(kind, "any thinking")} if parsed.thinking or TAG.search(parsed.content) else found


def _rounds(results: Sequence[int]) -> Iterator[range]:
    """The messages from each answered call to the next one."""
    return (range(first - 1, after - 1) for first, after in itertools.pairwise(results))
