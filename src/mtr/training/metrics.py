"""What a run writes down: one JSON object a line, and the environment it ran in."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from mtr import __version__
from mtr.errors import SaveError
from mtr.model.device import device_name
from mtr.prepare.builder import Counts

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")


def environment(seed: int, device: torch.device, num_processes: int, date: str) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "mtr": __version__,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": device_name(device),
        "cuda": torch.version.cuda if cuda else None,
        "cpus": os.cpu_count(),
        "num_processes": num_processes,
        "seed": seed,
        "date": date,
    }


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


def write_json(path: Path | None, value: Any) -> str:
    """Strict JSON, to a file (indented) or as one line: numbers that are not finite become null."""
    text = json.dumps(_finite(value), indent=None if path is None else 2, ensure_ascii=False, allow_nan=False)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return text


def replace_file(path: Path, text: str) -> None:
    """Whole or not at all, whenever the process is killed."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
