"""Claims: a template with which nothing can be rendered is an error in one line; a date that a template prints is the
run's, however the template asks for it, and no other text changes.
"""

from __future__ import annotations

from datetime import date as Date

import pytest
from support.rendering import ROWS, parsed, renderer
from support.rows import conversation_row
from support.templates import CONTENT, template

from mtr.errors import UserError


def test_no_chat_template_is_an_error() -> None:
    with pytest.raises(UserError, match="no chat template"):
        renderer("")


def test_broken_chat_template_is_an_error() -> None:
    with pytest.raises(UserError, match="chat template fails"):
        renderer("{%- for message in messages -%}")


@pytest.mark.parametrize("call_of", ["strftime_now('{}')", 'strftime_now("{}")', "strftime_now(  form )"])
def test_date_is_held_fixed(call_of: str) -> None:
    """However the template asks for it."""
    text = "{%- set form = '%d %b %Y' -%}{{- " + call_of.format("%d %b %Y") + " + '\\n' -}}"
    dated = template(CONTENT, head=text)
    for date, printed in (("2024-02-03", "03 Feb 2024"), (None, Date.today().strftime("%d %b %Y"))):
        made = renderer(dated, date=date)
        (turn,) = made.render(parsed(conversation_row(1, thinking=False)))
        assert made.tokenizer.decode(list(turn.prompt_ids)).startswith(printed + "\n")
        assert made.prompt([{"role": "user", "content": "Ana gets 2 more."}]) == list(turn.prompt_ids)


def test_a_date_that_cannot_be_fixed_is_refused() -> None:
    with pytest.raises(UserError, match="does not write out"):
        renderer(template(CONTENT, head="{{- strftime_now('%d' ~ ' %b') -}}"))


def test_white_space_before_the_template_survives_the_fixed_date() -> None:
    made = renderer("  \n" + template(CONTENT, head="{{- strftime_now('%Y') -}}"))
    plain = renderer("  \n" + template(CONTENT, head=f"{{{{- '{Date.today().year}' -}}}}"))
    assert made.render(parsed(ROWS["no thinking"])) == plain.render(parsed(ROWS["no thinking"]))
