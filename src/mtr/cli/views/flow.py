"""Text that arrives in pieces, written as it comes."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from mtr.console import printable

BAR = "│ "
"""In front of each line of thinking, so that it is told apart without colours."""


def is_terminal(out: Console) -> bool:
    """Whether somebody looks on, with colours or without."""
    return out.file.isatty()


class Flow:
    """Text that arrives in pieces, wrapped at words where it is written to a terminal."""

    def __init__(self, out: Console, style: str = "", bar: str = "") -> None:
        self._out = out
        self._style = style
        self._bar = bar
        self._wraps = is_terminal(out)
        self._column = 0
        self._word = ""
        self._shown = 0

    def show(self, text: str) -> None:
        """All of the text so far: what is new of it is written."""
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        if not self._wraps:
            self._write(printable(new))
            return
        for character in printable(new):
            if character == "\n":
                self._end_word()
                self._break()
            elif character == " ":
                self._end_word()
                self._put(" ")
            elif cell_len(character) > 1:  # scripts that are written without spaces
                self._end_word()
                self._put(character)
            else:
                self._word += character

    def end(self) -> None:
        """Complete the last line."""
        self._end_word()
        if self._column:
            self._break()
        elif self._shown and not self._wraps:
            self._write("\n")

    def _end_word(self) -> None:
        word, self._word = self._word, ""
        if word:
            self._put(word)

    def _put(self, text: str) -> None:
        width = cell_len(text)
        if self._column > len(self._bar) and self._column + width > self._out.width:
            self._break()
            if text == " ":
                return
        if self._column == 0 and self._bar:
            self._write(self._bar)
            self._column = len(self._bar)
        self._write(text)
        self._column += width

    def _break(self) -> None:
        if self._column == 0 and self._bar:
            self._write(self._bar.rstrip())
        self._write("\n")
        self._column = 0

    def _write(self, text: str) -> None:
        if text:
            self._out.print(Text(text, self._style), end="")
