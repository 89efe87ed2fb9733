"""Thinking in a message and in a rendered text: how it is spelled, opened, closed and read back.

    prompt = head + lead         lead: the think tags at the end of the prompt, if any, e.g. "<think>\\n"
    own rendering = head + rest  rest: what the template renders for the turn itself
    completion                   what must follow the prompt, so that inference reads it as this turn

Pure functions of text; `mtr.chat.trials` finds out what the tags are and which spelling a template reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mtr.chat.findings import State, Tags
from mtr.data.conversation import THINKING_KEYS

INLINE = "inline"
THINKING_FIELDS = (*THINKING_KEYS, "tool_plan")
"""Fields that templates read thinking from."""
PARTS = "content parts"
"""The content as a list: {type: thinking, thinking: ...}, {type: text, text: ...}."""
SPELLINGS = (*THINKING_FIELDS, PARTS, INLINE)
COMMON_TAGS: Tags = ("<think>", "</think>")
_COPIED_PART = re.compile(r"['\"]thinking['\"]\s*:")
TAG = re.compile(r"[<\[][/\w:|]{0,40}(?:think|thought|reason)[\w:|]{0,40}[>\]]", re.IGNORECASE)
"""Of bounded length, or a long text like `<thinkthinkthink` would take quadratic time."""


def spell(
    message: Mapping[str, Any], thinking: str, response: str, spelling: str | None, tags: Tags | None
) -> dict[str, Any]:
    """The message with its thinking in one place only; without thinking if the spelling is None."""
    spelled = {key: value for key, value in message.items() if key not in THINKING_FIELDS}
    if response or "content" in message:
        spelled["content"] = response
    if spelling == INLINE:
        opened, closed = tags or COMMON_TAGS
        spelled["content"] = f"{opened}\n{thinking}\n{closed}\n\n{response}"
    elif spelling == PARTS:
        text = [{"type": "text", "text": response}] if response else []
        spelled["content"] = [{"type": "thinking", "thinking": thinking}, *text]
    elif spelling is not None:
        spelled[spelling] = thinking
    return spelled


def split_inline(content: str, tags: Tags | None) -> tuple[str, str] | None:
    """Thinking and response of a content that begins with a think block; else None."""
    text = content.lstrip()
    for opened, closed in dict.fromkeys([tags or COMMON_TAGS, COMMON_TAGS]):
        if text.startswith(opened):
            inside, close, after = text[len(opened) :].partition(closed)
            if close:
                return inside.strip(), after.strip()
    return None


def is_copied_part(spelling: str, text: str) -> bool:
    """Whether a template printed a thinking part as the dict that it is, rather than its thinking."""
    return spelling == PARTS and _COPIED_PART.search(text) is not None


def split_prompt(prompt: str, tags: Tags | None) -> tuple[str, str, State]:
    """Head and lead of a prompt, and what the lead does to the thinking."""
    if tags is not None:
        opened, closed = map(re.escape, tags)
        alone = "?" if TAG.fullmatch(tags[1]) else ""  # </think> can only close thinking, <|end|> may close other text
        last = min((at for at in map(prompt.rfind, tags) if at >= 0), default=len(prompt))  # prompts are long
        for pattern, state in ((rf"(?:{opened}\s*){alone}{closed}\s*$", "closes"), (rf"{opened}\s*$", "opens")):
            if match := re.compile(pattern).search(prompt, last):
                found: State = "closes thinking" if state == "closes" else "opens thinking"
                return prompt[: match.start()], match.group(), found
    return prompt, "", "nothing"


def after_thinking(text: str, thinking: str, tags: Tags | None) -> str | None:
    """What inference, which splits at the tags, reads after this thinking; None if it reads other thinking.

    Args:
        text: what the prompt has opened, and the completion.
    """
    if tags is None:
        _, found, after = text.partition(thinking)
        return after if found else None
    opened, closed = tags
    begun = text.lstrip()
    if not begun.startswith(opened):
        return None if thinking else text
    inside, close, after = begun[len(opened) :].partition(closed)
    return after if close and inside.strip() == thinking else None


def rendered(rest: str, lead: str, state: State, tags: Tags | None) -> Iterator[str]:
    """Candidates for what follows the prompt where the template renders the turn in full, the likeliest first.

    Args:
        rest: what the template renders for the turn.
    """
    if rest.startswith(lead):
        yield rest[len(lead) :]
    if tags is None or state == "nothing":
        return
    text = rest.lstrip()
    if state == "opens thinking":
        if text.startswith(tags[0]):  # with other white space than the prompt
            yield text[len(tags[0]) :].removeprefix(lead[len(tags[0]) :])
        yield rest
    else:
        yield without_block(rest, tags)


def built(rest: str, thinking: str, state: State, tags: Tags, spacing: tuple[str, str, str]) -> str:
    """A completion assembled from the tags, where the template leaves the thinking out.

    Args:
        rest: what the template renders for the turn without its thinking.
        spacing: after the opening tag, before and after the closing one.
    """
    start = "" if state == "opens thinking" else tags[0] + spacing[0]
    return f"{start}{thinking}{spacing[1]}{tags[1]}{spacing[2]}{without_block(rest, tags)}"


def without_block(rest: str, tags: Tags) -> str:
    """The text without an empty think block at its beginning."""
    opened, closed = map(re.escape, tags)
    alone = "?" if TAG.fullmatch(tags[1]) else ""
    match = re.match(rf"\s*(?:{opened}\s*){alone}{closed}", rest) or re.match(rf"\s*{opened}", rest)
    return rest[match.end() :].lstrip("\n") if match else rest
