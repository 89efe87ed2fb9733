"""Claims: a run touches only a folder that is provably its own, and in it only files that it wrote; what is missing or
foreign there is reported or refused, never guessed, and never lost.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import check_refused
from support.rows import conversation_row
from support.runs import good_checkpoint, marker_of, sign_again

from mtr.errors import SaveError
from mtr.store.marker import NAME

Mtr = Callable[..., tuple[int, str, str]]
MAIN = ("mtr-run.json", "recipe.yaml", "environment.json", "metrics.jsonl", "README.md", "adapter_model.safetensors")


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], write_rows: Callable[..., Path]) -> Path:
    rows = write_rows([conversation_row(turns=1 + i % 2) for i in range(8)])
    training = {"max_steps": 2, "save_steps": 1, "conversations_per_step": 2, "gradient_checkpointing": False}
    return write_recipe(data={"train": str(rows)}, training=training, date="2026-01-31", lora={"r": 2})


@pytest.fixture
def run(recipe: Path, mtr: Mtr) -> Path:
    """The folder of a run of two steps that is done."""
    code, _, err = mtr("train", recipe)
    assert code == 0, err
    return recipe.parent / "run"


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder, and where links lead, with a hash of the content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = "folder"
    return found


def refused_untouched(mtr: Mtr, recipe: Path, *arguments: object, words: list[str]) -> str:
    before = snapshot(recipe.parent)
    message = check_refused(mtr("train", recipe, *arguments), *words)
    assert snapshot(recipe.parent) == before
    return message


# --- a folder that is no run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
@pytest.mark.parametrize(
    "names",
    [
        ["notes.txt"],
        ["README.md", "recipe.yaml", "metrics.jsonl"],
        ["checkpoint-7/weights.bin"],
        ["adapter_model.safetensors", "adapter_config.json"],
        ["model.safetensors", "config.json", "tokenizer.json"],
        [".hidden"],
    ],
)
def test_a_foreign_folder_stays_as_it_is(mtr: Mtr, recipe: Path, names: list[str], flag: str) -> None:
    for name in names:
        path = recipe.parent / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    refused_untouched(mtr, recipe, flag, words=[f"is not empty and has no {NAME}", "nothing in it is touched"])


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"run": 1}', "null", '"mtr"', "[" * 3000])
@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_marker_that_is_none_is_refused(mtr: Mtr, recipe: Path, text: str, flag: str) -> None:
    folder = recipe.parent / "run"
    folder.mkdir()
    (folder / NAME).write_text(text)
    (folder / "metrics.jsonl").write_text("mine")
    refused_untouched(mtr, recipe, flag, words=[f"{folder / NAME}: not readable as the marker of a run"])


def test_a_marker_that_names_files_elsewhere_is_refused(mtr: Mtr, recipe: Path, run: Path) -> None:
    (recipe.parent / "mine.txt").write_text("mine")
    for name in ("../mine.txt", str(recipe.parent / "mine.txt")):
        marker = json.loads((run / NAME).read_text())
        (run / NAME).write_text(json.dumps({**marker, "files": {name: []}}))
        refused_untouched(mtr, recipe, "--overwrite", words=["it names files outside the folder"])


def test_a_run_of_a_newer_format_is_refused(mtr: Mtr, recipe: Path, run: Path) -> None:
    marker = json.loads((run / NAME).read_text())
    (run / NAME).write_text(json.dumps({**marker, "format": 99, "mtr": "9.9"}))
    refused_untouched(mtr, recipe, "--resume", words=["made by mtr 9.9, which is newer"])


def test_dangerous_places_are_refused_by_the_command(mtr: Mtr, recipe: Path, run: Path) -> None:
    """A run's own folder is one of them for the run that starts from it."""
    shutil.copy(recipe, run / "again.yaml")
    refused_untouched(mtr, run / "again.yaml", "--overwrite", words=["is the folder of the recipe"])
    (run / "again.yaml").unlink()
    shutil.copy(recipe.parent / "rows.jsonl", run / "rows.jsonl")
    data = f"data.train={run / 'rows.jsonl'}"
    refused_untouched(mtr, recipe, "--overwrite", data, words=["is the folder of data.train"])
    (run / "rows.jsonl").unlink()
    for folder in (run, run / "checkpoint-2"):
        refused_untouched(mtr, recipe, "--overwrite", f"lora.init_from={folder}", words=["folder of lora.init_from"])


# --- overwriting ------------------------------------------------------------------------------------------------------


def test_overwriting_removes_the_run_and_nothing_else(mtr: Mtr, recipe: Path, run: Path) -> None:
    mine = ("notes.txt", "plots/loss.png", "checkpoint-best/weights.bin", "old.safetensors")
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    first = marker_of(run)
    code, _, err = mtr("train", recipe, "--overwrite", "training.max_steps=1")
    assert code == 0, err
    assert all((run / name).read_text() == "mine" for name in mine)
    assert sorted(path.name for path in run.glob("checkpoint-?")) == ["checkpoint-1"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    assert marker_of(run).run != first.run
    assert marker_of(run).replaced == (first.run,)


@pytest.mark.parametrize("name", ["README.md", "recipe.yaml", "adapter_model.safetensors", "tokenizer.json"])
def test_a_file_that_was_changed_since_is_the_users(mtr: Mtr, recipe: Path, run: Path, name: str) -> None:
    (run / name).write_text("edited")
    words = [f"{name} was not written by mtr, or has been changed since", "move it to another folder first"]
    refused_untouched(mtr, recipe, "--overwrite", words=words)


def test_a_checkpoint_of_the_users_in_a_run_is_not_removed(mtr: Mtr, recipe: Path, run: Path) -> None:
    (run / "checkpoint-7").mkdir()
    (run / "checkpoint-7" / "weights.bin").write_text("mine")
    refused_untouched(mtr, recipe, "--overwrite", words=["checkpoint-7 has no manifest.json of this run"])
    (run / "checkpoint-7" / "weights.bin").unlink()
    (run / "checkpoint-7").rmdir()
    (run / "checkpoint-2" / "notes.txt").write_text("mine")
    refused_untouched(mtr, recipe, "--overwrite", words=["checkpoint-2 holds notes.txt, which mtr did not write"])


def test_a_checkpoint_that_is_a_link_is_neither_followed_nor_removed(mtr: Mtr, recipe: Path, run: Path) -> None:
    elsewhere = recipe.parent / "elsewhere"
    (run / "checkpoint-2").rename(elsewhere)
    (run / "checkpoint-2").symlink_to(elsewhere)
    refused_untouched(mtr, recipe, "--overwrite", words=["checkpoint-2 is a symbolic link"])
    code, _, err = mtr("train", recipe, "--resume")
    assert code == 0, err
    assert "checkpoint-2 is damaged (it is a symbolic link, which mtr does not write)" in err
    assert "resumed       checkpoint-1" in err
    assert (elsewhere / "training_state.json").exists()
    assert (run / "checkpoint-2.kept-1").is_symlink(), "it was in the way of the new one"
    assert good_checkpoint(run)[0] == run / "checkpoint-2"


def test_rotation_leaves_what_is_not_its_own(mtr: Mtr, recipe: Path, run: Path) -> None:
    (run / "checkpoint-1" / "notes.txt").write_text("mine")
    code, _, err = mtr("train", recipe, "--resume", "training.max_steps=5", "training.save_total_limit=1")
    assert code == 0, err
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-5"]
    assert (run / "checkpoint-1" / "notes.txt").read_text() == "mine"


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_a_file_in_the_way_of_the_result_is_refused_at_the_start(mtr: Mtr, recipe: Path, run: Path) -> None:
    (run / "README.md").write_text("my own words about this run")
    words = ["README.md was not written by mtr, or has been changed since"]
    refused_untouched(mtr, recipe, "--resume", "training.max_steps=3", words=words)


def test_a_file_that_comes_into_the_way_during_the_run_is_kept(
    mtr: Mtr, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtr.training.model_card import write_model_card as write

    run = recipe.parent / "run"

    def late(*arguments: Any) -> None:
        (run / "README.md").write_text("mine")
        write(*arguments)

    monkeypatch.setattr("mtr.training.export.write_model_card", late)
    code, _, err = mtr("train", recipe)
    assert code == 0, err
    assert "README.md was not written by mtr; it is kept as README.md.kept-1" in err
    assert (run / "README.md.kept-1").read_text() == "mine"
    assert "trained by mtr" in (run / "README.md").read_text()


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"run": "x", "step": 2, "files": {}}', "[" * 3000])
def test_a_manifest_that_says_nothing_is_damage(mtr: Mtr, recipe: Path, run: Path, text: str) -> None:
    (run / "checkpoint-2" / "manifest.json").write_text(text)
    code, _, err = mtr("train", recipe, "--resume")
    assert code == 0, err
    assert "checkpoint-2 is damaged (it has no readable manifest.json)" in err
    assert "resumed       checkpoint-1" in err


def test_a_checkpoint_under_another_name_is_damage(mtr: Mtr, recipe: Path, run: Path) -> None:
    shutil.copytree(run / "checkpoint-1", run / "checkpoint-9")
    code, _, err = mtr("train", recipe, "--resume")
    assert code == 0, err
    assert "checkpoint-9 is damaged (it is checkpoint-1 under another name)" in err
    assert "resumed       checkpoint-2" in err


def test_a_checkpoint_of_another_run_is_damage(mtr: Mtr, recipe: Path, run: Path) -> None:
    other = f"training.output_dir={recipe.parent / 'other'}"
    assert mtr("train", recipe, other, "training.max_steps=3")[0] == 0
    shutil.copytree(recipe.parent / "other" / "checkpoint-3", run / "checkpoint-3")
    code, _, err = mtr("train", recipe, "--resume")
    assert code == 0, err
    assert "checkpoint-3 is damaged (it belongs to another run)" in err


def test_a_checkpoint_without_its_recipe_is_not_guessed_at(mtr: Mtr, recipe: Path, run: Path) -> None:
    (run / "recipe.yaml").unlink()
    words = [f"{run / 'recipe.yaml'} is missing, so it is not known whether checkpoint-2 fits"]
    refused_untouched(mtr, recipe, "--resume", words=words)


def test_a_recipe_that_cannot_be_read_is_refused(mtr: Mtr, recipe: Path, run: Path) -> None:
    marker = json.loads((run / NAME).read_text())
    for text in ("", "[", "model: 1", "- 1"):
        (run / "recipe.yaml").write_text(text)
        sums = {**marker["files"], "recipe.yaml": [hashlib.sha256(text.encode()).hexdigest()]}
        (run / NAME).write_text(json.dumps({**marker, "files": sums}))
        refused_untouched(mtr, recipe, "--resume", words=[str(run / "recipe.yaml")])


def test_missing_metrics_are_reported(mtr: Mtr, recipe: Path, run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    code, _, err = mtr("train", recipe, "--resume", "training.max_steps=3")
    assert code == 0, err
    assert "metrics.jsonl is missing: what it held of the steps up to 2 is lost" in err


@pytest.mark.parametrize("number", [0, 1])
def test_lost_lines_of_metrics_are_reported(mtr: Mtr, recipe: Path, run: Path, number: int) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    del lines[number]
    (run / "metrics.jsonl").write_text("".join(lines))
    code, _, err = mtr("train", recipe, "--resume", "training.max_steps=3")
    assert code == 0, err
    assert "metrics.jsonl has lost 1 of 2 lines that were written up to step 2" in err


def test_a_folder_in_the_place_of_a_file_is_refused(mtr: Mtr, recipe: Path, run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    for flag in ("--resume", "--overwrite"):
        refused_untouched(mtr, recipe, flag, "training.max_steps=3", words=["metrics.jsonl was not written by mtr"])


def test_a_link_in_the_place_of_a_hidden_file_is_not_followed(mtr: Mtr, recipe: Path, run: Path) -> None:
    (recipe.parent / "mine.txt").write_text("mine")
    for name in (".recipe.yaml.partial", f".{NAME}.partial", ".metrics.jsonl.partial"):
        (run / name).symlink_to(recipe.parent / "mine.txt")
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 9}\n')
    code, _, err = mtr("train", recipe, "--resume", "training.max_steps=3")
    assert code == 0, err
    assert (recipe.parent / "mine.txt").read_text() == "mine"


def test_a_name_that_is_too_long_is_refused(mtr: Mtr, recipe: Path) -> None:
    for name in ("x" * 300, "/".join(["folder"] * 1000)):
        output = f"training.output_dir={recipe.parent / name}"
        refused_untouched(mtr, recipe, output, words=["training.output_dir: ", "File name too long"])


def test_damaged_metrics_are_reported_and_kept(mtr: Mtr, recipe: Path, run: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[0] + b'{"step": \xff\n')
    code, _, err = mtr("train", recipe, "--resume", "training.max_steps=3")
    assert code == 0, err
    assert "1 lines of metrics.jsonl cannot be read; they are moved to metrics.damaged.jsonl" in err
    assert "metrics.jsonl has lost 1 of 2 lines that were written up to step 2" in err
    assert (run / "metrics.damaged.jsonl").read_bytes() == b'{"step": \xff\n'
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 3]


def test_a_checkpoint_with_another_shape_is_refused(mtr: Mtr, recipe: Path, run: Path) -> None:
    """One number would be copied to all places of a parameter."""
    from safetensors.torch import load_file, save_file

    path = run / "checkpoint-2" / "training_state.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("parameter."))
    save_file({**tensors, name: tensors[name][:1, :1].clone()}, path)
    sign_again(run / "checkpoint-2")
    refused_untouched(mtr, recipe, "--resume", "training.max_steps=3", words=["has shape [1, 1], the model's has"])


def test_a_checkpoint_that_makes_no_sense_is_refused(mtr: Mtr, recipe: Path, run: Path) -> None:
    path = run / "checkpoint-2" / "training_state.json"
    path.write_text(json.dumps({"step": 2}))
    sign_again(run / "checkpoint-2")
    words = [f"{run / 'checkpoint-2'}: cannot be read as a checkpoint (KeyError: 'optimizer')"]
    refused_untouched(mtr, recipe, "--resume", "training.max_steps=3", words=words)


# --- what a kill leaves -----------------------------------------------------------------------------------------------


def test_an_empty_folder_and_one_that_a_kill_left_are_free(mtr: Mtr, recipe: Path) -> None:
    run = recipe.parent / "run"
    run.mkdir()
    (run / f".{NAME}.partial").write_text("{")
    (run / ".mtr-lock").write_text("")
    code, _, err = mtr("train", recipe)
    assert code == 0, err
    assert {path.name for path in run.iterdir() if path.is_file()} >= set(MAIN)
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_what_an_overwritten_run_left_is_not_continued(mtr: Mtr, recipe: Path, run: Path) -> None:
    """Killed right after the new marker was written: the old checkpoints are known, removed, and never resumed."""
    marker_of(run).successor().write(run)
    (run / "rejects.jsonl").write_text('{"where": "old"}\n')
    code, _, err = mtr("train", recipe, "--resume", "training.max_steps=1")
    assert code == 0, err
    assert "no checkpoint in" in err
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1"]
    assert not (run / "rejects.jsonl").exists()


def test_a_result_without_checkpoints_stays_until_there_is_a_new_one(
    mtr: Mtr, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming such a run starts from the beginning, and may not get to its end."""
    run = recipe.parent / "run"
    assert mtr("train", recipe, "training.save_steps=null")[0] == 0
    result = (run / "adapter_model.safetensors").read_bytes()

    def fail(*_: Any) -> None:
        raise SaveError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("mtr.training.loop.train_step", fail)
        assert mtr("train", recipe, "--resume", "training.save_steps=null")[0] == 3
    assert (run / "adapter_model.safetensors").read_bytes() == result
    code, _, err = mtr("train", recipe, "--resume", "training.save_steps=null")
    assert code == 0, err


def test_a_refused_run_leaves_no_trace(mtr: Mtr, recipe: Path) -> None:
    raw = yaml.safe_load(recipe.read_text())
    raw["lora"]["target_modules"] = "nothing"
    recipe.write_text(yaml.safe_dump(raw))
    refused_untouched(mtr, recipe, f"training.output_dir={recipe.parent / 'a' / 'b'}", words=["lora"])
