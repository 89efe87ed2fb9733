"""Claims: whatever is done to mtr, it does what it should, or says in one line what is wrong and ends with a documented
exit code; in bounded time, and without touching a file of the user's. An attempt that ends otherwise is noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.hostile import SECRET, Place, refused, run, snapshot
from support.paths import QUICKSTART

from hostile.table import TABLE

DOCUMENTED = {*range(8), 130, 137, 138, 143}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = snapshot(QUICKSTART)
    yield tmp_path_factory.mktemp("hostile") / "place"
    assert snapshot(QUICKSTART) == before, "the repository's own model or data was changed"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * attempt.slow) for name, attempt in TABLE.items()]
)
def test_it_ends_well(folder: Path, name: str) -> None:
    ended, problems = run(TABLE[name], folder)
    assert problems == [], ended.said[-2000:]


def test_the_table_is_large_and_every_error_has_its_words() -> None:
    assert len(TABLE) >= 350
    assert [name for name, attempt in TABLE.items() if not set(attempt.codes) <= DOCUMENTED] == []
    assert [name for name, attempt in TABLE.items() if attempt.codes == (2,) and not any(attempt.says)] == []


def fails() -> None:
    raise UnicodeError("no word of mine")


def says(text: str, code: int = 2) -> Callable[[], None]:
    def end() -> None:
        print(text, file=sys.stderr)
        raise SystemExit(code)

    return end


def writes(name: str) -> Callable[[], None]:
    def end() -> None:
        Path(name).write_text("other")
        says("error: the key is wrong")()

    return end


def removes() -> None:
    Path("recipe.yaml").unlink()
    says("error: the key is wrong")()


def hangs() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        (fails, "traceback: UnicodeError"),
        (says("error: the key is wrong", 1), "exit code 1"),
        (says("error: something is wrong"), "'the key' is not said"),
        (says("the key is wrong"), "not one line"),
        (says("error: the key\nis wrong"), "not one line"),
        (says("error: one\nerror: the key"), "not one line"),
        (says(f"error: the key {'x' * 9000}"), "an error of 9"),
        (says("error: the key is \x1b[31mred"), "control characters"),
        (says("error: the key is \u202egnp"), "control characters"),
        (says(f"error: the key {SECRET}"), "the token is shown"),
        (says("Traceback (most recent call last)\nerror: the key"), "a traceback"),
        (writes("rows.jsonl"), "rows.jsonl is changed"),
        (writes("home/cache"), "home/cache is new"),
        (removes, "recipe.yaml is gone"),
        (hangs, "no end after"),
    ],
)
def test_what_ends_otherwise_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: Callable[[], None], problem: str
) -> None:
    def prepare(_: Place) -> list[object]:
        monkeypatch.setattr("mtr.__main__.main", behaviour)
        return ["train", "recipe.yaml"]

    _, problems = run(refused("", prepare, "the key", seconds=0.2), tmp_path / "place")
    assert [found for found in problems if problem in found]
