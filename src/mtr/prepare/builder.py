"""One optimizer step, prepared: a fixed set of conversations, rendered, weighed, merged, packed.

    rows of the step -> Conversation -> [Turn] -> [View] -> [Layout] -> packs of every process -> own batches

A step is built from its number alone. Every process builds it whole and keeps its own packs, so all know the sums
of the step without asking each other, and no process waits for data that another one has.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from mtr.chat.rendering import Renderer, Turn
from mtr.data.conversation import Conversation
from mtr.data.mixture import Mixture, Stream
from mtr.data.rejects import Rejected
from mtr.errors import UserError, WorkerError
from mtr.recipe.sections import Recipe, SequenceSection
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import Ints, View
from mtr.tree.packing import BY_TOKENS, Cost, Pack, build_packs, imbalance, merge_conversations

_DYING = 2.0
_PREEMPTION = ("SIGUSR1", "SIGUSR2", "SIGHUP")
"""Beside SIGTERM and SIGINT, what a scheduler may send to every process of a job."""


@dataclass
class Counts:
    """What happened to rows, turns and tokens; adds up over steps."""

    conversations: int = 0
    """With a trained turn."""
    turns: int = 0
    """Trained."""
    tokens: int = 0
    """Physical: what the device processes."""
    supervised_tokens: int = 0
    per_turn_tokens: int = 0
    """What one pass per turn would process."""
    trees: int = 0
    untrained_turns: Counter[str] = field(default_factory=Counter)
    """By reason."""
    untrained_rows: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    """Turns that are trained, with something to know about them."""
    skipped_rows: Counter[str] = field(default_factory=Counter)
    """Bad rows and those outside the recipe's limits, by reason."""

    def reasons(self) -> str:
        """The most common reasons why turns and rows are not trained, for a message."""
        turns = [f"{n} turns: {reason}" for reason, n in self.untrained_turns.most_common(3)]
        rows = [f"{n} rows: {reason}" for reason, n in self.skipped_rows.most_common(3)]
        return "; ".join(turns + rows) or "no turns"

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Step:
    """What one process needs of one step."""

    batches: tuple[Batch, ...]
    """Of this process; may be empty."""
    weight_sum: float
    """Of all processes."""
    counts: Counts
    """Of all processes."""
    position: int
    """Rows taken when the step is done."""
    epoch: float
    rows: tuple[str, ...] = ()
    """File and row of each conversation, those without a trained turn included."""
    rounds: int = 0
    """Most packs that any process has."""
    imbalance: float = 1.0
    """Cost of the costliest process over the mean of all."""
    rejects: tuple[Rejected, ...] = ()
    """Rows of the step that were passed over."""


def fit_turns(turns: Sequence[Turn], sequence: SequenceSection, where: str) -> list[Turn]:
    """Apply `overlong` to the turns that are longer than max_length.

    Raises:
        UserError: a turn is too long and overlong is error.
    """
    limit = sequence.max_length
    fitted = []
    for turn in turns:
        if not turn.trained or turn.num_tokens <= limit:
            fitted.append(turn)
        elif sequence.overlong == "error":
            raise UserError(
                f"{where}, message {turn.message_index}: the turn has {turn.num_tokens} tokens, more than "
                f"sequence.max_length ({limit}); raise it, or set sequence.overlong to drop or truncate"
            )
        elif sequence.overlong == "drop":
            fitted.append(replace(turn, reason=f"longer than sequence.max_length ({limit})"))
        elif len(turn.prompt_ids) >= limit:
            fitted.append(replace(turn, reason=f"its prompt alone fills sequence.max_length ({limit})"))
        else:
            kept = turn.completion_ids[: limit - len(turn.prompt_ids)]
            note = f"truncated to sequence.max_length ({limit})"
            fitted.append(replace(turn, completion_ids=kept, notes=(*turn.notes, note)))
    return fitted


def weigh(turns: Sequence[Turn], weighting: str, where: str = "") -> list[View]:
    """Views of the trained turns, each completion token with its weight in the loss.

    With m the weight of a message: `token` gives each token m; `turn` gives m / tokens of the turn; `conversation`
    gives m / sum over the trained turns of (m * tokens).
    """
    trained = [turn for turn in turns if turn.trained]
    whole = sum(turn.weight * len(turn.completion_ids) for turn in trained)
    views = []
    for turn in trained:
        tokens = len(turn.completion_ids)
        norm = {"token": 1.0, "turn": float(tokens), "conversation": whole}[weighting]
        views.append(
            View(
                np.array(turn.prompt_ids, np.int64),
                np.array(turn.completion_ids, np.int64),
                np.full(tokens, turn.weight / norm),
                turn.turn,
                where,
            )
        )
    return views


@dataclass(frozen=True)
class Builder:
    """Makes steps from conversations."""

    recipe: Recipe
    renderer: Renderer
    process: int = 0
    num_processes: int = 1
    pad_to_multiple_of: int = 1
    cost: Cost = BY_TOKENS

    def turns(self, conversation: Conversation) -> list[Turn]:
        return fit_turns(self.renderer.render(conversation), self.recipe.sequence, conversation.where)

    def views(self, conversation: Conversation) -> list[View]:
        return weigh(self.turns(conversation), self.recipe.loss.weighting)

    def step(self, rows: Iterable[Conversation | Rejected], position: int, epoch: float) -> Step:
        """
        Args:
            rows: of the whole step, those that are passed over included.
        """
        counts = Counts()
        rejects: list[Rejected] = []
        where: list[str] = []
        views: list[list[View]] = []
        for row in rows:
            if isinstance(row, Rejected):
                rejects.append(row)
                counts.skipped_rows[row.reason] += 1
                continue
            turns = self.turns(row)
            where.append(row.where)
            views.append(weigh(turns, self.recipe.loss.weighting, row.where))
            counts.add(count_views(turns, views[-1]))
        sequence = self.recipe.sequence
        layouts = merge_conversations(views, sequence.strategy, sequence.merge, sequence.budget, self.num_processes)
        counts.tokens = sum(layout.num_tokens for layout in layouts)
        counts.trees = len(layouts)
        packs = build_packs(layouts, sequence.budget, self.num_processes, self.cost)
        return Step(
            batches=tuple(self.batch(pack) for pack in packs[self.process]),
            weight_sum=float(sum(layout.weight.sum() for layout in layouts)),
            counts=counts,
            position=position,
            epoch=epoch,
            rows=tuple(where),
            rounds=max(map(len, packs)),
            imbalance=imbalance(packs, self.cost) if self.num_processes > 1 else 1.0,
            rejects=tuple(rejects),
        )

    def batch(self, pack: Pack) -> Batch:
        batch = build_batch(pack, self.pad_to_multiple_of)
        return replace(batch, pack=pack) if self.recipe.sequence.on_oom == "split" else batch


def count_views(turns: Sequence[Turn], views: Sequence[View]) -> Counts:
    """What one conversation adds to the counts of a step, its trees left out."""
    return Counts(
        conversations=int(bool(views)),
        turns=len(views),
        supervised_tokens=sum(len(view.completion_ids) for view in views),
        per_turn_tokens=sum(view.num_tokens for view in views),
        untrained_turns=Counter(turn.reason for turn in turns if turn.reason is not None),
        untrained_rows=Counter([] if views else ["no turn of it is trained"]),
        notes=Counter(note for turn in turns if turn.trained for note in turn.notes),
    )


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

    def _take(self, number: int, rows: Ints) -> Iterator[Conversation | Rejected]:
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
                group: list[Conversation | Rejected] = []
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


def iterate_steps(steps: IndexedSteps | StreamedSteps, numbers: range, num_workers: int) -> Iterator[Step]:
    """The steps in order, prepared in background workers if there are any.

    Raises:
        UserError: a row is bad; the steps before it have been yielded.
    """
    indexed = isinstance(steps, IndexedSteps)
    leaving = torch.zeros(1, dtype=torch.int64)
    if num_workers:
        leaving.share_memory_()  # type: ignore[no-untyped-call]
        atexit.register(leaving.fill_, 1)
    if isinstance(steps, IndexedSteps) and num_workers:
        steps.at_work = torch.full((num_workers, 3), -1).share_memory_()  # type: ignore[no-untyped-call]
    loader: DataLoader[Step | UserError] = DataLoader(
        steps,
        batch_size=None,
        sampler=numbers if indexed else None,
        num_workers=num_workers if indexed else min(num_workers, 1),
        collate_fn=_same,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=partial(_quiet_worker, leaving),
    )
    prepared = _start_workers(loader)
    try:
        for number in numbers:
            try:
                step = next(prepared)
            except (RuntimeError, OSError, EOFError) as error:
                raise _explain_worker(error, steps, number) from error
            if isinstance(step, UserError):
                raise step
            yield step
    finally:
        leaving.fill_(1)


def _start_workers(loader: DataLoader[Step | UserError]) -> Iterator[Step | UserError]:
    """A worker's death shall be told where its step is asked for, not wherever the main process happens to be."""
    before = signal.getsignal(signal.SIGCHLD)
    prepared = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)
    return prepared


def _explain_worker(error: Exception, steps: IndexedSteps | StreamedSteps, number: int) -> Exception:
    """A worker that died (killed, out of memory) is for people, an exception in it is a bug and stays what it is."""
    broken = isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker (pid" in str(error)
    at = _lost_row(steps, patience=_DYING if broken else 0.0)
    if not (at or broken) or "Caught " in str(error):
        return error
    return WorkerError(
        f"a process that prepares data died at {at or f'step {number + 1}'} "
        f"({' '.join(str(error).split())[:200]}); look for an out-of-memory kill, or lower data.num_workers"
    )


def _lost_row(steps: IndexedSteps | StreamedSteps, patience: float) -> str:
    """What a dead worker was at. Its pipes close before it can be seen to be dead, hence the patience, in seconds."""
    if not isinstance(steps, IndexedSteps):
        return ""
    until = time.monotonic() + patience
    while True:
        at = steps.died({child.pid for child in multiprocessing.active_children()})
        if at or time.monotonic() >= until:
            return at
        time.sleep(0.02)


def _same(step: Any) -> Any:
    return step


def _quiet_worker(leaving: Tensor, _: int) -> None:
    """A scheduler signals every process of a job; only the main one acts on it, and ends its workers when it leaves."""
    torch.set_num_threads(1)

    def terminate(number: int, _: Any) -> None:
        if leaving.item():
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, terminate)
    for number in (signal.SIGINT, *(getattr(signal, n) for n in _PREEMPTION if hasattr(signal, n))):
        signal.signal(number, signal.SIG_IGN)
