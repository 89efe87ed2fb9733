"""What happens to rows that are bad or outside the limits of the recipe: they are errors, or are skipped and counted.

Every row gives exactly one result, a Conversation or a SkippedRow, so that positions in the data stay numbers of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.json_text import hash_value
from mtr.errors import RowError
from mtr.recipe.sections import FilterSection


@dataclass(frozen=True)
class Policy:
    """Limits, and whether bad rows are skipped; rows outside the limits always are."""

    limits: FilterSection = field(default_factory=FilterSection)
    skip_bad: bool = False

    def take(
        self, read: Callable[[Any, str], Conversation], row: Any, where: str, number: int | None
    ) -> Conversation | SkippedRow:
        """
        Args:
            read: makes a row a conversation; its second argument names the row in errors.
            row: the row, or the RowError raised when reading it.
            where: file and row.
            number: index of the row in the data; None in a stream.

        Raises:
            RowError: the row is bad, and bad rows are errors.
        """
        try:
            if isinstance(row, RowError):
                raise row
            conversation = read(row, where)
        except RowError as error:
            if not self.skip_bad:
                raise
            sha256 = row.sha256 if isinstance(row, RowError) else hash_value(row)
            return SkippedRow(number, where, error.reason, str(error).removeprefix(where).lstrip(",: "), sha256)
        for unit, size in (("turns", len(conversation.turns)), ("messages", len(conversation.messages))):
            least, most = getattr(self.limits, f"min_{unit}"), getattr(self.limits, f"max_{unit}")
            if least is not None and size < least:
                return SkippedRow(number, where, f"fewer {unit} than data.filter.min_{unit} ({least})")
            if most is not None and size > most:
                return SkippedRow(number, where, f"more {unit} than data.filter.max_{unit} ({most})")
        return conversation
