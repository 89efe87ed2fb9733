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

from mtr.errors import UserError, one_line
from mtr.recipe.sections import RESERVED_ARGUMENTS

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
# This macro shadows transformers' own strftime_now, so that the date stays that of the run when it spans midnight. A
# template can only be given plain data, so the macro looks the result up by the format string.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ mtr_dates[format] if format in mtr_dates else "
    "raise_exception('strftime_now is given a format that the template does not write out: ' ~ format) }}"
    "{% endmacro %}\n"
)


class RefusedError(Exception):
    """A turn cannot be rendered correctly; the text is the reason."""


class Template:
    """The template, ready to render; immutable."""

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None, day: Date | None = None) -> None:
        """
        Raises:
            UserError: the tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; "
                "put a chat_template.jinja beside it (the instruct variant of the model has one)"
            )
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self.day = day or Date.today()
        written = tokenizer.chat_template
        self.text = "\n".join(written.values()) if isinstance(written, dict) else str(written)
        """All of it; some tokenizers have a second template for conversations with tools."""
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
            RefusedError: the template raises; with its error message.
        """
        template = self.tokenizer.get_chat_template(tools=tools)
        dates = {}
        if "strftime_now" in template:
            template = _FIXED_DATE + template
            dates = {"mtr_dates": self._dates}
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=template,
                add_generation_prompt=generation,
                tokenize=False,
                **self.arguments,
                **dates,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise RefusedError(f"the chat template refuses it: {one_line(error, 10_000)}") from None
        assert isinstance(text, str)
        return text

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
        except jinja2.TemplateError:
            return None
