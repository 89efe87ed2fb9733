"""Claims: a tracker gets the numbers of metrics.jsonl under its names, nothing leaves the machine by itself, and a
missing package is named with the line that installs it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rows import conversation_row

from mtr.errors import UserError
from mtr.recipe.loading import load_recipe
from mtr.training.loop import train
from mtr.training.tracking import check_trackers, start_tracking, track

Recipes = Callable[..., Path]


class Tracked:
    """Stands in for Accelerate."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.started: tuple[Any, ...] = ()

    def init_trackers(self, *arguments: Any) -> None:
        self.started = arguments

    def log(self, numbers: dict[str, Any], step: int) -> None:
        self.logged.append((step, numbers))


def test_numbers_have_the_names_of_the_file() -> None:
    tracked: Any = Tracked()
    track(tracked, "train", {"step": 3, "loss": 0.5, "grad_norm": None, "rows": ["a"], "skipped": "not finite"})
    track(tracked, "train", {"step": 4, "loss": 0.5, "totals": {"tokens": 9, "untrained_turns": {"too 'long'": 1}}})
    track(tracked, "eval", {"step": 3, "eval_loss": 0.25, "eval_loss_by_source": {"a.jsonl": 0.5}})
    assert tracked.logged == [
        (3, {"train/loss": 0.5}),
        (4, {"train/loss": 0.5}),
        (3, {"eval/loss": 0.25, "eval/loss_by_source.a.jsonl": 0.5}),
    ]


def test_trackers_start_offline_and_in_the_output_folder(
    write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    wanted = {
        "WANDB_MODE": "offline",
        "COMET_START_ONLINE": "0",
        "SWANLAB_MODE": "offline",
        "CLEARML_OFFLINE_MODE": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{run / 'mlflow.db'}",
        "TRACKIO_DIR": str(run / "trackio"),
        "COMET_OFFLINE_DIRECTORY": str(run / "comet"),
    }
    for name in wanted:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    trackers = ["wandb", "mlflow", "trackio", "comet_ml", "tensorboard", "dvclive", "swanlab", "clearml", "aim"]
    tracked: Any = Tracked()
    start_tracking(tracked, load_recipe(write_recipe(training={"report_to": trackers})), start=4)
    assert {name: os.environ.get(name) for name in wanted} == wanted
    project, config, options = tracked.started
    assert project == "mtr"
    assert config["training.learning_rate"] == 1e-3
    assert options == {
        "tensorboard": {"purge_step": 5},
        "wandb": {"dir": str(run), "name": "run"},
        "trackio": {"name": "run"},
        "dvclive": {"dir": str(run / "dvclive"), "resume": True, "dvcyaml": None, "save_dvc_exp": False},
        "swanlab": {"logdir": str(run / "swanlog")},
    }


def test_the_user_decides_to_go_online(write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    start_tracking(Tracked(), load_recipe(write_recipe(training={"report_to": "wandb"})), 0)
    assert os.environ["WANDB_MODE"] == "online"


@pytest.mark.parametrize(
    ("value", "names"), [("none", []), ("wandb", ["wandb"]), (["mlflow", "aim"], ["mlflow", "aim"])]
)
def test_one_or_several_or_none(write_recipe: Recipes, value: Any, names: list[str]) -> None:
    assert load_recipe(write_recipe(training={"report_to": value})).training.report_to == names


def test_a_missing_package_comes_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("wandb", "comet_ml") else object())
    check_trackers(["tensorboard"])
    with pytest.raises(UserError, match="wandb, comet_ml is not installed; pip install wandb comet-ml"):
        check_trackers(["tensorboard", "wandb", "comet_ml"])


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_the_run(write_recipe: Recipes, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = str(write_rows([conversation_row() for _ in range(4)]))
    training = {"report_to": "tensorboard", "max_steps": 3, "conversations_per_step": 1}
    train(load_recipe(write_recipe(data={"train": rows, "eval": rows}, training=training)))
    folder = next((tmp_path / "run").rglob("events.out.tfevents.*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert {"train/learning_rate", "train/data_wait_seconds", "train/tokens_per_second", "eval/loss"} <= set(
        events.Tags()["scalars"]
    )
