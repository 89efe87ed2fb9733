"""Hub data sets that are streamed, without being downloaded first.

A stream has no length and no index: it is read in order, and replayed on resume. Its order is a function of
(seed, epoch).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.policy import Policy
from mtr.data.shapes import Reader
from mtr.data.tables import without_none


@dataclass(frozen=True)
class Stream:
    """Streamed data sets, interleaved at random by their weights."""

    sources: tuple[tuple[Any, str, float], ...]
    """Of each source the data set, its name, and its weight."""
    readers: tuple[Reader, ...]
    """Of each source; a reader without a shape takes the shape of the source's first row."""
    policy: Policy = field(default_factory=Policy)
    buffer: int = 10_000
    """Rows in the shuffle buffer."""

    def first(self, count: int) -> Iterator[Conversation]:
        """The first conversations, without skipped rows."""
        taken = self.rows(0, 0, shuffle=False)
        return itertools.islice((t for t in taken if isinstance(t, Conversation)), count)

    def rows(self, epoch: int, seed: int, shuffle: bool) -> Iterator[Conversation | SkippedRow]:
        """All rows of one epoch, those that are skipped included.

        Raises:
            RowError: a row is bad, and bad rows are errors.
        """
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
                readers[number] = readers[number].with_shape_of([row])
            yield self.policy.take(readers[number].read, row, where, None)
