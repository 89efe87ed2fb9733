"""Rich consoles, and text cut to fit them."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console


def console(file: TextIO | None = None) -> Console:
    """A console that neither wraps nor highlights, on standard error by default; without escape codes if `is_plain`."""
    terminal = False if is_plain() else None
    return Console(file=file or sys.stderr, soft_wrap=True, highlight=False, force_terminal=terminal)


def is_plain() -> bool:
    """Whether the environment asks for text without escape codes: NO_COLOR (https://no-color.org) or TERM=dumb."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def printable(text: str) -> str:
    """The text with control characters written out (`\\x1b`), line breaks and tabs left alone.

    Text of data, templates and other libraries could otherwise move the cursor, recolour or retitle a terminal, or
    reorder what is read.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_written_out(character) for character in text)


def _written_out(character: str) -> str:
    steers = unicodedata.category(character) in ("Cc", "Cs") or character in _BIDIRECTIONAL
    if not steers or character in "\n\t":
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


_BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def shorten(text: str, width: int) -> str:
    """The text on one line; if it is longer than `width`, its middle is left out."""
    text = text.replace("\n", "⏎")
    if len(text) <= width:
        return text
    half = (width - 3) // 2
    return f"{text[:half]} … {text[-half:]}"


def first_few(names: Sequence[str], most: int = 4) -> str:
    """The first `most` names, and how many more there are."""
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")


def labelled(label: str, text: str) -> str:
    """A line of a run's log: the label in a column of its own."""
    return f"{label:<14}{text}"


BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
"""Bars of rising height, one character wide."""


def block(share: float, blocks: str = BLOCKS) -> str:
    """The bar that is nearest to a share of the full height."""
    return blocks[min(max(round(share * (len(blocks) - 1)), 0), len(blocks) - 1)]
