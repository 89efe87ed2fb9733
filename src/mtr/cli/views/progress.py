"""A bar that shows how far a command is with its rows, as long as it works on them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mtr.console import console, is_plain

T = TypeVar("T")


def shown(items: Iterable[T], total: int | None, doing: str, shares_terminal: bool = False) -> Iterator[T]:
    """The items; a bar on standard error shows how many were taken, if that is a terminal.

    Args:
        total: how many there are; None if that is not known.
        doing: what is done with them, in front of the bar.
        shares_terminal: standard output is written meanwhile: there is no bar where that is a terminal too.
    """
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = is_plain() or not sys.stderr.isatty() or (shares_terminal and sys.stdout.isatty())
    with Progress(
        *columns, console=console(), transient=True, redirect_stdout=False, redirect_stderr=False, disable=hidden
    ) as progress:
        yield from progress.track(items, total=total)
