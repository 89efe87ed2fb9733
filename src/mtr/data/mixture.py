"""Rows become conversations in an order: how sources mix, what is held back or passed over, what an epoch takes.

Local rows have an index, so the position in the data is a number: the order of an epoch is a function of
(seed, epoch), and any step can be built from its number alone, by any process, in any worker. Hub streams have no
index; they are read in order and replayed on resume.

A row that is passed over (bad, or outside the recipe's limits) keeps its place in the order, so that the position
stays a number of rows.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from mtr.data.conversation import Conversation
from mtr.data.rejects import Rejected
from mtr.data.shapes import Reader
from mtr.data.sources import Rows, open_source, without_none
from mtr.errors import RowError, UserError
from mtr.recipe.sections import DataSection, FilterSection, Source
from mtr.tree.layout import Ints

_FIRST_ROWS = 200
"""Rows that tell the shape of a source, and whether turns repeat."""


@dataclass(frozen=True)
class Policy:
    """What happens to a row that is bad or outside the limits."""

    limits: FilterSection = field(default_factory=FilterSection)
    skip_bad: bool = False

    def take(self, reader: Reader, row: Any, where: str, number: int | None) -> Conversation | Rejected:
        """
        Args:
            row: or the error that reading it gave.
            number: of the row in the data.

        Raises:
            RowError: the row is bad, and bad rows are errors.
        """
        try:
            if isinstance(row, RowError):
                raise row
            conversation = reader.read(row, where)
        except RowError as error:
            if not self.skip_bad:
                raise
            return Rejected(number, where, error.reason, str(error).removeprefix(where).lstrip(",: "))
        for unit, size in (("turns", len(conversation.turns)), ("messages", len(conversation.messages))):
            least, most = getattr(self.limits, f"min_{unit}"), getattr(self.limits, f"max_{unit}")
            if least is not None and size < least:
                return Rejected(number, where, f"fewer {unit} than data.filter.min_{unit} ({least})")
            if most is not None and size > most:
                return Rejected(number, where, f"more {unit} than data.filter.max_{unit} ({most})")
        return conversation


@dataclass(frozen=True)
class Opened:
    """One file of a source."""

    rows: Rows
    name: str
    weight: float
    reader: Reader


@dataclass(frozen=True)
class Mixture:
    """Sources side by side, each with its weight. Rows are numbered through all of them, in file order."""

    sources: tuple[Opened, ...]
    policy: Policy = Policy()
    own: Ints | None = None
    """Row numbers that an epoch takes; None: all."""
    groups: Ints | None = None
    """Of each row, the number of the group that it stays with."""

    def __len__(self) -> int:
        """Rows of the sources."""
        return int(self._ends[-1]) if self.sources else 0

    @cached_property
    def _ends(self) -> Ints:
        """Of each source, the number after its last row."""
        return np.cumsum([len(source.rows) for source in self.sources])

    @property
    def num_rows(self) -> int:
        """Rows that an epoch may take."""
        return len(self) if self.own is None else len(self.own)

    def conversation(self, index: int) -> Conversation:
        """
        Raises:
            UserError: the row is bad, or there is none of this number.
        """
        taken = replace(self, policy=Policy()).take(index)
        assert isinstance(taken, Conversation)
        return taken

    def where(self, index: int) -> str:
        """File and row, without reading it."""
        source, at = self._find(index)
        return source.rows.where(at)

    def take(self, index: int) -> Conversation | Rejected:
        """The conversation of a row, or why it is passed over.

        Raises:
            RowError: the row is bad, and bad rows are errors.
            UserError: there is none of this number.
        """
        source, at = self._find(index)
        return self.policy.take(source.reader, _read(source.rows, at), source.rows.where(at), index)

    def first(self, count: int) -> Iterator[Conversation]:
        """The first conversations of an epoch in file order, rows that are passed over left out."""
        numbers = range(len(self)) if self.own is None else map(int, self.own)
        taken = (self.take(number) for number in numbers)
        return itertools.islice((t for t in taken if isinstance(t, Conversation)), count)

    def epoch(self, epoch: int, seed: int, shuffle: bool, step_size: int = 1) -> Ints:
        """Row numbers of one epoch: each source as often as its weight says.

        With groups, the members of one stand together, and no step of `step_size` rows ends inside a group that
        could have been placed elsewhere.
        """
        rng = np.random.default_rng((seed, epoch))
        start, parts = 0, []
        for source in self.sources:
            end = start + len(source.rows)
            numbers = np.arange(start, end) if self.own is None else _between(self.own, start, end)
            whole, rest = int(source.weight), round((source.weight - int(source.weight)) * len(numbers))
            parts += [numbers] * whole + [np.sort(self._share(numbers, rest, rng))]
            start = end
        if self.groups is not None:
            return self._in_groups(parts, rng if shuffle else None, step_size)
        order = np.concatenate(parts)
        return rng.permutation(order) if shuffle else order

    def _share(self, numbers: Ints, size: int, rng: np.random.Generator) -> Ints:
        """`size` of these rows by lot; by whole groups, as far as they go."""
        shuffled = rng.permutation(numbers)
        if self.groups is not None and size:
            drawn = dict(zip(dict.fromkeys(self.groups[shuffled].tolist()), itertools.count(), strict=False))
            rank = np.array([drawn[group] for group in self.groups[numbers].tolist()])
            shuffled = numbers[np.argsort(rank, kind="stable")]
        return shuffled[:size]

    def _in_groups(self, parts: Sequence[Ints], rng: np.random.Generator | None, step_size: int) -> Ints:
        assert self.groups is not None
        members: dict[tuple[int, int], list[int]] = defaultdict(list)
        times: Counter[int] = Counter()  # a row that is taken twice is in two copies of its group
        for number in itertools.chain.from_iterable(part.tolist() for part in parts):
            members[times[number], int(self.groups[number])].append(number)
            times[number] += 1
        together = list(members.values())
        order = range(len(together)) if rng is None else rng.permutation(len(together))
        return np.array(fill_steps([together[i] for i in order], step_size), np.int64)

    def _find(self, index: int) -> tuple[Opened, int]:
        if not 0 <= index < len(self):
            raise UserError(f"the data has {len(self)} rows, counted from 0")
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        return source, index - int(self._ends[number]) + len(source.rows)


def fill_steps(groups: Sequence[list[int]], step_size: int) -> list[int]:
    """Line up the groups so that steps of `step_size` rows cut as few of them as a greedy choice can.

    Each place takes the earliest group that fits what is left of the step. Where none fits, one is cut: if possible
    one that is larger than a step and has to be cut anyway.
    """
    waiting: dict[int, deque[int]] = defaultdict(deque)  # by size, the earliest first
    for i, group in enumerate(groups):
        waiting[len(group)].append(i)
    order: list[int] = []
    while waiting:
        room = step_size - len(order) % step_size
        fitting = [queue[0] for size, queue in waiting.items() if size <= room]
        if not fitting:
            large = [queue[0] for size, queue in waiting.items() if size > step_size]
            fitting = large or [queue[0] for queue in waiting.values()]
        chosen = min(fitting)
        size = len(groups[chosen])
        waiting[size].popleft()
        if not waiting[size]:
            del waiting[size]
        order += groups[chosen]
    return order


@dataclass(frozen=True)
class Stream:
    """Hub data sets read as they come: no length, no index."""

    sources: tuple[tuple[Any, str, float], ...]
    readers: tuple[Reader, ...]
    """Of each source; where one has no shape, the first row tells it."""
    policy: Policy = Policy()
    buffer: int = 10_000

    def first(self, count: int) -> Iterator[Conversation]:
        """The first conversations, rows that are passed over left out."""
        taken = self.rows(0, 0, shuffle=False)
        return itertools.islice((t for t in taken if isinstance(t, Conversation)), count)

    def rows(self, epoch: int, seed: int, shuffle: bool) -> Iterator[Conversation | Rejected]:
        from datasets import interleave_datasets

        streams = []
        for number, (stream, name, _) in enumerate(self.sources):
            named = stream.map(
                lambda row, index, name=name, number=number: {
                    "mtr_where": f"{name}, row {index + 1}",
                    "mtr_source": number,
                    **row,
                },
                with_indices=True,
            )
            streams.append(named.shuffle(seed=seed + epoch, buffer_size=self.buffer) if shuffle else named)
        weights = [weight for *_, weight in self.sources]
        mixed = (
            streams[0]
            if len(streams) == 1
            else interleave_datasets(
                streams,
                [w / sum(weights) for w in weights],
                seed=seed + epoch,
                stopping_strategy="all_exhausted",
            )
        )
        readers = dict(enumerate(self.readers))
        for raw in mixed:
            row = dict(without_none(raw))
            number, where = row.pop("mtr_source"), row.pop("mtr_where")
            if readers[number].shape is None:
                readers[number] = readers[number].told_by([row])
            yield self.policy.take(readers[number], row, where, None)


def open_data(data: DataSection, sources: Sequence[Source]) -> Mixture | Stream:
    """Open every source of `data.train` or `data.eval`.

    Raises:
        UserError: a source is missing, unreadable or empty.
    """
    opened = [(source, rows) for source in sources for rows in open_source(source, data.streaming)]
    policy = Policy(data.filter, data.on_bad_row == "skip")
    streams = [(rows, source.path, source.weight) for source, rows in opened if not hasattr(rows, "row")]
    if streams:
        if len(streams) < len(opened):
            raise UserError("data: Hub streams and local files cannot be mixed; set data.streaming to false")
        readers = tuple(_reader(data, source) for source, _ in opened)
        return Stream(tuple(streams), readers, policy, data.shuffle_buffer)
    files = []
    for source, rows in opened:
        reader = _reader(data, source)
        if reader.shape is None:
            reader = reader.told_by(_read(rows, i) for i in range(min(len(rows), _FIRST_ROWS)))
        name = rows.where(0).rpartition(", ")[0] if len(rows) else source.path
        files.append(Opened(rows, name, source.weight, reader))
    mixture = Mixture(tuple(files), policy)
    if not len(mixture):
        raise UserError(f"data: no rows in {', '.join(source.path for source in sources)}")
    return mixture


def _reader(data: DataSection, source: Source) -> Reader:
    """Without a shape where the recipe names none."""
    named = source.format or data.format
    columns = {str(name): column for name, column in data.columns.items()}
    return Reader(None if named == "auto" else named, data.messages, data.tools, columns)


def open_training_data(data: DataSection, seed: int) -> tuple[Mixture | Stream, Mixture | None]:
    """The data to train on, and the share of it that is held back for evaluation.

    Raises:
        UserError: as `open_data`; or a stream is to be grouped or divided.
    """
    opened = open_data(data, data.train)
    for key in ("group_by", "eval_fraction"):
        if getattr(data, key) is not None and isinstance(opened, Stream):
            raise UserError(f"data.{key}: a Hub stream is read in its own order; set data.streaming to false")
    if isinstance(opened, Stream):
        return opened, None
    if data.group_by is not None:
        opened = replace(opened, groups=group_rows(opened, data.group_by))
    return (opened, None) if data.eval_fraction is None else split_data(opened, data.eval_fraction, seed)


def group_rows(mixture: Mixture, column: str) -> Ints:
    """Of each row the number of its group: rows with the same value in `column`. A row without it stands alone.

    Raises:
        UserError: no row has the column.
    """
    numbers: dict[str, int] = {}
    groups: list[int] = []
    found: Counter[str] = Counter()
    for source in mixture.sources:
        for i in range(len(source.rows)):
            row = _read(source.rows, i)
            value = row.get(column) if isinstance(row, dict) else None
            if value is None:
                found.update(row if isinstance(row, dict) and len(groups) < _FIRST_ROWS else ())
                key = f"row {len(groups)}"
            else:
                key = json.dumps(value, sort_keys=True, default=str)
            groups.append(numbers.setdefault(key, len(numbers)))
    if all(key.startswith("row ") for key in numbers):
        columns = ", ".join(map(str, found)) or "nothing"
        raise UserError(f"data.group_by: no row has a column {column!r} (found: {columns})")
    return np.array(groups, np.int64)


def split_data(mixture: Mixture, fraction: float, seed: int) -> tuple[Mixture, Mixture]:
    """Hold back a share of the rows, by lot; whole groups where there are groups.

    Raises:
        UserError: nothing would be left on one side.
    """
    total = len(mixture)
    groups = np.arange(total) if mixture.groups is None else mixture.groups
    lots = np.random.default_rng((seed, 0x5EED)).permutation(int(groups.max()) + 1)
    by_lot = np.argsort(lots[groups], kind="stable")
    size = max(1, round(fraction * total))
    while size < total and groups[by_lot[size]] == groups[by_lot[size - 1]]:
        size += 1
    if size >= total:
        raise UserError(
            f"data.eval_fraction: {fraction} of {total} rows{'' if mixture.groups is None else ' in whole groups'} "
            "leaves nothing to train on; lower it, or name other data in data.eval"
        )
    held_back, own = np.sort(by_lot[:size]), np.sort(by_lot[size:])
    return replace(mixture, own=own), replace(mixture, own=held_back, groups=None)


def describe_data(data: Mixture | Stream) -> list[str]:
    """What is worth saying about the data before it is trained on, read off its first rows."""
    if isinstance(data, Stream):
        return []
    notes = [f"{s.name} is read as {s.reader.shape}" for s in data.sources if s.reader.shape != "messages"]
    notes = notes if len(notes) <= 3 else [*notes[:2], f"... and {len(notes) - 2} more files"]
    taken = [t for i in range(min(len(data), _FIRST_ROWS)) if (t := _try_take(data, i)) is not None]
    if repeating := count_repeating(taken):
        notes.append(
            f"{repeating} of the first {len(taken)} rows are the beginning of another row or equal to one: the data is "
            "split per turn already, or holds rows twice, and such turns count twice; keep the longest row of each "
            "conversation"
        )
    return notes


def count_repeating(conversations: Sequence[Conversation]) -> int:
    """How many conversations are the beginning of a longer one, or equal to an earlier one.

    Thinking is left aside in the first case: a splitter may have taken it out of the earlier turns.
    """
    going_on: dict[int, set[int]] = defaultdict(set)
    ends: list[int] = []
    whole: Counter[str] = Counter()
    repeating = set()
    for number, conversation in enumerate(conversations):
        said = [json.dumps(dict(m.data), sort_keys=True, default=str) for m in conversation.messages]
        tools = json.dumps(conversation.tools, sort_keys=True, default=str)
        whole["\0".join([tools, *said])] += 1
        if whole["\0".join([tools, *said])] > 1:
            repeating.add(number)
        prefix, prefixes = hash(tools), []
        for message in conversation.messages:
            calls = json.dumps(message.tool_calls, sort_keys=True, default=str)
            text = _INLINE_THINKING.sub("", message.content).strip()
            prefix = hash((prefix, message.role, text, calls))
            if message.role == "assistant":
                prefixes.append(prefix if message.weight > 0 else 0)
        ends.append(prefixes[-1])
        for earlier in prefixes[:-1]:
            going_on[earlier].add(number)
    repeating |= {number for number, end in enumerate(ends) if end and going_on.get(end, set()) - {number}}
    return len(repeating)


_INLINE_THINKING = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


def _try_take(data: Mixture, index: int) -> Conversation | None:
    try:
        taken = data.take(index)
    except RowError:
        return None
    return taken if isinstance(taken, Conversation) else None


def _read(rows: Rows, index: int) -> Any:
    """The row, or the error that reading it gives: a broken line is a bad row like any other."""
    try:
        return rows.row(index)
    except RowError as error:
        return error


def _between(numbers: Ints, start: int, end: int) -> Ints:
    first, last = np.searchsorted(numbers, [start, end])
    return numbers[first:last]
