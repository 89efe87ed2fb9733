"""Bounds on the time and memory of code that is not trusted, a chat template, while it runs in this process.

The time is processor time of this thread: a machine that is busy or asleep does not use it up. It is looked at every
second, between two steps of Python, so one long step of C code is not cut short. Memory is bounded by the operating
system, so that asking for too much fails before any of it is touched.

Signals and limits belong to the whole process: only its main thread is bounded, time only while nobody else uses
SIGALRM, memory only on Linux.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

SECONDS = 10.0
"""What a call may take at least."""
MEMORY = 2 << 30
"""Bytes that may be used in addition to what the process has."""
_TICK = 1.0
"""Seconds of wall-clock time between two looks at the time used."""


class TimeUp(BaseException):
    """Raised inside a call that takes too long. No Exception, which libraries in between may swallow."""


class _Limits:
    def __init__(self) -> None:
        self._active = False
        self._began: float | None = None
        """Processor time of the thread when the present call began; None between calls."""
        self._extra: Callable[[], float] = float

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Bound the memory of everything inside, and the time of each `call` inside.

        Within other limits this does nothing; setting them once for many calls saves their cost.
        """
        if self._active or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._active, self._began = True, None
        memory, handler = limit_memory(MEMORY), self._start_ticking()
        try:
            yield
        finally:
            # Nothing interrupts here: outside of a call, and right after TimeUp was raised in one, a tick does nothing.
            _stop_ticking(handler)
            _restore_memory(memory)
            self._active = False

    def call(self, function: Callable[[], T], extra: Callable[[], float]) -> T:
        """The function's result, under limits.

        Args:
            extra: how many seconds more than SECONDS the call may take; asked once it has taken these.

        Raises:
            TimeUp: it took longer.
            MemoryError: it asked for more memory than it may use.
        """
        if threading.current_thread() is not threading.main_thread():
            return function()
        if not self._active:
            with self():
                return self.call(function, extra)
        self._began, self._extra = time.thread_time(), extra
        try:
            return function()
        finally:
            self._began = None

    def _start_ticking(self) -> Any:
        """The handler of SIGALRM before; None where the signal is in use or does not exist."""
        if not hasattr(signal, "SIGALRM"):
            return None
        if signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL or signal.getitimer(signal.ITIMER_REAL)[0]:
            return None
        before = signal.signal(signal.SIGALRM, self._tick)
        signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)
        return before

    def _tick(self, number: int, frame: FrameType | None) -> None:
        if self._began is None:
            return
        used = time.thread_time() - self._began
        if used > SECONDS and used > SECONDS + self._extra():
            self._began = time.thread_time()  # if the exception is swallowed, there is another one later
            raise TimeUp


limits = _Limits()
"""Of this process."""


def _stop_ticking(handler: Any) -> None:
    if handler is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def limit_memory(more: int) -> tuple[int, int] | None:
    """Let this process use so many bytes more than it does, on Linux.

    Returns:
        The soft and hard limit before, in bytes; None where nothing was changed.
    """
    if sys.platform != "linux":
        return None
    import resource

    used = _address_space()
    if used is None:
        return None
    before, wanted = resource.getrlimit(resource.RLIMIT_AS), used + more
    if before[0] != resource.RLIM_INFINITY and before[0] <= wanted:
        return None
    resource.setrlimit(resource.RLIMIT_AS, (wanted, before[1]))
    return before


def _restore_memory(before: tuple[int, int] | None) -> None:
    if sys.platform == "linux" and before is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, before)


def _address_space() -> int | None:
    """Bytes of address space that this process has; None where /proc does not tell."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None
    try:
        return int(os.read(file, 64).split(b" ", 1)[0]) * os.sysconf("SC_PAGESIZE")
    finally:
        os.close(file)
