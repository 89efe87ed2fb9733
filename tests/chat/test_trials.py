"""Claims: the audit finds by rendering alone what each template does, and finds it once.

The templates are in templates.py; each names what must be found.
"""

from __future__ import annotations

import dataclasses
import json
from datetime import date as Date
from typing import Any

import pytest
import transformers
from support.paths import QUICKSTART
from support.templates import BEHAVIOURS, CONTENT, PROMPT, template, thinking, tokenizer

from mtr.chat import trials
from mtr.chat.findings import Findings
from mtr.chat.template import Template
from mtr.chat.trials import find
from mtr.errors import UserError

DAY = Date(2025, 1, 2)


def found(name: str, **arguments: Any) -> Findings:
    behaviour, loaded = BEHAVIOURS[name], tokenizer(name)
    made = Template(loaded, {**behaviour.arguments, **arguments}, DAY)
    return find(made, [loaded.convert_tokens_to_ids(stop) for stop in behaviour.stops], behaviour.tags)


def as_told(field: str, value: Any) -> Any:
    """A finding in the words of templates.py."""
    if field in ("answer_stop", "call_stop"):
        return (value.text, value.source, value.stops_inference)
    if field == "switches":
        return [(switch.argument, switch.value, switch.effects[0]) for switch in value]
    return value


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_findings(name: str) -> None:
    result = found(name)
    assert {f: as_told(f, getattr(result, f)) for f in BEHAVIOURS[name].found} == BEHAVIOURS[name].found


def test_a_template_is_audited_once_for_its_arguments_and_date(monkeypatch: pytest.MonkeyPatch) -> None:
    audited = []
    try_out = trials._try_out

    def counting(*keys: Any) -> Findings:
        audited.append(keys)
        return try_out(*keys)

    monkeypatch.setattr(trials, "_CACHE", {})
    monkeypatch.setattr(trials, "_try_out", counting)
    loaded = tokenizer("a switch closes it")
    makings: list[tuple[Template, list[int], Any]] = [
        (Template(loaded, {}, DAY), [], None),
        (Template(loaded, {"enable_thinking": False}, DAY), [], None),
        (Template(loaded, {}, Date(2025, 1, 3)), [], None),
        (Template(tokenizer("history thinking is kept"), {}, DAY), [], None),
        (Template(loaded, {}, DAY), [0], None),
        (Template(loaded, {}, DAY), [], ("[", "]")),
    ]
    first = [find(*making) for making in makings]
    assert len(audited) == len(makings)
    assert [find(*making) for making in makings] == first
    assert len(audited) == len(makings)
    assert [result.prompt_ends for result in first[:2]] == ["nothing", "closes thinking"]


def test_findings_are_plain_data() -> None:
    for name in BEHAVIOURS:
        assert json.loads(json.dumps(dataclasses.asdict(found(name))))["prompt_ends"]


def test_what_changes_with_an_argument() -> None:
    name = "a switch keeps it in history"
    assert found(name).history == "only the final message"
    assert found(name, keep_all=True).history == "always"
    name = "closed, and a switch opens it"
    assert found(name).openers == ['template: {deliberate: "yes"}']
    assert found(name, deliberate="yes").openers == []
    assert found(name, deliberate="yes").prompt_ends == "opens thinking"


def made_of(text: str) -> Template:
    loaded = transformers.AutoTokenizer.from_pretrained(str(QUICKSTART / "base"))
    loaded.chat_template = text
    return Template(loaded, {}, DAY)


def test_values_that_the_template_lists_are_tried() -> None:
    closes = "{%- if effort not in ['low', 'high'] -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
    default = "{%- if effort is not defined -%}{%- set effort = 'none' -%}{%- endif -%}"
    result = find(made_of(template(thinking() + CONTENT, PROMPT + closes, head=default)))
    assert result.openers == ['template: {effort: "low"}', 'template: {effort: "high"}']


def test_a_template_for_tools_only() -> None:
    result = find(made_of("{%- for tool in tools -%}{{- tool.function.name -}}{%- endfor -%}" + template(CONTENT)))
    assert (result.history_inline, result.tools) == ("always", "rendered")


def test_a_template_that_fails_is_an_error() -> None:
    with pytest.raises(UserError, match="fails on one user message: the chat template refuses it: never"):
        find(made_of("{{- raise_exception('never') -}}"))
