"""Signals that end a run with a checkpoint, and those that ask for one and let it go on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self


class StopSignals:
    """SIGTERM, SIGINT and the recipe's preempt_signal: the first one asks the run to stop after its step, a second one
    ends the process at once. Before the first step, when there is nothing to save, the first one ends it as well.

    Those of checkpoint_signal ask for a checkpoint, and nothing ends.
    """

    def __init__(self, more: Sequence[str] = (), saving: Sequence[str] = ()) -> None:
        self.received: int | None = None
        self.is_save_asked = False
        self.can_save = False
        self._numbers = sorted({signal.SIGTERM, signal.SIGINT, *(signal.Signals[name] for name in more)})
        self._saving = sorted({signal.Signals[name] for name in saving})
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._receive)
        for number in self._saving:
            self._before[number] = signal.signal(number, self._ask_to_save)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask_to_save(self, number: int, frame: FrameType | None) -> None:
        self.is_save_asked = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os.write(2, f"stopped at once by a second signal ({signal.Signals(number).name})\n".encode())
            os._exit(128 + number)
        self.received = number
        if not self.can_save:
            print(f"stopped by {signal.Signals(number).name} before the first step", file=sys.stderr)
            raise SystemExit(128 + number)
