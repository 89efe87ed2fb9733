"""metrics.jsonl: one JSON object per logged step or evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mtr.errors import SaveError
from mtr.files import replace_file, write_json
from mtr.prepare.counts import Counts


def throughput(counts: Counts, seconds: float) -> dict[str, Any]:
    """The counts of one or more steps under their names in metrics.jsonl."""
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

    A line that cannot be written is kept and tried again with the next one, so a disk that is full for a while costs
    no line.
    """

    def __init__(self, path: Path, last_step: int, last_evaluation: int | None = None) -> None:
        """Remove what a resumed run will write again: later steps, later evaluations, an incomplete last line."""
        self._path = path
        self._pending: list[str] = []
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
            SaveError: it cannot be written. The line is pending until the next call.
        """
        self._pending.append(write_json(None, line) + "\n")
        self.flush()

    def flush(self) -> None:
        """Write the pending lines."""
        while self._pending:
            size = self._path.stat().st_size if self._path.exists() else 0
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(self._pending[0])
            except OSError as error:
                if self._path.exists():
                    os.truncate(self._path, size)
                raise SaveError(f"{self._path} cannot be written: {error.strerror or error}") from None
            self._pending.pop(0)

    def sync(self) -> None:
        """Flush to disk: a checkpoint must never be newer than the metrics."""
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
