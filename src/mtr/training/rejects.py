"""rejects.jsonl: the bad rows that a run skipped, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mtr.data.conversation import SkippedRow
from mtr.errors import SaveError


class RejectsFile:
    """One bad row per line, each row once, over all epochs and resumed runs. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        """Read what an earlier part of the run wrote, and remove an incomplete last line."""
        self._path = path
        self._seen: set[str] = set()
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            self._seen = {json.loads(line)["where"] for line in lines}
            path.write_text("".join(lines), encoding="utf-8")

    def write(self, rejects: Iterable[SkippedRow]) -> None:
        """
        Raises:
            SaveError: it cannot be written.
        """
        new: dict[str, SkippedRow] = {}
        for rejected in rejects:
            if rejected.problem is not None and rejected.where not in self._seen:
                new.setdefault(rejected.where, rejected)
        if not new:
            return
        lines = [{"row": r.row, "where": r.where, "reason": r.problem} for r in new.values()]
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise SaveError(f"{self._path} cannot be written: {error.strerror or error}") from None
        self._seen.update(new)
