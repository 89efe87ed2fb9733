"""Local data: which rows an epoch takes from each source, and in which order.

Local rows have an index, so the position in the data is a number: the order of an epoch is a function of
(seed, epoch), and any step can be built from its number alone, by any process, in any worker.

A skipped row (bad, or outside the recipe's limits) keeps its place in the order, so that the position stays a number
of rows.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.lines import Ints
from mtr.data.policy import Policy
from mtr.data.shapes import Reader
from mtr.data.sources import Rows
from mtr.errors import RowError, UserError

FIRST_ROWS = 200
"""Rows that are read ahead, to find the shape of a source and rows that repeat each other."""


@dataclass(frozen=True)
class Opened:
    """One file of a source."""

    rows: Rows
    name: str
    weight: float
    reader: Reader


@dataclass(frozen=True)
class Mixture:
    """Sources with their weights. Rows are numbered consecutively through all of them, in file order."""

    sources: tuple[Opened, ...]
    policy: Policy = field(default_factory=Policy)
    own: Ints | None = None
    """Numbers of the rows that an epoch draws from, ascending; None: all."""
    groups: Ints | None = None
    """Of each row, the number of the group that it stays with; None: no groups."""

    def __len__(self) -> int:
        """Number of rows in the sources."""
        return int(self._ends[-1]) if self.sources else 0

    @cached_property
    def _ends(self) -> Ints:
        """Of each source, the number of its last row plus 1."""
        return np.cumsum([len(source.rows) for source in self.sources])

    @property
    def num_rows(self) -> int:
        """Number of rows that an epoch draws from."""
        return len(self) if self.own is None else len(self.own)

    def conversation(self, index: int) -> Conversation:
        """The conversation of a row, whatever the limits.

        Raises:
            UserError: the row is bad, or there is no such row.
        """
        taken = replace(self, policy=Policy()).take(index)
        assert isinstance(taken, Conversation)
        return taken

    def where(self, index: int) -> str:
        """File and row, without reading it."""
        source, at = self._find(index)
        return source.rows.where(at)

    def take(self, index: int) -> Conversation | SkippedRow:
        """The conversation of a row, or why it is skipped.

        Raises:
            RowError: the row is bad, and bad rows are errors.
            UserError: there is no such row.
        """
        source, at = self._find(index)
        return self.policy.take(source.reader.read, read_row(source.rows, at), source.rows.where(at), index)

    def first(self, count: int) -> Iterator[Conversation]:
        """The first conversations in file order, without skipped rows."""
        numbers = range(len(self)) if self.own is None else map(int, self.own)
        taken = (self.take(number) for number in numbers)
        return itertools.islice((t for t in taken if isinstance(t, Conversation)), count)

    def epoch(self, epoch: int, seed: int, shuffle: bool, step_size: int = 1) -> Ints:
        """Row numbers of one epoch: each row of a source as often as the source's weight says.

        With groups, the members of a group are adjacent, and no step of `step_size` rows ends inside a group that
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
        """`size` of these rows at random; whole groups, except for the last one."""
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
    """Order the groups so that few of them are split between steps of `step_size` rows, by a greedy choice.

    The next group is always the earliest that fits the rest of the step. If none fits, one is split: if possible one
    that is larger than a step and has to be split anyway.
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


def read_row(rows: Rows, index: int) -> Any:
    """The row, or the RowError raised when reading it: a broken line is a bad row like any other."""
    try:
        return rows.row(index)
    except RowError as error:
        return error


def _between(numbers: Ints, start: int, end: int) -> Ints:
    first, last = np.searchsorted(numbers, [start, end])
    return numbers[first:last]
