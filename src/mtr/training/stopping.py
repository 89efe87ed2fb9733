"""How all processes of a run stop together, and what it means when one of them is gone."""

from __future__ import annotations

import re

from accelerate import Accelerator

from mtr.errors import LostProcessError
from mtr.training.processes import highest
from mtr.training.signals import StopSignals

_LOST = re.compile(r"Connection (closed|reset) by peer|gloo/transport|NCCL|Broken pipe")


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

    def explain(self, error: RuntimeError) -> Exception:
        """What an error of a collective call means; the error itself where that is not known."""
        if self._accelerator.num_processes > 1 and _LOST.search(str(error)):
            return LostProcessError(f"process {self._accelerator.process_index}: another process of the run ended")
        return error
