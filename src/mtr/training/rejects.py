"""rejects.jsonl: the bad rows that a run skipped, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mtr.data.conversation import SkippedRow
from mtr.errors import SaveError
from mtr.files import replace_file


class RejectsFile:
    """One bad row per line, each row once, over all epochs and resumed runs. Only the main process writes.

    A row is known by its place and its content: one that was edited, and is bad again, is another one.
    """

    def __init__(self, path: Path) -> None:
        """Read what an earlier part of the run wrote, and remove an incomplete last line."""
        self._path = path
        self._seen: set[tuple[str, str | None]] = set()
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            lines = text[: text.rfind("\n") + 1]
            self._seen = {key for line in lines.splitlines() if (key := _read_key(line)) is not None}
            if lines != text:
                replace_file(path, lines)

    def write(self, rejects: Iterable[SkippedRow]) -> None:
        """
        Raises:
            SaveError: it cannot be written.
        """
        new: dict[tuple[str, str | None], SkippedRow] = {}
        for rejected in rejects:
            key = rejected.where, rejected.sha256
            if rejected.problem is not None and self._seen.isdisjoint({key, (rejected.where, None)}):
                new.setdefault(key, rejected)
        if not new:
            return
        lines = [{"row": r.row, "where": r.where, "reason": r.problem, "sha256": r.sha256} for r in new.values()]
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise SaveError(f"{self._path} cannot be written: {error.strerror or error}") from None
        self._seen.update(new)


def _read_key(line: str) -> tuple[str, str | None] | None:
    """Place and content of the row that a line is about; without content in older runs. None: damaged."""
    try:
        known = json.loads(line)
        return str(known["where"]), known.get("sha256")
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
