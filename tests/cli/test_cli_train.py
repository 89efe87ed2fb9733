"""Claims: whatever the user got wrong in a recipe, its data or its model is one line on standard error with exit code
2, and nothing is written; a bad row that is met later does not cost the training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.commands import check_refused
from support.paths import QUICKSTART
from support.rows import ANSWER, USER, chat, conversation_row, copy_tokenizer

Mtr = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]


@pytest.fixture
def refused(mtr: Mtr, tmp_path: Path) -> Callable[..., str]:
    """`refused(recipe, override, ..., words=[...])`: training is refused with these words and leaves no trace."""

    def run(*arguments: object, words: list[str]) -> str:
        before = sorted(tmp_path.rglob("*"))
        message = check_refused(mtr("train", *arguments), *words)
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.lerning_rate=1", "'training.lerning_rate', did you mean 'learning_rate'?"),
        ("modle.dtype=float32", "'modle', did you mean 'model'?"),
        ("training.max_steps=many", "'training.max_steps'"),
        ("training.learning_rate=[1]", "'training.learning_rate'"),
        ("training.learning_rate=-1", "'training.learning_rate': Input should be greater than 0 (got -1"),
        ("lora.dropout=1.5", "'lora.dropout'"),
        ("sequence.max_tokens=10", "max_tokens (10) is below max_length"),
        ("training.max_steps", "an override is written section.key=value"),
        ("date=2025-13-41", "'date'"),
        ("lora.target_modules=nothing", "lora: Target modules nothing not found"),
    ],
)
def test_a_wrong_key_or_value_is_refused(refused: Refused, write_recipe: Write, override: str, words: str) -> None:
    refused(write_recipe(), override, words=[words])


@pytest.mark.parametrize("text", ["model: [", "model:\n\tx: 1", "", "- 1", "\x00"])
def test_a_file_that_is_no_recipe_is_refused(refused: Refused, tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    refused(path, words=[str(path)])


def test_a_missing_recipe_is_refused(refused: Refused, tmp_path: Path) -> None:
    refused(tmp_path / "none.yaml", words=[f"{tmp_path / 'none.yaml'}: no such recipe file"])
    refused(tmp_path, words=[f"{tmp_path}: cannot be read"])


def test_missing_files_and_folders_are_refused(refused: Refused, write_recipe: Write, tmp_path: Path) -> None:
    file, folder = tmp_path / "none.jsonl", tmp_path / "none"
    refused(write_recipe(data={"train": str(file)}), words=[f"data: no such file: {file}"])
    refused(write_recipe(data={"eval": str(file)}), words=[f"data: no such file: {file}"])
    refused(write_recipe(data={"train": f"{tmp_path}/*.parquet"}), words=[f"no file matches {tmp_path}/*.parquet"])
    refused(write_recipe(model={"name_or_path": str(folder)}), words=[f"no such model folder: {folder}"])


def test_a_folder_without_a_model_is_refused(refused: Refused, write_recipe: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(
        write_recipe(model={"name_or_path": str(tmp_path / "empty")}),
        words=[f"no tokenizer can be loaded from {tmp_path}"],
    )
    bare = copy_tokenizer(tmp_path / "bare")
    refused(write_recipe(model={"name_or_path": str(bare)}), words=[f"no model config at {bare}"])
    shutil.copy(QUICKSTART / "base" / "config.json", bare / "config.json")
    refused(write_recipe(model={"name_or_path": str(bare)}), words=[f"no weights can be loaded from {bare}"])
    (bare / "model.safetensors").write_bytes(b"torn")
    refused(write_recipe(model={"name_or_path": str(bare)}), words=[f"no weights can be loaded from {bare}"])


def test_a_broken_config_is_refused(refused: Refused, write_recipe: Write, tmp_path: Path) -> None:
    bare = copy_tokenizer(tmp_path / "bare")
    (bare / "config.json").write_text("{broken")
    refused(write_recipe(model={"name_or_path": str(bare)}), words=["model.name_or_path", str(bare)])


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_data_set_is_refused(refused: Refused, write_recipe: Write, tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    refused(write_recipe(data={"train": str(path)}), words=[f"data: no rows in {path}"])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, ", line 3: no 'messages' column (found: text)"),
        (chat(), ", line 3: 'messages' must be a non-empty list"),
        (chat({"role": "human", "content": "x"}), ", line 3, message 0: unknown role 'human'"),
        (chat(USER), ", line 3: no assistant message"),
        (
            chat({"role": "user", "content": [{"type": "image"}]}, ANSWER),
            ", line 3, message 0: images, videos or sound, and only text is trained",
        ),
        (chat(USER, {"role": "assistant", "content": 4}), ", line 3, message 1: content must be text"),
        ([1], ", line 3: a row is a JSON object"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(
    refused: Refused, write_recipe: Write, write_rows: Write, row: Any, words: str
) -> None:
    path = write_rows([chat(USER, ANSWER), chat(USER, ANSWER), row])
    refused(write_recipe(data={"train": str(path), "shuffle": False}), words=[f"{path}{words}"])


def test_a_broken_line_is_refused(refused: Refused, write_recipe: Write, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(chat(USER, ANSWER)) + "\n\n{broken\n")
    refused(write_recipe(data={"train": str(path), "shuffle": False}), words=[f"{path}, line 3: not valid JSON"])


def test_a_tokenizer_without_a_chat_template_is_refused(refused: Refused, write_recipe: Write, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(QUICKSTART / "base", base)
    (base / "chat_template.jinja").unlink()
    refused(
        write_recipe(model={"name_or_path": str(base)}),
        words=[f"{base}: the tokenizer has no chat template; put a chat_template.jinja beside it"],
    )


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('never') }}", "{{ messages.x.y }}", "{% for"])
def test_a_template_that_fails_is_refused(refused: Refused, write_recipe: Write, tmp_path: Path, template: str) -> None:
    base = copy_tokenizer(shutil.copytree(QUICKSTART / "base", tmp_path / "base"), template)
    refused(write_recipe(model={"name_or_path": str(base)}), words=[f"{base}: the chat template fails"])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "dynamic RoPE"),
        ("use_bidirectional_attention", True, "tokens see those after them"),
    ],
)
def test_a_model_that_cannot_go_in_one_pass_is_refused_by_name(
    refused: Refused, write_recipe: Write, tmp_path: Path, key: str, value: Any, words: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(QUICKSTART / "base", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, key: value, "max_position_embeddings": 64}))
    recipe = write_recipe(model={"name_or_path": str(base)}, sequence={"strategy": "single_pass"})
    refused(recipe, words=[str(base), words])


def test_a_turn_that_is_too_long_is_refused_where_the_recipe_says_error(refused: Refused, write_recipe: Write) -> None:
    sequence = {"overlong": "error", "max_length": 40}
    message = refused(write_recipe(sequence=sequence), words=["train.jsonl, line ", "sequence.max_length (40)"])
    assert "raise it, or set sequence.overlong to drop or truncate" in message


def test_when_every_turn_is_dropped_training_is_refused(
    refused: Refused, write_recipe: Write, write_rows: Write
) -> None:
    refused(
        write_recipe(sequence={"max_length": 5}),
        words=["data.train: no turn is left to train", "longer than sequence.max_length (5)"],
    )
    refused(
        write_recipe(sequence={"max_length": 5, "overlong": "truncate"}),
        words=["data.train: no turn is left to train", "its prompt alone fills sequence.max_length (5)"],
    )
    path = write_rows([chat(USER, {**ANSWER, "train": False})])
    refused(write_recipe(data={"train": str(path)}), words=["no turn is left to train", "weight 0"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="flex trains on this machine")
def test_flex_without_a_gpu_is_refused(refused: Refused, write_recipe: Write) -> None:
    refused(write_recipe(model={"attention": "flex"}), words=["model.attention: flex trains on CUDA only"])


def test_a_folder_that_is_not_empty_is_refused(mtr: Mtr, write_recipe: Write, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    message = check_refused(mtr("train", write_recipe()), f"training.output_dir: {run} is not empty")
    assert "nothing in it is touched; name another folder" in message
    assert [p.name for p in run.iterdir()] == ["notes.txt"]
    check_refused(mtr("train", write_recipe(), "--resume", "--overwrite"), "exclude each other")
    file = tmp_path / "file"
    file.write_text("mine")
    check_refused(mtr("train", write_recipe(), f"training.output_dir={file}"), f"{file} is a file")


def test_an_empty_folder_is_taken_and_the_next_run_is_refused_or_replaces_it(
    mtr: Mtr, write_recipe: Write, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    recipe = write_recipe(training={"max_steps": 1})
    code, out, err = mtr("train", recipe)
    assert (code, out) == (0, ""), err
    assert f"{run}" in err
    assert {"adapter_model.safetensors", "recipe.yaml", "environment.json", "metrics.jsonl"} <= {
        p.name for p in run.iterdir()
    }
    check_refused(mtr("train", recipe), f"{run} is not empty")
    (run / "notes.txt").write_text("mine")
    assert mtr("train", recipe, "training.seed=7", "--overwrite")[0] == 0
    assert (run / "notes.txt").read_text() == "mine"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["training"]["seed"] == 7
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_long_path_is_not_wrapped(refused: Refused, write_recipe: Write, tmp_path: Path) -> None:
    file = tmp_path.joinpath(*["a folder with quite a long name"] * 8) / "x.jsonl"
    recipe = write_recipe(data={"train": str(file)})
    assert refused(recipe, words=[]) == f"error: {recipe}:2:10: data: no such file: {file}\n"


def test_words_in_brackets_are_not_taken_for_markup(refused: Refused, write_recipe: Write, write_rows: Write) -> None:
    path = write_rows([chat({"role": "[red]user[/]", "content": "x"})])
    refused(write_recipe(data={"train": str(path)}), words=["unknown role '[red]user[/]'"])


def test_text_that_no_tokenizer_takes_is_refused_with_file_and_line(
    refused: Refused, write_recipe: Write, write_rows: Write
) -> None:
    path = write_rows([chat({"role": "user", "content": "half a pair: \ud800"}, ANSWER)])
    refused(write_recipe(data={"train": str(path)}), words=[f"{path}, line 1"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train.0.weight=0.0001", "data.train"),
        ("lora.target_modules=(", "lora"),
        ("training.output_dir={file}/run", "training.output_dir"),
    ],
)
def test_what_shows_only_later_is_refused_too(
    refused: Refused, write_recipe: Write, write_rows: Write, override: str, words: str
) -> None:
    path = write_rows([conversation_row()])
    refused(write_recipe(data={"train": [{"path": str(path)}]}), override.format(file=path), words=[words])


def test_a_bad_row_met_later_saves_a_checkpoint(
    mtr: Mtr, write_recipe: Write, write_rows: Write, tmp_path: Path
) -> None:
    path = write_rows([*(conversation_row() for _ in range(4)), chat(USER)])
    recipe = write_recipe(data={"train": str(path), "shuffle": False}, training={"conversations_per_step": 2})
    code, out, err = mtr("train", recipe, "training.max_steps=3")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == (
        f"error: {path}, line 5: no assistant message, so there is nothing to train; remove the row"
    )
    assert "Traceback" not in err
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_a_bad_row_of_the_evaluation_does_not_cost_the_training(
    mtr: Mtr, write_recipe: Write, write_rows: Write, tmp_path: Path
) -> None:
    good, bad = write_rows([conversation_row()]), write_rows([chat(USER)], "eval.jsonl")
    code, _, err = mtr("train", write_recipe(data={"train": str(good), "eval": str(bad)}))
    assert code == 2
    assert f"error: {bad}, line 1: no assistant message" in err
    run = tmp_path / "run"
    assert not run.exists() or (run / "checkpoint-2").exists() or (run / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"])
def test_a_run_of_one_step_works_with_every_schedule(
    mtr: Mtr, write_recipe: Write, write_rows: Write, kind: str
) -> None:
    path = write_rows([conversation_row(turns=1)])
    training = {"max_steps": 1, "lr_scheduler_type": kind, "conversations_per_step": 1}
    code, _, err = mtr("train", write_recipe(data={"train": str(path)}, training=training))
    assert code == 0, err
