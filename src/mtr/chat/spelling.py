"""Messages in the spelling that a template takes: where their thinking is, how their tool calls are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mtr.chat.completion import INLINE, PARTS, spell, split_inline
from mtr.chat.expected import Expected, function_of
from mtr.chat.findings import Findings
from mtr.data.conversation import THINKING_KEYS, Message

PLACEHOLDER = "\ue000own text\ue001"


class Speller:
    """Spells the messages of a data set for one template."""

    def __init__(self, findings: Findings, respell: bool) -> None:
        """
        Args:
            respell: give thinking in history as the template reads it, not as the data spells it.
        """
        self.findings = findings
        self.respell = respell

    def expected(self, message: Message) -> Expected:
        """Thinking and response, whether the thinking has a field of its own or is inline."""
        field = next((key for key in THINKING_KEYS if message.data.get(key) is not None), None)
        spelling = PARTS if message.in_parts else field
        thinking, content = (message.thinking or "").strip(), message.content.strip()
        inline = split_inline(content, self.findings.tags)
        if inline is not None and (not thinking or inline[0] == thinking):
            return Expected(message, *inline, INLINE)
        return Expected(message, thinking, content, spelling if thinking else None)

    def in_history(self, message: Message) -> dict[str, Any]:
        """A message that is context, as the template is given it."""
        if self.respell and message.role == "assistant":
            expected = self.expected(message)
            if expected.thinking:
                read = self.findings.read(bool(message.tool_calls))
                spelling = (*read, THINKING_KEYS[0])[0]
                return self.given(
                    spell(message.data, expected.thinking, expected.response, spelling, self.findings.tags)
                )
        return self.given(message.data)

    def given(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with its parts and its tool calls in the spelling that the template takes."""
        given, parsed = dict(message), Message(message)
        if parsed.in_parts and PARTS not in self.findings.read(bool(parsed.tool_calls)):
            given = spell(given, parsed.thinking or "", parsed.content, THINKING_KEYS[0], self.findings.tags)
        if not given.get("tool_calls"):
            return given
        if self.findings.call_content == "empty":
            given.setdefault("content", "")
        if self.findings.arguments == "string":
            given["tool_calls"] = [_with_text_arguments(call) for call in given["tool_calls"]]
        return given

    def is_inline(self, message: Message) -> bool:
        """Whether an assistant message has its thinking inline."""
        return message.role == "assistant" and self.expected(message).spelling == INLINE


def with_placeholders(message: dict[str, Any]) -> dict[str, Any]:
    """The message with every text of its own replaced by a placeholder."""
    replaced = dict(message)
    for key in ("content", *THINKING_KEYS):
        if isinstance(replaced.get(key), list):
            replaced[key] = [{**part, part["type"]: PLACEHOLDER} for part in replaced[key]]
        elif replaced.get(key):
            replaced[key] = PLACEHOLDER
    calls = []
    for call in replaced.get("tool_calls") or []:
        function = {**function_of(call), "name": PLACEHOLDER}
        calls.append({**call, "function": function} if "function" in call else function)
    if calls:
        replaced["tool_calls"] = calls
    return replaced


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(function_of(call))
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {**call, "function": function} if "function" in call else function
