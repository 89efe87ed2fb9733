"""Types of a recipe's values, and how some of them may be written."""

from __future__ import annotations

import datetime
import re
import signal
from typing import Annotated, Any

from pydantic import AfterValidator, Field

Positive = Annotated[int, Field(gt=0, lt=2**63)]
Tokens = Annotated[int, Field(gt=0, le=10**9)]
Rank = Annotated[int, Field(gt=0, le=2**16)]
Alpha = Annotated[float, Field(gt=0, le=10**6)]

RESERVED_ARGUMENTS = {
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "tokenizer_kwargs", "return_dict", "return_assistant_tokens_mask", "return_tensors",
}  # fmt: skip
"""Arguments that mtr itself gives to apply_chat_template, so a recipe must not."""


def _named(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("holds a character that no path may hold")
    return value


Name = Annotated[str, AfterValidator(_named)]
"""A path, or the id of something on the Hub."""


def as_date(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return datetime.date.fromisoformat(value).isoformat()
        except ValueError:
            raise ValueError("not a date; write it YYYY-MM-DD") from None
    return value


def as_trackers(value: Any) -> Any:
    value = [value] if isinstance(value, str) else value
    return [] if value in (None, ["none"]) else value


def as_signals(value: Any) -> Any:
    """USR1, SIGUSR1 or a list of such names."""
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list):
        return value
    full = [f"SIG{str(name).upper().removeprefix('SIG')}" for name in names]
    for name in full:
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
            raise ValueError(f"{name} is no signal that a process can catch")
    return full


def repository(name: str) -> str:
    if not re.fullmatch(r"([A-Za-z0-9_.-]+/)?[A-Za-z0-9_.-]{1,96}", name):
        raise ValueError("not the name of a Hub repository, owner/name: letters, digits, '-', '_' and '.'")
    return name
