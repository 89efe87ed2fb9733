"""Claims: the commands start fast; standard output carries only what was asked for; whatever the user got wrong is one
line on standard error with exit code 2 and nothing written; inspect shows the tokens of inference, as the contract
spells them, from a tokenizer alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.paths import QUICKSTART, ROOT
from support.rows import conversation_row, copy_tokenizer

from mtr import __version__
from mtr.cli.app import _with_json_target

Mtr = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]


# --- start ------------------------------------------------------------------------------------------------------------

WITHOUT_HEAVY_IMPORTS = """
import sys
sys.argv = ["mtr", *sys.argv[1:]]
from mtr.cli.app import main
try:
    main()
except SystemExit as end:
    code = end.code
heavy = {"torch", "transformers", "datasets", "tokenizers", "peft", "accelerate", "pyarrow", "numpy"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else code)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "train verify bench inspect audit"),
        (["train", "--help"], 0, "--resume --overwrite"),
        (["verify", "-h"], 0, "--conversations --dtype --attention --json"),
        (["bench", "--help"], 0, "--conversations --repeats --json --plot"),
        (["inspect", "--help"], 0, "--index --all --json --verify"),
        (["audit", "--help"], 0, "RECIPE|TOKENIZER --rows --json"),
        (["--version"], 0, f"mtr {__version__}"),
        (["train", "none.yaml"], 2, "error: none.yaml: no such recipe file"),
    ],
)
def test_help_and_a_misspelt_recipe_are_there_at_once(arguments: list[str], code: int, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HEAVY_IMPORTS, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert done.returncode == code, done.stderr
    shown = done.stderr if code else done.stdout
    assert [word for word in words.split() if word not in shown] == []


def test_the_module_runs_as_the_console_script_does() -> None:
    done = subprocess.run([sys.executable, "-m", "mtr", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mtr {__version__}\n", "")


def test_no_command_shows_the_help(mtr: Mtr) -> None:
    code, out, err = mtr()
    assert "Usage" in out + err
    assert code in (0, 2)


# --- --json -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "spelled"),
    [
        ("verify r.yaml --json", "verify r.yaml --json -"),
        ("verify --json r.yaml", "verify --json - r.yaml"),
        ("verify --json r.yml", "verify --json - r.yml"),
        ("bench r.yaml --json --repeats 2", "bench r.yaml --json - --repeats 2"),
        ("bench r.yaml --json training.seed=1", "bench r.yaml --json - training.seed=1"),
        ("bench r.yaml --json out.json", "bench r.yaml --json out.json"),
        ("bench --json out.json r.yaml", "bench --json out.json r.yaml"),
        ("verify r.yaml --json -", "verify r.yaml --json -"),
        ("verify r.yaml --json=out.json", "verify r.yaml --json=out.json"),
        ("verify r.yaml", "verify r.yaml"),
        ("inspect r.yaml --json", "inspect r.yaml --json"),
        ("inspect --json r.yaml", "inspect --json r.yaml"),
        ("", ""),
    ],
)
def test_json_stands_with_or_without_its_file(arguments: str, spelled: str) -> None:
    assert _with_json_target(arguments.split()) == spelled.split()


def verified(passed: bool = True) -> dict[str, Any]:
    both = {"loss": 0.0, "gradient": 0.0}
    return {
        "conversations": 1,
        "turns": 2,
        "dtype": "float64",
        "attention": "segment",
        "device": "cpu",
        "loss": {"single_pass": 1.0, "per_turn": 1.0},
        "max_relative_difference": both,
        "tolerance": both,
        "tensors": 3,
        "zero_gradients": [],
        "passed": passed,
    }


@pytest.fixture
def verify_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments that `mtr verify` hands on; nothing is computed."""
    calls: list[tuple[Any, ...]] = []

    def verify(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        return verified()

    monkeypatch.setattr("mtr.checks.verify.verify", verify)
    return calls


@pytest.mark.usefixtures("verify_calls")
@pytest.mark.parametrize("before", [True, False])
def test_json_without_a_file_is_all_of_standard_output(mtr: Mtr, write_recipe: Write, before: bool) -> None:
    recipe = write_recipe()
    code, out, _ = mtr("verify", *(["--json", recipe] if before else [recipe, "--json"]))
    assert code == 0
    assert json.loads(out) == verified()
    assert out.count("\n") == 1


@pytest.mark.usefixtures("verify_calls")
@pytest.mark.parametrize("before", [True, False])
def test_json_with_a_file_leaves_the_table_on_standard_output(
    mtr: Mtr, write_recipe: Write, tmp_path: Path, before: bool
) -> None:
    recipe, file = write_recipe(), tmp_path / "new" / "out.json"
    code, out, _ = mtr("verify", *(["--json", file, recipe] if before else [recipe, "--json", file]))
    assert code == 0
    assert json.loads(file.read_text()) == verified()
    assert "single pass against one forward per turn" in out
    assert "passed" in out


def test_options_and_overrides_reach_the_command(
    mtr: Mtr, write_recipe: Write, verify_calls: list[tuple[Any, ...]]
) -> None:
    code, out, _ = mtr(
        "verify", write_recipe(), "loss.weighting=turn", "--conversations", 7, "--dtype", "float32",
        "--attention", "eager", "training.seed=5",
    )  # fmt: skip
    assert code == 0
    assert "passed" in out
    ((recipe, conversations, dtype),) = verify_calls
    assert (conversations, dtype) == (7, "float32")
    assert (recipe.loss.weighting, recipe.training.seed, recipe.model.attention) == ("turn", 5, "eager")


def test_verify_exits_with_1_when_it_fails(mtr: Mtr, write_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtr.checks.verify.verify", lambda *_: verified(passed=False))
    code, out, err = mtr("verify", write_recipe())
    assert (code, err) == (1, "")
    assert "FAILED" in out
    code, out, _ = mtr("verify", write_recipe(), "--json")
    assert code == 1
    assert json.loads(out)["passed"] is False


# --- errors -----------------------------------------------------------------------------------------------------------


def check_refused(result: tuple[int, str, str], *words: str) -> str:
    """One line, exit code 2, nothing on standard output."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert [word for word in words if word not in err] == []
    return err


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


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


USER = {"role": "user", "content": "Ana has 4 coins."}
ANSWER = {"role": "assistant", "content": "Ana has 4 coins now."}


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
            ", line 3, message 0: content must be text",
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
    base = copy_tokenizer(tmp_path / "base", template)
    refused(write_recipe(model={"name_or_path": str(base)}), words=[f"{base}: the chat template fails"])


def test_a_model_that_ignores_masks_is_refused_by_name(
    refused: Refused, write_recipe: Write, models: Callable[..., Path]
) -> None:
    folder = models("qwen3_next")
    refused(
        write_recipe(model={"name_or_path": str(folder)}),
        words=[f"{folder} (qwen3_next) cannot be trained exactly", "linear_attention", "ignore the mask"],
    )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("output_router_logits", True, "output_router_logits is on"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "dynamic RoPE"),
    ],
)
def test_a_config_that_cannot_be_exact_is_refused(
    refused: Refused, write_recipe: Write, tmp_path: Path, key: str, value: Any, words: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(QUICKSTART / "base", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, key: value, "max_position_embeddings": 64}))
    refused(write_recipe(model={"name_or_path": str(base)}), words=["cannot be trained exactly", words])


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
    assert "--resume" in message
    assert "--overwrite" in message
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
    message = refused(write_recipe(data={"train": str(file)}), words=[])
    assert message == f"error: data: no such file: {file}\n"


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


@pytest.mark.usefixtures("verify_calls")
def test_a_result_that_cannot_be_written_is_an_error(mtr: Mtr, write_recipe: Write) -> None:
    recipe = write_recipe()
    code, _, err = mtr("verify", recipe, "--json", recipe / "out.json")
    assert code == 2
    assert err.startswith("error: ")
    assert str(recipe / "out.json") in err


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


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "{recipe}", "--nonsense"],
        ["train"],
        ["verify", "{recipe}", "--conversations", "0"],
        ["verify", "{recipe}", "--conversations", "few"],
        ["inspect", "{recipe}", "--index", "-1"],
        ["bench", "{recipe}", "--repeats", "0"],
        ["verify", "{recipe}", "--dtype", "int8"],
        ["verify", "{recipe}", "--attention", "flash"],
        ["inspect", "{recipe}", "--index", "100000"],
        ["inspect", "{recipe}", "--index", "100000", "--json"],
        ["verify", "{recipe}", "data.train=/none.jsonl"],
        ["bench", "{recipe}", "model.name_or_path=/none"],
    ],
)
def test_a_wrong_option_is_one_line_too(mtr: Mtr, write_recipe: Write, arguments: list[str]) -> None:
    recipe = str(write_recipe())
    check_refused(mtr(*(argument.format(recipe=recipe) for argument in arguments)))


# --- inspect ----------------------------------------------------------------------------------------------------------


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
    assert list(found) == ["index", "turns", "layout", "targets", "segments", "num_tokens"]
    assert set(found["turns"][0]) == {"turn", "message_index", "prompt_ids", "completion_ids", "trained"}
    assert set(found["layout"]) == {"input_ids", "position_ids", "subtree_end", "parent"}
    assert set(found["targets"]) == {"predictor", "target_id", "weight"}
    assert set(found["segments"][0]) == {"start", "end", "kind", "turn"}
    assert set(found["num_tokens"]) == {"single_pass", "per_turn", "supervised"}


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
    assert mtr("inspect", recipe, "--json") == mtr("inspect", whole, "--json")
    assert mtr("inspect", recipe)[0] == 0


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
        "turns",
        "tree",
        "trunk 0",
        "branch 1",
        "◣",
    ):
        assert words in out
    assert "[bold]" in out


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
        (break_a_token, "its path through the tree is another sequence"),
        (break_a_position, "a position is not the depth of its token"),
        (break_the_mask, "a token sees other tokens than its ancestors"),
        (break_a_predictor, "the targets of the tree are not those of the turns"),
        (break_a_target, "the targets of the tree are not those of the turns"),
        (break_a_weight, "the targets of the tree are not those of the turns"),
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


def test_the_console_script_is_the_function_tested_here() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"mtr": "mtr.cli.app:main"}
    assert project["version"] == __version__
