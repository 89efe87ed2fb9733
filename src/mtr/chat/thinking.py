"""What a template does to thinking: where it reads it from, what it keeps in history, which arguments change that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtr.chat.completion import (
    PARTS,
    SPELLINGS,
    THINKING_FIELDS,
    after_thinking,
    is_copied_part,
    rendered,
    spell,
    split_prompt,
)
from mtr.chat.findings import CLOSES, LEAVES, OPENS, History, State, Switch, Tags
from mtr.chat.sentinels import ANSWER, RESPONSE, THINKING, TOOL_NAME, TOOL_RESULT, USER, Sentinels
from mtr.chat.template import Template


class ThinkingTrials:
    """Trials of sentinel thinking in each of its spellings; every method answers one question."""

    def __init__(self, sentinels: Sentinels, tags: Tags | None) -> None:
        self.sentinels = sentinels
        self.tags = tags

    def spelled(self, message: Mapping[str, Any], spelling: str | None) -> dict[str, Any]:
        """The message with sentinel thinking."""
        return spell(message, THINKING, message.get("content") or "", spelling, self.tags)

    def state(self, template: Template | None = None) -> State:
        """What the generation prompt does to the thinking."""
        return split_prompt(self.sentinels.text([USER], generation=True, template=template), self.tags)[2]

    def read(self, calls: bool, template: Template | None = None) -> tuple[str, ...]:
        """Spellings whose thinking is rendered before an answer, or before tool calls."""
        text = self.sentinels.text
        message, own = (self.sentinels.calls(), TOOL_NAME) if calls else (ANSWER, RESPONSE)
        head, lead, state = split_prompt(text([USER], generation=True, template=template), self.tags)
        read = []
        for spelling in SPELLINGS:
            full = text([USER, self.spelled(message, spelling)], template=template)
            if is_copied_part(spelling, full):
                continue
            rest = full.removeprefix(head)
            ways = rendered(rest, lead, state, self.tags) if state != "closes thinking" else [rest]
            opening = lead if state == "opens thinking" else ""
            after = [after_thinking(opening + way, THINKING, self.tags) or "" for way in ways]
            if full.startswith(head) and any(own in reading for reading in after):
                read.append(spelling)
        return tuple(read)

    def fields(self) -> tuple[str, ...]:
        """Fields that the template itself reads: transformers copies one into others, so the others are given empty."""
        text = self.sentinels.text
        empty = dict.fromkeys(THINKING_FIELDS, "")
        messages = [ANSWER, self.sentinels.calls()]
        fields = [
            key
            for key in THINKING_FIELDS
            if any(THINKING in text([USER, {**m, **empty, key: THINKING}]) for m in messages)
        ]
        in_parts = [text([USER, self.spelled(m, PARTS)]) for m in messages]
        if any(THINKING in full and not is_copied_part(PARTS, full) for full in in_parts):
            fields.append(PARTS)
        return tuple(fields)

    def history(self, spelling: str, template: Template | None = None) -> History:
        """What the prompts of later turns keep of thinking in this spelling."""
        answer, calls = self.spelled(ANSWER, spelling), self.spelled(self.sentinels.calls(), spelling)
        loop = [USER, calls, TOOL_RESULT]

        def kept(messages: Sequence[Mapping[str, Any]], generation: bool) -> bool:
            return THINKING in self.sentinels.text(messages, generation=generation, template=template)

        if kept([USER, answer, USER], generation=True):
            return "always"
        if kept(loop, generation=True):
            return "since the last user message" if kept([*loop, ANSWER], False) else "until answered"
        return "only the final message" if kept([USER, answer], False) or kept([USER, calls], False) else "never"

    def own_rendering(self, message: Mapping[str, Any]) -> str:
        """The rendering of a first turn, without the user message and the generation prompt before it."""
        full = self.sentinels.text([USER, message])
        prompt = self.sentinels.text([USER], generation=True)
        return full[self.sentinels.added.common_prefix(full, split_prompt(prompt, self.tags)[0]) :]

    def response_opening(self, read: tuple[str, ...]) -> str:
        """The text between the closing tag and the response."""
        text = self.sentinels.text([USER, self.spelled(ANSWER, next(iter(read), None))])
        between = text.partition(THINKING)[2].partition(RESPONSE)[0]
        return between.partition(self.tags[1])[2].strip() if self.tags else ""

    def switches(self, answers_read: tuple[str, ...], field: str) -> Iterator[Switch]:
        """Arguments of the template that change what happens to thinking, as far as it is spelled in this field."""
        state, history, unchanged = self.state(), self.history(field), self.sentinels.template.arguments
        for template in self.sentinels.variants():
            changed = {k: v for k, v in template.arguments.items() if unchanged.get(k) != v}
            if not self.sentinels.text([USER, ANSWER], template=template):
                continue
            (name, value), effects = next(iter(changed.items())), []
            new_state = self.state(template)
            if new_state != state:
                effects.append({"opens thinking": OPENS, "closes thinking": CLOSES, "nothing": LEAVES}[new_state])
            if self.read(calls=False, template=template) and not answers_read:
                effects.append("renders a turn's own thinking")
            if (new_history := self.history(field, template)) != history and new_history != "never":
                effects.append(f"keeps thinking in history: {new_history}")
            if effects:
                yield Switch(name, value, tuple(effects))
