"""How all processes of a run stop together."""

from __future__ import annotations

from accelerate import Accelerator

from mtr.training.processes import highest
from mtr.training.signals import StopSignals


class Stopping:
    """A signal may reach one process only, so they agree on it where all of them are at the same point."""

    def __init__(self, signals: StopSignals, accelerator: Accelerator) -> None:
        self.signals = signals
        self.signal: int | None = None
        """What all processes have agreed on."""
        self._accelerator = accelerator

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
