"""A row of messages becomes a Conversation: messages as the chat template will see them, checked once.

Keys that only the trainer reads (`train`, `weight`) are taken out of the message. Everything else is given to the
template as the row spells it, except for two changes that keep the meaning: text parts are joined (to one string if
there is no thinking among them), and tool arguments written as a JSON string are parsed (most templates fail on the
string or quote it twice).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from mtr.data.conversation import THINKING_KEYS, Conversation, Message
from mtr.data.json_text import RepeatedKeys, parse_json
from mtr.data.media import check_parts
from mtr.errors import RowError, one_line

T = TypeVar("T")


ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_MESSAGES = 100_000
"""Messages of one row; more are not looked at."""
REPEATED_KEY = "a key is given twice in one object, and only the last value counts"
_MAX_WEIGHT = 1e6
_MOST_NAMES = 30


def parse_row(row: Any, where: str, messages: str = "messages", tools: str = "tools") -> Conversation:
    """Check one row and make it a Conversation.

    Args:
        where: file and row, as errors name it.
        messages, tools: names of the columns.

    Raises:
        RowError: names the row, the message, what is wrong and the fix.
    """
    if not isinstance(row, Mapping):
        raise RowError(where, "a row is a JSON object", f", this is {kind(row)}")
    listed = row.get(messages)
    if listed is None:
        found = names(row) or "nothing"
        raise RowError(
            where, f"no {messages!r} column", f" (found: {found}); name yours in data.messages or data.columns"
        )
    listed = from_json(listed)
    if not isinstance(listed, list) or not listed:
        raise RowError(where, f"{messages!r} must be a non-empty list of messages", f", this is {kind(listed)}")
    if len(listed) > MOST_MESSAGES:
        raise RowError(where, f"more than {MOST_MESSAGES:,} messages", f" ({len(listed):,}); split or remove the row")
    parsed = tuple(_parse_message(message, f"{where}, message {i}") for i, message in enumerate(listed))
    if not any(message.role == "assistant" for message in parsed):
        raise RowError(where, "no assistant message, so there is nothing to train", "; remove the row")
    listed_tools = from_json(row.get(tools))
    if listed_tools is not None and not (
        isinstance(listed_tools, list) and all(isinstance(tool, Mapping) for tool in listed_tools)
    ):
        raise RowError(where, f"{tools!r} must be a list of tool schemas", f", this is {kind(listed_tools)}")
    arguments = [call.get("function", call).get("arguments") for message in parsed for call in message.tool_calls]
    repeated = any(isinstance(value, RepeatedKeys) for value in (*listed, *arguments))
    remarks = (REPEATED_KEY,) if repeated else ()
    return Conversation(parsed, where, _encodable(listed_tools, where) or None, row, remarks)


def _parse_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(where, "a message is an object with role and content", f", this is {kind(message)}")
    data = {key: value for key, value in message.items() if value is not None}
    role = data.get("role")
    if role is None and "from" in data:
        raise RowError(
            where,
            "a ShareGPT message among OpenAI messages",
            "; give ShareGPT rows a source of their own, with format: sharegpt",
        )
    if role not in ROLES:
        raise RowError(where, "unknown role", f" {role!r:.80}; roles are {', '.join(ROLES)}")
    weight = _pop_weight(data, where)
    if "content" in data:
        thinks = role == "assistant" and isinstance(data["content"], list)
        data["content"] = _parts(data["content"], where) if thinks else _text(data["content"], where)
        if isinstance(data["content"], list) and any(data.get(key) for key in THINKING_KEYS):
            raise RowError(where, "thinking both in a field and in parts of the content", "; remove one")
    for key in THINKING_KEYS:
        if key in data and not isinstance(data[key], str):
            raise RowError(where, f"{key!r} must be text", f", this is {kind(data[key])}")
        _encodable(data.get(key), where)
    if calls := from_json(data.get("tool_calls")):
        data["tool_calls"] = _encodable(_parse_calls(calls, where), where)
    else:
        data.pop("tool_calls", None)
    if role == "assistant":
        if "content" not in data and "tool_calls" not in data:
            raise RowError(where, "an assistant message needs content or tool_calls")
    elif "content" not in data:
        raise RowError(where, f"a {role} message needs content")
    return Message(data, weight)


def _pop_weight(data: dict[str, Any], where: str) -> float:
    weight = 1.0
    for key in ("train", "weight", "loss", "loss_weight"):
        if key not in data:
            continue
        value = data.pop(key)
        if not isinstance(value, (bool, int, float)) or not 0 <= value <= _MAX_WEIGHT:
            raise RowError(where, f"{key!r} must be true, false or a number from 0 to 1e6", f", got {value!r:.80}")
        weight *= float(value)
    return weight


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return _encodable(content, where)
    if isinstance(content, list) and all(
        isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
    ):
        return _encodable("".join(part["text"] for part in content), where)
    if isinstance(content, list):
        check_parts(content, where)
    raise RowError(where, "content must be text or a list of text parts", f", this is {kind(content)}")


def _parts(content: list[Any], where: str) -> str | list[dict[str, str]]:
    """Thinking and text as one part each; a string if there is no thinking."""
    thoughts = [part for part in content if isinstance(part, Mapping) and part.get("type") == "thinking"]
    text = _text([part for part in content if part not in thoughts], where)
    thinking = ""
    for part in thoughts:
        thought = part.get("thinking")
        if not isinstance(thought, (str, list)):
            raise RowError(where, "a thinking part needs its thinking as text", f", this is {kind(thought)}")
        thinking += _text(thought, where)  # a list of text parts in Mistral's API
    if not thinking.strip():
        return text
    if content[: len(thoughts)] != thoughts:
        raise RowError(where, "thinking parts must come before the text", "; move them to the front")
    text_parts = [{"type": "text", "text": text}] if text else []
    return [{"type": "thinking", "thinking": thinking}, *text_parts]


def _encodable(value: T, where: str) -> T:
    """The value, if it can be encoded: JSON can spell half of a surrogate pair, which tokenizers do not accept."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise RowError(where, "not valid text", f": {error}; fix or remove the broken escape") from None
    except (TypeError, ValueError, RecursionError) as error:  # keys that are no text, from a data set in Python
        raise RowError(where, "not a JSON value", f": {one_line(error)}") from None
    return value


def _parse_calls(calls: Any, where: str) -> list[Any]:
    if not isinstance(calls, list):
        raise RowError(where, "tool_calls must be a list", f", this is {kind(calls)}")
    parsed = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(where, "a tool call needs a function with a name", f", this is {kind(call)}")
        function = dict(function)
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = parse_json(function["arguments"] or "{}")
            except ValueError as error:
                detail = f" (in a call of {function['name']!r:.80}: {error}); fix them"
                raise RowError(where, "tool arguments are not valid JSON", detail) from None
        parsed.append({**call, "function": function} if "function" in call else function)
    return parsed


def from_json(value: Any) -> Any:
    """Parse lists and objects that are stored as JSON text (common in Parquet and CSV); anything else is returned."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def kind(value: Any) -> str:
    """What a value is, in words for an error message."""
    if isinstance(value, list):
        kinds = sorted({str(p.get("type")) for p in value if isinstance(p, Mapping) and "type" in p})
        return f"a list ({names(kinds)} parts)" if kinds else "an empty list" if not value else "a list"
    if isinstance(value, Mapping):
        return f"an object with {names(value) or 'no keys'}"
    if value is None:
        return "null"
    return f"{type(value).__name__} {value!r}"[:80]


def names(keys: Iterable[Any]) -> str:
    """Keys or columns in a row, cut to fit on one line."""
    shown = [str(key)[:40] for key in itertools.islice(keys, _MOST_NAMES + 1)]
    text = ", ".join([*shown[:_MOST_NAMES], *(["..."] if len(shown) > _MOST_NAMES else [])])
    return text if text.isprintable() else repr(text)[1:-1]
