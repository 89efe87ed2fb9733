"""Claims: what became of a run is told from its folder, running, stopped or killed; what is missing is said; a folder
that is none of a run is one clear error; no secret is in a report; recipes are compared key by key.
"""

from __future__ import annotations

import copy
import functools
import json
import operator
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from support.reports import LONG, environment, loss_at, played, write_checkpoint, write_rejects, write_run

from mtr.errors import UserError
from mtr.pages.report_played import played_side_by_side
from mtr.recipe.sections import Recipe
from mtr.report.recipes import default_of, defaults, differences, flat, not_comparable, own_settings, sources
from mtr.report.report import report
from mtr.report.results import best, rows_with_values, written
from mtr.report.run import read_run
from mtr.store.lock import RunLock, is_at_work
from mtr.training.exact_match import GeneratedTurn

BOOT = Path("/proc/sys/kernel/random/boot_id")


def outcome(run: Path) -> tuple[str, str]:
    found = read_run(run).outcome
    return found.state, found.text


def lock(run: Path, pid: int, host: str | None = None, age: float = 0.0) -> None:
    boot = BOOT.read_text().strip() if BOOT.exists() else ""
    holder = {"host": host or socket.gethostname(), "boot": boot if host is None else "other", "pid": pid}
    (run / ".mtr-lock").write_text(json.dumps(holder))
    now = (run / ".mtr-lock").stat().st_mtime
    os.utime(run / ".mtr-lock", (now - age, now - age))


# --- outcomes ---------------------------------------------------------------------------------------------------------


def test_a_finished_run(tmp_path: Path) -> None:
    assert outcome(write_run(tmp_path / "a")) == ("finished", "finished, 20 steps")
    early = write_run(tmp_path / "b", 15, early_stopping_patience=2, eval_steps=5)
    assert outcome(early) == (
        "finished",
        "finished early after 15 of 20 steps: eval loss did not improve in 2 evaluations",
    )


def test_a_run_at_work_is_told_by_its_lock_and_how_long_it_will_take(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 12, result=False)
    with RunLock(run) as held:
        held.take()
        found = read_run(run).outcome
        assert sorted(path.name for path in run.iterdir() if "lock" in path.name) == [".mtr-lock"]
    assert (found.state, found.text, found.seconds_left) == ("running", "at work, 12 of 20 steps done", 4.0)


def test_a_lock_whose_holder_is_gone_is_none(tmp_path: Path) -> None:
    lock(tmp_path, 2**22 + 1)  # above the largest process id
    assert not is_at_work(tmp_path)
    lock(tmp_path, os.getpid())  # which another process has by now: it began at another time
    assert not is_at_work(tmp_path)
    lock(tmp_path, 1, host="elsewhere", age=60)
    assert is_at_work(tmp_path)
    lock(tmp_path, 1, host="elsewhere", age=200)
    assert not is_at_work(tmp_path)
    for text in ("", "[]", "{"):
        (tmp_path / ".mtr-lock").write_text(text)
        assert not is_at_work(tmp_path)


def test_a_run_that_was_stopped_or_killed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 12, result=False)
    assert outcome(run) == ("failed", "ended after 12 of 20 steps, by an error or killed; there is no checkpoint")
    write_checkpoint(run, 10, stopped_by=15)
    assert outcome(run)[1].endswith("checkpoint-10 is the newest")  # steps were made after it
    write_checkpoint(run, 12, stopped_by=15)
    assert outcome(run) == ("stopped", "stopped by SIGTERM after 12 of 20 steps; continue with --resume")


def test_steps_without_a_line_are_those_of_the_checkpoint_that_was_written_at_the_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 18, every=5, result=False, logging_steps=5)  # its last line is that of step 15
    write_checkpoint(run, 18, stopped_by=15)
    assert outcome(run) == ("stopped", "stopped by SIGTERM after 18 of 20 steps; continue with --resume")
    (found,) = report([run])["runs"]
    assert (found["results"]["steps"], found["results"]["conversations"]) == (18, 60)
    assert found["missing"] == ["no line tells of the steps after 15: curves and results are those up to it"]
    write_checkpoint(run, 20, stopped_by=15)  # its line is missing: of an earlier run, or the file is cut
    assert "after 18 of 20" in outcome(run)[1]


def test_a_run_whose_loss_was_not_finite(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 10, result=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(f'{{"step": {i}, "loss": null, "skipped": "not finite"}}\n' for i in (11, 12))
    state, text = outcome(run)
    assert state == "failed"
    assert text.startswith("ended after 12 of 20 steps, the last 2 without a finite loss or gradient")


def test_a_run_without_a_step_and_one_that_goes_by_epochs(tmp_path: Path) -> None:
    assert outcome(write_run(tmp_path / "a", 0, result=False)) == ("empty", "no step is logged")
    by_epochs = write_run(tmp_path / "b", 20, max_steps=None, result=False)  # 40 steps an epoch
    assert "ended after 20 of about 40 steps" in outcome(by_epochs)[1]


# --- what is known, and what is missing -------------------------------------------------------------------------------


def test_results_are_those_of_the_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 20, every=4, generated=[(0, played(False)), (20, played(True))])
    (found,) = report([run])["runs"]
    results = found["results"]
    assert (results["loss"], results["steps"]) == (loss_at(20), 20)
    assert results["loss_recent"] == pytest.approx(sum(map(loss_at, (4, 8, 12, 16, 20))) / 5)
    lowest = min((loss_at(step) + 0.2, step) for step in (5, 10, 15, 20))
    assert (results["best_eval_loss"], results["best_eval_step"]) == lowest
    assert (results["right_before"], results["right_after"]) == (0.5, 0.75)
    assert (results["tokens"], results["per_turn_tokens"], results["turns"]) == (20_000, 50_000, 200)
    assert (results["tokens_per_second"], results["per_turn_tokens_per_second"]) == (2000.0, 5000.0)
    assert (results["seconds"], results["data_wait"], results["mfu"]) == (10.0, pytest.approx(0.1), pytest.approx(0.4))
    assert results["peak_memory_bytes"] == 21 * 2**20
    assert found["counts"]["untrained_turns"] == {LONG: 40}
    assert found["missing"] == []


def test_rates_are_those_of_all_steps_and_not_of_the_logged_ones(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 20, every=10)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    slow = [{**line, "seconds": 5.0} for line in lines]  # the two logged steps took ten times as long as the others
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in slow))
    results = report([run])["runs"][0]["results"]
    assert results["tokens_per_second"] == results["tokens"] / results["seconds"] == 2000.0
    assert (results["supervised_tokens_per_second"], results["per_turn_tokens_per_second"]) == (800.0, 5000.0)
    assert results["estimated"] == ["mfu"]
    assert report([write_run(tmp_path / "b", 20)])["runs"][0]["results"]["estimated"] == []


def test_without_totals_reasons_are_those_of_the_newest_checkpoint_or_said_to_be_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 20, every=4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    older = [{k: v for k, v in line.items() if not k.startswith("total")} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in older))
    (found,) = report([run])["runs"]
    assert found["counts"] is None
    assert any("what was not trained is not known" in text for text in found["missing"])
    rates = [f"{name}_per_second" for name in ("tokens", "supervised_tokens", "per_turn_tokens")]
    assert found["results"]["estimated"] == ["seconds", "tokens", *rates, "mfu"]
    rows = {row.key: row for row in rows_with_values([found["results"]])}
    assert written(rows["seconds"], found["results"]) == "~10 s"
    assert found["results"]["turns"] is None
    write_checkpoint(run, 8, counts={"turns": 80, "untrained_turns": {LONG: 16, "x": "bad"}})
    (found,) = report([run])["runs"]
    assert (found["counts"]["turns"], found["counts"]["untrained_turns"]) == (80, {LONG: 16})
    assert "what was not trained is that of checkpoint-8" in found["missing"]


def test_what_lines_of_an_older_format_do_not_say_is_not_counted_as_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 20)
    keys = ("step", "loss", "learning_rate", "seconds", "num_tokens", "eval_loss")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: line[key] for key in keys if key in line} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = report([run])["runs"][0]["results"]
    unknown = ("conversations", "turns", "supervised_tokens", "per_turn_tokens", "data_wait", "mfu")
    assert [results[key] for key in (*unknown, "supervised_tokens_per_second")] == [None] * 7
    assert (results["tokens"], results["tokens_per_second"], results["seconds"]) == (20_000, 2000.0, 10.0)
    lines = [{"step": line["step"] * 2, "loss": 1.0} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = report([run])["runs"][0]["results"]
    assert [results[key] for key in (*unknown, "tokens", "tokens_per_second", "seconds")] == [None] * 9


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 3, result=False, generated=[(0, played(False))])
    for name in ("recipe.yaml", "environment.json"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('nonsense\n{"step": 4, "lo')
    with (run / "generations.jsonl").open("a") as file:
        file.write("nonsense\n")
    missing = read_run(run).missing
    for text in (
        "recipe.yaml is missing",
        "environment.json is missing",
        "1 lines of metrics.jsonl cannot be read",
        "the last line of metrics.jsonl is incomplete",
        "no evaluation",
        "1 lines of generations.jsonl cannot be read",
        "no conversations played after training yet",
    ):
        assert any(text in said for said in missing), text
    assert not any("the recipe has no data.eval" in said for said in missing)  # nobody knows
    assert outcome(run)[0] == "failed"


def test_bad_rows_are_counted_with_the_first_reasons(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 3)
    write_rejects(run, *(f"row {i}: no messages" for i in range(8)))
    rejects = read_run(run).rejects
    assert (rejects.number, len(rejects.examples)) == (8, 5)
    assert rejects.examples[0] == "row 0: no messages"


def test_played_turns_are_paired_by_conversation_and_turn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 3, generated=[(0, played(False)), (20, played(True))])
    found = read_run(run).played
    assert (found.before, found.after) == ({"step": 0, "turns": 4, "right": 2}, {"step": 20, "turns": 4, "right": 3})
    first, second = found.conversations
    assert (first["where"], second["where"]) == ("eval.jsonl, line 1", "eval.jsonl, line 2")
    turn = first["turns"][0]
    assert (turn["asked"], turn["reference"]) == ("Ana: 5.", "Ana has 5.")
    assert (turn["before"]["right"], turn["after"]["right"]) == (False, True)
    assert turn["after"]["thinking"] == "Hm."


def test_of_several_plays_the_first_and_the_last_count_and_of_many_the_first_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 3, generated=[(0, played(False)), (8, played(False)), (20, played(True))])
    row = json.loads((run / "generations.jsonl").read_text().splitlines()[0])
    more = [{**row, "conversation": f"c{number}"} for number in range(100)]
    after = [{**line, "step": 24, "exact_match": True, "response": "!"} for line in (*more, row)]
    old = {**row, "step": 8, "exact_match": True}  # out of place
    with (run / "generations.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in (*more, *after, old))
    found = read_run(run).played
    assert (found.num_conversations, len(found.conversations)) == (102, 60)
    assert found.before == {"step": 0, "turns": 104, "right": 2}
    assert found.after == {"step": 24, "turns": 101, "right": 101}
    for place in (0, 2, 59):
        turn = found.conversations[place]["turns"][0]
        assert (turn["before"]["response"], turn["after"]["response"]) == ("?", "!")


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    turns = [GeneratedTurn(f"/data/{name}/eval.jsonl, line 1", 0, "", name, name) for name in "ab"]
    (found,) = report([write_run(tmp_path / "a", 20, generated=[(20, turns)])])["runs"]
    assert [chat["where"] for chat in found["played"]["conversations"]] == [
        "a/eval.jsonl, line 1",
        "b/eval.jsonl, line 1",
    ]
    page = played_side_by_side([found])
    assert page is not None
    assert [chat["turns"][0]["wanted"] for chat in page["chats"]] == ["a", "b"]


def test_texts_that_no_file_can_hold_and_very_long_ones_are_made_to_fit(tmp_path: Path) -> None:
    long = "x" * 5_000 + "y" * 5_000
    said = played(True, thinking=long)
    run = write_run(tmp_path / "a", 3, generated=[(0, said)])
    text = (run / "generations.jsonl").read_text().replace('"Ana has 5."', '"half \\ud83d"')
    (run / "generations.jsonl").write_text(text)
    (found,) = report([run])["runs"]
    turn = found["played"]["conversations"][0]["turns"][0]
    assert turn["before"]["response"] == "half \\ud83d"
    assert "4,000 characters" in turn["before"]["thinking"]
    assert len(turn["before"]["thinking"]) < 6_100


# --- folders that are none --------------------------------------------------------------------------------------------


def spoil(run: Path, name: str, text: str) -> None:
    (run / name).unlink(missing_ok=True)
    (run / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("mtr-run.json", "{", "not readable as the marker of a run"),
        ("recipe.yaml", "a: [", "recipe.yaml: not readable as the recipe of a run"),
        ("recipe.yaml", "- 1\n", "recipe.yaml: not the recipe of a run"),
        ("environment.json", "{", "environment.json: not readable as JSON"),
        ("environment.json", "[]", "environment.json: not a JSON object"),
        ("metrics.jsonl", "x\n", "metrics.jsonl: none of its 1 lines"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    run = write_run(tmp_path / "a", 2)
    spoil(run, name, text)
    with pytest.raises(UserError, match=words) as error:
        report([run])
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_run_is_refused_with_the_runs_nearby(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "a", 2)
    write_checkpoint(run, 2)
    for folder, words in (
        (tmp_path / "none", "no such folder"),
        (run / "metrics.jsonl", "a file; name the folder of a run"),
        (tmp_path, "has no mtr-run.json"),
        (tmp_path / "runs", "the runs in it are a"),
        (run / "checkpoint-2", "name the run itself"),
    ):
        with pytest.raises(UserError, match=words):
            report([folder])


def test_a_run_is_shown_once_and_names_tell_runs_apart(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "x" / "run", 2), write_run(tmp_path / "y" / "run", 2)
    assert [run["name"] for run in report([one, two, one])["runs"]] == ["x/run", "y/run"]
    with pytest.raises(UserError, match="at most 20"):
        report([write_run(tmp_path / f"r{i}", 0) for i in range(21)])


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_no_access_token_is_in_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "my-own-secret-of-no-known-form")
    token = "hf_" + "aB3" * 10
    said = played(True, thinking=f"the token is {token}", response=f"{token} my-own-secret-of-no-known-form")
    run = write_run(tmp_path / token, 2, generated=[(0, said)], push_to_hub="me/model")
    spoil(run, "environment.json", json.dumps(environment(device=token, accepted_changes=[{"changes": [token]}])))
    text = json.dumps(report([run]))
    assert token not in text
    assert "my-own-secret" not in text
    assert text.count("[access token]") >= 5


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_only_keys_that_differ_are_listed_with_their_defaults(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a", 2, rate=1e-3), write_run(tmp_path / "b", 2, rate=1e-2, max_steps=30)
    found = report([one, two])
    assert found["differences"] == [
        {"key": "training.max_steps", "values": ["20", "30"], "default": "null"},
        {"key": "training.learning_rate", "values": ["0.001", "0.01"], "default": "0.0002"},
    ]
    assert all(row["same"] for row in found["sources"])


def test_sections_that_only_one_recipe_has_and_long_paths() -> None:
    one: dict[str, Any] = {"lora": None, "data": {"train": [{"path": "/a/b/one.jsonl", "weight": 1.0}]}}
    two: dict[str, Any] = {"lora": {"r": 8}, "data": {"train": [{"path": "/a/b/two.jsonl", "weight": 1.0}]}}
    assert differences([one, two]) == [
        {"key": "lora", "values": ["null", "not set"], "default": None},
        {"key": "lora.r", "values": ["not set", "8"], "default": "16"},
        {"key": "data.train.0.path", "values": ["one.jsonl", "two.jsonl"], "default": None},
    ]
    same = [{"data": {"train": [{"path": path}]}} for path in ("/a/x.jsonl", "/b/x.jsonl")]
    assert differences(same)[0]["values"] == ["/a/x.jsonl", "/b/x.jsonl"]  # their names would be equal
    assert differences([one, one]) == []


def test_a_single_recipe_lists_what_it_sets() -> None:
    recipe = {"data": {"train": [{"path": "/a/x.jsonl", "split": "train", "weight": 2.0}]}, "training": {"seed": 42}}
    assert [(row["key"], row["values"]) for row in own_settings(recipe)] == [
        ("data.train.0.path", ["x.jsonl"]),
        ("data.train.0.weight", ["2.0"]),
    ]
    assert default_of("data.eval.3.split", {}) == "train"
    assert defaults()["training.seed"] == 42
    assert flat({"a": {"b": [], "c": {}}}) == {"a.b": [], "a.c": {}}


def test_other_data_is_noticed_by_content_alone() -> None:
    one, moved, other = environment(), environment(), environment()
    moved["made_from"]["data"]["sources"][0].update(name="/elsewhere", modified=5)
    other["made_from"]["evaluation"] = {"e": {"sources": [{"content": "x"}]}}
    assert all(row["same"] for row in sources([one, moved]))
    assert [row["what"] for row in sources([one, other]) if row["same"] is False] == ["evaluation data"]
    assert {row["same"] for row in sources([one, {}])} == {None}


def test_losses_of_other_data_have_no_best_one(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 20, rate=rate) for name, rate in (("a", 1e-3), ("b", 1e-2))]

    def bests() -> dict[str, int | None]:
        found = [run["results"] for run in report(runs)["runs"]]
        return {row.key: best(row, found) for row in rows_with_values(found)}

    assert (bests()["best_eval_loss"], bests()["loss_recent"]) == (1, 1)
    other = environment()
    other["made_from"]["evaluation"] = {"e": {"sources": [{"content": "x"}]}}
    (runs[1] / "environment.json").write_text(json.dumps(other))
    assert (bests()["best_eval_loss"], bests()["loss_recent"]) == (None, 1)
    other["made_from"]["tokenizer"] = "another"
    (runs[1] / "environment.json").write_text(json.dumps(other))
    assert (bests()["best_eval_loss"], bests()["loss_recent"]) == (None, None)


@pytest.mark.parametrize(
    ("key", "value", "losses", "played"),
    [
        ("sequence.max_length", 110, True, False),
        ("data.filter.max_turns", 3, True, True),
        ("template.enable_thinking", True, True, True),
        ("train_on", "last", True, False),
        ("loss.weighting", "turn", True, False),
        ("generation.max_new_tokens", 16, False, True),
        ("data.num_workers", 2, False, False),
        ("sequence.max_tokens", 4096, False, False),
        ("training.learning_rate", 1e-4, False, False),
        ("lora.r", 4, False, False),
    ],
)
def test_keys_that_decide_what_is_measured_leave_no_best(key: str, value: Any, losses: bool, played: bool) -> None:
    base = Recipe.model_validate(
        {"model": {"name_or_path": "m"}, "data": {"train": "t"}, "training": {"output_dir": "o"}}
    ).model_dump()
    other = copy.deepcopy(base)
    *sections, last = key.split(".")
    functools.reduce(operator.getitem, sections, other)[last] = value
    found = not_comparable([], differences([base, other]))
    assert ({"loss", "best_eval_loss"} <= set(found)) == losses
    assert ({"right_before", "right_after"} <= set(found)) == played
    assert bool(found) == (losses or played)


def test_the_best_of_several_runs_is_the_lowest_loss_and_no_tie() -> None:
    found = [{"eval_loss": 0.5, "mfu": 0.3, "estimated": []}, {"eval_loss": 0.4, "mfu": 0.3, "estimated": []}]
    rows = {row.key: row for row in rows_with_values([{**one, "skipped_steps": 0} for one in found])}
    assert best(rows["eval_loss"], found) == 1
    assert best(rows["mfu"], found) is None
    assert best(rows["eval_loss"], found[:1]) is None
