"""Which conversations make up a step."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.mixture import Mixture
from mtr.data.stream import Stream
from mtr.errors import UserError
from mtr.prepare.builder import Builder
from mtr.prepare.step import Step
from mtr.tree.layout import Ints


class IndexedSteps(Dataset[Step | UserError]):
    """Steps of a mixture, by number. A bad row comes back as the error it is, to be raised where it is met."""

    def __init__(self, builder: Builder, data: Mixture, shuffle: bool) -> None:
        self._builder = builder
        self._data = data
        self._shuffle = shuffle
        self._seed = builder.recipe.training.seed
        self._size = builder.recipe.training.conversations_per_step
        self._order: tuple[int, Any] = (0, self._epoch(0))
        if not len(self._order[1]):
            raise UserError("data.train: the weights of the sources leave no row in an epoch; raise weight")
        self.steps_per_epoch = -(-len(self._order[1]) // self._size)
        self._row = 0
        self.at_work: Tensor | None = None
        """[workers, 3] shared: process id, step and row that each worker prepares."""

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
            return self._builder.step(self._take(number, rows), position, position / len(order))
        except UserError as error:
            return error
        except Exception as error:
            error.add_note(f"while step {number + 1} was prepared, {self._data.where(self._row)}")
            raise

    def _take(self, number: int, rows: Ints) -> Iterator[Conversation | SkippedRow]:
        """One by one, and marked while it is prepared, so that a worker that dies can be traced to its row."""
        worker = get_worker_info()
        for row in rows.tolist():
            self._row = row
            if worker is not None and self.at_work is not None:
                self.at_work[worker.id] = torch.tensor([os.getpid(), number, row])
            yield self._data.take(row)

    def died(self, alive: Collection[int | None]) -> str:
        """What the workers were at that are not among these process ids."""
        marks = [] if self.at_work is None else self.at_work.tolist()
        lost = [mark for mark in marks if mark[0] > 0 and mark[0] not in alive]
        return "; ".join(f"step {number + 1}, {self._data.where(row)}" for _, number, row in lost)


class StreamedSteps(IterableDataset[Step | UserError]):
    """Steps of a stream, in order, repeated; those before `start` are read and passed over."""

    def __init__(self, builder: Builder, data: Stream, shuffle: bool, start: int = 0) -> None:
        self._builder = builder
        self._data = data
        self._shuffle = shuffle
        self._start = start

    def __iter__(self) -> Iterator[Step | UserError]:
        training = self._builder.recipe.training
        number, position = 0, 0
        try:
            for epoch in range(2**31):
                before = position
                group: list[Conversation | SkippedRow] = []
                for row in self._data.rows(epoch, training.seed, self._shuffle):
                    group.append(row)
                    position += 1
                    if len(group) == training.conversations_per_step:
                        if number >= self._start:
                            yield self._builder.step(group, position, epoch)
                        number, group = number + 1, []
                if position == before:
                    raise UserError("data: the stream has no rows")
                if group:
                    if number >= self._start:
                        yield self._builder.step(group, position, epoch + 1)
                    number += 1
        except UserError as error:
            yield error
