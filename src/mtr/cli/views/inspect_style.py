"""Signs and colours of the roles in a terminal. What is trained has a sign of its own, too, which needs no colour."""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from mtr.checks.roles import ROLES
from mtr.console import printable

COLOURS = {
    "system": "color(100)",
    "prompt": "default",
    "tool": "color(166)",
    "thinking": "color(134)",
    "response": "color(33)",
    "copy": "color(30)",
}
"""Of medium brightness, to be read on a dark and on a light background."""
FILLS = {**COLOURS, "prompt": "color(246)"}
"""Of areas, for which the colour of the text would be too strong."""
MEANINGS = {
    "system": "system message, tool schemas, the template's own text",
    "prompt": "user messages and the headers of answers",
    "tool": "tool results",
    "thinking": "thinking of a trained turn",
    "response": "answer or tool call of a trained turn",
    "copy": "an earlier answer, seen as history",
}


@dataclass(frozen=True)
class Signs:
    """What the drawings are made of."""

    trained: str
    context: str
    branch: str
    turn: str
    more: str
    full: str
    light: str
    shades: str
    """From empty to full."""
    line_break: str


_UNICODE = Signs("▌", "│", "├─╮", "├─", "…", "█", "░", " ░▒▓█", "⏎")
_ASCII = Signs("#", "|", "+-.", "+-", "...", "#", "-", " .:*#", "\\n")


class Style:
    """How to draw on one console."""

    def __init__(self, out: Console) -> None:
        self.width = out.width
        self._encoding = out.encoding
        self.signs = _UNICODE if out.encoding.lower().replace("-", "").startswith("utf") else _ASCII

    def safe(self, text: str) -> str:
        """The text as the terminal can show it."""
        return printable(text).encode(self._encoding, "backslashreplace").decode(self._encoding)

    def line(self, text: str, width: int) -> str:
        """The text on one line of at most so many cells."""
        text = self.safe(" ".join(text.split()))
        if cell_len(text) <= width:
            return text
        kept = width - len(self.signs.more)
        return f"{chop_cells(text, kept)[0].rstrip()}{self.signs.more}" if kept > 0 else ""

    def bar(self, role: int, trained: bool) -> Text:
        """The sign in front of tokens of a role."""
        colour = COLOURS[ROLES[role]]
        return Text(self.signs.trained if trained else self.signs.context, f"bold {colour}" if trained else colour)

    def name(self, role: int, trained: bool) -> Text:
        return Text(ROLES[role], f"bold {COLOURS[ROLES[role]]}" if trained else COLOURS[ROLES[role]])
