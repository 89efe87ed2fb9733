"""One tokenizer's chat template, with its arguments and the date of the run: messages -> text.

Nothing is interpreted here: what a template does is found by rendering (`mtr.chat.trials`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from datetime import date as Date
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import meta, nodes

from mtr.chat.limits import SECONDS, TimeUp, limits
from mtr.console import printable
from mtr.errors import UserError, one_line
from mtr.recipe.values import RESERVED_ARGUMENTS

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
# This macro shadows transformers' own strftime_now, so that the date stays that of the run when it spans midnight. A
# template can only be given plain data, so the macro looks the result up by the format string.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ mtr_dates[format] if format in mtr_dates else "
    "raise_exception('strftime_now is given a format that the template does not write out: ' ~ format) }}"
    "{% endmacro %}\n"
)


_MOST_WRITTEN = 1_000_000
"""Characters of a template's source. Those of the largest models have less than 100,000."""
_MOST_RENDERED, _TIMES_INPUT = 1_000_000, 64
"""Characters of a rendering: so many, or so many times its input."""
_INPUT_PER_SECOND = 1_000_000
"""Characters of input for which a rendering may take another second."""
_EXPECTED = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
"""What templates raise because of the conversation; the texts of other errors need their names to be understood."""


_SENTINEL = "mtr reads its own words"


def _in_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """With its text as a part of a list."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


class RefusedError(Exception):
    """A turn cannot be rendered correctly; the text is the reason."""


class LimitError(UserError):
    """Rendering takes too much time or memory, which would be the same for the next turn."""


class Template:
    """The template, ready to render; immutable."""

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None, day: Date | None = None) -> None:
        """
        Raises:
            UserError: the tokenizer has no chat template, or it is not text, or far too long.
        """
        written = tokenizer.chat_template
        if not written:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; "
                "put a chat_template.jinja beside it (the instruct variant of the model has one)"
            )
        texts = list(written.values()) if isinstance(written, dict) else [written]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{tokenizer.name_or_path}: the chat template is not text; write it as a string")
        self.text = "\n".join(texts)
        """All of it; some tokenizers have a second template for conversations with tools."""
        if len(self.text) > _MOST_WRITTEN:
            raise UserError(
                f"{tokenizer.name_or_path}: the chat template has {len(self.text):,} characters, more than "
                f"{_MOST_WRITTEN:,}; use that of the original model"
            )
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self.day = day or Date.today()
        self.special_texts = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]

    def with_arguments(self, **arguments: Any) -> Template:
        return Template(self.tokenizer, {**self.arguments, **arguments}, self.day)

    def on(self, day: Date) -> Template:
        return Template(self.tokenizer, self.arguments, day)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, generation: bool = False
    ) -> str:
        """
        Raises:
            RefusedError: the template raises, with its error message; or it renders far too much.
            LimitError: it takes too much time or memory.
        """
        given, text, limit = list(messages), "", ""

        def size() -> int:
            return len(str(given)) + len(str(tools)) + len(given) * len(self.text)

        try:
            text = limits.call(lambda: self._render(given, tools, generation), lambda: size() / _INPUT_PER_SECOND)
        except TimeUp:
            limit = f"takes too long, more than {SECONDS:.0f} seconds"
        except MemoryError:
            limit = "needs gigabytes of memory"
        except Exception as error:
            name = "" if isinstance(error, _EXPECTED) else f"{type(error).__name__}: "
            raise RefusedError(f"the chat template refuses it: {name}{printable(one_line(error, 10_000))}") from None
        if limit:  # raised here, where the error that holds on to the memory is gone
            raise LimitError(
                f"{self.tokenizer.name_or_path}: the chat template {limit}; use that of the original model"
            )
        if len(text) > _MOST_RENDERED and len(text) > (most := _TIMES_INPUT * size()):
            raise RefusedError(f"the chat template makes more than {most:,} characters of it")
        return text

    def _render(self, messages: list[Mapping[str, Any]], tools: Sequence[Any] | None, generation: bool) -> str:
        template = self.tokenizer.get_chat_template(tools=tools)
        dates = {}
        if "strftime_now" in template:
            template = _FIXED_DATE + template
            dates = {"mtr_dates": self._dates}
        text = self.tokenizer.apply_chat_template(
            [_in_parts(message) for message in messages] if self._wants_parts else messages,
            tools=tools,
            chat_template=template,
            add_generation_prompt=generation,
            tokenize=False,
            **self.arguments,
            **dates,
        )
        assert isinstance(text, str)
        return text

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether text is only read as a part of a list, as in templates of models for images and text."""
        if not re.search(r"\btype\b", self.text):
            return False
        plain = {"role": "user", "content": _SENTINEL}
        found = [self._shows_sentinel(message) for message in (plain, _in_parts(plain))]
        return found == [False, True]

    def _shows_sentinel(self, message: Mapping[str, Any]) -> bool:
        try:
            text = self.tokenizer.apply_chat_template(
                [message], tokenize=False, chat_template=self.tokenizer.get_chat_template(), **self.arguments
            )
        except _EXPECTED:
            return False
        return _SENTINEL in text

    @cached_property
    def switches(self) -> dict[str, list[Any]]:
        """Arguments that the template reads and that are not set elsewhere, each with the values worth trying."""
        tree = self._parse()
        if tree is None:
            return {}
        try:
            names = meta.find_undeclared_variables(tree)
        except jinja2.TemplateError:  # a filter of another library
            return {}
        for test in tree.find_all(nodes.Test):  # names that the template gives a default if they are not set
            if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name):
                names.add(test.node.name)
        names -= {*self.tokenizer.special_tokens_map, *RESERVED_ARGUMENTS, "raise_exception", "strftime_now"}
        compared_with: dict[str, list[Any]] = {name: [] for name in sorted(names)}
        for compared in tree.find_all(nodes.Compare):
            constants = [node.value for node in compared.find_all(nodes.Const)]
            lists = [value for value in constants if isinstance(value, (list, tuple))]
            values = [v for v in (*constants, *itertools.chain(*lists)) if isinstance(v, (str, int, float))]
            for name in {node.name for node in compared.find_all(nodes.Name)} & names:
                compared_with[name] += values
        return {
            name: [True, False] if all(isinstance(value, bool) for value in values) else list(dict.fromkeys(values))
            for name, values in compared_with.items()
        }

    @cached_property
    def _dates(self) -> dict[str, str]:
        tree = self._parse()
        constants = tree.find_all(nodes.Const) if tree is not None else ()
        formats = {node.value for node in constants if isinstance(node.value, str) and "%" in node.value}
        return {text: self.day.strftime(text) for text in formats}

    def _parse(self) -> nodes.Template | None:
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        try:
            return environment.parse(_GENERATION_TAG.sub("", self.text))
        except (jinja2.TemplateError, RecursionError):
            return None
