"""Claims: while a run trains, the terminal shows the loss so far as a curve and the time that is left; without a
terminal each line ends in the time left.
"""

from __future__ import annotations

import io
import math
import re
import sys
from typing import Any

import pytest
from support.paths import QUICKSTART

from mtr.console import ASCII_BLOCKS, BLOCKS
from mtr.recipe.loading import recipe_of_tokenizer
from mtr.training.pace import Pace, sparkline, time_left
from mtr.training.progress import RunDisplay


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 8, ""),
        ([1.0], 8, "▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, BLOCKS),
        ([7, 6, 5, 4, 3, 2, 1, 0], 8, BLOCKS[::-1]),
        ([0, 0, 7, 7], 2, "▁█"),
        ([5.0] * 9, 3, "▁▁▁"),
        ([0, None, 7], 3, "▁ █"),
        ([0, math.nan, 7], 3, "▁x█"),
        ([0, math.inf, 7, 7], 2, "x▁"),
        ([None, None], 2, "  "),
    ],
)
def test_a_curve_in_a_line(values: list[float | None], width: int, drawn: str) -> None:
    assert sparkline(values, width) == drawn
    assert len(sparkline(values, width, ASCII_BLOCKS)) == len(drawn)
    assert sparkline(values, width, ASCII_BLOCKS).isascii()


@pytest.mark.parametrize("length", [1, 7, 20, 999])
def test_a_curve_has_every_value_in_it(length: int) -> None:
    """A single high value shows, wherever it is."""
    for place in range(0, length, max(length // 7, 1)):
        values: list[float | None] = [0.0] * length
        values[place] = 1.0
        assert len(sparkline(values, 20)) == min(length, 20)
        assert ("█" in sparkline(values, 20)) == (length > 1)


def test_the_time_left_is_that_of_the_recent_steps() -> None:
    pace = Pace(num_steps=100, start=0, now=0.0)
    assert pace.left(5.0) is None
    pace.reached(1, 60.0)  # with the loading of the data and the first compilation
    assert pace.left(60.0) == pytest.approx(99 * 60)
    for step in range(2, 11):
        pace.reached(step, 60.0 + 2 * (step - 1))
    assert pace.left(78.0) == pytest.approx(90 * 2), "the first step is left out"
    assert pace.left(79.5) == pytest.approx(90 * 2 - 1.5), "it counts down"
    assert pace.left(9999.0) == 0
    for step in range(11, 71):
        pace.reached(step, 78.0 + 5 * (step - 10))
    assert pace.left(378.0) == pytest.approx(30 * 5), "what was long ago does not count"


def test_the_time_left_of_a_run_that_is_continued() -> None:
    pace = Pace(num_steps=100, start=90, now=1000.0)
    pace.reached(92, 1004.0)
    assert pace.left(1004.0) == pytest.approx(16)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0 s"),
        (0.2, "1 s"),
        (59.0, "59 s"),
        (60.0, "1 min 00 s"),
        (599.0, "9 min 59 s"),
        (600.0, "10 min"),
        (3599.4, "59 min"),
        (3600.0, "1 h 00 min"),
        (86_400.0, "1 d 0 h"),
        (100_000.0, "1 d 3 h"),
    ],
)
def test_a_time_in_words(seconds: float, words: str) -> None:
    assert time_left(seconds) == words


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def line(step: int, loss: float | None) -> dict[str, Any]:
    rates = {"tokens_per_second": 1000.0, "per_turn_tokens_per_second": 2000.0}
    return {"step": step, "loss": loss, "grad_norm": 0.5, "learning_rate": 1e-3, **rates}


def run(monkeypatch: pytest.MonkeyPatch, file: io.StringIO, losses: list[float | None], columns: int = 80) -> str:
    """What a run of ten steps, two seconds each, writes to standard error."""
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    now = [0.0]
    with monkeypatch.context() as patch:
        display = RunDisplay(recipe_of_tokenizer(str(QUICKSTART / "base"), None), 10, 0, enabled=True)
        patch.setattr("mtr.training.progress.time.monotonic", lambda: now[0])
        with display:
            for step, loss in enumerate(losses, 1):
                now[0] += 2.0
                display.stepped(line(step, loss))
    return file.getvalue()


def test_on_a_terminal_the_loss_is_a_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    written = run(monkeypatch, Terminal(), [4.0, 3.0, None, 1.0])
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r", "\n").split("\n")
    shown = next(text for text in reversed(last) if "training" in text)
    assert "4/10" in shown
    assert "loss 1.0000 █▆ ▁" in shown
    assert "12 s left" in shown
    assert max(map(len, last)) <= 80


def test_on_a_narrow_terminal_there_is_no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    written = run(monkeypatch, Terminal(), [4.0, 1.0], columns=60)
    assert "loss 1.0000" in written
    assert not set(written) & set(BLOCKS)


def test_without_a_terminal_each_line_has_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run(monkeypatch, io.StringIO(), [4.0, 3.0, None, *[1.0] * 7]).splitlines()
    assert len(lines) == 10
    assert lines[3] == (
        "step 4/10  loss 1.0000  grad norm 0.500  lr 1.00e-03  1,000 tokens/s  (2,000 per-turn)  12 s left"
    )
    assert [text.rpartition("  ")[2] for text in lines] == [
        *[f"{2 * (9 - i)} s left" for i in range(9)],
        "(2,000 per-turn)",
    ]
    assert not set("".join(lines)) & set(BLOCKS)


def test_long_lines_are_broken_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"/runs/{'x' * 90}"
    for file in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", file)
        monkeypatch.setenv("COLUMNS", "60")
        display = RunDisplay(recipe_of_tokenizer(str(QUICKSTART / "base"), None), 10, 0, enabled=True)
        display.note("throughput", "many tokens/s; one pass per turn would need more of them for the same work")
        display.note("adapter", path)
        lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).splitlines()
        if file.isatty():
            assert lines[1].startswith(" " * 14)
            assert len(lines[0]) <= 60
        assert sum(path in shown for shown in lines) == 1, "a path stays whole"
        assert len(lines) == (4 if file.isatty() else 2)
