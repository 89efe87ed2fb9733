"""How all processes of a run stop together, and save together when somebody asks for a checkpoint."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from mtr.store.trigger import Trigger
from mtr.training.processes import highest
from mtr.training.signals import StopSignals

_SAVE = 1
"""Below every code of a signal to stop."""


class Stopping:
    """A signal may reach one process only, so they agree on it where all of them are at the same point."""

    def __init__(self, signals: StopSignals, accelerator: Accelerator, output_dir: Path | None = None) -> None:
        """
        Args:
            output_dir: where a file may ask for a checkpoint.
        """
        self.signals = signals
        self.signal: int | None = None
        """What all processes have agreed on."""
        self.is_save_agreed = False
        """All processes write a checkpoint after this step."""
        self._accelerator = accelerator
        self._trigger = Trigger(output_dir) if output_dir and accelerator.is_main_process else None

    @property
    def code(self) -> int:
        """What this process was asked for; the highest code of all processes counts, so stopping before saving."""
        if self.signals.received:
            return self.signals.received + _SAVE
        return _SAVE if self.signals.is_save_asked or (self._trigger and self._trigger.is_there()) else 0

    def agree_on(self, code: int) -> None:
        """Take the highest code of all processes."""
        self.signal = code - _SAVE if code > _SAVE else None
        self.is_save_agreed = self.is_save_agreed or code == _SAVE

    def saved(self) -> bool:
        """A checkpoint was written, or could not be: nobody waits for one any more. Returns whether somebody did."""
        asked = self.is_save_agreed
        self.is_save_agreed = self.signals.is_save_asked = False
        if self._trigger:
            self._trigger.remove()
        return asked

    @property
    def is_agreed(self) -> bool:
        return self.signal is not None

    @property
    def is_asked_here(self) -> bool:
        """A signal has reached this process."""
        return self.signals.received is not None

    def agree(self) -> bool:
        """Whether any process was asked to stop. All of them call it together."""
        self.signal = highest(self._accelerator, self.signals.received or 0) or None
        return self.is_agreed
