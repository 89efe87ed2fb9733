"""Rows that are passed over, each with its reason, and the file that lists the bad ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rejected:
    """A row that is not trained: it is bad, or outside the recipe's limits."""

    row: int | None
    """Its number in the data, as `mtr inspect --index` counts; None in a stream."""
    where: str
    """File and row."""
    reason: str
    """What rows are counted by."""
    problem: str | None = None
    """What is wrong with this one; None for a row that is outside the limits."""


class RejectsFile:
    """rejects.jsonl: one bad row a line, each row once, also over epochs and resumed runs. The main process writes."""

    def __init__(self, path: Path) -> None:
        """Read what an earlier part of the run wrote, and cut a torn last line."""
        self._path = path
        self._seen: set[str] = set()
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            self._seen = {json.loads(line)["where"] for line in lines}
            path.write_text("".join(lines), encoding="utf-8")

    def write(self, rejects: Iterable[Rejected]) -> None:
        new: dict[str, Rejected] = {}
        for rejected in rejects:
            if rejected.problem is not None and rejected.where not in self._seen:
                new.setdefault(rejected.where, rejected)
        if not new:
            return
        self._seen.update(new)
        with self._path.open("a", encoding="utf-8") as file:
            for rejected in new.values():
                line = {"row": rejected.row, "where": rejected.where, "reason": rejected.problem}
                file.write(json.dumps(line) + "\n")
