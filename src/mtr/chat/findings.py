"""What is known about a chat template: facts found by `mtr.chat.trials`, used to build completions and shown by
`mtr audit`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

Tags = tuple[str, str]
"""What opens and closes thinking in a text."""
State = Literal["nothing", "opens thinking", "closes thinking"]
"""What the end of a generation prompt does to the thinking."""
History = Literal["always", "since the last user message", "until answered", "only the final message", "never"]
Survival = Literal["rendered", "lost", "refused"]
OPENS, CLOSES, LEAVES = "opens the thinking", "closes the thinking", "leaves the thinking to the model"


@dataclass(frozen=True)
class Stop:
    """What ends a completion."""

    text: str
    id: int
    source: Literal["template", "next message", "generation config", "tokenizer"]
    """template: the turn's own rendering; next message: the template leaves it to the message that follows."""
    stops_inference: bool
    """Whether inference stops at it, by the generation config or the tokenizer."""


@dataclass(frozen=True)
class Switch:
    """A value of a template argument that changes what happens to thinking, found by trial."""

    argument: str
    value: Any
    effects: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """What a template does with one set of arguments."""

    generation_prompt: str
    """What add_generation_prompt adds after a user message."""
    prompt_ends: State
    tags: Tags | None
    tags_from: Literal["recipe", "rendering", "template", "tokenizer"] | None
    spacing: tuple[str, str, str]
    """White space after the opening tag, before and after the closing one, for completions assembled from the tags."""
    answers_read: tuple[str, ...]
    """Spellings whose thinking is rendered on a turn that answers; empty if it never is."""
    calls_read: tuple[str, ...]
    """The same for a turn that calls tools."""
    fields: tuple[str, ...]
    """Fields, or parts of the content, that the template itself reads."""
    history: History
    """What the prompts of later turns keep of thinking in a field."""
    history_inline: History
    """The same for thinking that is inline in the content."""
    switches: tuple[Switch, ...]
    answer_opening: str
    """What an answer without thinking begins with."""
    response_opening: str
    """The text between the closing tag and the response."""
    answer_stop: Stop | None
    call_stop: Stop | None
    after_stop: str
    """Text that the template writes after an answer's stop token; never trained."""
    history_end: str
    """What ends an answer once it is history."""
    bos: Literal["template", "none", "twice"]
    bos_on_encode: bool
    """Encoding the rendered text with special tokens, which mtr does not, would add another BOS."""
    dated: bool
    whitespace: Literal["kept", "newlines trimmed", "trimmed"]
    """Around a response."""
    close_tag_in_response: Survival
    tools: Survival
    """The tool schemas."""
    calls: Survival
    arguments: Literal["object", "string"]
    """How the arguments of a tool call must be spelled."""
    call_content: Literal["absent", "empty"]
    """How a tool call without text must be spelled."""
    string_arguments: Survival
    """Arguments given as JSON text; lost: quoted a second time."""
    parallel_calls: Survival
    results: Survival
    text_beside_calls: Survival
    text_beside_calls_with_thinking: Survival
    system: Survival
    developer: Survival
    assistant_first: Survival
    consecutive_users: Survival
    consecutive_assistants: Survival

    def read(self, calls: bool) -> tuple[str, ...]:
        return self.calls_read if calls else self.answers_read

    def stop(self, calls: bool) -> Stop | None:
        return self.call_stop if calls else self.answer_stop

    @property
    def openers(self) -> list[str]:
        """Arguments under which the generation prompt does not close the thinking, as a recipe spells them."""
        found = [s for effect in (OPENS, LEAVES) for s in self.switches if effect in s.effects]
        return [f"template: {{{switch.argument}: {spelled(switch.value)}}}" for switch in found]


def spelled(value: Any) -> str:
    """As a recipe writes it, quoted: a bare yes would be true in YAML."""
    return json.dumps(value, ensure_ascii=False)
