"""Claims: `mtr report` shows runs within 80 columns, as JSON, as a page and as a picture; it writes what is named and
nothing else; a bad folder or option is one line; a real run is reported as its summary said.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.commands import check_refused
from support.paths import QUICKSTART
from support.reports import LONG, played, write_run

from mtr.cli.views.report import show_report, sparkline
from mtr.recipe.loading import load_recipe
from mtr.report.report import report
from mtr.training.loop import train

Mtr = Callable[..., tuple[int, str, str]]
HOSTILE = "\x1b[31m[bold]\u202ename"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    one = write_run(tmp_path / "one", generated=[(0, played(False)), (20, played(True))])
    return [one, write_run(tmp_path / "a-run-with-quite-a-long-name", 12, rate=1e-2, result=False)]


def shown(found: dict[str, Any], width: int = 80) -> list[str]:
    """What a terminal of this width is given, without colours."""
    file = io.StringIO()
    show_report(found, Console(file=file, width=width, soft_wrap=True, highlight=False))
    return file.getvalue().splitlines()


def test_the_summary_holds_what_one_wants_to_know(mtr: Mtr, runs: list[Path]) -> None:
    before = contents(runs[0].parent)
    code, out, err = mtr("report", *runs)
    assert (code, err) == (0, "")
    for words in (
        "✓ finished, 20 steps",
        "✗ ended after 12 of 20 steps",
        "training loss",
        "2.5500 to 0.7000",
        "lowest eval loss",
        "75.0%",
        f"40 turns not trained: {LONG}",
        "training.learning_rate",
        "before   wrong ?",
        "after    right Ana has 5.",
    ):
        assert words in out, words
    assert contents(runs[0].parent) == before


@pytest.mark.parametrize("width", [80, 160])
def test_every_line_fits_the_terminal(runs: list[Path], width: int) -> None:
    for number in (1, 2):
        lines = shown(report(runs[:number]), width)
        assert max(map(len, lines)) <= width
        assert len(lines) > 20


def test_of_many_runs_the_main_numbers_are_shown(tmp_path: Path) -> None:
    found = report([write_run(tmp_path / f"run-{i}", 3) for i in range(7)])
    lines = shown(found)
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("run-5 ") for line in lines) == 3  # outcome, curve and results
    assert "gradient norm" not in lines
    assert "--html and --json have all numbers" in lines  # no run is the best, and nothing is estimated


def test_names_and_texts_of_others_send_nothing_to_the_terminal(tmp_path: Path) -> None:
    said = played(True, response=HOSTILE)
    run = write_run(tmp_path / HOSTILE, 3, generated=[(0, said), (20, said)])
    text = "\n".join(shown(report([run, write_run(tmp_path / "b", 3, rate=1e-2)])))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b[31m[bold]\\u202ename" in text


@pytest.mark.parametrize(
    ("steps", "values", "cells", "line"),
    [
        ([1, 2, 3, 4], [0.0, 1.0, 2.0, 7.0], 4, "▁▂▃█"),
        ([2, 4], [0.0, 7.0], 4, " ▁▁█"),
        ([1, 2, 3, 4], [0.0, 2.0, 5.0, 7.0], 2, "▂▇"),
        ([5], [3.0], 3, "  ▄"),
    ],
)
def test_a_curve_in_a_line(steps: list[float], values: list[float], cells: int, line: str) -> None:
    assert sparkline(steps, values, cells, (0.0, 7.0)) == line


def test_a_curve_that_does_not_move_is_in_the_middle() -> None:
    assert sparkline([1, 2], [5.0, 5.0], 2, (5.0, 5.0)) == "▅▅"


def test_json_is_all_that_standard_output_holds(mtr: Mtr, runs: list[Path]) -> None:
    code, out, err = mtr("report", *runs, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert [run["results"]["steps"] for run in found["runs"]] == [20, 12]
    assert found["runs"][0]["series"]["loss"]["step"] == list(range(1, 21))
    assert {"mtr", "date", "runs", "differences", "settings", "sources"} == set(found)


def test_files_that_are_named_are_written_and_replaced_and_no_others(
    mtr: Mtr, runs: list[Path], tmp_path: Path
) -> None:
    before = contents(tmp_path)
    html, png = tmp_path / "new" / "r.html", tmp_path / "r.png"
    png.write_text("older")
    code, out, err = mtr("report", *runs, "--html", html, "--png", png)
    assert code == 0
    assert "lowest eval loss" in out
    assert err == f"written to {html}\nwritten to {png}\n"
    assert html.read_text().startswith("<!doctype html>")
    assert png.read_bytes().startswith(b"\x89PNG")
    after = contents(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {str(html), str(png)}


def test_a_bad_folder_or_option_is_one_line_and_nothing_is_written(mtr: Mtr, runs: list[Path], tmp_path: Path) -> None:
    before = contents(tmp_path)
    check_refused(mtr("report", tmp_path / "none"), "no such folder; name the training.output_dir of a run")
    check_refused(mtr("report", tmp_path, "--html", tmp_path / "r.html"), "the runs in it are a-run-with")
    check_refused(mtr("report", runs[0], "--png", tmp_path / "r.gif"), "must end in .png, .svg or .pdf")
    check_refused(mtr("report", runs[0], "--html", runs[0]), "--html", "it is a folder")
    check_refused(mtr("report"), "Missing argument")
    assert contents(tmp_path) == before


def test_the_help_fits_and_has_examples(mtr: Mtr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = mtr("report", "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "mtr report runs/chats --html chats.html" in out


def test_torch_is_not_imported(runs: list[Path], tmp_path: Path) -> None:
    script = (
        "import sys; from mtr.__main__ import main\ntry: main()\nexcept SystemExit: pass\n"
        "sys.exit(str({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules) or ''))"
    )
    command = [sys.executable, "-c", script, "report", str(runs[0]), "--html", str(tmp_path / "r.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, f"written to {tmp_path / 'r.html'}\n\n")
    assert (tmp_path / "r.html").exists()


def test_a_real_run_is_reported_as_it_was(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Trained, evaluated and played, with turns that are too long for it."""
    recipe = write_recipe(
        data={"eval": str(QUICKSTART / "eval.jsonl")},
        sequence={"max_length": 110},
        generation={"conversations": 2, "max_new_tokens": 4},
        training={"max_steps": 3, "logging_steps": 2, "gradient_checkpointing": False},
    )
    state = train(load_recipe(recipe, ["data.eval.0.path=" + str(_few(tmp_path))]))
    (found,) = report([tmp_path / "run"])["runs"]
    assert found["outcome"] == {"state": "finished", "text": "finished, 3 steps", "steps": 3, "seconds_left": None}
    assert found["missing"] == []
    results = found["results"]
    assert (results["loss"], results["eval_loss"]) == (state.loss, state.eval_loss)
    assert (results["turns"], results["tokens"]) == (state.counts.turns, state.counts.tokens)
    assert results["per_turn_tokens"] == state.counts.per_turn_tokens
    assert (results["seconds"], results["right_after"]) == (state.seconds, state.exact_match[-1])
    assert results["tokens_per_second"] == state.counts.tokens / state.seconds
    assert found["counts"]["untrained_turns"] == dict(state.counts.untrained_turns) != {}
    assert found["series"]["loss"]["step"] == [2, 3]
    assert found["played"]["before"]["turns"] == found["played"]["after"]["turns"] > 2
    assert "nuts" in found["played"]["conversations"][0]["turns"][0]["asked"]
    assert found["environment"]["strategy"] == "single_pass"


def _few(folder: Path) -> Path:
    """The first two rows of the quickstart's evaluation data."""
    lines = (QUICKSTART / "eval.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[:2]))
    return folder / "few.jsonl"
