"""A recipe as text: sections of keys, each with a comment that says why it is so."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mtr.console import printable

_COMMENTS_FROM = 36
"""Column of the comments."""
_WIDTH = 120
_LABEL = 8
"""Characters of a label at the head."""


@dataclass(frozen=True)
class Line:
    key: str
    value: Any
    comment: str = ""
    off: bool = False
    """Commented out: there to be found."""


@dataclass(frozen=True)
class Block:
    """A section; without lines it is null."""

    name: str
    lines: Sequence[Line]
    comment: str = ""
    """Above it."""


def recipe_text(head: Sequence[tuple[str, str]], blocks: Sequence[Block], modeline: str | None = None) -> str:
    """
    Args:
        head: comments at the top: labels, and texts beside them.
        modeline: the first comment, as it is.
    """
    above = [modeline] if modeline else []
    parts = ["\n".join([*above, *(line for label, text in head for line in _comment(text, f"{label:<{_LABEL}}"))])]
    for block in blocks:
        name = f"{block.name}:" if block.lines else f"{block.name}: null"
        reason = _comment(block.comment) if block.comment else []
        parts.append("\n".join([*reason, name, *map(_line, block.lines)]))
    return "\n\n".join(parts) + "\n"


def _comment(text: str, label: str = "") -> list[str]:
    first, *others = textwrap.wrap(_plain(text), _WIDTH - 2 - len(label)) or [""]
    return [f"# {label}{first}", *(f"# {'':<{len(label)}}{line}" for line in others)]


def _line(line: Line) -> str:
    text = f"  {'# ' if line.off else ''}{line.key}: {_value(line.value)}"
    comment = _plain(line.comment)
    if not comment:
        return text
    first, *others = textwrap.wrap(comment, _WIDTH - _COMMENTS_FROM - 2)
    return "\n".join([f"{text:<{_COMMENTS_FROM - 2}}  # {first}", *(f"{'':<{_COMMENTS_FROM}}# {o}" for o in others)])


def _value(value: Any) -> str:
    """On one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    if printable(text) != text:  # YAML leaves marks as they are that reorder what is read
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(text: str) -> str:
    """Of other people's data: no line break may end a comment."""
    return " ".join(printable(text).split())
