"""What the completion of an assistant message must contain, and whether a text contains it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mtr.data.conversation import Message


@dataclass(frozen=True)
class Expected:
    """An assistant message, its thinking and response apart."""

    message: Message
    thinking: str
    response: str
    spelling: str | None
    """Where the data has the thinking; None: there is none."""


def missing_response(text: str, expected: Expected) -> str:
    """What the text lacks of the response and the tool calls; empty if nothing."""
    calls = expected.message.tool_calls
    for call in calls:
        name = function_of(call)["name"]
        wanted = sum(function_of(other)["name"] == name for other in calls)
        if text.count(name) < wanted:
            some = any(function_of(other)["name"] in text for other in calls)
            return "the template drops a parallel tool call" if some else "the template drops its tool call"
        if not all(_contains(text, argument) for argument in _texts(function_of(call).get("arguments"))):
            return "the template drops an argument of its tool call"
    if not calls and expected.response not in text:
        return "the template does not render its response whole"
    return ""


def function_of(call: Any) -> Any:
    """The name and arguments of a tool call, with or without its `function` wrapper."""
    return call.get("function", call)


def _texts(arguments: Any) -> Iterator[str]:
    """Every key and text in the arguments of a tool call."""
    if isinstance(arguments, Mapping):
        for key, value in arguments.items():
            yield str(key)
            yield from _texts(value)
    elif isinstance(arguments, list):
        for value in arguments:
            yield from _texts(value)
    elif isinstance(arguments, str):
        yield arguments


def _contains(completion: str, text: str) -> bool:
    """Whether the completion has the text as it is, or as JSON or Python would quote it."""
    if text.strip() in completion:
        return True
    quoted = (json.dumps(text, ensure_ascii=False), json.dumps(text), repr(text))
    return any(way[1:-1].strip() in completion for way in quoted)
