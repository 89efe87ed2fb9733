"""The records that rows become: conversations of messages, and rows that are skipped.

A Conversation was checked when it was made (`mtr.data.parsing`), and is immutable, so no message is checked twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Message:
    """One message; `data` is what the template is given, including role and content."""

    data: Mapping[str, Any]
    weight: float = 1.0
    """Weight of its tokens in the loss; 0 for a turn that is context only."""

    @property
    def role(self) -> str:
        return str(self.data["role"])

    @property
    def content(self) -> str:
        """Its text, without thinking parts."""
        return _join(self.data.get("content"), "text")

    @property
    def in_parts(self) -> bool:
        """Whether the content is a list of parts, the first of which is thinking."""
        return isinstance(self.data.get("content"), list)

    @property
    def thinking(self) -> str | None:
        """The thinking from its own field or part; None if there is none. Inline thinking is part of `content`."""
        if self.in_parts:
            return _join(self.data["content"], "thinking")
        return next((self.data[key] for key in THINKING_KEYS if self.data.get(key) is not None), None)

    @property
    def tool_calls(self) -> list[Any]:
        return self.data.get("tool_calls") or []


@dataclass(frozen=True)
class Conversation:
    """A complete chat, and where it came from."""

    messages: tuple[Message, ...]
    where: str
    """File and row, as messages name it."""
    tools: list[Any] | None = None
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The row as it was read."""
    remarks: tuple[str, ...] = ()
    """What is odd about it, though it is trained: each one of a finite number of texts, at most once."""

    @property
    def turns(self) -> list[int]:
        """Message indices of the assistant messages: one turn each."""
        return [i for i, message in enumerate(self.messages) if message.role == "assistant"]


@dataclass(frozen=True)
class SkippedRow:
    """A row that is not trained on: it is bad, or outside the recipe's limits."""

    row: int | None
    """Its index in the data, as in `mtr inspect --index`; None in a stream."""
    where: str
    """File and row."""
    reason: str
    """One of a finite number of texts, by which skipped rows are counted."""
    problem: str | None = None
    """What is wrong with this one; None for a row that is outside the limits."""
    sha256: str | None = None
    """Of a bad row's content; None if it could not be read at all."""


def _join(content: Any, kind: str) -> str:
    if isinstance(content, list):
        return "".join(part.get(kind, "") for part in content)
    return (content or "") if kind == "text" else ""
