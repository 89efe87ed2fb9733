"""Where a run reports: metrics.jsonl, the trackers and the terminal, all with the same numbers."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from mtr.errors import SaveError
from mtr.training.metrics import MetricsFile
from mtr.training.progress import RunDisplay
from mtr.training.tracking import track


class RunLog:
    """Only the main process writes and prints; the others call it all the same."""

    def __init__(
        self, display: RunDisplay, metrics: MetricsFile | None, accelerator: Accelerator, on_save_error: str
    ) -> None:
        """
        Args:
            metrics: of the main process.
            on_save_error: of the recipe: what to do when a line cannot be written.
        """
        self.display = display
        self._metrics = metrics
        self._accelerator = accelerator
        self._on_save_error = on_save_error

    def say(self, text: str) -> None:
        self.display.say(text)

    def note(self, label: str, text: str) -> None:
        self.display.note(label, text)

    def write(self, kind: str, line: dict[str, Any]) -> None:
        """
        Args:
            kind: train or eval, the trackers' prefix.

        Raises:
            SaveError: the disk does not take it, and `on_save_error` is stop.
        """
        if self._metrics:
            try:
                self._metrics.write(line)
            except SaveError as error:
                if self._on_save_error == "stop":
                    raise
                self.note("warning", f"{error}; the line is kept until there is space")
        track(self._accelerator, kind, line)

    @property
    def lines(self) -> int:
        """Of metrics.jsonl; 0 where another process writes it."""
        return self._metrics.lines if self._metrics else 0

    def flush(self) -> None:
        if self._metrics:
            self._metrics.flush()

    def sync(self) -> None:
        """Everything written so far onto the disk: a checkpoint must not outlive the lines before it."""
        if self._metrics:
            self._metrics.sync()
