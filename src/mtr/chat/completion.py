"""Where thinking stands in a message and in a text: spelled, opened, closed, read back.

    prompt = head + lead         lead: what the prompt's last words say about thinking, e.g. "<think>\\n"
    own rendering = head + rest  rest: what the template makes of the turn itself
    completion                   what must follow the prompt, so that inference reads it as this turn

Pure text; what the tags are and which spelling a template reads is found by `mtr.chat.trials`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from mtr.data.conversation import THINKING_KEYS

Tags = tuple[str, str]
State = Literal["nothing", "opens thinking", "closes thinking"]

INLINE = "inline"
THINKING_FIELDS = (*THINKING_KEYS, "tool_plan")
"""Fields that templates read thinking from."""
PARTS = "content parts"
"""The content as a list: {type: thinking, thinking: ...}, {type: text, text: ...}."""
SPELLINGS = (*THINKING_FIELDS, PARTS, INLINE)
COMMON_TAGS: Tags = ("<think>", "</think>")
TAG = re.compile(r"[<\[][/\w:|]*(?:think|thought|reason)[\w:|]*[>\]]", re.IGNORECASE)


def spell(
    message: Mapping[str, Any], thinking: str, response: str, spelling: str | None, tags: Tags | None
) -> dict[str, Any]:
    """The message with its thinking in one place only; in none if the spelling is None."""
    spelled = {key: value for key, value in message.items() if key not in THINKING_FIELDS}
    if response or "content" in message:
        spelled["content"] = response
    if spelling == INLINE:
        opened, closed = tags or COMMON_TAGS
        spelled["content"] = f"{opened}\n{thinking}\n{closed}\n\n{response}"
    elif spelling == PARTS:
        said = [{"type": "text", "text": response}] if response else []
        spelled["content"] = [{"type": "thinking", "thinking": thinking}, *said]
    elif spelling is not None:
        spelled[spelling] = thinking
    return spelled


def split_inline(content: str, tags: Tags | None) -> tuple[str, str] | None:
    """Thinking and response of a content that begins with a think block, else None."""
    text = content.lstrip()
    for opened, closed in dict.fromkeys([tags or COMMON_TAGS, COMMON_TAGS]):
        if text.startswith(opened):
            inside, close, after = text[len(opened) :].partition(closed)
            if close:
                return inside.strip(), after.strip()
    return None


def split_prompt(prompt: str, tags: Tags | None) -> tuple[str, str, State]:
    """Head, lead, and what the lead does to the thinking."""
    if tags is not None:
        opened, closed = map(re.escape, tags)
        alone = "?" if TAG.fullmatch(tags[1]) else ""  # </think> says by itself what it closes, <|end|> does not
        last = min((at for at in map(prompt.rfind, tags) if at >= 0), default=len(prompt))  # prompts are long
        for pattern, state in ((rf"(?:{opened}\s*){alone}{closed}\s*$", "closes"), (rf"{opened}\s*$", "opens")):
            if match := re.compile(pattern).search(prompt, last):
                found: State = "closes thinking" if state == "closes" else "opens thinking"
                return prompt[: match.start()], match.group(), found
    return prompt, "", "nothing"


def after_thinking(text: str, thinking: str, tags: Tags | None) -> str | None:
    """What inference, which cuts at the tags, reads after this thinking; None if it reads another one.

    Args:
        text: lead and completion.
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
    """What may follow the prompt where the template renders the turn, thinking and all: the straight way first."""
    if rest.startswith(lead):
        yield rest[len(lead) :]
    if tags is None or state == "nothing":
        return
    text = rest.lstrip()
    if state == "opens thinking":
        if text.startswith(tags[0]):  # spaced in another way
            yield text[len(tags[0]) :].removeprefix(lead[len(tags[0]) :])
        yield rest
    else:
        yield without_block(rest, tags)


def built(rest: str, thinking: str, state: State, tags: Tags, spacing: tuple[str, str, str]) -> str:
    """Put together where the template leaves the thinking out.

    Args:
        rest: what the template makes of the turn without its thinking.
        spacing: after the opening tag, before and after the closing one.
    """
    start = "" if state == "opens thinking" else tags[0] + spacing[0]
    return f"{start}{thinking}{spacing[1]}{tags[1]}{spacing[2]}{without_block(rest, tags)}"


def without_block(rest: str, tags: Tags) -> str:
    """The text without a think block that holds nothing, at its beginning."""
    opened, closed = map(re.escape, tags)
    alone = "?" if TAG.fullmatch(tags[1]) else ""
    match = re.match(rf"\s*(?:{opened}\s*){alone}{closed}", rest) or re.match(rf"\s*{opened}", rest)
    return rest[match.end() :].lstrip("\n") if match else rest
