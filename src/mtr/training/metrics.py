"""metrics.jsonl: one JSON object per logged step or evaluation."""

from __future__ import annotations

import contextlib
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


def totals(counts: Counts) -> dict[str, Any]:
    """The counts of a whole run so far, by their names in `Counts`; what there is none of is left out."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(counts).items() if value}


class MetricsFile:
    """metrics.jsonl, one line at a time. Only the main process writes.

    A line that cannot be written is kept and tried again with the next one, so a disk that is full for a while costs
    no line.
    """

    def __init__(self, path: Path, last_step: int, last_evaluation: int | None = None) -> None:
        """Remove what a resumed run will write again: later steps, later evaluations, an incomplete last line.

        Complete lines that cannot be read are moved to a file beside it.
        """
        self._path = path
        self._pending: list[str] = []
        self.lines = 0
        """In the file and pending."""
        last_evaluation = last_step if last_evaluation is None else last_evaluation
        if path.exists():
            lines = _lines(path)
            if damaged := [line for line in lines if line.endswith("\n") and _read(line) is None]:
                with path.with_name(_DAMAGED).open("a", encoding="utf-8", errors="surrogateescape") as file:
                    file.writelines(damaged)
            kept = [line for line in lines if _is_before(line, last_step, last_evaluation)]
            if kept != lines:
                replace_file(path, "".join(kept))
            self.lines = len(kept)

    def write(self, line: dict[str, Any]) -> None:
        """
        Raises:
            SaveError: it cannot be written. The line is pending until the next call.
        """
        self._pending.append(write_json(None, line) + "\n")
        self.lines += 1
        self.flush()

    def flush(self) -> None:
        """Write the pending lines."""
        while self._pending:
            size = self._path.stat().st_size if self._path.exists() else 0
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(self._pending[0])
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.truncate(self._path, size)
                raise SaveError(f"{self._path} cannot be written: {error.strerror or error}") from None
            self._pending.pop(0)

    def sync(self) -> None:
        """Flush to disk: a checkpoint must never be newer than the metrics."""
        self.flush()
        if self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())


def describe_gaps(path: Path, step: int) -> list[str]:
    """What is missing from or damaged in the metrics of a run that continues after `step`."""
    if not path.exists():
        return [f"{path.name} is missing: what it held of the steps up to {step} is lost"]
    damaged = sum(line.endswith("\n") and _read(line) is None for line in _lines(path))
    return [f"{damaged} lines of {path.name} cannot be read; they are moved to {_DAMAGED}"] if damaged else []


_DAMAGED = "metrics.damaged.jsonl"


def _lines(path: Path) -> list[str]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.readlines()


def _read(line: str) -> dict[str, Any] | None:
    """A complete line; None if it is damaged or incomplete."""
    try:
        written = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    is_one = isinstance(written, dict) and type(written.get("step")) is int
    return written if is_one else None


def _is_before(line: str, last_step: int, last_evaluation: int) -> bool:
    written = _read(line)
    return written is not None and written["step"] <= (last_evaluation if "eval_loss" in written else last_step)
