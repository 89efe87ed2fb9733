"""What a completion must say, and whether a text says it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mtr.data.conversation import Message


@dataclass(frozen=True)
class Own:
    """What one assistant message must say."""

    message: Message
    thinking: str
    response: str
    spelling: str | None
    """Where the data has the thinking."""


def _function(call: Any) -> Any:
    return call.get("function", call)


def _unsaid(text: str, own: Own) -> str:
    """What the text lacks of the response and the calls, or nothing."""
    calls = own.message.tool_calls
    for call in calls:
        name = _function(call)["name"]
        wanted = sum(_function(other)["name"] == name for other in calls)
        if text.count(name) < wanted:
            some = any(_function(other)["name"] in text for other in calls)
            return "the template drops a parallel tool call" if some else "the template drops its tool call"
        if not all(_holds(text, argument) for argument in _texts(_function(call).get("arguments"))):
            return "the template drops an argument of its tool call"
    if not calls and own.response not in text:
        return "the template does not render its response whole"
    return ""


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


def _holds(completion: str, text: str) -> bool:
    """Whether a text stands there as it is, or as JSON or Python write it."""
    if text.strip() in completion:
        return True
    spelled = (json.dumps(text, ensure_ascii=False), json.dumps(text), repr(text))
    return any(way[1:-1].strip() in completion for way in spelled)
