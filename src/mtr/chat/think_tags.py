"""Which tags surround thinking, and the white space around them.

From the best evidence to the weakest: the recipe names them, they surround the sentinel thinking in a rendering, the
template's source contains them, the tokenizer has them as added tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mtr.chat.completion import PARTS, TAG, THINKING_FIELDS, is_copied_part, spell, split_prompt
from mtr.chat.findings import Tags
from mtr.chat.sentinels import ANSWER, RESPONSE, THINKING, TOOL_NAME, USER, Sentinels

_LAST_TAG = re.compile(r"[<\[◁][^<>\[\]\s]*[>\]▷]$")


@dataclass(frozen=True)
class FoundTags:
    """What was found about the tags."""

    tags: Tags | None
    source: Literal["recipe", "rendering", "template", "tokenizer"] | None
    spacing: tuple[str, str, str]
    """After the opening tag, before and after the closing one."""


def find_tags(sentinels: Sentinels, given: Tags | None) -> FoundTags:
    """
    Args:
        given: the tags that the recipe names.
    """
    surroundings = _surroundings(sentinels)
    if given is not None:
        spacing = _spacing(*surroundings, given) if surroundings else _spacing_of_prompt(sentinels, given)
        return FoundTags(given, "recipe", spacing)
    written, added = _tag_pairs(sentinels.template.text), _tag_pairs(" ".join(sentinels.added.ids))
    if surroundings is not None:
        before, after = surroundings
        pair = next((p for p in [*written, *added] if p[0] in before and p[1] in after), None)
        pair = pair or (_opening(sentinels, before), _closing(sentinels, after))
        if all(pair):
            return FoundTags(pair, "rendering", _spacing(before, after, pair))
    if written:
        return FoundTags(written[0], "template", _spacing_of_prompt(sentinels, written[0]))
    if added:
        return FoundTags(added[0], "tokenizer", _spacing_of_prompt(sentinels, added[0]))
    return FoundTags(None, None, ("\n", "\n", "\n\n"))


def _surroundings(sentinels: Sentinels) -> tuple[str, str] | None:
    """The text before and after a turn's own thinking, if the template renders it from any field."""
    bare = sentinels.text([USER])
    for message, own in ((ANSWER, RESPONSE), (sentinels.calls(), TOOL_NAME)):
        for spelling in (*THINKING_FIELDS, PARTS):
            full = sentinels.text([USER, spell(message, THINKING, message.get("content") or "", spelling, None)])
            at = -1 if is_copied_part(spelling, full) else full.find(THINKING)
            if at >= 0 and own in full[at:]:
                after = full[at + len(THINKING) : full.index(own, at)]
                if after.strip():
                    return full[sentinels.added.common_prefix(full, bare) : at], after
    return None


def _opening(sentinels: Sentinels, before: str) -> str:
    """The text that opens the thinking, without the header of the turn."""
    bare, full = sentinels.text([USER]), sentinels.text([USER, ANSWER])
    plain, prompt = full[sentinels.added.common_prefix(full, bare) :], sentinels.generation_prompt
    header = prompt[: sentinels.added.common_prefix(prompt, plain)]
    if before.startswith(header):
        # If only the prompt opens the thinking, nothing is left of the text before it.
        rest = before[len(header) :].strip() or prompt.removeprefix(before).strip()
        if rest:
            return rest
    match = _LAST_TAG.search(before.rstrip())
    return match.group() if match else before.strip()


def _closing(sentinels: Sentinels, after: str) -> str:
    match = sentinels.added.pattern.match(after.strip())
    return match.group() if match else after.strip()


def _spacing(before: str, after: str, tags: Tags) -> tuple[str, str, str]:
    """White space after the opening tag, and before and after the closing one."""
    start = before.rpartition(tags[0])[2] if tags[0] in before else "\n"
    head, _, rest = after.partition(tags[1])
    return start, head, rest[: len(rest) - len(rest.lstrip())]


def _spacing_of_prompt(sentinels: Sentinels, tags: Tags) -> tuple[str, str, str]:
    """The spacing of the opening tag in a generation prompt, or of an empty block; else newlines."""
    for template in (sentinels.template, *sentinels.variants()):
        prompt = sentinels.text([USER], generation=True, template=template)
        _, lead, state = split_prompt(prompt, tags)
        if state == "opens thinking":
            space = lead[len(tags[0]) :]
            return space, space, space * 2
    empty = re.escape(tags[0]) + r"(\s*)" + re.escape(tags[1]) + r"(\s*)"
    if match := re.search(empty, sentinels.text([USER, ANSWER])):
        space = match.group(1)[:1]
        return space, space, match.group(2)
    return "\n", "\n", "\n\n"


def _tag_pairs(text: str) -> list[Tags]:
    """Pairs in a text such as <think> and </think>, or <|START_THINKING|> and <|END_THINKING|>."""
    found = list(dict.fromkeys(match.group() for match in TAG.finditer(text)))
    pairs = []
    for tag in found:
        closing = (tag[0] + "/" + tag[1:], re.sub("start|begin", "end", tag), re.sub("START|BEGIN", "END", tag))
        pairs += [(tag, other) for other in closing if other != tag and other in found][:1]
    return pairs
