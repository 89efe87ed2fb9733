"""Claims: `mtr inspect` shows the tokens of inference, as the contract spells them, from a tokenizer alone; on demand
it proves that the tree is its turns.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.paths import QUICKSTART
from support.rows import ANSWER, USER, chat, conversation_row, copy_tokenizer

Mtr = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]


@pytest.fixture
def inspected(mtr: Mtr, write_recipe: Write) -> Callable[..., dict[str, Any]]:
    def run(*arguments: object, **sections: Any) -> dict[str, Any]:
        code, out, err = mtr("inspect", write_recipe(**sections), *arguments, "--json")
        assert (code, err) == (0, "")
        found: dict[str, Any] = json.loads(out)
        return found

    return run


Inspected = Callable[..., dict[str, Any]]


def decode(ids: list[int]) -> str:
    from transformers import AutoTokenizer

    text: str = AutoTokenizer.from_pretrained(str(QUICKSTART / "base")).decode(ids)
    return text


def test_inspect_has_the_keys_of_the_contract(inspected: Inspected) -> None:
    found = inspected()
    assert list(found) == ["index", "turns", "layout", "targets", "segments", "num_tokens", "flops", "roles"]
    assert set(found["turns"][0]) == {"turn", "message_index", "prompt_ids", "completion_ids", "trained"}
    assert set(found["layout"]) == {"input_ids", "position_ids", "subtree_end", "parent"}
    assert set(found["targets"]) == {"predictor", "target_id", "weight"}
    assert set(found["segments"][0]) == {"start", "end", "kind", "turn"}
    assert set(found["num_tokens"]) == {"single_pass", "per_turn", "supervised"}
    assert set(found["roles"][0]) == {"start", "end", "role", "message"}
    edges = [0, *(run["end"] for run in found["roles"])]
    assert [run["start"] for run in found["roles"]] == edges[:-1]
    assert edges[-1] == len(found["layout"]["input_ids"])


def test_inspect_shows_the_tokens_of_inference(inspected: Inspected, write_rows: Write) -> None:
    path = write_rows([conversation_row(turns=2)])
    found = inspected(data={"train": str(path)})
    first, second = found["turns"]
    assert [t["message_index"] for t in found["turns"]] == [1, 3]
    assert decode(first["prompt_ids"]) == "<|im_start|>user\nAna gets 2 more.<|im_end|>\n<|im_start|>assistant\n"
    answer = "<think>\nBefore: 0. 0 + 2 = 2.\n</think>\n\nAna has 2 coins now.<|im_end|>"
    assert decode(first["completion_ids"]) == answer
    assert decode(second["prompt_ids"]) == (
        "<|im_start|>user\nAna gets 2 more.<|im_end|>\n<|im_start|>assistant\nAna has 2 coins now.<|im_end|>\n"
        "<|im_start|>user\nAna gets 3 more.<|im_end|>\n<|im_start|>assistant\n"
    )
    layout, counts = found["layout"], found["num_tokens"]
    size = len(layout["input_ids"])
    assert {len(values) for values in layout.values()} == {size}
    assert counts["single_pass"] == size
    assert counts["per_turn"] == sum(len(t["prompt_ids"]) + len(t["completion_ids"]) for t in found["turns"])
    assert counts["supervised"] == sum(len(t["completion_ids"]) for t in found["turns"])
    assert size < counts["per_turn"]
    assert layout["parent"][0] == -1
    assert layout["position_ids"][0] == 0
    spans = [(segment["start"], segment["end"]) for segment in found["segments"]]
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == size
    assert {segment["kind"] for segment in found["segments"]} == {"trunk", "branch"}
    supervised = {(p, t) for p, t in zip(found["targets"]["predictor"], found["targets"]["target_id"], strict=True)}
    for turn in found["turns"]:
        path_ids = [*turn["prompt_ids"], *turn["completion_ids"]]
        node = -1
        for position, token in enumerate(path_ids):
            children = [i for i in range(size) if layout["parent"][i] == node and layout["input_ids"][i] == token]
            if position >= len(turn["prompt_ids"]):
                assert (node, token) in supervised
            (node,) = children


def test_index_is_file_order_before_shuffling(inspected: Inspected, write_rows: Write) -> None:
    rows = [conversation_row(turns=n) for n in (1, 3, 2)]
    path = write_rows(rows)
    for index, row in enumerate(rows):
        found = inspected("--index", index, data={"train": str(path), "shuffle": True})
        assert found["index"] == index
        assert len(found["turns"]) == len(row["messages"]) // 2


def test_message_index_counts_all_messages_and_untrained_turns_have_a_reason(
    inspected: Inspected, write_rows: Write
) -> None:
    path = write_rows(
        [
            chat(
                {"role": "assistant", "content": "Welcome."},
                {"role": "system", "content": "s"},
                USER,
                {**ANSWER, "train": False},
                USER,
                ANSWER,
            )
        ]
    )
    found = inspected(data={"train": str(path)})
    assert [turn["turn"] for turn in found["turns"]] == [0, 1, 2]
    assert [turn["message_index"] for turn in found["turns"]] == [0, 3, 5]
    assert [turn["trained"] for turn in found["turns"]] == [False, False, True]
    assert ["reason" in turn for turn in found["turns"]] == [True, True, False]
    assert "weight 0" in found["turns"][1]["reason"]
    assert found["num_tokens"]["supervised"] == len(found["turns"][2]["completion_ids"])


def test_a_row_without_a_trained_turn_is_shown_too(inspected: Inspected, mtr: Mtr, write_recipe: Write) -> None:
    found = inspected(sequence={"max_length": 5})
    assert found["num_tokens"] == {"single_pass": 0, "per_turn": 0, "supervised": 0}
    assert all("sequence.max_length (5)" in turn["reason"] for turn in found["turns"])
    code, out, _ = mtr("inspect", write_recipe(sequence={"max_length": 5}), "--verify")
    assert code == 0
    assert "not trained" in out


def test_a_conversation_that_is_cut_gives_lists(inspected: Inspected, write_rows: Write) -> None:
    path = write_rows([conversation_row(turns=8)])
    whole = inspected(data={"train": str(path)})
    cut = inspected(data={"train": str(path)}, sequence={"max_length": 300, "max_tokens": 300})
    assert isinstance(whole["layout"], dict)
    trees = len(cut["layout"])
    assert trees > 1
    assert isinstance(cut["layout"], list)
    assert [len(cut[key]) for key in ("targets", "segments")] == [trees, trees]
    for layout, targets, segments in zip(cut["layout"], cut["targets"], cut["segments"], strict=True):
        size = len(layout["input_ids"])
        assert size <= 300
        assert layout["position_ids"][0] == 0
        assert layout["parent"][0] == -1
        assert max(layout["subtree_end"]) == size
        assert max(targets["predictor"]) < size
        assert segments[-1]["end"] == size
    assert cut["turns"] == whole["turns"]
    assert sum(len(t["predictor"]) for t in cut["targets"]) == len(whole["targets"]["predictor"])
    assert cut["num_tokens"]["single_pass"] > whole["num_tokens"]["single_pass"]
    assert cut["num_tokens"]["per_turn"] == whole["num_tokens"]["per_turn"]


def test_the_weights_are_those_of_the_recipe(inspected: Inspected) -> None:
    for weighting, total in (("token", None), ("turn", "turns"), ("conversation", "one")):
        found = inspected(loss={"weighting": weighting})
        wanted = {None: found["num_tokens"]["supervised"], "turns": len(found["turns"]), "one": 1}[total]
        assert sum(found["targets"]["weight"]) == pytest.approx(wanted, abs=1e-9)


def test_all_prints_one_object_a_line_for_every_row(mtr: Mtr, write_recipe: Write, write_rows: Write) -> None:
    path = write_rows([conversation_row(turns=n) for n in (2, 1, 3)])
    recipe = write_recipe(data={"train": str(path)})
    for arguments in (["--all"], ["--all", "--json"], ["--json", "--all", "--index", "1"]):
        code, out, err = mtr("inspect", recipe, *arguments)
        assert (code, err) == (0, "")
        found = [json.loads(line) for line in out.splitlines()]
        assert [(row["index"], len(row["turns"])) for row in found] == [(0, 2), (1, 1), (2, 3)]


def test_inspect_needs_a_tokenizer_and_nothing_else(
    mtr: Mtr, write_recipe: Write, write_rows: Write, tmp_path: Path
) -> None:
    folder = copy_tokenizer(tmp_path / "tokenizer")
    path = write_rows([conversation_row()])
    recipe = write_recipe(model={"name_or_path": str(folder)}, data={"train": str(path)})
    whole = write_recipe(data={"train": str(path)}).rename(tmp_path / "whole.yaml")
    recipe = write_recipe(model={"name_or_path": str(folder)}, data={"train": str(path)})
    code, out, err = mtr("inspect", recipe, "--json")
    found, wanted = json.loads(out), json.loads(mtr("inspect", whole, "--json")[1])
    assert (code, err) == (0, "")
    assert found.pop("flops") is None  # which need the model's config
    del wanted["flops"]
    assert found == wanted
    code, out, err = mtr("inspect", recipe)
    assert (code, err) == (0, "")
    assert "work:" not in out


def test_inspect_counts_the_work_from_a_config(
    mtr: Mtr, inspected: Inspected, write_recipe: Write, write_rows: Write
) -> None:
    path = write_rows([conversation_row(turns=2)])
    flops = inspected(data={"train": str(path)})["flops"]
    one, apart = (sum(flops[strategy].values()) for strategy in ("single_pass", "per_turn"))
    assert 0 < one < apart
    assert set(flops["single_pass"]) == {"linear", "attention", "recurrence", "head"}
    assert flops["single_pass"]["recurrence"] == 0
    assert flops["single_pass"]["head"] == flops["per_turn"]["head"]  # one predictor for each target in both
    shown = mtr("inspect", write_recipe(data={"train": str(path)}))[1]
    assert f"({apart / one:.2f}x)" in shown.partition("work: ")[2].partition("\n")[0]


def test_inspect_neither_checks_nor_writes_output_dir(mtr: Mtr, write_recipe: Write, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert mtr("inspect", write_recipe())[0] == 0
    assert not run.exists()
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert mtr("inspect", write_recipe(), "--json")[0] == 0
    assert [p.name for p in run.iterdir()] == ["notes.txt"]


def test_inspect_shows_people_the_turns_the_tree_and_the_mask(
    mtr: Mtr, write_recipe: Write, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    row = conversation_row(turns=2)
    row["messages"][1]["reasoning_content"] = "[bold]Ana[/bold] has [/] 2."
    path = write_rows([row])
    code, out, err = mtr("inspect", write_recipe(data={"train": str(path)}))
    assert (code, err) == (0, "")
    for words in (
        f"{path}, line 1",
        "single pass",
        "per turn",
        "supervised",
        "turns: 2 of 2 trained",
        "├─╮ turn 0  sees ",
        "├─ turn 1  sees ",
        "▌ thinking  [bold]Ana[/bold] has [/] 2.",
        "│ copy      Ana has 2 coins now.",
        "mask",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--index 1 --find x", "--index and --find exclude each other: --index names the row; leave one out"),
        ("--index 1 --untrained", "--index and --untrained"),
        ("--index 1 --longest", "--index and --longest"),
        ("--index 1 --random", "--index and --random"),
        ("--random --longest", "--random and --longest exclude each other"),
        ("--all --rows 2", "--all and --rows exclude each other"),
        ("--seed 1", "--seed is for --random"),
        ("--turn 0 --rows 2", "--turn is for one row"),
        ("--turn 0 --all", "--turn is for one row"),
        ("--png {tmp}/x.png --rows 2", "--png is for one row"),
        ("--turn 0 --html {tmp}/x.html", "--turn and --html exclude each other"),
        ("--html {tmp}", "--html: {tmp} cannot be written: it is a folder"),
        ("--png {recipe}/x.png", "--png: {recipe}/x.png cannot be written"),
        ("--find", "requires an argument"),
        ("--find ''", "--find: there is no text to look for"),
        ("--rows 0", "--rows"),
        ("--turn 9", "--turn 9: row 0 has 6 turns, counted from 0"),
    ],
)
def test_options_that_make_no_sense_together_are_one_line(
    mtr: Mtr, write_recipe: Write, tmp_path: Path, options: str, words: str
) -> None:
    recipe = write_recipe()
    places = {"tmp": tmp_path, "recipe": recipe}
    code, out, err = mtr("inspect", recipe, *shlex.split(options.format(**places)))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words.format(**places) in err


def beginning(text: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row with another beginning, so that none is the beginning of another row."""
    row["messages"][0]["content"] = f"{text}: {row['messages'][0]['content']}"
    return row


def test_rows_are_chosen_and_what_is_not_found_exits_with_1(mtr: Mtr, write_recipe: Write, write_rows: Write) -> None:
    rows = [beginning(str(n), conversation_row(turns=n)) for n in (2, 1, 3)]
    rows[1]["messages"][1]["train"] = False
    recipe = write_recipe(data={"train": str(write_rows(rows))})

    def found(*options: object) -> list[int]:
        code, out, err = mtr("inspect", recipe, *options, "--json")
        assert (code, err) == (0, "")
        return [json.loads(line)["index"] for line in out.splitlines()]

    assert found("--longest") == [2]
    assert found("--untrained", "--rows", 3) == [1]
    assert found("--find", "8 COINS", "--rows", 3) == [2]
    assert found("--rows", 2) == [0, 1]
    assert sorted(found("--random", "--rows", 3, "--seed", 5)) == [0, 1, 2]
    assert found("--random", "--seed", 5) == found("--random", "--seed", 5)
    code, out, err = mtr("inspect", recipe, "--find", "eight coins")
    assert (code, out) == (1, "")
    assert err == "error: data.train: no row with 'eight coins' in a message\n"
    err = mtr("inspect", recipe, "--random")[2]
    assert re.fullmatch(r"note: --random --seed \d+ chooses the same again\n", err)


def test_files_hold_the_rows_and_standard_output_nothing(
    mtr: Mtr, write_recipe: Write, write_rows: Write, tmp_path: Path
) -> None:
    rows = [beginning(str(n), conversation_row(turns=n)) for n in (1, 2)]
    recipe = write_recipe(data={"train": str(write_rows(rows))})
    page, picture = tmp_path / "new" / "rows.html", tmp_path / "mask.png"
    page.parent.mkdir()
    page.write_text("an older one, named again")
    code, out, err = mtr("inspect", recipe, "--rows", 2, "--html", page)
    assert (code, out, err) == (0, "", f"wrote {page}: 2 rows\n")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    for line in ("line 1", "line 2"):
        assert line in text
    code, out, err = mtr("inspect", recipe, "--index", 1, "--png", picture)
    assert (code, out, err) == (0, "", f"wrote {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, err = mtr("inspect", recipe, "--all", "--html", page)
    assert (code, out, err) == (0, "", f"wrote {page}: 2 rows\n")


def test_a_picture_needs_a_trained_turn(mtr: Mtr, write_recipe: Write, write_rows: Write, tmp_path: Path) -> None:
    row = conversation_row(turns=1)
    row["messages"][1]["train"] = False
    recipe = write_recipe(data={"train": str(write_rows([row]))})
    code, out, err = mtr("inspect", recipe, "--png", tmp_path / "mask.png")
    assert (code, out) == (2, "")
    assert err == "error: --png: row 0 has no trained turn, so there is no mask to draw\n"
    assert not (tmp_path / "mask.png").exists()


def test_one_turn_as_json_is_that_of_the_whole_row(mtr: Mtr, inspected: Inspected, write_recipe: Write) -> None:
    whole = inspected("--index", 2)["turns"][1]
    code, out, err = mtr("inspect", write_recipe(), "--index", 2, "--turn", 1, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["prompt"]["ids"] == whole["prompt_ids"]
    assert found["completion"]["ids"] == whole["completion_ids"]
    assert decode(found["completion"]["ids"]) == found["completion"]["text"]
    assert [found[key] for key in ("index", "turn", "message_index", "trained", "weight")] == [2, 1, 3, True, 1.0]


@pytest.mark.parametrize("max_tokens", [4096, 300])
@pytest.mark.parametrize("strategy", ["single_pass", "per_turn"])
def test_inspect_proves_that_the_paths_are_the_turns(
    mtr: Mtr, write_recipe: Write, write_rows: Write, max_tokens: int, strategy: str
) -> None:
    path = write_rows([conversation_row(turns=n) for n in (1, 8)])
    sequence = {"max_length": 300, "max_tokens": max_tokens, "strategy": strategy}
    recipe = write_recipe(data={"train": str(path)}, sequence=sequence)
    code, out, err = mtr("inspect", recipe, "--all", "--verify")
    assert code == 0
    assert len(out.splitlines()) == 2
    assert err.count("every path of the tree is its turn") == 2
    code, out, err = mtr("inspect", recipe, "--json", "--verify", "--index", 1)
    assert (code, json.loads(out)["index"]) == (0, 1)
    assert "row 1: every path" in err


def break_a_token(layout: Any) -> None:
    layout.input_ids[3] += 1


def break_a_position(layout: Any) -> None:
    layout.position_ids[-1] += 1


def break_the_mask(layout: Any) -> None:
    layout.subtree_end[0] -= 1


def break_a_predictor(layout: Any) -> None:
    layout.predictor[0] += 1


def break_a_target(layout: Any) -> None:
    layout.target_id[0] += 1


def break_a_weight(layout: Any) -> None:
    layout.weight[0] *= 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_a_token, "its path through the tree is a different sequence"),
        (break_a_position, "a position is not the depth of its token in the tree"),
        (break_the_mask, "a token attends to other tokens than its ancestors and itself"),
        (break_a_predictor, "the targets of the tree differ from those of the turns"),
        (break_a_target, "the targets of the tree differ from those of the turns"),
        (break_a_weight, "the targets of the tree differ from those of the turns"),
    ],
)
def test_inspect_exits_with_1_when_the_layout_is_wrong(
    mtr: Mtr, write_recipe: Write, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Any], None], words: str
) -> None:
    from mtr.tree.packing import build_layouts

    def damaged(*arguments: Any) -> Any:
        layouts = build_layouts(*arguments)
        damage(layouts[0])
        return layouts

    monkeypatch.setattr("mtr.checks.inspect.build_layouts", damaged)
    code, _, err = mtr("inspect", write_recipe(), "--verify", "--json")
    assert code == 1
    assert err.startswith("row 0: FAILED: ")
    assert words in err
    assert mtr("inspect", write_recipe(), "--json")[0] == 0, "without --verify nothing is proven"
