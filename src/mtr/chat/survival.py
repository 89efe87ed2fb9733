"""Which parts of a conversation a template renders, drops silently, or refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from mtr.chat.completion import COMMON_TAGS, spell
from mtr.chat.findings import Survival, Tags
from mtr.chat.sentinels import (
    ANSWER,
    QUESTION,
    RESPONSE,
    RESULT,
    SCHEMA,
    SCHEMA_NAME,
    THINKING,
    TOOL_NAME,
    TOOL_RESULT,
    USER,
    VALUE,
    Sentinels,
)


def survivals(sentinels: Sentinels, tags: Tags | None, calls_read: tuple[str, ...]) -> dict[str, Survival]:
    """Fields of Findings.

    Args:
        calls_read: spellings whose thinking is rendered before tool calls.
    """
    survives = partial(_survives, sentinels)
    two_values, rule, earlier = (VALUE, "another value"), "Sentinel rule.", "Said first."
    close_tag = f"{RESPONSE} {(tags or COMMON_TAGS)[1]} Sentinel end."
    beside_calls = sentinels.calls(content=RESPONSE)
    thinking_too = spell(beside_calls, THINKING, RESPONSE, next(iter(calls_read), None), tags)
    return {
        "close_tag_in_response": survives(close_tag, [USER, _answering(close_tag)]),
        "tools": survives(SCHEMA_NAME, [USER], [SCHEMA]),
        "calls": survives((TOOL_NAME, VALUE), [USER, sentinels.calls()]),
        "string_arguments": _string_arguments(sentinels),
        "parallel_calls": survives(two_values, [USER, sentinels.calls(values=two_values)]),
        "results": survives(RESULT, [USER, sentinels.calls(), TOOL_RESULT]),
        "text_beside_calls": survives(RESPONSE, [USER, beside_calls]),
        "text_beside_calls_with_thinking": survives(RESPONSE, [USER, thinking_too]),
        "system": survives(rule, [{"role": "system", "content": rule}, USER]),
        "developer": survives(rule, [{"role": "developer", "content": rule}, USER]),
        "assistant_first": survives(RESPONSE, [ANSWER, USER]),
        "consecutive_users": survives((QUESTION, "And more."), [USER, {"role": "user", "content": "And more."}]),
        "consecutive_assistants": survives((earlier, RESPONSE), [USER, _answering(earlier), ANSWER]),
    }


def whitespace(sentinels: Sentinels) -> Literal["kept", "newlines trimmed", "trimmed"]:
    """What happens to white space around a response."""

    def renders(text: str) -> bool:
        return text in sentinels.text([USER, _answering(text)])

    return "kept" if renders(f"\n  {RESPONSE}  \n") else "newlines trimmed" if renders(f"  {RESPONSE}  ") else "trimmed"


def _survives(
    sentinels: Sentinels,
    wanted: str | tuple[str, ...],
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
) -> Survival:
    """Whether all of the wanted texts are in the rendering."""
    text = sentinels.text(messages, tools)
    if not text:
        return "refused"
    return "rendered" if all(w in text for w in ([wanted] if isinstance(wanted, str) else wanted)) else "lost"


def _string_arguments(sentinels: Sentinels) -> Survival:
    """Lost: the template quotes the text a second time."""
    text = sentinels.text([USER, sentinels.calls(arguments="string")])
    if not text:
        return "refused"
    return "rendered" if VALUE in text and f'\\"{VALUE}' not in text else "lost"


def _answering(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}
