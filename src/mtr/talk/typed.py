"""Messages as they are typed or pasted, with the line editing and the history of readline where Python has it."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable
from typing import Any

from mtr.errors import UserError

_PASTE_SECONDS = 0.02
"""Lines of a paste come faster than anybody types."""


def edit_lines() -> Any:
    """Switch line editing on: arrows, history, and pastes of several lines that end where the paste ends.

    Returns:
        The readline module, or None where Python has none. Its history is kept in memory only.
    """
    try:
        import readline
    except ImportError:
        return None
    if "libedit" in (readline.__doc__ or ""):  # macOS; it knows no bracketed paste
        return None
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python switches it off
    return readline


def type_line(prompt: str) -> str:
    """A line of standard input. The prompt is shown beside the answers where those do not go to the terminal.

    Raises:
        EOFError: there is no more.
        UserError: it is not text.
    """
    if not sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        line = input(prompt)
    except UnicodeDecodeError:
        raise UserError(_NO_TEXT.format("what was typed")) from None
    return checked_text(line, "what was typed")


def checked_text(text: str, source: str) -> str:
    """
    Raises:
        UserError: it has bytes that are no text, which Python keeps as half characters; names the source.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(_NO_TEXT.format(source)) from None
    return text


_NO_TEXT = "{} is not text in UTF-8; convert it, or type it anew"


def read_message(read_line: Callable[[str], str], prompt: str, more_waits: Callable[[], bool]) -> str | None:
    """One message: a line, the lines of a paste, or lines that end in a backslash.

    Args:
        read_line: shows a prompt and returns a line; raises EOFError at the end.
        more_waits: whether more of a paste is there already.

    Returns:
        None at the end of the input.
    """
    lines: list[str] = []
    while True:
        try:
            line = read_line(prompt if not lines else "")
        except EOFError:
            return "\n".join(lines) if lines else None
        continued = line.endswith("\\")
        lines.append(line.removesuffix("\\"))
        if not continued and not more_waits():
            return "\n".join(lines).strip("\n")


def more_waits() -> bool:
    """Whether standard input has more to be read at once; of a paste, where readline does not see its end."""
    try:
        return bool(select.select([sys.stdin], [], [], _PASTE_SECONDS)[0])
    except (OSError, ValueError):  # Windows, a closed input
        return False
