"""Sentinel conversations: texts that no template looks for, in every kind of message that matters, to be rendered.

What a template does is found by looking for these texts in its renderings. A conversation that the template refuses
renders as the empty string, in which nothing is found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from mtr.chat.added_tokens import AddedTokens
from mtr.chat.template import RefusedError, Template
from mtr.errors import UserError, one_line

QUESTION, THINKING, RESPONSE = "Sentinel question.", "Sentinel thinking.", "Sentinel response."
TOOL_NAME, KEY, VALUE, RESULT = "sentinel_tool", "sentinel_key", "sentinel value", "sentinel result"
SCHEMA_NAME = "sentinel_schema"
USER: dict[str, Any] = {"role": "user", "content": QUESTION}
ANSWER: dict[str, Any] = {"role": "assistant", "content": RESPONSE}
TOOL_RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "sentinel0", "name": TOOL_NAME, "content": RESULT}
SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": SCHEMA_NAME,
        "description": "A sentinel.",
        "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": "A sentinel."}}},
    },
}


class Sentinels:
    """Renders sentinel conversations with one template, tool calls in the spelling that it accepts."""

    def __init__(self, template: Template) -> None:
        """
        Raises:
            UserError: the template fails on a single user message.
        """
        self.template = template
        self.tokenizer = template.tokenizer
        self.added = AddedTokens(self.tokenizer)
        self.tools: list[Any] | None = None
        """Given to every conversation where the template renders nothing without tools."""
        try:
            if not self.text([USER]) and self.text([USER], [SCHEMA]):
                self.tools = [SCHEMA]
            bare, prompted = (template.render([USER], self.tools, generation) for generation in (False, True))
        except RefusedError as error:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the chat template fails on one user message: {one_line(error, 1000)}"
            ) from None
        self.generation_prompt = prompted[self.added.common_prefix(prompted, bare) :]
        self.arguments: Literal["object", "string"] = "object"
        self.call_content: Literal["absent", "empty"] = "absent"
        self._find_call_spelling()

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        generation: bool = False,
        template: Template | None = None,
    ) -> str:
        """The rendering; empty if the template refuses.

        Args:
            template: to render with, if not the one that is tried out.
        """
        try:
            return (template or self.template).render(messages, tools or self.tools, generation)
        except RefusedError:
            return ""

    def calls(
        self, values: Sequence[str] = (VALUE,), content: str | None = None, arguments: str | None = None
    ) -> dict[str, Any]:
        """A message with one tool call for each value.

        Args:
            content: text beside the calls.
            arguments: "object" or "string"; if not given, as the template accepts them.
        """
        calls = []
        for number, value in enumerate(values):
            given: Any = {KEY: value}
            if (arguments or self.arguments) == "string":
                given = f'{{"{KEY}": "{value}"}}'
            function = {"name": TOOL_NAME, "arguments": given}
            calls.append({"id": f"sentinel{number}", "type": "function", "function": function})
        if content is None and self.call_content == "empty":
            content = ""
        return {"role": "assistant", "tool_calls": calls} | ({"content": content} if content is not None else {})

    def variants(self) -> Iterator[Template]:
        """The template with one of its arguments changed."""
        for name, values in self.template.switches.items():
            for value in values:
                if value != self.template.arguments.get(name):
                    yield self.template.with_arguments(**{name: value})

    def _find_call_spelling(self) -> None:
        """Find the first spelling of a tool call that renders: some templates want text arguments, or a content."""

        def rendered(way: tuple[str, str | None]) -> tuple[bool, bool, bool]:
            calls = self.calls(arguments=way[0], content=way[1])
            own = self.text([USER, calls])
            return VALUE in own, bool(own), bool(self.text([USER, calls, TOOL_RESULT], generation=True))

        arguments, content = max(itertools.product(("object", "string"), (None, "")), key=rendered)
        self.arguments = "object" if arguments == "object" else "string"
        self.call_content = "absent" if content is None else "empty"
