"""What happens to a row that is bad or outside the limits of the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mtr.data.conversation import Conversation, SkippedRow
from mtr.errors import RowError
from mtr.recipe.sections import FilterSection


@dataclass(frozen=True)
class Policy:
    """What happens to a row that is bad or outside the limits."""

    limits: FilterSection = field(default_factory=FilterSection)
    skip_bad: bool = False

    def take(
        self, read: Callable[[Any, str], Conversation], row: Any, where: str, number: int | None
    ) -> Conversation | SkippedRow:
        """
        Args:
            read: makes a conversation of a row; `where` names it in errors.
            row: or the error that reading it gave.
            number: of the row in the data.

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
            return SkippedRow(number, where, error.reason, str(error).removeprefix(where).lstrip(",: "))
        for unit, size in (("turns", len(conversation.turns)), ("messages", len(conversation.messages))):
            least, most = getattr(self.limits, f"min_{unit}"), getattr(self.limits, f"max_{unit}")
            if least is not None and size < least:
                return SkippedRow(number, where, f"fewer {unit} than data.filter.min_{unit} ({least})")
            if most is not None and size > most:
                return SkippedRow(number, where, f"more {unit} than data.filter.max_{unit} ({most})")
        return conversation
