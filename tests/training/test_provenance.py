"""Claims: a run continues with the data, template, tokenizer and weights that it began with, or says what changed and
goes on only if asked to, which is recorded; other versions are noted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import check_refused
from support.paths import QUICKSTART
from support.rows import conversation_row
from support.runs import sign_again

Mtr = Callable[..., tuple[int, str, str]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return shutil.copytree(QUICKSTART / "base", tmp_path / "base")


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], write_rows: Callable[..., Path], base: Path, mtr: Mtr) -> Path:
    """Of a run that has done two of three steps."""
    rows = write_rows([conversation_row(turns=1 + i % 2, thinking=bool(i % 3)) for i in range(9)])
    held_out = write_rows([conversation_row(turns=2)], "eval.jsonl")
    training = {"max_steps": 2, "save_steps": 1, "conversations_per_step": 2, "gradient_checkpointing": False}
    path = write_recipe(
        model={"name_or_path": str(base)},
        data={"train": str(rows), "eval": str(held_out)},
        training={**training, "lr_scheduler_type": "constant"},
        date="2026-01-31",
        lora={"r": 2},
    )
    code, _, err = mtr("train", path)
    assert code == 0, err
    return path


def edit_rows(change: Callable[[list[str]], list[str]], name: str = "rows.jsonl") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(change(lines)))

    return edit


def edit_template(folder: Path) -> None:
    path = folder / "base" / "chat_template.jinja"
    path.write_text(path.read_text() + "{# another version #}")


def edit_tokenizer(folder: Path) -> None:
    path = folder / "base" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(tokenizer))


def edit_weights(folder: Path) -> None:
    """The same names and shapes, other values: another model."""
    from safetensors.torch import load_file, save_file

    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = torch.randn_like(tensors[name].float()).to(tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "rows added": (edit_rows(lambda rows: [*rows, rows[0]]), "data.train: "),
    "rows removed": (edit_rows(lambda rows: rows[:-2]), "data.train: "),
    "a row edited": (edit_rows(lambda rows: [rows[0].replace("Ana", "Eva"), *rows[1:]]), "data.train: "),
    "rows reordered": (edit_rows(lambda rows: rows[::-1]), "data.train: "),
    "template": (edit_template, "the chat template is another one"),
    "tokenizer": (edit_tokenizer, "the tokenizer is another one"),
    "weights": (edit_weights, "model.safetensors has other values"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_and_can_be_accepted(mtr: Mtr, recipe: Path, name: str) -> None:
    change, words = CHANGES[name]
    change(recipe.parent)
    more = "training.max_steps=3"
    run = recipe.parent / "run"
    refusal = check_refused(mtr("train", recipe, "--resume", more), f"{run / 'checkpoint-2'} was made from", words)
    assert "continue on purpose with --resume --accept-changes" in refusal
    code, _, err = mtr("train", recipe, "--resume", "--accept-changes", more)
    assert code == 0, err
    assert "changed since checkpoint-2, accepted: " in err
    for folder in (run, run / "checkpoint-3"):
        (accepted,) = json.loads((folder / "environment.json").read_text())["accepted_changes"]
        assert accepted["checkpoint"] == "checkpoint-2"
        assert words in "; ".join(accepted["changes"])
    code, _, err = mtr("train", recipe, "--resume", "training.max_steps=4")
    assert code == 0, "what was accepted is what the next part is compared with"


def test_nothing_changed_and_nothing_is_said(mtr: Mtr, recipe: Path) -> None:
    """Copied, touched and written out otherwise, it is still the same."""
    folder = recipe.parent
    shutil.copy(folder / "rows.jsonl", folder / "copy.jsonl")
    os.replace(folder / "copy.jsonl", folder / "rows.jsonl")
    os.utime(folder / "base" / "model.safetensors", (1, 1))
    tokenizer = folder / "base" / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=4))
    code, _, err = mtr("train", recipe, "--resume", "training.max_steps=3")
    assert code == 0, err
    assert not [line for line in err.splitlines() if "changed since" in line or "other versions" in line]


def test_other_evaluation_data_is_noted(mtr: Mtr, recipe: Path) -> None:
    edit_rows(lambda rows: rows * 2, "eval.jsonl")(recipe.parent)
    code, _, err = mtr("train", recipe, "--resume", "training.max_steps=3")
    assert code == 0, err
    assert "losses before and after cannot be compared" in err


def edit_environment(run: Path, **keys: Any) -> None:
    path = run / "checkpoint-2" / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    sign_again(run / "checkpoint-2")


def test_other_versions_are_noted(mtr: Mtr, recipe: Path) -> None:
    run = recipe.parent / "run"
    packages = json.loads((run / "environment.json").read_text())["packages"]
    edit_environment(run, mtr="0.0.1", packages={**packages, "torch": "1.0"})
    code, _, err = mtr("train", recipe, "--resume", "training.max_steps=3")
    assert code == 0, err
    assert f"other versions than before: mtr 0.1.0 (was 0.0.1), torch {torch.__version__} (was 1.0)" in err


@pytest.mark.parametrize("made_from", [None, {}, [], {"data": "x", "weights": 3, "template": []}])
def test_a_checkpoint_that_does_not_say_is_noted_or_refused(mtr: Mtr, recipe: Path, made_from: Any) -> None:
    edit_environment(recipe.parent / "run", made_from=made_from, accepted_changes=None)
    code, _, err = mtr("train", recipe, "--resume", "training.max_steps=3")
    assert (code == 2) == bool(made_from), err
    assert "Traceback" not in err
    assert ("does not say what it was made from" in err) == (not made_from)


def test_an_adapter_is_not_merged_into_other_weights(mtr: Mtr, recipe: Path) -> None:
    run = recipe.parent / "run"
    assert mtr("merge", run, "--output", recipe.parent / "one")[0] == 0
    edit_weights(recipe.parent)
    for folder in (run, run / "checkpoint-2"):
        words = [f"{folder}: the adapter was trained on other weights", "model.safetensors has other values"]
        check_refused(mtr("merge", folder, "--output", recipe.parent / "other"), *words)


def test_accepting_changes_goes_with_resuming(mtr: Mtr, recipe: Path) -> None:
    check_refused(mtr("train", recipe, "--accept-changes"), "--accept-changes goes with --resume")
    check_refused(mtr("train", recipe, "--accept-changes", "--overwrite"), "--accept-changes goes with --resume")
