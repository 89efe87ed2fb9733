"""One optimizer step, prepared: a fixed set of conversations, rendered, weighed, merged, packed.

    rows of the step -> Conversation -> [Turn] -> [View] -> [Layout] -> packs of every process -> own batches

A step is built from its number alone. Every process builds it whole and keeps its own packs, so all know the sums
of the step without asking each other, and no process waits for data that another one has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mtr.batch import Batch, build_batch
from mtr.conversation import Conversation
from mtr.data import Mixture, Stream
from mtr.errors import UserError
from mtr.layout import View
from mtr.packing import build_packs, merge_conversations
from mtr.recipe import Recipe, SequenceSection
from mtr.rejects import Rejected
from mtr.rendering import Renderer, Turn


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


def weigh(turns: Sequence[Turn], weighting: str) -> list[View]:
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
        views: list[list[View]] = []
        for row in rows:
            if isinstance(row, Rejected):
                rejects.append(row)
                counts.skipped_rows[row.reason] += 1
                continue
            turns = self.turns(row)
            views.append(weigh(turns, self.recipe.loss.weighting))
            counts.add(count_views(turns, views[-1]))
        sequence = self.recipe.sequence
        layouts = merge_conversations(views, sequence.strategy, sequence.merge, sequence.budget, self.num_processes)
        counts.tokens = sum(layout.num_tokens for layout in layouts)
        counts.trees = len(layouts)
        packs = build_packs(layouts, sequence.budget, self.num_processes)[self.process]
        batches = tuple(build_batch(pack, self.pad_to_multiple_of) for pack in packs)
        weight_sum = float(sum(layout.weight.sum() for layout in layouts))
        return Step(batches, weight_sum, counts, position, epoch, tuple(rejects))


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
            taken = [self._data.take(int(row)) for row in rows]
            return self._builder.step(taken, position, position / len(order))
        except UserError as error:
            return error


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
    loader: DataLoader[Step | UserError] = DataLoader(
        steps,
        batch_size=None,
        sampler=numbers if indexed else None,
        num_workers=num_workers if indexed else min(num_workers, 1),
        collate_fn=_same,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_quiet_worker,
    )
    for _, step in zip(numbers, loader, strict=False):
        if isinstance(step, UserError):
            raise step
        yield step


def _same(step: Any) -> Any:
    return step


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
