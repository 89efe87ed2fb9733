"""A row becomes a Conversation: messages as the chat template will see them, checked once.

What only the trainer reads (`train`, `weight`) is taken out of the message; everything else is handed to the
template as the row spells it, but for two repairs that change no meaning: text parts are joined (to one string where
there is no thinking among them), and tool arguments written as a JSON string become the object (most templates fail on
the string or quote it twice).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Message:
    """One message; `data` is what the template is given, role and content included."""

    data: Mapping[str, Any]
    weight: float = 1.0
    """Of its tokens in the loss; 0 for a turn that is context only."""

    @property
    def role(self) -> str:
        return str(self.data["role"])

    @property
    def content(self) -> str:
        """Its text, without thinking in parts."""
        return _join(self.data.get("content"), "text")

    @property
    def in_parts(self) -> bool:
        """Whether the content is a list, its first part thinking."""
        return isinstance(self.data.get("content"), list)

    @property
    def thinking(self) -> str | None:
        """The thinking where a field or a part of its own holds it, else None."""
        if self.in_parts:
            return _join(self.data["content"], "thinking")
        return next((self.data[key] for key in THINKING_KEYS if self.data.get(key) is not None), None)

    @property
    def tool_calls(self) -> list[Any]:
        return self.data.get("tool_calls") or []


@dataclass(frozen=True)
class Conversation:
    """A whole chat and where it came from."""

    messages: tuple[Message, ...]
    where: str
    """File and row, for messages to people."""
    tools: list[Any] | None = None
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def turns(self) -> list[int]:
        """Message indices of the assistant messages: one turn each."""
        return [i for i, message in enumerate(self.messages) if message.role == "assistant"]


@dataclass(frozen=True)
class SkippedRow:
    """A row that is not trained: it is bad, or outside the recipe's limits."""

    row: int | None
    """Its number in the data, as `mtr inspect --index` counts; None in a stream."""
    where: str
    """File and row."""
    reason: str
    """What rows are counted by."""
    problem: str | None = None
    """What is wrong with this one; None for a row that is outside the limits."""


def _join(content: Any, kind: str) -> str:
    if isinstance(content, list):
        return "".join(part.get(kind, "") for part in content)
    return (content or "") if kind == "text" else ""
