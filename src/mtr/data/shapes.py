"""The shapes that chat rows come in. Each is made a list of messages before anything else is checked.

    messages           {messages: [{role, content}, ...], tools}                  OpenAI
    sharegpt           {conversations: [{from, value}, ...], tools}
    prompt_completion  {prompt, completion}, texts or lists of messages           TRL
    instruction        {instruction, input, output, history: [[user, assistant]]} Alpaca

Every shape may have its system prompt in a column `system`. A source has one shape: the one that the recipe names, or
else that of its first row. Nothing else is guessed: a later row of another shape is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mtr.data.conversation import Conversation
from mtr.data.json_text import MOST_ROW, RepeatedKeys
from mtr.data.media import check_columns
from mtr.data.parsing import REPEATED_KEY, from_json, kind, names, parse_row
from mtr.data.remarks import find_remarks
from mtr.errors import RowError

Shape = Literal["messages", "sharegpt", "prompt_completion", "instruction"]
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_CALL = re.compile(r"\s*(<think>.*?</think>)?\s*(.*)", re.DOTALL)
"""The value of a function_call: thinking, if any, and the call as JSON."""


@dataclass(frozen=True)
class Reader:
    """How the rows of one source become conversations."""

    shape: Shape | None = "messages"
    """None: not known yet, see `with_shape_of`."""
    messages: str = "messages"
    """The column of the messages."""
    tools: str = "tools"
    """The column of the tool schemas."""
    columns: Mapping[str, str | None] = field(default_factory=dict)
    """Names of the other columns where they differ from the usual ones; None: the column is not read."""

    def read(self, row: Any, where: str) -> Conversation:
        """Check one row and make it a Conversation.

        Args:
            where: file and row, as errors name it.

        Raises:
            RowError: names the row, the message, what is wrong and the fix.
        """
        if not isinstance(row, Mapping):
            raise RowError(where, "a row is a JSON object", f", this is {kind(row)}")
        assert self.shape is not None, "call with_shape_of first"
        if any(isinstance(value, str) and len(value) > MOST_ROW for value in row.values()):
            raise RowError(where, f"longer than {MOST_ROW >> 20} MiB", "; split or remove the row")
        if self.shape == "messages":
            plain, column = row, self._list_column(row)
        else:
            make = {"sharegpt": self._sharegpt, "prompt_completion": self._prompt, "instruction": self._instruction}
            plain, column = {self.messages: make[self.shape](row, where), self.tools: row.get(self.tools)}, ""
        system = self._text(row, "system", where, required=False)
        plain = _with_system(plain, column or self.messages, system, where) if system else plain
        conversation = parse_row(plain, where, column or self.messages, self.tools)
        conversation = replace(conversation, row=row)
        check_columns(conversation)
        repeated = [REPEATED_KEY] if isinstance(row, RepeatedKeys) else []
        remarks = (*repeated, *conversation.remarks, *find_remarks(conversation))
        return replace(conversation, remarks=tuple(dict.fromkeys(remarks)))

    def with_shape_of(self, rows: Iterable[Any]) -> Reader:
        """With the shape of the first row that has one; if none does, `messages`, whose errors say what is missing."""
        shapes = (self._shape_of(row) for row in rows if isinstance(row, Mapping))
        return replace(self, shape=next(filter(None, shapes), "messages"))

    def _shape_of(self, row: Mapping[str, Any]) -> Shape | None:
        listed = from_json(row.get(self._list_column(row)))
        if listed is not None:
            first = listed[0] if isinstance(listed, list) and listed else None
            sharegpt = isinstance(first, Mapping) and "from" in first and "role" not in first
            return "sharegpt" if sharegpt else "messages"
        if all(self._get(row, name) is not None for name in ("prompt", "completion")):
            return "prompt_completion"
        if all(self._get(row, name) is not None for name in ("instruction", "output")):
            return "instruction"
        return None

    def _column(self, name: str) -> str | None:
        return self.columns.get(name, name)

    def _get(self, row: Mapping[str, Any], name: str) -> Any:
        column = self._column(name)
        return None if column is None else row.get(column)

    def _text(self, row: Mapping[str, Any], name: str, where: str, required: bool = True) -> str:
        value = self._get(row, name)
        if value is None and not required:
            return ""
        if not isinstance(value, str):
            if value is None:
                raise _no_column(row, self._column(name), where)
            raise RowError(where, f"{self._column(name)!r} must be text", f", this is {kind(value)}")
        return value

    def _list_column(self, row: Mapping[str, Any]) -> str:
        """The column of the messages: `data.messages`, or the usual one of ShareGPT data."""
        other = self._column("conversations")
        return other if row.get(self.messages) is None and other and row.get(other) is not None else self.messages

    def _sharegpt(self, row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        column = self._list_column(row)
        entries = from_json(row.get(column))
        if entries is None:
            raise _no_column(row, self._column("conversations"), where)
        if not isinstance(entries, list) or not entries:
            raise RowError(where, f"{column!r} must be a non-empty list of messages", f", this is {kind(entries)}")
        return [_as_message(entry, f"{where}, message {i}") for i, entry in enumerate(entries)]

    def _prompt(self, row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        """Messages of the prompt are context; only the completion is trained."""
        prompt, completion = self._side(row, "prompt", "user", where), self._side(row, "completion", "assistant", where)
        return [{**m, "train": False} if m.get("role") == "assistant" else m for m in prompt] + completion

    def _side(self, row: Mapping[str, Any], name: str, role: str, where: str) -> list[dict[str, Any]]:
        value = self._get(row, name)
        if value is None:
            raise _no_column(row, self._column(name), where)
        listed = from_json(value)
        if isinstance(listed, list) and listed and all(isinstance(m, Mapping) and "role" in m for m in listed):
            return [dict(message) for message in listed]
        if isinstance(value, str):
            return [{"role": role, "content": value}]
        raise RowError(where, f"{self._column(name)!r} must be text or a list of messages", f", this is {kind(value)}")

    def _instruction(self, row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        history = from_json(self._get(row, "history")) or []
        pairs = isinstance(history, list) and all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
            for pair in history
        )
        if not pairs:
            reason = f"{self._column('history')!r} must be a list of [user, assistant] pairs of texts"
            raise RowError(where, reason, f", this is {kind(history)}")
        question = [self._text(row, "instruction", where), self._text(row, "input", where, required=False)]
        texts = [text for pair in history for text in pair]
        texts += ["\n".join(filter(None, question)), self._text(row, "output", where)]
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _as_message(entry: Any, where: str) -> dict[str, Any]:
    """One ShareGPT entry as a message; keys beyond `from` and `value` are kept."""
    if not isinstance(entry, Mapping) or "from" not in entry:
        raise RowError(where, "a ShareGPT message must be an object with from and value", f", this is {kind(entry)}")
    role = _SPEAKERS.get(entry["from"]) if isinstance(entry["from"], str) else None
    if role is None:
        raise RowError(where, "unknown speaker", f" {entry['from']!r:.80}; speakers are {', '.join(_SPEAKERS)}")
    message = {key: value for key, value in entry.items() if key not in ("from", "value")}
    if role != "call":
        return {"role": role, "content": entry.get("value"), **message}
    value = entry.get("value")
    matched = _CALL.fullmatch(value) if isinstance(value, str) else None
    thinking, calls = (matched[1], from_json(matched[2])) if matched else (None, value)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not all(isinstance(c, Mapping) and isinstance(c.get("name"), str) for c in calls):
        raise RowError(
            where, "a function_call must be JSON with name and arguments", f", this is {kind(value)}; fix the JSON"
        )
    wrapped = [{"type": "function", "function": dict(call)} for call in calls]
    return {"role": "assistant", "content": thinking or "", "tool_calls": wrapped, **message}


def _with_system(row: Mapping[str, Any], column: str, system: str, where: str) -> Mapping[str, Any]:
    """The row, with the system prompt from its own column as the first message."""
    listed = from_json(row.get(column))
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], Mapping):
        return row  # parse_row raises
    first = listed[0]
    if first.get("role") != "system":
        return {**row, column: [{"role": "system", "content": system}, *listed]}
    if first.get("content") != system:
        raise RowError(
            where,
            "two system prompts, one in the column 'system' and one in the messages",
            "; remove one, or set data.columns to {system: null} to leave the column unread",
        )
    return row


def _no_column(row: Mapping[str, Any], column: str | None, where: str) -> RowError:
    found = names(key for key, value in row.items() if value is not None) or "nothing"
    return RowError(where, f"no {column!r} column", f" (found: {found}); name yours in data.columns")
