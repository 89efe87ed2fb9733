"""Long output on a terminal goes through a pager, as git does it: $PAGER, or less; in pipes it is printed."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from mtr.console import console


@contextmanager
def paged(enabled: bool = True) -> Iterator[Console]:
    """A console for standard output. What is printed to it is shown at the end, in a pager if it is higher than the
    terminal; at once where standard output is no terminal.
    """
    out = console(sys.stdout)
    command = _pager() if enabled and sys.stdout.isatty() and sys.stdin.isatty() else []
    if not command or os.environ.get("TERM", "dumb") == "dumb":
        yield out
        return
    with out.capture() as captured:
        yield out
    text = captured.get()
    if text.count("\n") < out.height or not _show(command, text):
        sys.stdout.write(text)
        sys.stdout.flush()


def _pager() -> list[str]:
    """The command; empty where there is none, or it is `cat`."""
    try:
        command = shlex.split(os.environ.get("PAGER", "less"))
    except ValueError:
        return []
    return command if command and command[0] != "cat" and shutil.which(command[0]) else []


def _show(command: list[str], text: str) -> bool:
    """Whether the pager could be started."""
    environment = {"LESS": "FRX", **os.environ}  # with colours; what was shown stays on the screen
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, env=environment, text=True, encoding=sys.stdout.encoding, errors="replace"
        )
    except OSError:
        return False
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # control-C is the pager's
    try:
        process.communicate(text)
    finally:
        signal.signal(signal.SIGINT, before)
    return True
