"""Claims: with NO_COLOR or TERM=dumb nothing has an escape code, on a terminal too; text of others never sends one."""

from __future__ import annotations

import io
import os
import pty
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.rows import conversation_row

from mtr.recipe.loading import load_recipe
from mtr.training.loop import train

Write = Callable[..., Path]
PLAIN = [{"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def trained_on_a_terminal(recipe: Path, monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What a run writes to standard error where that is a terminal."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        train(load_recipe(recipe))
    return terminal.getvalue()


def on_a_terminal(*arguments: str, **environment: str) -> bytes:
    """What a command writes to the terminal that it is started on."""
    written = b""
    process, master = pty.fork()
    if process == 0:
        keep = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
        os.execve(sys.executable, [sys.executable, "-m", "mtr", *arguments], {**keep, **environment})
    while True:
        try:
            chunk = os.read(master, 1 << 16)
        except OSError:  # Linux says so at the end
            chunk = b""
        if not chunk:
            break
        written += chunk
    os.waitpid(process, 0)
    os.close(master)
    return written


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("environment", PLAIN, ids=" ".join)
def test_help_and_errors_on_a_terminal(environment: dict[str, str]) -> None:
    for arguments, words in ((["train", "--help"], b"--overwrite"), (["train", "none.yaml"], b"no such recipe file")):
        written = on_a_terminal(*arguments, **environment)
        assert words in written
        assert b"\x1b" not in written
    assert b"\x1b[" in on_a_terminal("train", "--help", TERM="xterm"), "the other direction"


@pytest.mark.parametrize("environment", [*PLAIN, {"TERM": "xterm"}], ids=" ".join)
def test_a_run_on_a_terminal(
    write_recipe: Write, write_rows: Write, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    rows = write_rows([conversation_row(turns=1) for _ in range(2)])
    recipe = write_recipe(data={"train": str(rows)}, training={"conversations_per_step": 1})
    written = trained_on_a_terminal(recipe, monkeypatch, **environment)
    if environment in PLAIN:
        assert "\x1b" not in written
        assert "step 1/2  loss " in written, "progress is lines"
    else:
        assert "\x1b" in written, "the other direction"


def test_names_of_others_are_written_out(
    write_recipe: Write, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows([conversation_row(turns=1)], "a\x1b]0;title\x07\u202eb.jsonl")
    training = {"max_steps": 1, "conversations_per_step": 1, "output_dir": str(tmp_path / "r\x1b[31mun")}
    recipe = write_recipe(data={"train": str(rows), "eval": [str(rows), str(rows)]}, training=training)
    written = trained_on_a_terminal(recipe, monkeypatch, NO_COLOR="1")
    assert "r\\x1b[31mun" in written
    assert "a\\x1b]0;title\\x07\\u202eb.jsonl" in written
    assert not any(character in written for character in "\x1b\x07\u202e")
