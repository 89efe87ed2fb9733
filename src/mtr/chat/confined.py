"""Runs a function in a child process that the operating system ends if it takes too much time or memory.

    parent -- fork --> child: the function, under limits -- its result, or what went wrong, through a pipe --> parent

Only Linux can fork a process with threads and loaded libraries safely enough. Elsewhere, and where the child gets
stuck, the function runs in this process, without these limits.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from mtr.chat.limits import limit_memory
from mtr.errors import UserError, is_failure, one_line

T = TypeVar("T")

SECONDS = 12
"""Processor time of the child."""
MEMORY = 1 << 30
"""Bytes that the child may use in addition to what its parent has."""
_PATIENCE = 120.0
"""Seconds of wall-clock time after which a child that has not used up its processor time is stuck."""
_LEFT_TO_PARENT = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
"""Signals that are sent to a whole group of processes."""


def confined(function: Callable[[], T], what: str) -> T:
    """The function's result, which has to be plain data.

    Args:
        what: the subject of error messages, as in "the template".

    Raises:
        UserError: the function's own, or it failed, or was ended.
    """
    if sys.platform == "linux" and (found := _in_child(function, what)) is not None:
        result, problem = found
    else:
        result, problem = _outcome(function, what)
    if problem is not None:
        raise UserError(problem)
    return result  # type: ignore[no-any-return]


def _outcome(function: Callable[[], Any], what: str) -> tuple[Any, str | None]:
    """The result, or an error message."""
    try:
        return function(), None
    except UserError as error:
        return None, str(error)
    except MemoryError:
        return None, f"{what} needs more memory than it may use"
    except BaseException as error:
        if not is_failure(error):
            raise
        return None, f"{what} fails: {type(error).__name__}: {one_line(error)}"


def _in_child(function: Callable[[], Any], what: str) -> tuple[Any, str | None] | None:
    """The outcome; None if no child can be started, or it is stuck."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(function, what, sender))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, about forking a process with threads
            child.start()
    except (OSError, AssertionError):  # no room for a process; a daemon may have none
        receiver.close()
        sender.close()
        return None
    sender.close()
    try:
        return _received(receiver, child, what)
    finally:
        receiver.close()
        child.kill()
        child.join()
        child.close()


def _received(receiver: Connection, child: BaseProcess, what: str) -> tuple[Any, str | None] | None:
    if not receiver.poll(_PATIENCE):
        return None
    try:
        outcome: tuple[Any, str | None] = receiver.recv()
    except EOFError:
        child.join()
        code = child.exitcode or 0
        if code == -signal.SIGXCPU:
            return None, f"{what} takes too long, more than {SECONDS} seconds; use that of the original model"
        return None, f"{what} ends Python with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
    return outcome


def _work(function: Callable[[], Any], what: str, sender: Connection) -> None:
    """The child: silent, and dead after its time, whatever becomes of its parent."""
    import resource

    for name in _LEFT_TO_PARENT:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    for name in ("SIGXCPU", "SIGALRM"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    faulthandler.disable()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS if hard == resource.RLIM_INFINITY else min(SECONDS, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_memory(MEMORY)
    sender.send(_outcome(function, what))
