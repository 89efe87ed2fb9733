"""Which rows of `data.train` to look at: one by its number, or those that meet conditions, in some order.

    every row  ->  find, untrained  ->  file order, at random or longest first  ->  the first so many

Rows that training leaves out are shown where every row is asked for, and passed over elsewhere; but the row of an index
is shown whatever the limits, and an error if it is bad.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

import numpy as np

from mtr.chat.turn import Turn
from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.mixture import Mixture
from mtr.data.stream import Stream
from mtr.errors import RowError, UserError

Row = tuple[int, Conversation | SkippedRow]
"""A row with its number, counted from 0 in file order."""
Watch = Callable[[Iterable[Row], int | None], Iterable[Row]]
"""Shows that rows are taken one by one, and how many there are if that is known."""


class NothingFoundError(UserError):
    """No row meets the conditions."""

    exit_code = 1


@dataclass(frozen=True)
class Choice:
    """What is asked for."""

    index: int | None = None
    """The first row, whatever the limits of the recipe; without conditions, and in file order."""
    find: str | None = None
    """A text in a message of the row, in upper or lower case."""
    untrained: bool = False
    """A turn of the row is not trained."""
    order: Literal["file", "random", "longest"] = "file"
    """longest: the most text in its messages and tool schemas first, which is found without rendering."""
    count: int | None = 1
    """How many rows at most; None: all."""
    seed: int = 0
    """Of the random order."""

    @property
    def searches(self) -> bool:
        """Whether rows have to be read, or rendered, to know which are meant."""
        return bool(self.conditions) or self.order == "longest"

    @property
    def conditions(self) -> str:
        """In words, after "no row"."""
        found = [f"with {self.find!r} in a message"] if self.find is not None else []
        return " and ".join([*found, *(["with a turn that is not trained"] if self.untrained else [])])


def choose(
    data: Mixture | Stream, choice: Choice, turns_of: Callable[[Conversation], list[Turn]], watch: Watch
) -> Iterator[Row]:
    """The rows, each with its number.

    Args:
        turns_of: renders a conversation, as `Builder.turns` does; only called to look for untrained turns.
        watch: wraps the rows that are searched, where that may take long.

    Raises:
        UserError: the row of the index is bad, or there is none; a stream has to be in its own order.
        NothingFoundError: no row meets the conditions.
    """
    if choice.index is not None:
        yield from _from_index(data, choice.index, choice.count)
        return
    if isinstance(data, Stream) and choice.order != "file":
        raise UserError(f"--{choice.order}: a stream is read in its own order; set data.streaming to false")
    rows, everything = _rows(data, choice), choice.order == "file" and not choice.conditions
    if everything:
        yield from islice(rows, choice.count)
        return
    if choice.searches:
        rows = iter(watch(rows, len(data) if isinstance(data, Mixture) else None))
    found = _taken(_meeting(rows, choice, turns_of), choice)
    first = next(found, None)
    if first is None:
        raise NothingFoundError(f"data.train: no row {choice.conditions}".rstrip())
    yield first
    yield from found


def _from_index(data: Mixture | Stream, index: int, count: int | None) -> Iterator[Row]:
    if isinstance(data, Mixture):
        last = len(data) if count is None else min(index + count, len(data))
        yield index, data.conversation(index)
        yield from ((number, row) for number in range(index + 1, last) if (row := _passable(data, number)) is not None)
        return
    stop = None if count is None else index + count
    rows = list(islice(enumerate(data.rows(0, 0, shuffle=False)), index, stop))
    if not rows:
        raise UserError(f"--index: the data has no row {index}")
    yield from rows


def _passable(data: Mixture, number: int) -> Conversation | None:
    """The conversation of a row, whatever the limits; None if it is bad and training skips bad rows."""
    try:
        return data.conversation(number)
    except RowError:
        if not data.policy.skip_bad:
            raise
        return None


def _rows(data: Mixture | Stream, choice: Choice) -> Iterator[Row]:
    if isinstance(data, Stream):
        return enumerate(data.rows(0, 0, shuffle=False))
    numbers: Iterable[int] = range(len(data))
    if choice.order == "random":
        numbers = np.random.default_rng(choice.seed).permutation(len(data)).tolist()
    return ((number, data.take(number)) for number in numbers)


def _meeting(rows: Iterable[Row], choice: Choice, turns_of: Callable[[Conversation], list[Turn]]) -> Iterator[Row]:
    """The rows that training takes and that meet all conditions, the cheap one first."""
    for number, row in rows:
        if isinstance(row, SkippedRow) or (choice.find is not None and not _says(row, choice.find)):
            continue
        if not choice.untrained or not all(turn.trained for turn in turns_of(row)):
            yield number, row


def _taken(rows: Iterator[Row], choice: Choice) -> Iterator[Row]:
    if choice.order != "longest":
        return islice(rows, choice.count)
    if choice.count is None:
        return iter(sorted(rows, key=_by_size, reverse=True))
    return iter(heapq.nlargest(choice.count, rows, _by_size))


def _says(conversation: Conversation, wanted: str) -> bool:
    called = (text for message in conversation.messages for text in _strings(message.tool_calls))
    lowered = wanted.lower()  # casefold would find "ss" for "ß"
    return any(wanted in text or lowered in text.lower() for text in chain(_texts(conversation), called))


def _strings(value: Any) -> Iterator[str]:
    """The strings within a value as they are, without the escapes of JSON; also of arguments that are given as JSON."""
    if isinstance(value, str):
        yield value
        if value.startswith(("{", "[")):
            with suppress(ValueError, RecursionError):
                yield from _strings(json.loads(value))
    elif isinstance(value, dict):
        yield from chain.from_iterable(map(_strings, value.values()))
    elif isinstance(value, list):
        yield from chain.from_iterable(map(_strings, value))


def _texts(conversation: Conversation) -> Iterator[str]:
    """Of every message its thinking, its text, and its tool calls as JSON."""
    for message in conversation.messages:
        yield from (message.thinking or "", message.content)
        if message.tool_calls:
            yield json.dumps(message.tool_calls, ensure_ascii=False, default=str)


def _by_size(row: Row) -> tuple[int, int]:
    """Characters of its text; of several rows with as many the first one is the greatest."""
    number, conversation = row
    assert isinstance(conversation, Conversation)
    return sum(map(len, _texts(conversation))) + len(str(conversation.tools or "")), -number


def ranges(numbers: Sequence[int]) -> list[str]:
    """Ascending numbers as ranges: 0 1 2 5 -> 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
