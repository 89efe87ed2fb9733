"""How a message is spelled for the template."""

from __future__ import annotations

import json
from typing import Any

from mtr.chat.expected import _function
from mtr.data.conversation import THINKING_KEYS

_SENTINEL = "\ue000own text\ue001"


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(_function(call))
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {**call, "function": function} if "function" in call else function


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """The message with every text of its own replaced by a sentinel."""
    marked = dict(message)
    for key in ("content", *THINKING_KEYS):
        if isinstance(marked.get(key), list):
            marked[key] = [{**part, part["type"]: _SENTINEL} for part in marked[key]]
        elif marked.get(key):
            marked[key] = _SENTINEL
    calls = []
    for call in marked.get("tool_calls") or []:
        function = {**_function(call), "name": _SENTINEL}
        calls.append({**call, "function": function} if "function" in call else function)
    if calls:
        marked["tool_calls"] = calls
    return marked
