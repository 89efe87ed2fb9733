"""What `mtr.checks.audit_rows` counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """Tokens of the turns, prompt and completion, before any is dropped or cut for its length.

    None stands for more than max_length: of a turn that is far too long the tokens are not counted.
    """

    turns: int
    median: int | None
    percentile_95: int | None
    longest: int | None
    max_length: int
    longer: int
    """Turns that are longer than max_length."""


@dataclass(frozen=True)
class DataReport:
    """What training would make of a recipe's rows."""

    rows: int
    """Rows that were checked."""
    of_rows: int | None
    """Rows of `data.train`; None for a stream."""
    turns: int
    trained: int
    refused: dict[str, int]
    """Number of turns by reason."""
    chosen: dict[str, int]
    """Number of turns that the data or the recipe excludes, by reason."""
    notes: dict[str, int]
    """Number of trained turns by what they are missing."""
    unreadable: dict[str, int]
    """Number of rows by error."""
    examples: dict[str, str]
    """The first turn with each reason and note, and the first row with each remark: file, row and message."""
    filtered: dict[str, int]
    """Number of rows that `data.filter` excludes, by reason."""
    remarks: dict[str, int]
    """Number of rows by what is odd about them, though nothing is lost."""
    lengths: Lengths | None
    """None if no turn was encoded."""
    stops: dict[str, str]
    """Settings of the recipe that would end the run, each with the first row or turn at which it would."""
