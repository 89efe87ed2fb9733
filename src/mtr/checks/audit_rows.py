"""What training would make of the rows of a recipe: the same steps from row to turns, counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from mtr.chat.turn import CHOSEN, Turn, fills, too_long
from mtr.checks.data_report import DataReport, Lengths
from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.mixture import Mixture
from mtr.data.opening import open_data
from mtr.prepare.builder import Builder
from mtr.recipe.sections import Recipe

STOPS_AT_LENGTH = "sequence.overlong: error"
STOPS_AT_ROW = "data.on_bad_row: error"


def sample_rows(recipe: Recipe, most: int) -> tuple[Iterator[Conversation | SkippedRow], int | None]:
    """At most `most` rows of `data.train`, evenly spaced (of a stream: the first), bad rows as SkippedRow.

    Returns:
        The rows, and how many `data.train` has: None for a stream.

    Raises:
        UserError: a source is missing, unreadable or empty.
    """
    recipe = recipe.replace(data={"on_bad_row": "skip"})
    data = open_data(recipe.data, recipe.data.train)
    if not isinstance(data, Mixture):
        return islice(data.rows(0, 0, shuffle=False), most), None
    number = min(most, len(data))
    return (data.take(index * len(data) // number) for index in range(number)), len(data)


class RowAudit:
    """Makes turns of rows as training would, and counts them by what happens to them.

    What would end the run is counted, and does not end this.
    """

    def __init__(self, builder: Builder) -> None:
        recipe = builder.recipe
        self._limit, self._stops_at_length = recipe.sequence.max_length, recipe.sequence.overlong == "error"
        self._stops_at_row = recipe.data.on_bad_row == "error"
        if self._stops_at_length:
            builder = Builder(recipe.replace(sequence={"overlong": "drop"}), builder.renderer)
        self._builder = builder
        kinds = ("refused", "chosen", "notes", "unreadable", "filtered", "remarks")
        self._counts = {name: Counter[str]() for name in kinds}
        self._examples: dict[str, str] = {}
        self._stops: dict[str, str] = {}
        self._lengths: list[float] = []
        self._rows = self._turns = self._trained = 0

    def add(self, row: Conversation | SkippedRow) -> list[Turn]:
        """Count a row.

        Returns:
            Its turns, those that are not trained included; none of a row that is skipped.
        """
        self._rows += 1
        counts, examples = self._counts, self._examples
        if isinstance(row, SkippedRow):
            counts["filtered" if row.problem is None else "unreadable"][_why(row)] += 1
            if row.problem is not None and self._stops_at_row:
                self._stops.setdefault(STOPS_AT_ROW, row.where)
            return []
        for remark in row.remarks:
            counts["remarks"][remark] += 1
            examples.setdefault(remark, row.where)
        rendered = self._builder.rendered(row)
        self._lengths += _lengths(rendered, self._limit)
        turns = self._builder.fitted(rendered, row.where)
        for turn in turns:
            self._turns += 1
            self._trained += turn.trained
            where = f"{row.where}, message {turn.message_index}"
            if turn.reason is not None:
                counts["chosen" if turn.reason in CHOSEN else "refused"][turn.reason] += 1
            if turn.reason == too_long(self._limit) and self._stops_at_length:
                self._stops.setdefault(STOPS_AT_LENGTH, where)
            notes = turn.notes if turn.trained else ()
            counts["notes"].update(notes)
            for text in (*notes, *([turn.reason] if turn.reason else [])):
                examples.setdefault(text, where)
        return turns

    def report(self, of_rows: int | None) -> DataReport:
        """
        Args:
            of_rows: how many rows there are; None if that is not known.
        """
        by_number = {name: dict(counter.most_common()) for name, counter in self._counts.items()}
        return DataReport(
            self._rows,
            of_rows,
            self._turns,
            self._trained,
            **by_number,
            examples=self._examples,
            lengths=_summary(self._lengths, self._limit),
            stops=self._stops,
        )


def audit_rows(builder: Builder, rows: Iterable[Conversation | SkippedRow], of_rows: int | None) -> DataReport:
    """What becomes of these rows, and of their turns."""
    audit = RowAudit(builder)
    for row in rows:
        audit.add(row)
    return audit.report(of_rows)


def _why(row: SkippedRow) -> str:
    return row.reason if row.problem is None else f"{row.where}: {row.problem}"


def _lengths(turns: Sequence[Turn], limit: int) -> Iterator[float]:
    """Tokens of each turn that could be trained if it were short enough; infinite where they were not counted."""
    for turn in turns:
        if turn.trained:
            yield turn.num_tokens
        elif turn.reason in (too_long(limit), fills(limit)):
            yield math.inf


def _summary(lengths: list[float], limit: int) -> Lengths | None:
    if not lengths:
        return None
    ordered, total = sorted(lengths), len(lengths)
    ranks = (math.ceil(total / 2), math.ceil(0.95 * total), total)
    median, percentile_95, longest = (
        None if math.isinf(length) else int(length) for length in (ordered[rank - 1] for rank in ranks)
    )
    return Lengths(total, median, percentile_95, longest, limit, sum(length > limit for length in lengths))
