"""Claims: output_dir is never a folder that a run reads from, one above it, or a place that is not a run's own; what
projects commonly look like is allowed; links and detours make no difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtr.errors import UserError
from mtr.recipe.placement import check_placement
from mtr.recipe.sections import Recipe


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with model, adapter, data and recipe, beside the home folder and the working folder."""
    for name in ("base", "adapter", "data/more", "recipes", "home/me", "work", "repository/.git"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/train.jsonl", "data/more/eval.jsonl", "recipes/recipe.yaml"):
        (tmp_path / name).write_text("{}\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def recipe(project: Path, output: Path | str, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name_or_path": str(project / "base")},
            "lora": {"init_from": str(project / "adapter")},
            "data": {"train": str(project / "data" / "train.jsonl"), **data},
            "training": {"output_dir": str(output)},
        }
    )


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("/", "contains"),
        ("home/me", "is the home folder"),
        ("home", "contains the home folder"),
        ("work", "is the working folder"),
        (".", "contains"),
        ("repository", "is the root of a git repository"),
        ("base", "is the folder of model.name_or_path"),
        ("base/run", "is inside the folder of model.name_or_path"),
        ("base/deep/er/run", "is inside the folder of model.name_or_path"),
        ("adapter", "is the folder of lora.init_from"),
        ("adapter/run", "is inside the folder of lora.init_from"),
        ("data", "is the folder of data.train"),
        ("recipes", "is the folder of the recipe"),
        ("work/../base", "is the folder of model.name_or_path"),
    ],
)
def test_a_folder_in_danger_is_refused(project: Path, output: str, words: str) -> None:
    with pytest.raises(UserError, match=r"^training\.output_dir: ") as error:
        check_placement(recipe(project, project / output), project / "recipes" / "recipe.yaml")
    assert words in str(error.value)
    assert "name a new folder of its own" in str(error.value)


@pytest.mark.parametrize("output", ["runs/one", "recipes/run", "work/run", "home/me/run", "data/run", "repository/run"])
def test_a_folder_of_its_own_is_allowed(project: Path, output: str) -> None:
    check_placement(recipe(project, project / output), project / "recipes" / "recipe.yaml")


def test_links_and_relative_paths_make_no_difference(project: Path) -> None:
    (project / "link").symlink_to(project / "base")
    (project / "around").symlink_to(project)
    for output in (project / "link", project / "link" / "run", project / "around" / "base", "../base", "."):
        with pytest.raises(UserError):
            check_placement(recipe(project, output))


@pytest.mark.parametrize("train", ["data", "data/**/*.jsonl", "data/*/*.jsonl"])
def test_a_run_is_not_put_where_data_is_searched_for(project: Path, train: str) -> None:
    """metrics.jsonl would be read as data when the run is resumed."""
    with pytest.raises(UserError, match=r"which data\.train searches for data files"):
        check_placement(recipe(project, project / "data" / "run", train=str(project / train)))
    check_placement(recipe(project, project / "data" / "run", train=str(project / "data" / "*.jsonl")))


def test_evaluation_data_counts_too(project: Path) -> None:
    with pytest.raises(UserError, match=r"is the folder of data\.eval"):
        check_placement(recipe(project, project / "data/more", eval=str(project / "data/more/eval.jsonl")))


def test_hub_names_are_no_folders(project: Path) -> None:
    made = recipe(project, project / "run", train="owner/name").replace(
        model={"name_or_path": "owner/model"}, lora={"init_from": None}
    )
    check_placement(made)
