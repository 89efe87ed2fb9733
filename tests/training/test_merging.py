"""Claims: `mtr merge` refuses weights that are not those of the base model or of the adapter, and reads no pickle; the
merged folder appears complete or not at all, whatever happens meanwhile, and nothing that it left is in the way of the
next try; nothing of the user's is touched.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import Tensors, changed_model, save_tensors
from support.paths import QUICKSTART

from mtr.checks.verify import fill_lora_b
from mtr.model.loading import load_model
from mtr.recipe.loading import load_recipe

Mtr = Callable[..., tuple[int, str, str]]
Recipes = Callable[..., Path]
UP = "model.layers.1.mlp.up_proj.weight"
LORA = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return changed_model(QUICKSTART / "base", tmp_path / "base")


@pytest.fixture
def run(base: Path, write_recipe: Recipes, tmp_path: Path) -> Path:
    """What a finished run leaves of its adapter."""
    recipe = load_recipe(write_recipe(model={"name_or_path": str(base)}, lora={"r": 2}))
    model = load_model(recipe, torch.device("cpu"))
    fill_lora_b(model, 0)
    folder = tmp_path / "run"
    model.save_pretrained(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, folder)
    (folder / "recipe.yaml").write_text(recipe.dump())
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(mtr: Mtr, run: Path, *options: object, code: int = 2) -> str:
    """The one line; nothing new is left, and nothing has changed."""
    before = files(run.parent)
    found, out, err = mtr("merge", run, *options)
    assert (found, out) == (code, ""), err
    assert len(err.splitlines()) == 1, err
    assert files(run.parent) == before
    return err


def rewrite(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_tensors(change(load_file(file)), file)


def edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def merges(mtr: Mtr, run: Path) -> None:
    code, _, err = mtr("merge", run)
    assert (code, err) == (0, "")
    names = {path.name for path in (run / "merged").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert not any(name.startswith(".") for name in names)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: {f"_orig_mod.{n}": t for n, t in tensors.items()}, "under torch.compile"),
        (lambda tensors: {n: t for n, t in tensors.items() if n != UP}, f"1 parameter ({UP})"),
        (lambda tensors: {**tensors, UP: tensors[UP][:7].clone()}, f"{UP} [7, 128], not [384, 128]"),
    ],
)
def test_a_base_with_other_weights_is_refused(
    mtr: Mtr, base: Path, run: Path, change: Callable[[Tensors], Tensors], words: str
) -> None:
    rewrite(base / "model.safetensors", change)
    err = refused(mtr, run)
    assert f"{run}: the base model cannot be loaded from {base}: " in err
    assert words in err


ADAPTERS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "one missing": (lambda tensors: {n: t for n, t in tensors.items() if n != LORA}, f"does not adapt {LORA}"),
    "one more": (lambda tensors: {**tensors, "base_model.x": tensors[LORA].clone()}, "adapts more: base_model.x"),
    "prefixed": (lambda tensors: {f"_orig_mod.{n}": t for n, t in tensors.items()}, "adapts more: _orig_mod."),
    "another shape": (lambda tensors: {**tensors, LORA: tensors[LORA][:1].clone()}, LORA.removesuffix(".weight")),
    "integers": (lambda tensors: {**tensors, LORA: tensors[LORA].to(torch.int8)}, "torch.int8"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_with_other_tensors_is_refused(mtr: Mtr, run: Path, name: str) -> None:
    change, words = ADAPTERS[name]
    rewrite(run / "adapter_model.safetensors", change)
    err = refused(mtr, run)
    assert f"{run}: the adapter " in err
    assert words in err


def test_an_adapter_in_pickle_is_not_opened(mtr: Mtr, run: Path) -> None:
    file = run / "adapter_model.safetensors"
    torch.save(load_file(file), run / "adapter_model.bin")
    file.unlink()
    err = refused(mtr, run)
    assert "holds its adapter only as pickle (adapter_model.bin)" in err


@pytest.mark.parametrize("keys", [{"r": 10**9}, {"rank_pattern": {"q_proj": 10**9}}, {"r": "two"}])
def test_a_rank_without_tensors_takes_no_memory(mtr: Mtr, run: Path, keys: dict[str, Any]) -> None:
    edit(run / "adapter_config.json", **keys)
    assert "in adapter_config.json, and no tensor of that size" in refused(mtr, run)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "not the config of an adapter"),
        ("{", "not the config of an adapter"),
        ("{}", "only LoRA adapters can be loaded and merged"),
        ('{"peft_type": "LORA", "base_model_name_or_path": null}', "base_model_name_or_path is None"),
    ],
)
def test_an_adapter_without_a_config_is_refused(mtr: Mtr, run: Path, text: str, words: str) -> None:
    (run / "adapter_config.json").write_text(text)
    assert words in refused(mtr, run)


def test_a_run_without_tokenizer_is_refused(mtr: Mtr, run: Path) -> None:
    for path in (*run.glob("tokenizer*"), run / "chat_template.jinja"):
        path.unlink()
    assert "its tokenizer cannot be loaded" in refused(mtr, run)


def test_what_the_recipe_allows_holds_for_the_base(mtr: Mtr, base: Path, run: Path) -> None:
    rewrite(base / "model.safetensors", lambda tensors: {**tensors, "model.mtp.weight": tensors[UP].clone()})
    assert "goes into model.allow_unexpected" in refused(mtr, run)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("allow_unexpected: []", "allow_unexpected: [model.mtp.*]"))
    code, _, err = mtr("merge", run)
    assert code == 0
    assert "left out of the model: model.mtp.weight" in err
    assert "model.mtp.weight" not in load_file(run / "merged" / "model.safetensors")


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_nothing_in_the_way(mtr: Mtr, run: Path, exists: bool) -> None:
    """Files larger than this cannot be written, as on a disk that fills up in the middle of one."""
    if exists:
        (run / "merged").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    try:
        err = refused(mtr, run, code=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"--output: {run / 'merged'} cannot be written: " in err
    assert "MiB free in" in err
    assert (run / "merged").exists() == exists
    assert not list(run.glob(".*"))
    merges(mtr, run)


def test_a_killed_merge_is_not_in_the_way(mtr: Mtr, run: Path) -> None:
    script = (
        "import os, sys, transformers\n"
        "transformers.PreTrainedTokenizerBase.save_pretrained = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        "from mtr.__main__ import main\n"
        f"sys.argv = ['mtr', 'merge', {str(run)!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert not (run / "merged").exists()
    assert (run / ".merged.partial" / "model.safetensors").exists()
    merges(mtr, run)


def test_a_folder_of_the_users_is_not_taken_for_a_rest(mtr: Mtr, run: Path) -> None:
    partial = run / ".merged.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    assert "is in the way, and mtr did not write it" in refused(mtr, run)
    shutil.rmtree(partial)
    elsewhere = run.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".mtr-lock").write_text("{}")
    partial.symlink_to(elsewhere)
    assert "is in the way, and mtr did not write it" in refused(mtr, run)
    assert partial.is_symlink()


def test_two_merges_at_once(mtr: Mtr, run: Path) -> None:
    from mtr.store.lock import RunLock

    with RunLock(run / ".merged.partial") as lock:
        lock.take()
        err = refused(mtr, run)
        assert f"--output: another process is writing {run / 'merged'}: process " in err
    merges(mtr, run)


def test_the_output_is_a_folder_of_its_own(mtr: Mtr, base: Path, run: Path) -> None:
    assert "is the run itself" in refused(mtr, run, "--output", run)
    for inside in (base / "merged", base / "a" / "b"):
        assert "is in the folder of the base model" in refused(mtr, run, "--output", inside)
    taken = run.parent / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    assert "is not empty; remove it, or name another folder" in refused(mtr, run, "--output", taken)
    assert "is not empty" in refused(mtr, run, "--output", taken / "mine.txt")
