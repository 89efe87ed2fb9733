"""What is odd about a conversation that is trained all the same: it is counted and reported, never refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mtr.data.conversation import Conversation, Message

EMPTY_ANSWER = "an assistant message is empty: no text, no thinking, no call"
NO_CALL = "a tool result answers no call before it"
NO_RESULT = "the chat goes on after a tool call that has no result"
OUT_OF_ORDER = "tool results are in another order than their calls"


def find_remarks(conversation: Conversation) -> list[str]:
    """What is odd, each at most once."""
    messages = conversation.messages
    found = [EMPTY_ANSWER] if any(_is_empty_answer(message) for message in messages) else []
    if any(message.role == "tool" or message.tool_calls for message in messages):
        found += dict.fromkeys(_compare_results(messages))
    return found


def _is_empty_answer(message: Message) -> bool:
    """Of an answer that is trained; an empty one that is context only teaches nothing."""
    if message.role != "assistant" or not message.weight or message.tool_calls:
        return False
    return not (message.content.strip() or (message.thinking or "").strip())


def _compare_results(messages: Sequence[Message]) -> Iterator[str]:
    """Follow each call to its result: by id where both have one, else by number.

    A result without id may hold those of several calls, and calls that end the chat need no result.
    """
    waiting: list[Any] = []  # ids of calls without a result so far
    in_number, calling = False, False
    for message in messages:
        if message.role == "tool":
            known = message.data.get("tool_call_id")
            if known is not None and known in waiting:
                if waiting[0] != known:
                    yield OUT_OF_ORDER
                waiting.remove(known)
            elif waiting and (known is None or None in waiting):
                waiting.remove(None if None in waiting else waiting[0])
                in_number = True
            else:
                yield NO_CALL
        else:
            parallel = calling and message.tool_calls  # calls of one turn, spread over several messages
            if waiting and not (in_number or parallel):
                yield NO_RESULT
            if not parallel:
                waiting, in_number = [], False
            waiting += [call.get("id") for call in message.tool_calls]
        calling = bool(message.tool_calls)
