"""What a run writes down: one JSON object a line, and the environment it ran in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mtr.errors import SaveError
from mtr.files import replace_file, write_json
from mtr.prepare.step import Counts


def throughput(counts: Counts, seconds: float) -> dict[str, Any]:
    """The counts of one or more steps as metrics.jsonl names them."""
    return {
        "num_conversations": counts.conversations,
        "num_turns": counts.turns,
        "num_tokens": counts.tokens,
        "num_supervised_tokens": counts.supervised_tokens,
        "num_per_turn_tokens": counts.per_turn_tokens,
        "seconds": seconds,
        "tokens_per_second": counts.tokens / seconds,
        "supervised_tokens_per_second": counts.supervised_tokens / seconds,
        "per_turn_tokens_per_second": counts.per_turn_tokens / seconds,
        "conversations_per_second": counts.conversations / seconds,
    }


class MetricsFile:
    """metrics.jsonl, one line at a time. Only the main process writes.

    A line that does not go onto the disk is kept and tried again with the next one, so a disk that is full for a
    while costs no line.
    """

    def __init__(self, path: Path, last_step: int, last_evaluation: int | None = None) -> None:
        """Cut what a resumed run will write again: later steps, later evaluations, a torn last line."""
        self._path = path
        self._waiting: list[str] = []
        last_evaluation = last_step if last_evaluation is None else last_evaluation
        if path.exists():
            with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
                lines = file.readlines()
            kept = [line for line in lines if _is_before(line, last_step, last_evaluation)]
            if kept != lines:
                replace_file(path, "".join(kept))

    def write(self, line: dict[str, Any]) -> None:
        """
        Raises:
            SaveError: the disk does not take it. The line waits for the next call.
        """
        self._waiting.append(write_json(None, line) + "\n")
        self.flush()

    def flush(self) -> None:
        """Write the lines that wait."""
        while self._waiting:
            size = self._path.stat().st_size if self._path.exists() else 0
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(self._waiting[0])
            except OSError as error:
                if self._path.exists():
                    os.truncate(self._path, size)
                raise SaveError(f"{self._path} cannot be written: {error.strerror or error}") from None
            self._waiting.pop(0)

    def sync(self) -> None:
        """Onto the disk: a checkpoint must not outlive the lines before it."""
        self.flush()
        if self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())


def _is_before(line: str, last_step: int, last_evaluation: int) -> bool:
    try:
        written = json.loads(line) if line.endswith("\n") else {}
        return bool(written["step"] <= (last_evaluation if "eval_loss" in written else last_step))
    except (json.JSONDecodeError, KeyError, TypeError):
        return False
