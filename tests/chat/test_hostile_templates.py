"""Claims: a chat template that loops, grows, recurses or fails in any other way ends a command with exit code 2, one
line that says why, soon and with bounded memory, also where it does so only for some conversations; its text does not
steer a terminal.
"""

from __future__ import annotations

import json
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.paths import QUICKSTART
from support.processes import in_processes
from support.rendering import parsed, renderer
from support.rows import conversation_row, copy_tokenizer
from support.templates import CONTENT, template

import mtr.chat.template as template_module
from mtr.chat import limits
from mtr.chat.completion import TAG
from mtr.errors import UserError

LOOP = "{%- for i in range(99999) -%}{%- for j in range(99999) -%}{%- endfor -%}{%- endfor -%}"
GROW = (
    "{%- set text = namespace(all='a') -%}{%- for i in range(60) -%}{%- set text.all = text.all ~ text.all -%}"
    "{%- endfor -%}{{- text.all -}}"
)
PATIENCE, MEMORY = 90.0, 8 << 30
"""Seconds and bytes after which a command is ended here: mtr's own limits are far below."""


def later(hostile: str) -> str:
    """Only for conversations of more than 4 messages, which the trials do not have."""
    return f"{{%- if messages | length > 4 -%}}{hostile}{{%- endif -%}}"


def bounded() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    limits.SECONDS = template_module.SECONDS = 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "head", "says"),
    [
        ("audit", LOOP, "too long"),
        ("inspect", GROW, "memory|too long"),  # on a busy machine time is up first
        ("inspect", later(LOOP), "rows.jsonl, line 1, message 5: "),
        ("train", later(GROW), "rows.jsonl, line 1, message 5: "),
    ],
)
def test_a_command_ends(
    command: str,
    head: str,
    says: str,
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    write_rows: Callable[..., Path],
) -> None:
    model = copy_tokenizer(tmp_path / "base", template(CONTENT, head=head))
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (model / name).write_bytes((QUICKSTART / "base" / name).read_bytes())
    recipe = write_recipe(model={"name_or_path": str(model)}, data={"train": str(write_rows([conversation_row(4)]))})
    asked = model if command == "audit" else recipe
    ended = in_processes(1, command, asked, prepare=bounded, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(says, line)
    assert "the chat template" in line
    assert 0 < ended.memory < 3_500_000, "KiB"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{% if messages %}" * 150 + "{% endif %}" * 150, "IndentationError"),
        ("{% for m in messages %}" * 50 + "{% endfor %}" * 50, "SyntaxError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
        ("{% set n = 10**14 %}{{ 'a' * n }}", "memory"),
        ("{% set n = 10**14 %}{% set x = [0] * n %}", "memory"),
        ("{{ '%99999999999d' % 1 }}", "memory"),
        ("{{ '{:>99999999999999}'.format(1) }}", "memory"),
        ("{{ 'a' | center(10**14) }}", "memory"),
        ("{{ '\\ta'.expandtabs(10**9) * 64 }}", "memory"),
        ("{{ 'word ' * 10**6 }}", "more than"),
        ("a" * 1_000_000, "more than 1,000,000"),
    ],
    ids=lambda value: value[:20],
)
def test_what_a_template_does_is_named(text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        renderer(text + template(CONTENT))
    assert says in str(caught.value)
    assert "the chat template" in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_what_goes_wrong_in_one_turn_is_its_reason() -> None:
    made = renderer(template(CONTENT, head=later("{{- 1 // 0 -}}")))
    turns = made.render(parsed(conversation_row(4, thinking=False)))
    assert [turn.trained for turn in turns] == [True, True, False, False]
    assert turns[2].reason == "the chat template refuses it: ZeroDivisionError: integer division or modulo by zero"


def test_a_turn_that_grows_far_beyond_its_input_is_refused() -> None:
    made = renderer(template(CONTENT, head=later("{{- 'word ' * 10**6 -}}")))
    turns = made.render(parsed(conversation_row(4, thinking=False)))
    assert [turn.trained for turn in turns] == [True, True, False, False]
    assert "the chat template makes more than" in str(turns[2].reason)


def test_a_long_conversation_may_have_a_long_rendering() -> None:
    row = conversation_row(2, thinking=False)
    row["messages"][0]["content"] = "word " * 300_000
    assert all(turn.trained for turn in renderer(template(CONTENT)).render(parsed(row)))


STEERING = "\x1b]0;owned\x07\x1b[31m\u202eden"


def test_a_reason_does_not_steer_a_terminal() -> None:
    written = "\\x1b]0;owned\\x07\\x1b[31m\\u202eden"
    with pytest.raises(UserError, match="owned") as caught:
        renderer("{{ raise_exception('" + STEERING + "') }}")
    assert written in str(caught.value)
    made = renderer(template(CONTENT, head=later("{{ raise_exception('" + STEERING + "') }}")))
    reason = made.render(parsed(conversation_row(4, thinking=False)))[2].reason
    assert reason == f"the chat template refuses it: {written}"


def test_the_audit_does_not_steer_a_terminal(tmp_path: Path, mtr: Callable[..., tuple[int, str, str]]) -> None:
    end = "{{- '<|im_end|>" + "\x9b31m\u202e" + "' -}}"
    _, out, err = mtr("audit", copy_tokenizer(tmp_path / "base", template(CONTENT, end=end)))
    assert "31m" in out
    assert not {"\x1b", "\x9b", "\u202e"} & set(out + err)


def test_a_reason_is_bounded() -> None:
    made = renderer(template(CONTENT, head=later("{{ raise_exception('so ' * 10**6) }}")))
    reason = made.render(parsed(conversation_row(4, thinking=False)))[2].reason
    assert reason is not None
    assert 1000 < len(reason) < 10_100


def test_a_search_for_tags_does_not_take_quadratic_time() -> None:
    before = time.process_time()
    assert TAG.search("<" + "think" * 8000) is None
    assert time.process_time() - before < 0.5
    assert TAG.search("<|START_THINKING|>") is not None


def test_limits_do_not_change_honest_renderings() -> None:
    made = renderer(template(CONTENT))
    row: dict[str, Any] = json.loads(json.dumps(conversation_row(3, thinking=False)))
    text = made.tokenizer.apply_chat_template(row["messages"][:5], tokenize=False, add_generation_prompt=True)
    assert made.tokenizer.decode(list(made.render(parsed(row))[2].prompt_ids)) == text
