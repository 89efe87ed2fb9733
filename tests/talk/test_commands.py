"""Claims: a line that begins with a slash is a command, known or named after its nearest; /save replaces nothing; a
paste and lines that end in a backslash are one message.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtr.data.parsing import parse_row
from mtr.errors import UserError
from mtr.talk.commands import COMMANDS, Command, carry_out, help_lines, parse_command
from mtr.talk.session import Answer, Session
from mtr.talk.typed import read_message, type_line

MESSAGES = [
    {"role": "user", "content": "Paul has 23 nuts."},
    {"role": "assistant", "content": "Paul has 23 nuts now.", "reasoning_content": "Start: 23."},
]


@pytest.fixture
def session() -> Session:
    """After one turn, without a model."""

    def prompt(messages: list[dict[str, Any]]) -> list[int]:
        return [0] * sum(len(message["content"]) for message in messages)

    speakers: Any = SimpleNamespace(
        voices=[SimpleNamespace(name="tuned")], positions=100, renderer=SimpleNamespace(prompt=prompt)
    )
    made = Session(speakers, None)  # type: ignore[arg-type]
    made.talks[0].messages = [*MESSAGES]
    made.answers = [Answer("tuned", "Start: 23.", "Paul has 23 nuts now.", "stop", 17, 16, 9, 2.0)]
    return made


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("/help", Command("help")),
        ("/save  out.jsonl ", Command("save", "out.jsonl")),
        ("/system You count. Well.", Command("system", "You count. Well.")),
        ("Paul has 23 nuts.", None),
        (" /save out.jsonl", None),
        ("", None),
    ],
)
def test_lines_are_read(line: str, command: Command | None) -> None:
    assert parse_command(line) == command


@pytest.mark.parametrize(
    ("line", "hint"), [("/rest", "did you mean /reset?"), ("/frobnicate 3", "/help lists them"), ("/", "is no command")]
)
def test_a_wrong_command_names_the_nearest(line: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        parse_command(line)
    assert hint in str(error.value)


def test_help_names_every_command_within_80_columns() -> None:
    lines = help_lines()
    assert all(len(line) <= 80 for line in lines)
    assert [name for name in COMMANDS if not any(line.startswith(f"/{name} ") for line in lines)] == []


def test_undo_and_reset(session: Session) -> None:
    assert carry_out(session, Command("undo")) == ["taken back: Paul has 23 nuts."]
    assert carry_out(session, Command("undo")) == ["there is nothing to take back"]
    session.system = "Count."
    assert carry_out(session, Command("reset")) == ["a new conversation, with the same system prompt"]


def test_the_system_prompt_is_shown_set_and_removed(session: Session) -> None:
    assert carry_out(session, Command("system")) == ["there is no system prompt"]
    carry_out(session, Command("system", "Count well."))
    assert session.messages[0] == {"role": "system", "content": "Count well."}
    assert carry_out(session, Command("system")) == ["system prompt: Count well."]
    carry_out(session, Command("system", "off"))
    assert session.messages == MESSAGES


def test_tokens_are_those_of_the_prompt(session: Session) -> None:
    prompt, answer, after = carry_out(session, Command("tokens"))
    assert prompt.split()[:3] == ["prompt", "17", "tokens,"]
    assert "16 tokens, 9 of them thinking, in 2.0 s (8 tokens/s)" in answer
    assert "38 tokens before your message; 62 of 100 left" in after


def test_a_conversation_is_saved_as_a_row_and_nothing_is_replaced(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    (line,) = carry_out(session, Command("save", str(file)))
    assert line == f"saved: {file}, a row with 1 turn"
    (row,) = file.read_text().splitlines()
    assert parse_row(json.loads(row), "row").messages[1].thinking == "Start: 23."
    session.system = "Count."
    with pytest.raises(UserError, match="exists, and is not replaced"):
        carry_out(session, Command("save", str(file)))
    assert file.read_text() == row + "\n"
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        carry_out(session, Command("save", str(tmp_path / "none" / "x.jsonl")))
    for name in ("~nobody-of-this-name/x.jsonl", "a\0b"):
        with pytest.raises(UserError, match="cannot be written"):
            carry_out(session, Command("save", name))
    with pytest.raises(UserError, match="needs the name of a file"):
        carry_out(session, Command("save"))
    session.reset()
    with pytest.raises(UserError, match="nothing has been said yet"):
        carry_out(session, Command("save", str(tmp_path / "empty.jsonl")))
    assert not (tmp_path / "empty.jsonl").exists()


def typing(*lines: str) -> Callable[[str], str]:
    left = list(lines)

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return read


@pytest.mark.parametrize(
    ("lines", "waits", "message"),
    [
        (("Hello", "next"), (False,), "Hello"),
        (("one\\", "two\\", "three", "next"), (False,), "one\ntwo\nthree"),
        (("pasted", "", "  more"), (True, True, False), "pasted\n\n  more"),
        (("one\nbracketed paste", "next"), (False,), "one\nbracketed paste"),
        (("one\\",), (), "one"),
        ((), (), None),
    ],
)
def test_a_message_is_what_belongs_together(
    lines: tuple[str, ...], waits: tuple[bool, ...], message: str | None
) -> None:
    more = iter(waits)
    assert read_message(typing(*lines), "> ", lambda: next(more)) == message


def test_the_prompt_is_beside_answers_that_go_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def read(prompt: str) -> str:
        asked.append(prompt)
        return "Hello"

    monkeypatch.setattr("builtins.input", read)
    assert type_line("> ") == "Hello"
    assert capsys.readouterr() == ("", "> ")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert type_line("> ") == "Hello"
    assert (asked, capsys.readouterr()) == (["", "> "], ("", ""))


@pytest.mark.parametrize("read", [lambda _: "a \udcff", lambda _: b"a \xff".decode()])
def test_bytes_that_are_no_text_are_said(monkeypatch: pytest.MonkeyPatch, read: Callable[[str], str]) -> None:
    """Python keeps them or fails, as the locale has it."""
    monkeypatch.setattr("builtins.input", read)
    with pytest.raises(UserError, match="what was typed is not text in UTF-8"):
        type_line("> ")
