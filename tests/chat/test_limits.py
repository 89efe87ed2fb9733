"""Claims: a call under limits ends soon after its time, whatever it loops over, or when it asks for too much memory;
signals and limits of the process are as before afterwards; nobody else's alarm is touched; what stays within the
limits is not changed.
"""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from mtr.chat import limits as module
from mtr.chat.limits import TimeUp, limits
from mtr.model.device import peak_memory, reset_peak_memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "SECONDS", 0.2)
    monkeypatch.setattr(module, "_TICK", 0.05)
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    yield
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def loop(seconds: float = 20.0) -> str:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass
    return "done"


def test_a_loop_is_ended() -> None:
    before = time.thread_time()
    with pytest.raises(TimeUp):
        limits.call(loop, float)
    assert time.thread_time() - before < 5


def test_a_large_number_is_ended() -> None:
    with pytest.raises(TimeUp):
        limits.call(lambda: str(10 ** (10**10)), float)


def test_a_library_that_swallows_exceptions_does_not_help() -> None:
    def stubborn() -> None:
        for _ in range(2):
            try:
                loop()
            except Exception:
                continue
            except BaseException:
                loop()  # ended by the next one

    with pytest.raises(TimeUp):
        limits.call(stubborn, float)


def test_large_inputs_have_more_time() -> None:
    assert limits.call(lambda: loop(0.6), lambda: 20.0) == "done"


def test_time_between_calls_does_not_count() -> None:
    with limits():
        for _ in range(3):
            assert limits.call(lambda: loop(0.1), float) == "done"
            loop(0.15)


def test_waiting_does_not_count() -> None:
    limits.call(lambda: time.sleep(0.5), float)


def test_memory_is_refused_before_it_is_used() -> None:
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    with pytest.raises(MemoryError):
        limits.call(lambda: "a" * 10**11, float)
    assert peak_memory(CPU) - before < 500_000_000
    assert len(limits.call(lambda: "a" * 10**8, float)) == 10**8


def test_an_alarm_in_use_is_left_alone() -> None:
    """As where SIGALRM is the recipe's preempt_signal."""
    received = []
    signal.signal(signal.SIGALRM, lambda number, _: received.append(number))
    try:
        assert limits.call(lambda: loop(0.5), float) == "done"
        signal.raise_signal(signal.SIGALRM)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert received == [signal.SIGALRM]


def test_another_thread_is_not_bounded() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(limits.call(lambda: loop(0.5), float)))
    thread.start()
    thread.join()
    assert found == ["done"]


def test_errors_pass() -> None:
    with pytest.raises(KeyError, match="mine"):
        limits.call(lambda: {"yours": 1}["mine"], float)
