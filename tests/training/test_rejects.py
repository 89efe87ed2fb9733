"""Claims: a bad row is counted by its reason and listed once, with what is wrong, whoever found it: the main process or
a worker, in one epoch or several, before or after a resume.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rows import conversation_row
from support.sources import opened

from mtr.data.conversation import SkippedRow
from mtr.errors import RowError, SaveError, UserError
from mtr.recipe.loading import load_recipe
from mtr.training.loop import train
from mtr.training.rejects import RejectsFile
from mtr.training.state import RunState

ROWS: list[Any] = [conversation_row(turns=1 + i % 3) for i in range(12)]  # 0, 3 and 6 are below the limit
BAD = {2: {"messages": []}, 5: {"messages": [{"role": "bot", "content": "x"}]}, 9: {"id": 9}}
for place, row in BAD.items():
    ROWS[place] = row

Run = Callable[..., RunState]


@pytest.fixture
def run(write_recipe: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path) -> Run:
    def go(resume: bool = False, rows: list[Any] = ROWS, **sections: Any) -> RunState:
        data = {"train": str(write_rows(rows)), "on_bad_row": "skip", "filter": {"min_turns": 2}}
        training = {"max_steps": 3, **sections.get("training", {})}
        recipe = write_recipe(data={**data, **sections.get("data", {})}, training=training)
        return train(load_recipe(recipe), resume=resume)

    return go


def listed(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_counted_and_listed(run: Run, tmp_path: Path, workers: int) -> None:
    counts = run(data={"num_workers": workers}).counts
    assert counts.skipped_rows == {
        "'messages' must be a non-empty list of messages": 1,
        "unknown role": 1,
        "no 'messages' column": 1,
        "fewer turns than data.filter.min_turns (2)": 3,
    }
    assert counts.conversations == 12 - 3 - 3
    lines = sorted(listed(tmp_path), key=lambda line: int(line["row"]))
    assert [line["row"] for line in lines] == list(BAD)
    assert [line["where"] for line in lines] == [f"{tmp_path / 'rows.jsonl'}, line {i + 1}" for i in BAD]
    assert lines[1]["reason"].startswith("message 0: unknown role 'bot'; roles are system")


def test_each_is_listed_once_over_epochs_and_resumes(run: Run, tmp_path: Path) -> None:
    twice = run(training={"max_steps": 6, "save_steps": 2})
    assert sum(twice.counts.skipped_rows.values()) == 12, "an epoch is three steps, and counts add up"
    assert len(listed(tmp_path)) == 3
    with (tmp_path / "run" / "rejects.jsonl").open("a") as file:
        file.write('{"row": 1, "whe')  # torn
    longer = run(resume=True, training={"max_steps": 8, "save_steps": 2})
    assert longer.steps == 8
    assert Counter(line["row"] for line in listed(tmp_path)) == Counter(list(BAD))


def test_an_overwritten_run_begins_a_new_list(tmp_path: Path, write_recipe: Any, write_rows: Any, run: Run) -> None:
    run()
    assert listed(tmp_path)
    recipe = write_recipe(data={"train": str(write_rows([conversation_row()] * 4, "good.jsonl"))})
    train(load_recipe(recipe), overwrite=True)
    assert not (tmp_path / "run" / "rejects.jsonl").exists()


def test_without_skipping_a_bad_row_ends_the_run(run: Run) -> None:
    with pytest.raises(UserError, match="line 3: 'messages' must be a non-empty list"):
        run(data={"on_bad_row": "error", "shuffle": False})


def test_when_every_row_is_passed_over_the_reasons_are_said(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no turn is left to train \(3 rows: unknown role; 1 rows: fewer turns"):
        run(rows=[BAD[5]] * 3 + [conversation_row(turns=1)])
    assert not (tmp_path / "run").exists(), "nothing was written"


def test_the_summary_says_what_was_skipped(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    said = capsys.readouterr().err
    assert "skipped       1 rows: unknown role" in said
    assert "skipped       3 rows: fewer turns than data.filter.min_turns (2)" in said


@pytest.mark.parametrize("again", [{"messages": [], "id": 1}, '{"messages": [' + "]" * 3])
def test_an_edited_row_that_is_bad_again_is_listed_again(run: Run, tmp_path: Path, again: Any) -> None:
    """A row is known by its place and its content, be that JSON or not."""
    path = tmp_path / "rejects.jsonl"
    contents: list[Any] = [{"messages": []}, again, {"messages": []}]
    for content in contents:
        row = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "rows.jsonl").write_text(row + "\n")
        rejected = opened(tmp_path / "rows.jsonl", on_bad_row="skip").take(0)
        assert isinstance(rejected, SkippedRow)
        RejectsFile(path).write([rejected])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"{tmp_path / 'rows.jsonl'}, line 1"] * 2
    assert len({line["sha256"] for line in lines}) == 2


def test_a_damaged_list_and_one_without_hashes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    path.write_bytes(b'{"row": 0, "where": "a, line 1", "reason": "bad"}\nno JSON\n[1]\n\xff\n{"row": 2, "wh')
    RejectsFile(path).write([SkippedRow(0, "a, line 1", "bad", "bad", "00"), SkippedRow(1, "b", "bad", "bad", "11")])
    lines = path.read_text().splitlines()
    assert [line[:12] for line in lines[:3]] == ['{"row": 0, "', "no JSON", "[1]"]
    assert [json.loads(line)["where"] for line in lines[4:]] == ["b"]


def test_an_error_goes_through_a_worker_whole() -> None:
    import pickle

    error = RowError("a.jsonl, line 1, message 2", "unknown role", " 'x'")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason, again.where) == (str(error), error.reason, error.where)


def test_rows_outside_the_limits_are_not_listed(tmp_path: Path) -> None:
    file = RejectsFile(tmp_path / "rejects.jsonl")
    file.write([SkippedRow(0, "a, line 1", "fewer turns")])
    assert not (tmp_path / "rejects.jsonl").exists()
    file.write([SkippedRow(1, "a, line 2", "bad", "bad: \ud800 <"), SkippedRow(1, "a, line 2", "bad", "bad")])
    assert json.loads((tmp_path / "rejects.jsonl").read_text()) == {
        "row": 1, "where": "a, line 2", "reason": "bad: \ud800 <", "sha256": None
    }  # fmt: skip


def test_inspect_says_of_every_row_whether_it_is_passed_over(
    mtr: Any, write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    path = write_rows(ROWS)
    recipe = write_recipe(data={"train": str(path), "on_bad_row": "skip", "filter": {"min_turns": 2}})
    code, out, _ = mtr("inspect", recipe, "--all")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, [line["index"] for line in lines]) == (0, list(range(12)))
    skipped = {line["index"]: line["skipped"] for line in lines if "skipped" in line}
    assert set(skipped) == {0, 3, 6, *BAD}
    assert skipped[0] == "fewer turns than data.filter.min_turns (2)"
    assert skipped[2] == "'messages' must be a non-empty list of messages, this is an empty list"
    code, _, err = mtr("inspect", recipe, "--index", 2)
    assert (code, err.splitlines()[-1][:6]) == (2, "error:"), "a bad row that is asked for is an error"


def test_inspect_tells_people_what_is_worth_knowing_about_the_data(
    mtr: Any, write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    asked = {"prompt": "Ana gets 2 more.", "completion": "Ana has 2 coins now."}
    recipe = write_recipe(data={"train": str(write_rows([asked] * 2))})
    code, _, err = mtr("inspect", recipe)
    assert code == 0
    assert "rows.jsonl is read as prompt_completion" in err
    assert "1 of the first 2 rows are equal to an earlier one" in err
    assert mtr("inspect", recipe, "--json")[2] == "", "none of it beside JSON"


def test_a_list_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    rejects = RejectsFile(tmp_path / "gone" / "rejects.jsonl")
    with pytest.raises(SaveError, match=r"rejects\.jsonl cannot be written: No such file"):
        rejects.write([SkippedRow(0, "a.jsonl, line 1", "a bad row", "it is bad")])
