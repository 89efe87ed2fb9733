"""Claims: trees made by `Dataset.map` are those of `mtr train`; every row is trained or counted with a reason; the
builder can be pickled, and `datasets` finds its cache again exactly when nothing changed that the trees depend on.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from datasets.fingerprint import Hasher
from support.integrations import columns, dataset, quickstart_rows
from support.paths import QUICKSTART
from support.rows import conversation_row, copy_tokenizer
from support.templates import tokenizer as with_template

import mtr
from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.data.shapes import Reader
from mtr.integrations.columns import COLUMNS
from mtr.integrations.rows import TABLE_ORDER
from mtr.prepare.builder import Builder
from mtr.recipe.loading import load_recipe
from mtr.tree.packing import idle_pack

BASE = str(QUICKSTART / "base")


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    datasets.disable_progress_bars()


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(mtr.UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def rows_of(trees: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(trees, values, strict=True)) for values in zip(*trees.values(), strict=True)]


def test_batches_are_those_of_a_step(write_recipe: Callable[..., Path]) -> None:
    rows = quickstart_rows(12, weight=0.5)
    sections = {"sequence": {"max_length": 256, "max_tokens": 4096}, "loss": {"weighting": "turn"}}
    recipe = load_recipe(write_recipe(**sections))
    builder = Builder(recipe, load_renderer(recipe, load_tokenizer(recipe)), pad_to_multiple_of=16)
    conversations = [Reader().read(row, f"row {i}") for i, row in enumerate(rows)]

    table = datasets.Dataset.from_list(rows)  # its rows have nulls where others have a weight
    made = mtr.TreeBuilder(BASE, max_length=256, max_tokens=4096, weighting="turn")
    trees = table.map(made, batched=True, batch_size=5, remove_columns=table.column_names)
    assert trees.column_names == list(COLUMNS)
    for first in (0, 4, 8):
        step = builder.step(conversations[first : first + 4], 0, 0.0)
        (expected,) = step.batches
        collated = mtr.TreeCollator(pad_to_multiple_of=16)([trees[i] for i in range(first, first + 4)])
        found = collated["attention_mask"]
        for name in ("input_ids", "position_ids", "subtree_end", "predictor", "target_id", "weight"):
            assert torch.equal(getattr(found.batch, name), getattr(expected, name)), name
        assert np.array_equal(found.batch.parent, expected.parent)
        assert found.weight_sum == pytest.approx(step.weight_sum, rel=1e-12)
        assert torch.equal(collated["input_ids"], expected.input_ids)


def test_labels_count_the_weights() -> None:
    trees = rows_of(mtr.TreeBuilder(BASE)(columns(quickstart_rows(3))))
    batch = mtr.TreeCollator()(trees)
    counts = mtr.count_turns(trees)
    assert counts.conversations == 3
    assert batch["labels"][:, 1:].ne(-100).sum() == counts.supervised_tokens == batch["attention_mask"].weight_sum
    assert batch["labels"].shape[1] != batch["input_ids"].shape[1]


def test_a_large_conversation_becomes_several_trees() -> None:
    row = conversation_row(turns=6)
    whole = mtr.TreeBuilder(BASE, max_length=128)(columns([row]))
    cut = mtr.TreeBuilder(BASE, max_length=128, max_tokens=160)(columns([row]))
    assert len(whole["weight"]) == 1
    assert len(cut["weight"]) > 1
    assert all(len(ids) <= 160 for ids in cut["input_ids"])
    assert sum(w.sum() for w in cut["weight"]) == whole["weight"][0].sum()
    counts = mtr.count_turns(cut)
    assert (counts.conversations, counts.trees) == (1, len(cut["weight"]))
    assert counts.turns == mtr.count_turns(whole).turns > 1
    assert counts.tokens == sum(map(len, cut["input_ids"]))


def test_what_is_not_trained_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    long, short = conversation_row(turns=8), conversation_row(turns=1)
    context = {"messages": [{**m, "train": False} for m in short["messages"]]}
    trees = mtr.TreeBuilder(BASE, max_length=100)(columns([context, long, short]))
    assert [len(ids) > 0 for ids in trees["input_ids"]] == [False, True, True]
    counts = mtr.count_turns(trees)
    assert counts.untrained_turns["longer than sequence.max_length (100)"] > 0
    assert counts.untrained_turns["the message says so (weight 0)"] == 1
    assert counts.turns + counts.untrained_turns.total() == 10
    assert counts.untrained_rows == {"no turn of it is trained": 1}
    (told,) = caplog.messages
    assert "row 1 of a batch, message" in told
    assert "longer than sequence.max_length (100)" in told


def test_rows_without_a_trained_turn_add_nothing(models: Callable[..., Path]) -> None:
    builder = mtr.TreeBuilder(BASE)
    row = conversation_row()
    context = {"messages": [{**m, "train": False} for m in row["messages"]]}
    (empty,), (full,) = rows_of(builder(columns([context]))), rows_of(builder(columns([row])))
    model = mtr.load(str(models("qwen3"))).train()
    collate = mtr.TreeCollator()
    assert torch.equal(collate([empty, full])["input_ids"], collate([full])["input_ids"])
    batch = collate([empty])
    assert batch["attention_mask"].batch.num_tokens == idle_pack().num_tokens
    for items in (None, 0.0, torch.tensor(0), 5.0):
        loss = model(**batch, num_items_in_batch=items).loss
        torch.autograd.backward(loss)
        assert loss == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_bad_rows(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = conversation_row(), {"messages": [{"role": "robot", "content": "?"}]}
    builder = mtr.TreeBuilder(BASE)
    assert "row 1 of a batch, message 0: unknown role 'robot'" in refused(builder, columns([good, bad]))
    assert "row 907, message 0: unknown role" in refused(builder, columns([good, bad]), [906, 907])
    trees = mtr.TreeBuilder(BASE, on_bad_row="skip")(columns([good, bad, bad]))
    assert mtr.count_turns(trees).skipped_rows == {"unknown role": 2}
    assert len(trees["counts"]) == 3
    assert "not trained: row 1 of a batch: message 0: unknown role 'robot'" in caplog.text
    assert caplog.text.count("not trained") == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"words": ["Hi."]}, "no 'messages' column (found: words)"),
        ({"text": ["Hi."]}, "row 0 of a batch: not valid JSON"),
        ({"text": [1]}, "no 'messages' column (found: text)"),
        ({"messages": [{"role": "user", "content": "Hi."}]}, "dataset.map(builder, batched=True, ...)"),
        ({"prompt": "Hi.", "completion": "Hello."}, "dataset.map(builder, batched=True, ...)"),
    ],
)
def test_what_is_no_batch_of_chats(rows: dict[str, Any], words: str) -> None:
    assert words in refused(mtr.TreeBuilder(BASE), rows)


@pytest.mark.parametrize(
    "rows",
    [
        {"prompt": ["Hi."], "completion": ["Hello."]},
        {"conversations": [[{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]]},
        {"instruction": ["Hi."], "output": ["Hello."]},
    ],
)
def test_other_shapes_of_rows(rows: dict[str, Any]) -> None:
    same = {"messages": [[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]]}
    builder = mtr.TreeBuilder(BASE)
    assert builder(rows)["input_ids"][0].tolist() == builder(same)["input_ids"][0].tolist()


def test_tokenizers_and_options(tmp_path: Path) -> None:
    expected = mtr.TreeBuilder(BASE)(columns([conversation_row()]))
    plain = copy_tokenizer(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    assert "has no chat template" in refused(mtr.TreeBuilder, str(plain))
    assert "has no chat template" in refused(mtr.TreeBuilder, transformers.AutoTokenizer.from_pretrained(str(plain)))
    unnamed = transformers.AutoTokenizer.from_pretrained(BASE)
    unnamed.name_or_path = ""
    batch = columns([conversation_row()])
    for tokenizer in (unnamed, QUICKSTART / "base"):
        assert mtr.TreeBuilder(tokenizer)(batch)["input_ids"][0].tolist() == expected["input_ids"][0].tolist()
    assert "no such model folder: /nowhere/at/all" in refused(mtr.TreeBuilder, "/nowhere/at/all")
    assert "object is no tokenizer" in refused(mtr.TreeBuilder, object())
    assert "sequence.overlong" in refused(mtr.TreeBuilder, BASE, overlong="squash")
    assert "max_tokens (64) is below max_length" in refused(mtr.TreeBuilder, BASE, max_tokens=64)
    with pytest.raises(TypeError, match="max_lenght"):
        mtr.TreeBuilder(BASE, max_lenght=64)  # type: ignore[call-arg]


def test_rows_that_are_no_trees() -> None:
    (row,) = rows_of(mtr.TreeBuilder(BASE)(columns([conversation_row()])))
    collate = mtr.TreeCollator()
    without = {name: value for name, value in row.items() if name != "parent"}
    assert "a row of trees without parent: " in refused(collate, [without])
    assert "was cut after mtr.TreeBuilder (input_ids 5, " in refused(
        collate, [row | {"input_ids": row["input_ids"][:5]}]
    )
    for name, value in (("parent", 10**6), ("subtree_end", 0), ("predictor", -1), ("weight", 0)):
        changed = {**row, name: np.full_like(row[name], value)}
        assert "does not hold a tree" in refused(collate, [changed]), name
    assert "no column 'counts'" in refused(mtr.count_turns, datasets.Dataset.from_list([{"messages": "x"}]))


def test_the_fingerprint_is_that_of_what_trees_depend_on(tmp_path: Path) -> None:
    builder = mtr.TreeBuilder(BASE, max_length=300)
    fingerprint = Hasher.hash(builder)
    trees = builder(columns([conversation_row()]))
    again = pickle.loads(pickle.dumps(builder))
    assert [ids.tolist() for ids in again(columns([conversation_row()]))["input_ids"]] == [
        ids.tolist() for ids in trees["input_ids"]
    ]
    assert Hasher.hash(builder) == Hasher.hash(again) == fingerprint, "using it changes nothing"
    assert Hasher.hash(mtr.TreeBuilder(BASE, max_length=300)) == fingerprint
    others = [
        mtr.TreeBuilder(BASE, max_length=301),
        mtr.TreeBuilder(BASE, max_length=300, weighting="turn"),
        mtr.TreeBuilder(str(copy_tokenizer(tmp_path / "other", CHANGED)), max_length=300),
    ]
    assert len({fingerprint, *map(Hasher.hash, others)}) == 4


CHANGED = (QUICKSTART / "base" / "chat_template.jinja").read_text() + "{# another #}"


def test_streams_and_batches_without_a_trained_turn() -> None:
    row = conversation_row()
    context = {"messages": [{**m, "train": m["role"] != "assistant"} for m in row["messages"]]}
    table = datasets.Dataset.from_list([context, context, row, row, context, row])
    builder = mtr.TreeBuilder(BASE)
    trees = table.map(builder, batched=True, batch_size=2, remove_columns=table.column_names)
    stream = table.to_iterable_dataset().map(builder, batched=True, batch_size=2, remove_columns=table.column_names)
    assert mtr.count_turns(trees) == mtr.count_turns(stream)
    for one, other in zip(trees, stream, strict=True):
        assert {k: list(v) for k, v in one.items()} == {k: list(v) for k, v in other.items()}


def calling(**arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "look_up", "arguments": arguments}}
    question = {"role": "user", "content": "Where?"}
    return {"messages": [question, {"role": "assistant", "content": "Here.", "tool_calls": [call]}]}


def test_lines_of_json_keep_the_order_of_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A table has one order for all rows, so a call would be trained as the data does not spell it."""
    rows = [calling(zip="1", street="a"), calling(street="b", zip="2", floor=None)]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "\n")
    tokenizer = with_template("history thinking is stripped")
    builder = mtr.TreeBuilder(tokenizer)
    raw = {
        "text": datasets.load_dataset("text", data_files=str(lines), split="train", cache_dir=str(tmp_path / "cache")),
        "table": datasets.Dataset.from_list(rows),
    }
    trees = {k: v.map(builder, batched=True, remove_columns=v.column_names) for k, v in raw.items()}
    shown = {k: [tokenizer.decode(row["input_ids"]) for row in v] for k, v in trees.items()}
    assert [text.index("zip") < text.index("street") for text in shown["text"]] == [True, False]
    assert len({text.index("zip") < text.index("street") for text in shown["table"]}) == 1
    assert ["floor" in text for text in (shown["text"][1], shown["table"][1])] == [True, False]
    assert mtr.count_turns(trees["table"]).remarks[TABLE_ORDER] == 2
    assert TABLE_ORDER not in mtr.count_turns(trees["text"]).remarks
    assert caplog.text.count(TABLE_ORDER) == 1
    assert mtr.count_turns(builder({"text": [json.dumps(rows[0]), None]})).conversations == 1
    bad = '{"messages": ['
    assert "row 1 of a batch: not valid JSON" in refused(builder, {"text": [json.dumps(rows[0]), bad]})
    skipping = mtr.TreeBuilder(BASE, on_bad_row="skip")
    assert mtr.count_turns(skipping({"text": [bad, "", bad]})).skipped_rows == {"not valid JSON": 2}


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this release of datasets has no columns of JSON")
def test_columns_of_json_keep_the_order_of_keys(caplog: pytest.LogCaptureFixture) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"zip": None, "a": {}}}}]
    rows = [{**calling(zip="1", street=None), "tools": tools}, {**calling(a="b"), "tools": None}]
    builder = mtr.TreeBuilder(with_template("history thinking is stripped"))
    expected = builder({"text": [json.dumps(row) for row in rows]})
    kind = datasets.List(datasets.Json())
    features = datasets.Features({"messages": kind, "tools": kind})
    ways = {
        "json": (datasets.Dataset.from_list(rows, features=features), True),
        "table": (datasets.Dataset.from_list(rows), False),
    }
    for table, same in ways.values():
        trees = table.map(builder, batched=True, remove_columns=table.column_names)
        assert ([list(ids) for ids in trees["input_ids"]] == [list(ids) for ids in expected["input_ids"]]) == same
        assert (TABLE_ORDER in mtr.count_turns(trees).remarks) != same
    assert caplog.text.count(TABLE_ORDER) == 1


@pytest.mark.slow
def test_several_processes_make_the_same_trees() -> None:
    rows = quickstart_rows(40)
    table = datasets.Dataset.from_list(rows)
    trees = table.map(mtr.TreeBuilder(BASE), batched=True, batch_size=10, remove_columns=table.column_names, num_proc=2)
    expected = dataset(rows)
    assert mtr.count_turns(trees) == mtr.count_turns(expected)
    assert [dict(row) for row in trees] == [dict(row) for row in expected]
