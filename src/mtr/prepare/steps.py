"""Which rows make up a step.

    row order of an epoch (seed, epoch)  ->  rows of step n  ->  build(rows)  ->  Step

Steps of a mixture have random access: step n depends on its number alone. Steps of a stream come in order; a resumed
run reads the stream again up to where it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.mixture import Mixture
from mtr.data.stream import Stream
from mtr.errors import UserError
from mtr.prepare.step import Step
from mtr.recipe.sections import TrainingSection
from mtr.tree.layout import Ints

BuildStep = Callable[[Iterable[Conversation | SkippedRow], int, float], Step]
"""Rows of the whole step, position and epoch after it -> the step: `Builder.step`."""


class IndexedSteps(Dataset[Step | UserError]):
    """Steps of a mixture, by number. A bad row is returned as its error, which the reader raises in its turn."""

    def __init__(self, build: BuildStep, data: Mixture, training: TrainingSection, shuffle: bool) -> None:
        """
        Raises:
            UserError: an epoch has no rows.
        """
        self._build = build
        self._data = data
        self._shuffle = shuffle
        self._seed = training.seed
        self._size = training.conversations_per_step
        self._order: tuple[int, Any] = (0, self._epoch(0))
        if not len(self._order[1]):
            raise UserError("data.train: the weights of the sources leave no row in an epoch; raise weight")
        self.steps_per_epoch = -(-len(self._order[1]) // self._size)
        self._row = 0
        self.at_work: Tensor | None = None
        """[workers, 3] shared: process id, step and row that each worker is preparing."""

    def _epoch(self, epoch: int) -> Any:
        return self._data.epoch(epoch, self._seed, self._shuffle, self._size)

    def __getitem__(self, number: int) -> Step | UserError:
        epoch, index = divmod(number, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._epoch(epoch))
        order = self._order[1]
        rows = order[index * self._size : (index + 1) * self._size]
        position = epoch * len(order) + min((index + 1) * self._size, len(order))
        try:
            return self._build(self._take(number, rows), position, position / len(order))
        except UserError as error:
            return error
        except Exception as error:
            error.add_note(f"while step {number + 1} was prepared, {self._data.where(self._row)}")
            raise

    def first_epoch(self) -> Iterator[Step]:
        """Every step of the first epoch, prepared in this process.

        Raises:
            UserError: a row is bad.
        """
        for number in range(self.steps_per_epoch):
            step = self[number]
            if isinstance(step, UserError):
                raise step
            yield step

    def _take(self, number: int, rows: Ints) -> Iterator[Conversation | SkippedRow]:
        """The rows one by one; a worker notes which one it is preparing, so that its death can be traced to a row."""
        worker = get_worker_info()
        for row in rows.tolist():
            self._row = row
            if worker is not None and self.at_work is not None:
                self.at_work[worker.id] = torch.tensor([os.getpid(), number, row])
            yield self._data.take(row)

    def died(self, alive: Collection[int | None]) -> str:
        """What the workers were preparing whose process ids are not among those alive."""
        marks = [] if self.at_work is None else self.at_work.tolist()
        lost = [mark for mark in marks if mark[0] > 0 and mark[0] not in alive]
        return "; ".join(f"step {number + 1}, {self._data.where(row)}" for _, number, row in lost)


class StreamedSteps(IterableDataset[Step | UserError]):
    """Steps of a stream, in order, epoch after epoch; those before `start` are read and skipped."""

    def __init__(
        self, build: BuildStep, data: Stream, training: TrainingSection, shuffle: bool, start: int = 0
    ) -> None:
        self._build = build
        self._data = data
        self._training = training
        self._shuffle = shuffle
        self._start = start

    def __iter__(self) -> Iterator[Step | UserError]:
        size, seed = self._training.conversations_per_step, self._training.seed
        number, position = 0, 0
        try:
            for epoch in range(2**31):
                before = position
                group: list[Conversation | SkippedRow] = []
                for row in self._data.rows(epoch, seed, self._shuffle):
                    group.append(row)
                    position += 1
                    if len(group) == size:
                        if number >= self._start:
                            yield self._build(group, position, epoch)
                        number, group = number + 1, []
                if position == before:
                    raise UserError("data: the stream has no rows")
                if group:
                    if number >= self._start:
                        yield self._build(group, position, epoch + 1)
                    number += 1
        except UserError as error:
            yield error
