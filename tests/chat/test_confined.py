"""Claims: a function that loops in C, fills the memory, crashes Python or panics in a child process is an error of one
line in its parent, which is not harmed; without a child, its result is the same.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from mtr.chat import confined as module
from mtr.chat.confined import confined
from mtr.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely enough")


def long_step_of_c() -> int:
    """No signal handler of Python runs in the middle of it."""
    return len(sum([[0] * 1000] * 10**5, start=[]))  # noqa: RUF017


class PanicException(BaseException):
    """As Rust code raises it."""


def panic() -> None:
    raise PanicException("index out of bounds")


def fail() -> None:
    raise UserError("rows.jsonl: no such file")


def test_the_result_comes_back() -> None:
    parent = os.getpid()
    pid, found = confined(lambda: (os.getpid(), {"a": (1, "ü")}), "the work")
    assert found == {"a": (1, "ü")}
    assert pid != parent


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (fail, "rows.jsonl: no such file"),
        (panic, "the work fails: PanicException: index out of bounds"),
        (lambda: {"other": 1}["key"], "the work fails: KeyError: 'key'"),
        (lambda: "a" * 10**12, "the work needs more memory than it may use"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "the work ends Python with SIGSEGV"),
        (lambda: os._exit(3), "the work ends Python with exit code 3"),
    ],
)
def test_what_goes_wrong_is_told(function: Callable[[], Any], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        confined(function, "the work")
    assert str(caught.value) == problem


def test_a_long_step_of_c_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 1)
    with pytest.raises(UserError, match="the work takes too long, more than 1 seconds"):
        confined(long_step_of_c, "the work")


def test_signals_to_the_group_are_left_to_the_parent() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        assert confined(lambda number=number: os.kill(os.getpid(), number), "the work") is None  # type: ignore[misc]


def test_a_child_that_is_stuck_is_replaced_by_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that another thread held when the process was forked is never released in the child."""
    monkeypatch.setattr(module, "_PATIENCE", 0.5)
    parent = os.getpid()

    def stuck_in_a_child() -> int:
        if os.getpid() != parent:
            time.sleep(60)
        return os.getpid()

    assert confined(stuck_in_a_child, "the work") == parent


def interrupted() -> None:
    raise KeyboardInterrupt


def test_without_fork_the_errors_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_in_child", lambda *_: None)
    assert confined(os.getpid, "the work") == os.getpid()
    for function, problem in (
        (fail, "no such file"),
        (panic, "PanicException"),
        (lambda: {"other": 1}["key"], "KeyError"),
    ):
        with pytest.raises(UserError, match=problem):
            confined(function, "the work")
    with pytest.raises(KeyboardInterrupt):
        confined(interrupted, "the work")
