"""Claims: overrides reach every key; relative paths are found; a file or an override that cannot be read is refused in
one line; every recipe of the repository loads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.paths import QUICKSTART, ROOT
from support.recipes import MINIMAL, at, changed, load, refused

from mtr.errors import UserError
from mtr.recipe.loading import load_recipe
from mtr.recipe.sections import Recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a recipe must be a mapping of sections"),
        ("- 1", "a recipe must be a mapping of sections"),
        ("just words", "a recipe must be a mapping of sections"),
        ("model: [", "not valid YAML"),
        ("model:\n\tname: x", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, words: str) -> None:
    message = refused(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}:")
    assert words in message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("# 1\n# Schlüssel".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml:2: not UTF-8 text; save the file as UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


def test_an_override_changes_one_place_of_an_alias(tmp_path: Path) -> None:
    text = "model: {name_or_path: /m}\ntraining: {output_dir: /o}\ndata: {train: &t [{path: /a}], eval: *t}\n"
    recipe = load(tmp_path, text + "template: {x: &x {n: 1}, y: *x}\n", "data.train.0.weight=2", "template.x.n=3")
    assert (recipe.data.train[0].weight, recipe.data.eval[0].weight) == (2, 1)
    assert recipe.template == {"x": {"n": 3}, "y": {"n": 1}}


@pytest.mark.parametrize("share", ["0.1", ".1", "1e-1", "1.0E-1"])
def test_a_share_may_be_written_as_yaml_writes_numbers(tmp_path: Path, share: str) -> None:
    data = load(tmp_path, MINIMAL, f"data.eval={share}").data
    assert (data.eval, data.eval_fraction) == ([], 0.1)
    raw = f"model: {{name_or_path: /m}}\ntraining: {{output_dir: /o}}\ndata: {{train: /d, eval: {share}}}"
    for overrides in ([], ["data.train.0.weight=2"]):
        data = load(tmp_path, raw, *overrides).data
        assert (data.eval, data.eval_fraction) == ([], 0.1)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.max_steps=20", "training.max_steps", 20),
        ("training.max_steps=null", "training.max_steps", None),
        ("training.max_steps=", "training.max_steps", None),
        ("training.learning_rate=1.0e-3", "training.learning_rate", 1e-3),
        ("training.learning_rate=1e-3", "training.learning_rate", 1e-3),
        ("training.gradient_checkpointing=false", "training.gradient_checkpointing", False),
        ("training.output_dir=a=b", "training.output_dir", "a=b"),
        ("lora.target_modules=[q_proj, k_proj]", "lora.target_modules", ["q_proj", "k_proj"]),
        ("template.enable_thinking=true", "template", {"enable_thinking": True}),
        ("template={a: {b: 1}}", "template", {"a": {"b": 1}}),
        ("template.a.b.c=1", "template", {"a": {"b": {"c": 1}}}),
        ("data.train.0.weight=0.5", "data.train.0.weight", 0.5),
        ("data.eval=[{path: /e.jsonl, split: test}]", "data.eval.0.split", "test"),
        ("lora=null", "lora", None),
    ],
)
def test_an_override_reaches_its_key(tmp_path: Path, override: str, key: str, value: Any) -> None:
    assert at(load(tmp_path, MINIMAL, override), key) == value


def test_an_override_opens_a_section_that_is_null_and_later_ones_win(tmp_path: Path) -> None:
    recipe = load(tmp_path, changed(lora=None), "lora.r=4", "lora.r=8")
    assert recipe.lora is not None
    assert recipe.lora.r == 8


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.max_steps", "an override is written section.key=value"),
        ("=5", "an override is written section.key=value"),
        ("template.x=[", "the value is not valid YAML; quote it"),
        ("training.seed.x=1", "'seed' is a plain value and has no keys"),
        ("data.train.7.path=x", "'7' is not an index into a list of 1"),
        ("data.train.1={path: x}", "'1' is not an index into a list of 1"),
        ("data.train.first.path=x", "'first' is not an index into a list of 1"),
        ("training.lerning_rate=1", "did you mean 'learning_rate'?"),
        ("trainig.seed=1", "did you mean 'training'?"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path: Path, override: str, words: str) -> None:
    raw = changed(training__seed=1)
    message = refused(tmp_path, raw, override)
    assert words in message


def test_relative_paths_are_found_in_the_working_directory_then_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder, names in ((here, ("both.jsonl",)), (beside, ("both.jsonl", "only.jsonl", "part-1.jsonl"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("")
    (beside / "model").mkdir()
    monkeypatch.chdir(here)
    sources = ["both.jsonl", "only.jsonl", "part-*.jsonl", "org/name", "absent.jsonl"]
    recipe = load(beside, changed(model={"name_or_path": "model"}, data={"train": sources, "eval": "only.jsonl"}))
    assert recipe.model.name_or_path == str(beside / "model")
    assert [s.path for s in recipe.data.train] == [
        str(here / "both.jsonl"),
        str(beside / "only.jsonl"),
        str(beside / "part-*.jsonl"),
        "org/name",
        "absent.jsonl",
    ]
    assert recipe.data.eval[0].path == str(beside / "only.jsonl")


def test_a_relative_output_dir_is_not_looked_up_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside" / "run").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert load(tmp_path / "beside", changed(training__output_dir="run")).training.output_dir == "run"


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(tmp_path, changed(data__train="~/x.jsonl")).data.train[0].path == str(tmp_path / "x.jsonl")


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_repository_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.training.output_dir
    assert Recipe.model_validate(yaml.safe_load(recipe.dump())) == recipe


def test_the_quickstart_recipe_finds_its_files_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    assert recipe.model.name_or_path == str(QUICKSTART / "base")
    assert all(Path(source.path).is_file() for source in recipe.data.train + recipe.data.eval)


def test_the_test_recipe_is_valid(write_recipe: Callable[..., Path]) -> None:
    assert load_recipe(write_recipe(lora=None)).lora is None
