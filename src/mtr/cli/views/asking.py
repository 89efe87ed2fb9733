"""Questions in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from mtr.console import printable
from mtr.errors import UserError


def can_ask() -> bool:
    """Whether somebody sits at a terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask(question: str, default: str | None, check: Callable[[str], object]) -> str:
    """The answer, asked for until it is right.

    Args:
        check: raises a UserError on a wrong answer.

    Raises:
        UserError: the input ends.
    """
    while True:
        try:
            answer = str(typer.prompt(question, default=default, show_default=bool(default), err=True)).strip()
        except typer.Abort:
            raise UserError("nothing was written") from None
        try:
            check(answer)
        except UserError as error:
            print(f"  {printable(str(error))}", file=sys.stderr)
        else:
            return answer
