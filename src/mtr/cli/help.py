"""How `--help` looks: paragraphs that fill the line, and the examples of a command's module as they are typed.

A command's module may have EXAMPLES: a line for each, `mtr ...  # what it does`, after a line that is a heading.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from mtr.console import is_plain

WIDTH = 78
"""Most characters of an example: a terminal of 80 columns, less the margins."""


class Command(TyperCommand):
    """A command of mtr."""

    def __init__(self, name: str | None, **keys: Any) -> None:
        super().__init__(name, **keys)
        self.help = reflowed(self.help or "")
        self.epilog = shown_examples(self.callback)

    def get_params(self, ctx: Any) -> list[Any]:
        return [_without_type(parameter) for parameter in super().get_params(ctx)]

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first paragraph in full, in the list of commands too."""
        return str(self.help).partition("\n\n")[0]


class Commands(TyperGroup):
    """`mtr`."""

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        self.epilog = shown_examples(self.callback)

    def get_params(self, ctx: Any) -> list[Any]:
        return [_without_type(parameter) for parameter in super().get_params(ctx)]


def _without_type(parameter: Any) -> Any:
    """The same parameter, its Python type left out of the help: a flag takes no value, an argument's name says more."""
    if getattr(parameter, "is_flag", False) and parameter.metavar is None:
        parameter.metavar = ""
    elif parameter.param_type_name == "argument":
        parameter.display_type_rich = _nothing
    return parameter


def _nothing(ctx: Any) -> None:
    del ctx


def reflowed(text: str) -> str:
    """Each paragraph on one line, for the terminal to wrap."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def shown_examples(callback: Callable[..., Any] | None) -> str | None:
    """The examples beside a command, without blank lines between them."""
    text = getattr(sys.modules.get(getattr(callback, "__module__", "")), "EXAMPLES", "")
    parts = [_split(line) for line in text.splitlines() if line.strip()]
    width = max((len(command) for command, comment in parts if comment), default=0)
    if not parts or is_plain():
        return (
            "\b\n" + "\n".join(f"{command:{width}}{comment}".rstrip() for command, comment in parts) if parts else None
        )
    lines = [escape(f"{command:{width}}") + f"[dim]{escape(comment)}[/dim]" for command, comment in parts]
    return "\n" + "\n".join(lines)  # the empty line keeps the indentation


def _split(line: str) -> tuple[str, str]:
    command, _, comment = line.partition(" # ")
    return command.rstrip(), f"  # {comment.strip()}" if comment else ""
