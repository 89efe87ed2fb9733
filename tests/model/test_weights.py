"""Claims: the weight files of a model are those that transformers loads, found without the network; pickle is refused
by saying so; damaged files are named.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models import changed_model, save_sharded
from support.paths import QUICKSTART

from mtr.errors import UserError
from mtr.model.weights import stored_tensors, weight_files

Recipes = Callable[..., Path]
Mtr = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return changed_model(QUICKSTART / "base", tmp_path / "model")


def test_files_are_those_that_transformers_takes(folder: Path) -> None:
    whole = folder / "model.safetensors"
    assert weight_files(str(folder), None) == [whole]
    stored = stored_tensors([whole])
    assert len(stored) == 46
    assert stored["model.norm.weight"].shape == (128,)
    assert (stored["model.norm.weight"].dtype, stored["model.norm.weight"].size) == ("BF16", 128)

    from safetensors.torch import load_file

    tensors = load_file(whole)
    save_sharded(tensors, folder, shards=3)
    shards = [folder / f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert weight_files(str(folder), None) == shards
    assert stored_tensors(shards).keys() == tensors.keys()
    shutil.copy(QUICKSTART / "base" / "model.safetensors", whole)
    assert weight_files(str(folder), None) == [whole], "the one file goes before the index"


def test_a_file_that_the_config_names_goes_first(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(UserError, match="there are no weights in it"):
        weight_files(str(folder), None)
    named = changed_model(folder, tmp_path / "named", transformers_weights="other.safetensors")
    assert weight_files(str(named), None) == [named / "other.safetensors"]


@pytest.mark.parametrize("name", ["../model/model.safetensors", "/model.safetensors", "adapter_model.bin", 3])
def test_the_config_names_no_file_elsewhere(folder: Path, tmp_path: Path, name: object) -> None:
    named = changed_model(folder, tmp_path / "named", transformers_weights=name)
    with pytest.raises(UserError, match="which is no safetensors file in it"):
        weight_files(str(named), None)


def test_hub_models_are_looked_up_in_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert weight_files("owner/name", None) == []
    assert weight_files("no Hub id, whatever/it/is", None) == []
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / "a1b2"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("a1b2")
    shutil.copytree(folder, snapshot)
    assert weight_files("owner/name", None) == weight_files("owner/name", "a1b2") == [snapshot / "model.safetensors"]
    assert weight_files("owner/name", "v2") == []

    from safetensors.torch import load_file

    save_sharded(load_file(snapshot / "model.safetensors"), snapshot)
    assert len(weight_files("owner/name", None)) == 2
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    assert weight_files("owner/name", None) == [], "not downloaded yet"


def refused(mtr: Mtr, recipe: Path) -> str:
    code, out, err = mtr("verify", recipe, "--conversations", 1)
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    return err.splitlines()[-1]


def test_pickle_is_refused_by_saying_so(write_recipe: Recipes, mtr: Mtr, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    line = refused(mtr, write_recipe(model={"name_or_path": str(folder)}))
    assert "only there as pickle (pytorch_model.bin), which can run code" in line
    assert "save the model as safetensors" in line


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 99, lambda b: b + b"x"]
)
def test_damaged_files_are_named(
    write_recipe: Recipes, mtr: Mtr, folder: Path, damage: Callable[[bytes], bytes]
) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    line = refused(mtr, write_recipe(model={"name_or_path": str(folder)}))
    assert f"{file} is damaged" in line


def test_a_distributed_checkpoint_is_refused(write_recipe: Recipes, mtr: Mtr, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "shard-00001-model-00001-of-00001.safetensors")
    line = refused(mtr, write_recipe(model={"name_or_path": str(folder)}))
    assert "is a part of a distributed checkpoint; save the whole model" in line
