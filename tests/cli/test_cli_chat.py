"""Claims: `mtr chat` answers on standard output and says everything else beside it, with a terminal and without; what a
model says cannot steer the terminal; wrong options and folders are answered before anything is loaded.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from support.commands import check_refused
from support.runs import trained_run

import mtr.cli.chat
from mtr.cli.views.chat import ColumnsView, StackedView, folded, note_on
from mtr.cli.views.flow import Flow
from mtr.errors import UserError
from mtr.talk.loading import Speakers
from mtr.talk.session import Answer

Mtr = Callable[..., tuple[int, str, str]]
QUESTIONS = ("Paul has 23 nuts.", "He buys 12 more.")


class Terminal(io.StringIO):
    """Empty, and may be closed, as a process that starts does it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch, speakers: dict[bool, Speakers]) -> None:
    """The model of `run` is loaded for the first test that needs it."""
    load = mtr.cli.chat._load

    def once(found: Any, compare: bool) -> Speakers:
        if compare not in speakers:
            speakers[compare] = load(found, compare)
        return speakers[compare]

    monkeypatch.setattr(mtr.cli.chat, "_load", once)


@pytest.fixture(scope="module")
def speakers() -> dict[bool, Speakers]:
    return {}


@pytest.fixture
def ask(mtr: Mtr, run: Path, loaded_once: None) -> Mtr:
    def go(*arguments: object) -> tuple[int, str, str]:
        return mtr("chat", run, "--max-new-tokens", 48, *arguments)

    return go


@pytest.fixture
def type_(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`type_("Hello", "/quit")` types these lines in a terminal."""

    def lines(*typed: str) -> None:
        left: Iterator[str] = iter(typed)

        def read(prompt: str) -> str:
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("sys.stdin", Terminal())

    return lines


def answers_of(ask: Mtr) -> list[dict[str, Any]]:
    code, out, _ = ask("--prompt", QUESTIONS[0], "--prompt", QUESTIONS[1], "--json", "--compare")
    assert code == 0
    return [json.loads(line) for line in out.splitlines()]


def test_questions_are_answered_one_after_the_other(ask: Mtr) -> None:
    first, second = answers_of(ask)
    assert (first["question"], second["question"]) == QUESTIONS
    assert second["tuned"]["prompt_tokens"] > first["tuned"]["prompt_tokens"]
    code, out, err = ask("--prompt", QUESTIONS[0], "--prompt", QUESTIONS[1])
    assert (code, out) == (0, f"{first['tuned']['response']}\n{second['tuned']['response']}\n")
    assert err == f"{first['tuned']['thinking']}\n{second['tuned']['thinking']}\n"
    code, _, err = ask("--prompt", QUESTIONS[0], "--fold")
    assert err == f"▸ thinking: {first['tuned']['thinking_tokens']} tokens\n"


def test_without_a_terminal_standard_input_is_the_question(ask: Mtr, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = answers_of(ask)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTIONS[0]}\n"))
    assert ask()[1] == f"{first['tuned']['response']}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTIONS[0]}\n"))
    code, out, _ = ask("--compare")
    assert (code, out) == (0, f"base\n{first['base']['response']}\ntuned\n{first['tuned']['response']}\n")


def test_a_conversation_in_a_terminal(ask: Mtr, type_: Callable[..., None], tmp_path: Path) -> None:
    first, second = (turn["tuned"] for turn in answers_of(ask))
    saved = tmp_path / "saved.jsonl"
    commands = ["/think", "/tokens", f"/save {saved}", "/undo", "/retry", "/quit"]
    type_(QUESTIONS[0], "/rest", "/think", QUESTIONS[1], *commands)
    code, out, err = ask()
    assert code == 0
    said = [first["response"], second["response"], first["response"]]
    assert [line for line in out.splitlines() if line] == said
    for words in (
        "LoRA adapter",
        "greedy, at most 48 new tokens",
        "/rest is no command; did you mean /reset?",
        "thinking is folded",
        f"▸ thinking: {second['thinking_tokens']} tokens",
        "thinking is shown",
        f"{second['prompt_tokens']} tokens, as the template renders the messages",
        "a row with 2 turns",
        f"taken back: {QUESTIONS[1]}",
    ):
        assert words in err, words
    messages = json.loads(saved.read_text())["messages"]
    assert [m.get("reasoning_content") for m in messages[1::2]] == [first["thinking"], second["thinking"]]


def test_ctrl_c_and_ctrl_d_at_the_prompt(ask: Mtr, monkeypatch: pytest.MonkeyPatch, type_: Callable[..., None]) -> None:
    type_()
    pressed: list[type[BaseException]] = [KeyboardInterrupt, EOFError]

    def read(prompt: str) -> str:
        raise pressed.pop(0)

    monkeypatch.setattr("builtins.input", read)
    code, out, err = ask()
    assert (code, out.strip()) == (0, ""), err
    assert "(Ctrl-D or /quit leaves)" in err


def test_an_answer_that_never_comes_is_an_error(ask: Mtr) -> None:
    code, out, err = ask("--prompt", QUESTIONS[0], "--max-new-tokens", 4)
    assert (code, out) == (2, "")
    assert "no answer after 4 tokens, only thinking: raise --max-new-tokens" in err


def test_an_answer_that_fills_the_context_is_not_blamed_on_the_limit(
    ask: Mtr, speakers: dict[bool, Speakers], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = answers_of(ask)
    code, _, _ = ask("--prompt", QUESTIONS[0])
    assert code == 0
    small = replace(speakers[False], positions=first["tuned"]["prompt_tokens"] + 4)
    monkeypatch.setitem(speakers, False, small)
    code, _, err = ask("--prompt", QUESTIONS[0])
    assert code == 2
    assert "no answer after 4 tokens, only thinking: the context is full; ask for less" in err


@pytest.mark.parametrize("option", [(), ("--json",), ("--compare",)])
def test_after_ctrl_c_no_more_is_asked(ask: Mtr, monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...]) -> None:
    @contextmanager
    def pressed() -> Iterator[Callable[[], bool]]:
        yield lambda: True

    monkeypatch.setattr("mtr.talk.session.stoppable", pressed)
    code, out, err = ask("--prompt", QUESTIONS[0], "--prompt", QUESTIONS[1], *option)
    assert code == 130
    assert "error" not in err
    if option == ("--json",):
        (line,) = out.splitlines()
        assert json.loads(line)["tuned"]["finish"] == "interrupted"


@pytest.mark.parametrize("view", [StackedView, ColumnsView])
def test_what_fails_half_way_is_shown_to_its_end(view: type[StackedView | ColumnsView]) -> None:
    """A picture that is still drawn would hide the cursor and stand in the way of the next answer."""
    out = Console(file=Screen(), width=100, force_terminal=True)
    made = view(out, True)

    def ask(question: str, watch: Callable[[Answer], None]) -> list[Answer]:
        watch(Answer("tuned"))
        watch(Answer("tuned", "Hm", completion_tokens=1, thinking_tokens=1))
        watch(Answer("tuned", "Hm", "", "interrupted", 9, 1, 1))
        raise UserError("no memory")

    session: Any = SimpleNamespace(ask=ask)
    with pytest.raises(UserError):
        mtr.cli.chat._ask(session, made, "?")
    assert isinstance(out.file, Screen)
    assert out.file.getvalue().count("\x1b[?25l") == out.file.getvalue().count("\x1b[?25h") > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none",), "none: no such folder; give the output_dir of a run"),
        (("{run}", "--prompt", "x", "--temperature", "-1"), "--temperature: -1 is not between 0 and 100"),
        (("{run}", "--prompt", "x", "--top-p", "0"), "--top-p: 0 is not above 0 and at most 1"),
        (("{run}", "--prompt", "x", "--seed", "-3"), "--seed: -3 is not between 0 and 2**62"),
        (("{run}", "--prompt", "a \udcff"), "--prompt is not text in UTF-8"),
        (("{run}", "--prompt", "x", "--system", "a \udcff"), "--system is not text in UTF-8"),
        (("{run}", "--json"), "--json needs --prompt, or a question on standard input"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    mtr: Mtr, run: Path, type_: Callable[..., None], arguments: tuple[str, ...], words: str
) -> None:
    type_()
    check_refused(mtr("chat", *(argument.format(run=run) for argument in arguments)), words)


def test_an_empty_question_is_refused(mtr: Mtr, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    check_refused(mtr("chat", run), "standard input is empty")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_are_refused(mtr: Mtr, run: Path, monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a \xff"), "utf-8", errors))
    check_refused(mtr("chat", run), "standard input is not text in UTF-8; convert it")


# --- what is shown ----------------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """A terminal without colours."""

    def isatty(self) -> bool:
        return True


def screen(width: int) -> Console:
    return Console(file=Screen(), width=width, soft_wrap=True, highlight=False, force_terminal=False)


def shown(out: Console) -> list[str]:
    assert isinstance(out.file, Screen)
    return [line.rstrip() for line in out.file.getvalue().split("\n")]


DONE = Answer("tuned", "One two three four five.", "Six seven eight nine.\nTen.", "stop", 9, 20, 8, 1.0)


def play(view: StackedView | ColumnsView, answer: Answer) -> None:
    """As it arrives, a character at a time."""
    view.watch(Answer(answer.voice))
    for end in range(1, len(answer.thinking) + 1):
        view.watch(Answer(answer.voice, answer.thinking[:end], completion_tokens=end, thinking_tokens=8))
    for end in range(1, len(answer.response) + 1):
        view.watch(Answer(answer.voice, answer.thinking, answer.response[:end], None, 9, 30 + end, 8))
    view.watch(answer)


def test_thinking_stands_behind_a_bar_and_lines_break_between_words() -> None:
    out = screen(16)
    play(StackedView(out, fold=False), DONE)
    assert shown(out) == ["│ One two three", "│ four five.", "Six seven eight", "nine.", "Ten.", ""]


def test_folded_thinking_is_a_line_with_its_length() -> None:
    out = screen(40)
    view = StackedView(out, fold=True, named=True)
    play(view, DONE)
    assert shown(out) == ["tuned", "▸ thinking: 8 tokens", "Six seven eight nine.", "Ten.", ""]
    view.show_thinking([DONE])
    assert shown(out)[-2] == "│ One two three four five."
    assert folded(Answer("x", thinking_tokens=1)) == "▸ thinking: 1 token"


def test_two_models_stand_side_by_side() -> None:
    out = screen(100)
    view = ColumnsView(out, fold=False)
    play(view, Answer("base", "Hm.", "No.", "length", 9, 5, 3))
    play(view, DONE)
    view.end()
    lines = shown(out)
    assert [line.split() for line in lines[:3]] == [
        ["base", "tuned"],
        ["│", "Hm.", "│", "One", "two", "three", "four", "five."],
        ["No.", "Six", "seven", "eight", "nine."],
    ]
    assert len({line.index(word) for line, word in zip(lines, ("tuned", "│ One", "Six"), strict=False)}) == 1
    assert "(cut after 5 tokens" in lines[3]


@pytest.mark.parametrize("view", [StackedView, ColumnsView])
def test_an_answer_cannot_steer_the_terminal(view: type[StackedView | ColumnsView]) -> None:
    hostile = "\x1b[2J\x1b]0;title\x07 \x9b31m \u202e[bold]x[/bold]\r\b"
    out = screen(120)
    made = view(out, False)
    play(made, Answer("tuned", hostile, hostile, "stop", 9, 30, 8))
    made.end()
    text = "\n".join(shown(out))
    assert not any(character in text for character in "\x1b\x07\x9b\u202e\r\b")
    assert text.count(r"\x1b[2J\x1b]0;title\x07") == 2
    assert text.count("[bold]x[/bold]") == 2


def test_wide_characters_are_shown_as_they_come_and_break_at_the_edge() -> None:
    out = screen(8)
    flow = Flow(out)
    flow.show("漢字漢")
    assert shown(out) == ["漢字漢"]
    flow.show("漢字漢字漢字")
    flow.end()
    assert shown(out) == ["漢字漢字", "漢字", ""]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (DONE, None),
        (Answer("x", "Hm.", "", "stop"), "(an empty answer)"),
        (Answer("x", "", "So", "interrupted"), "(stopped)"),
        (Answer("x", "Hm", "", "interrupted"), "not kept in the conversation, /retry asks again"),
        (Answer("x", "Hm", "", "length", 9, 48), "cut after 48 tokens"),
    ],
)
def test_the_end_of_an_answer_is_said(answer: Answer, words: str | None) -> None:
    note = note_on(answer)
    assert note is None if words is None else words in str(note)


def test_ctrl_c_stops_between_two_tokens() -> None:
    import signal

    from mtr.talk.interrupts import stoppable

    before = signal.getsignal(signal.SIGINT)
    with stoppable() as is_stopped:
        assert not is_stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert is_stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
