"""Claims: `mtr audit` says what a template does and what training would lose, in words and as JSON, for a tokenizer and
for a recipe with its data: lengths, limits and bad rows are treated as in training; it exits with 1 exactly when
something would be lost. Control characters of data and templates are written out; progress is shown on terminals only.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.paths import QUICKSTART, SHARED, needs_shared
from support.rows import conversation_row, copy_tokenizer
from support.templates import BEHAVIOURS, CONTENT, LAST, template

Mtr = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def folder(tmp_path: Path, name: str) -> Path:
    return copy_tokenizer(tmp_path / "tokenizer", BEHAVIOURS[name].text)


def in_words(text: str) -> str:
    return " ".join(text.split())


def test_a_tokenizer_that_loses_nothing(mtr: Mtr, tmp_path: Path) -> None:
    code, out, err = mtr("audit", folder(tmp_path, "kept since the last user message"))
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines()[1:])) <= 80  # the first line is the folder
    words = in_words(out)
    for said in (
        "thinking tags <think> … </think>, found around rendered thinking",
        "thinking is read from reasoning_content, or inline",
        "in later prompts thinking in a field is kept since the last user message, dropped before it; inline it is",
        'generation prompt "<|im_start|>assistant\\n" leaves the thinking to the model',
        "an answer ends in <|im_end|>, written by the template",
        "tools schemas, calls, results, parallel calls, text beside a call rendered",
        "turns with thinking 2 of 2",
        "training would lose nothing of common conversations",
    ):
        assert said in words, said


def test_a_tokenizer_that_loses_something(mtr: Mtr, tmp_path: Path) -> None:
    code, out, _ = mtr("audit", folder(tmp_path, "closed, and a switch opens it"))
    assert code == 1
    words = in_words(out)
    assert "closes the thinking: turns that have some are refused" in words
    assert 'switch template: {deliberate: "yes"} opens the thinking' in words
    assert "turns with thinking 0 of 2 it has thinking, but the generation prompt closes" in words
    code, out, _ = mtr("audit", tmp_path / "tokenizer", "template.deliberate='yes'")
    assert code == 0, out
    assert 'arguments deliberate: "yes"' in in_words(out)


def test_its_own_thinking_is_never_rendered_and_yet_trained(mtr: Mtr, tmp_path: Path) -> None:
    code, out, _ = mtr("audit", folder(tmp_path, "never rendered, the prompt opens it"))
    assert code == 0
    assert "never rendered by the template: completions are assembled from the tags" in in_words(out)


def test_thinking_is_read_from_parts_of_the_content(mtr: Mtr, tmp_path: Path) -> None:
    code, out, _ = mtr("audit", folder(tmp_path, "read from parts of the content"))
    assert code == 0
    words = in_words(out)
    assert "thinking is read from content parts, or inline in the content" in words
    assert "thinking is kept in every prompt, but not from a field; thinking: {history: respell} moves it" in words


def test_json_is_all_of_it(mtr: Mtr, tmp_path: Path) -> None:
    code, out, _ = mtr("audit", folder(tmp_path, "closed, and a switch opens it"), "date=2025-01-02", "--json")
    report = json.loads(out)
    assert code == 1
    assert report["passed"] is False
    assert report["date"] == "2025-01-02"
    assert report["findings"]["prompt_ends"] == "closes thinking"
    assert report["findings"]["switches"][0]["value"] == "yes"
    assert report["findings"]["answer_stop"]["text"] == "<|im_end|>"
    kinds = {trial["kind"]: trial for trial in report["trials"]}
    assert kinds["turns with thinking"]["trained"] == 0
    assert kinds["turns without thinking"]["trained"] == 2
    assert any("turns with thinking" in loss for loss in report["losses"])
    assert report["data"] is None


def test_forks(mtr: Mtr, tmp_path: Path) -> None:
    def forks(name: str) -> dict[str, bool]:
        report = json.loads(mtr("audit", folder(tmp_path, name), "--json")[1])
        return {trial["kind"]: trial["forks"] for trial in report["trials"]}

    stripped, kept = forks("history thinking is stripped"), forks("history thinking is kept")
    loop = forks("kept since the last user message")
    kinds = ("turns with thinking", "turns without thinking", "thinking in a tool loop")
    assert [stripped[kind] for kind in kinds] == [True, False, True]
    assert [kept[kind] for kind in kinds] == [False, False, False]
    assert [loop[kind] for kind in kinds] == [True, False, False]
    empty_blocks = forks("an empty block where there is no thinking, on the last turn only")
    assert empty_blocks["turns without thinking"]


# --- with a recipe ----------------------------------------------------------------------------------------------------


def test_a_recipes_rows(mtr: Mtr, write_recipe: Write, write_rows: Write, tmp_path: Path) -> None:
    """One row loses its answer, one is context by choice, one is no row at all."""
    cut, chosen = conversation_row(2), conversation_row(1)
    cut["messages"][3]["content"] = "The tag </think> ends it."
    chosen["messages"][1]["train"] = False
    rows = write_rows([conversation_row(3), cut, chosen])
    recipe = write_recipe(
        model={"name_or_path": str(folder(tmp_path, "an answer is cut at its closing tag"))}, data={"train": str(rows)}
    )
    code, out, _ = mtr("audit", recipe, "--json")
    assert code == 1
    report = json.loads(out)
    data, reason = report["data"], "the template does not render its response whole: it holds </think>"
    assert (data["rows"], data["of_rows"], data["turns"], data["trained"]) == (3, 3, 6, 4)
    assert data["refused"] == {reason: 1}
    assert data["chosen"] == {"the message says so (weight 0)": 1}
    assert data["examples"][reason] == f"{rows}, line 2, message 3"
    assert report["losses"] == [reason]
    code, out, _ = mtr("audit", recipe)
    words = in_words(out)
    assert code == 1
    assert "3 of 3 rows: 4 of 6 turns are trained" in words
    assert f"refused 1 turn: {reason} (first: " in words
    assert "excluded 1 turn: the message says so (weight 0)" in words


def test_with_data_only_the_data_counts(mtr: Mtr, write_recipe: Write, write_rows: Write, tmp_path: Path) -> None:
    """A template that drops what the data does not have loses nothing."""
    no_tools = template(LAST + CONTENT)
    tokenizer = copy_tokenizer(tmp_path / "tokenizer", no_tools)
    assert mtr("audit", tokenizer)[0] == 1
    recipe = write_recipe(
        model={"name_or_path": str(tokenizer)}, data={"train": str(write_rows([conversation_row(2)]))}
    )
    assert mtr("audit", recipe)[0] == 0
    assert mtr("audit", recipe, "--rows", 0)[0] == 1


def test_rows_are_sampled_evenly(mtr: Mtr, write_recipe: Write) -> None:
    recipe = write_recipe()
    data = json.loads(mtr("audit", recipe, "--rows", 7, "--json")[1])["data"]
    total = len((QUICKSTART / "train.jsonl").read_text().splitlines())
    assert (data["rows"], data["of_rows"]) == (7, total)


def test_train_on_last_is_a_choice(mtr: Mtr, write_recipe: Write, write_rows: Write) -> None:
    rows = write_rows([conversation_row(3), conversation_row(2)])
    recipe = write_recipe(train_on="last", data={"train": str(rows)})
    code, out, _ = mtr("audit", recipe, "--json")
    assert code == 0
    assert json.loads(out)["data"]["chosen"] == {"train_on is last, and this is not the last turn": 3}
    shown = json.loads(mtr("inspect", recipe, "--json")[1])
    assert [turn["trained"] for turn in shown["turns"]] == [False, False, True]
    assert [turn.get("reason") for turn in shown["turns"]] == [
        "train_on is last, and this is not the last turn"
    ] * 2 + [None]


def test_inspect_says_in_full_why_a_turn_is_not_trained(mtr: Mtr, write_recipe: Write, write_rows: Write) -> None:
    row = conversation_row(4)
    row["messages"][3]["weight"] = 0.5
    out = mtr("inspect", write_recipe(train_on="last", data={"train": str(write_rows([row]))}))[1]
    assert "turns 0-2 not trained: train_on is last, and this is not the last turn\n" in out


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("nowhere.yaml", "nowhere.yaml: no such recipe file"),
        ("./nowhere", "no such model folder: ./nowhere"),
    ],
)
def test_what_is_not_there_is_said(mtr: Mtr, argument: str, said: str) -> None:
    code, out, err = mtr("audit", argument)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_wrong_override_is_said(mtr: Mtr) -> None:
    code, _, err = mtr("audit", QUICKSTART / "base", "thinkin.open=x")
    assert code == 2
    assert "did you mean 'thinking'" in err


def test_thinking_tags_come_in_pairs(mtr: Mtr) -> None:
    code, _, err = mtr("audit", QUICKSTART / "base", "thinking.open=<think>")
    assert code == 2
    assert "give both" in err


# --- lengths, limits and bad rows, as in training ---------------------------------------------------------------------

TOO_LONG, FILLS = "longer than sequence.max_length (70)", "its prompt alone fills sequence.max_length (70)"


def lengths(inspected: str) -> list[int]:
    """Tokens of each turn that `mtr inspect --all` shows."""
    turns = [turn for line in inspected.splitlines() for turn in json.loads(line)["turns"]]
    return [len(turn["prompt_ids"]) + len(turn["completion_ids"]) for turn in turns]


@pytest.fixture
def growing(write_recipe: Write, write_rows: Write) -> Path:
    """Conversations of 1 to 4 turns; some turns have more than 70 tokens."""
    rows = write_rows([conversation_row(turns) for turns in (1, 4, 2, 3)])
    return write_recipe(data={"train": str(rows)}, sequence={"max_length": 70})


def test_turns_dropped_for_their_length_are_lost(mtr: Mtr, growing: Path) -> None:
    sizes = lengths(mtr("inspect", growing, "--all", "sequence.max_length=4096")[1])
    longer = sum(size > 70 for size in sizes)
    assert 0 < longer < len(sizes) == 10
    code, out, _ = mtr("audit", growing, "--json")
    report = json.loads(out)
    data = report["data"]
    assert code == 1
    assert report["losses"] == [TOO_LONG]
    assert (data["turns"], data["trained"], data["refused"]) == (10, 10 - longer, {TOO_LONG: longer})
    assert data["lengths"] == {
        "turns": 10,
        "median": sorted(sizes)[4],
        "percentile_95": max(sizes),
        "longest": max(sizes),
        "max_length": 70,
        "longer": longer,
    }
    words = in_words(mtr("audit", growing)[1])
    assert f"refused {longer} turns: {TOO_LONG} (first: " in words
    assert (
        f"lengths median {sorted(sizes)[4]}, 95 % {max(sizes)}, longest {max(sizes)} tokens "
        f"(max_length 70: {longer} of 10 turns are longer)"
    ) in words
    assert "training would lose parts of this data" in words
    assert mtr("audit", growing, "sequence.max_length=4096")[0] == 0


def test_every_turn_is_dropped(mtr: Mtr, growing: Path) -> None:
    code, out, _ = mtr("audit", growing, "sequence.max_length=4")
    assert code == 1
    words = in_words(out)
    assert "0 of 10 turns are trained" in words
    assert "refused 10 turns: longer than sequence.max_length (4)" in words


def test_turns_that_are_cut_are_lost(mtr: Mtr, growing: Path) -> None:
    shown = [
        json.loads(line) for line in mtr("inspect", growing, "--all", "sequence.overlong=truncate")[1].splitlines()
    ]
    turns = [turn for row in shown for turn in row["turns"]]
    cut = sum("truncated to sequence.max_length (70)" in turn.get("notes", ()) for turn in turns)
    full = sum(turn.get("reason") == FILLS for turn in turns)
    assert 0 < cut < full + cut
    code, out, _ = mtr("audit", growing, "sequence.overlong=truncate", "--json")
    data = json.loads(out)["data"]
    assert code == 1
    assert (data["notes"], data["refused"]) == ({"truncated to sequence.max_length (70)": cut}, {FILLS: full})
    assert data["lengths"]["longest"] == max(lengths(mtr("inspect", growing, "--all", "sequence.max_length=4096")[1]))


def test_what_would_end_the_run_is_told(mtr: Mtr, growing: Path, write_rows: Write) -> None:
    code, _, err = mtr("inspect", growing, "--all", "sequence.overlong=error")
    assert code == 2
    first = err.removeprefix("error: ").partition(": ")[0]
    code, out, _ = mtr("audit", growing, "sequence.overlong=error")
    assert code == 1
    shown = "".join(out.split())  # paths are folded
    assert f"endstherunsequence.overlong:error,firstat{first.replace(' ', '')}" in shown
    rows = write_rows([conversation_row(1), {"messages": []}, conversation_row(2), {"messages": 7}], "bad.jsonl")
    stops = {}
    for policy in ("error", "skip"):
        arguments = (f"data.train={rows}", f"data.on_bad_row={policy}", "sequence.max_length=4096")
        code, out, _ = mtr("audit", growing, *arguments, "--json")
        data = json.loads(out)["data"]
        stops[policy] = data["stops"]
        assert (code, len(data["unreadable"]), data["trained"]) == (1, 2, 3)
    assert stops == {"error": {"data.on_bad_row: error": f"{rows}, line 2"}, "skip": {}}


def test_rows_that_the_filter_excludes_are_a_choice(mtr: Mtr, growing: Path) -> None:
    code, out, _ = mtr("audit", growing, "data.filter.max_turns=2", "--json")
    data = json.loads(out)["data"]
    assert code == 0
    assert (data["rows"], data["turns"], data["trained"]) == (4, 3, 3)
    assert data["filtered"] == {"more turns than data.filter.max_turns (2)": 2}
    words = in_words(mtr("audit", growing, "data.filter.max_turns=2")[1])
    assert "filtered 2 rows: more turns than data.filter.max_turns (2)" in words


def test_lengths_that_were_not_counted(mtr: Mtr, write_recipe: Write, write_rows: Write) -> None:
    """Of a text that is far too long it is only known that it is."""
    row = conversation_row(2)
    row["messages"][2]["content"] = "coins " * 20_000
    recipe = write_recipe(data={"train": str(write_rows([row]))})
    code, out, _ = mtr("audit", recipe, "--json")
    found = json.loads(out)["data"]["lengths"]
    assert code == 1
    assert (found["longest"], found["percentile_95"], found["longer"]) == (None, None, 1)
    assert "longest more than 4,096 tokens (max_length 4096: 1 of 2 turns is longer)" in in_words(
        mtr("audit", recipe)[1]
    )


# --- terminals --------------------------------------------------------------------------------------------------------

STEERING = "\x1b]0;title\x07\x1b[31m\u202e"


@pytest.mark.parametrize("command", ["audit", "inspect"])
def test_control_characters_are_written_out(
    command: str, mtr: Mtr, write_recipe: Write, write_rows: Write, tmp_path: Path
) -> None:
    """Of answers that are shown, of the template's own error, and of file names."""
    refusing = CONTENT + (
        "{%- if 'Five' in message.content -%}{{- raise_exception('no ' ~ message.content) -}}{%- endif -%}"
    )
    row = conversation_row(3)
    row["messages"][1]["content"] = f"An answer {STEERING}"
    row["messages"][3]["content"] = f"Five {STEERING}"
    tokenizer = copy_tokenizer(tmp_path / "tokenizer", template(refusing))
    rows = write_rows([row], f"rows{STEERING.replace('/', '')}.jsonl")
    recipe = write_recipe(model={"name_or_path": str(tokenizer)}, data={"train": str(rows)})
    _, out, err = mtr(command, recipe)
    assert "\\x1b[31m\\u202e" in out
    assert not any(character in out + err for character in "\x1b\x07\u202e")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("command", [("audit",), ("inspect", "--all")], ids=lambda command: command[0])
def test_progress_is_shown_on_terminals_only(
    command: tuple[str, ...], mtr: Mtr, write_recipe: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = (QUICKSTART / "train.jsonl").read_text().splitlines(keepends=True)[:300]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    recipe = write_recipe(data={"train": str(tmp_path / "rows.jsonl")})
    code, plain, err = mtr(command[0], recipe, *command[1:])
    assert (code, err) == (0, "")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert mtr(command[0], recipe, *command[1:])[1] == plain
    assert "/300" in terminal.getvalue()
    if command[0] == "inspect":  # the lines of standard output are the progress
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        monkeypatch.setattr(sys, "stdout", Terminal())
        mtr(command[0], recipe, *command[1:])
        assert terminal.getvalue() == ""


# --- real tokenizers --------------------------------------------------------------------------------------------------

REAL: dict[str, dict[str, Any]] = {
    "qwen3": {
        "history": "since the last user message",
        "fields": ["reasoning_content"],
        "prompt_ends": "nothing",
        "tags": ["<think>", "</think>"],
        "bos": "none",
        "dated": False,
        "parallel_calls": "rendered",
    },
    "r1-distill-qwen": {
        "history": "never",
        "fields": [],
        "answers_read": [],
        "prompt_ends": "opens thinking",
        "tags": ["<think>", "</think>"],
        "tags_from": "template",
        "bos": "template",
        "bos_on_encode": True,
        "tools": "lost",
    },
    "gpt-oss": {
        "history": "until answered",
        "history_end": "<|end|>",
        "prompt_ends": "nothing",
        "tags": ["<|channel|>analysis<|message|>", "<|end|>"],
        "tags_from": "rendering",
        "parallel_calls": "lost",
        "dated": True,
    },
}
STOPS = {
    "qwen3": ("<|im_end|>",) * 2,
    "r1-distill-qwen": ("<｜end▁of▁sentence｜>",) * 2,
    "gpt-oss": ("<|return|>", "<|call|>"),
}


@needs_shared
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(mtr: Mtr, name: str) -> None:
    code, out, _ = mtr("audit", SHARED / "tokenizers" / name, "--json")
    report = json.loads(out)
    found = report["findings"]
    assert {key: found[key] for key in REAL[name]} == REAL[name]
    assert (found["answer_stop"]["text"], found["call_stop"]["text"]) == STOPS[name]
    assert code == (name != "qwen3")
    kinds = {trial["kind"]: trial for trial in report["trials"]}
    assert all(kinds[kind]["trained"] == 2 for kind in ("turns with thinking", "turns with inline thinking"))


@needs_shared
def test_real_switch(mtr: Mtr) -> None:
    code, out, _ = mtr("audit", SHARED / "tokenizers" / "qwen3", "template.enable_thinking=false")
    assert code == 1
    assert "open it with template: {enable_thinking: true}" in in_words(out)
