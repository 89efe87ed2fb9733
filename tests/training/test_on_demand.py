"""Claims: a signal or a file makes a run write a checkpoint after its step and go on as if nobody had asked; the file
is removed and nothing else is. For several processes see test_processes.py.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mtr.training.loop
from mtr.errors import UserError
from mtr.recipe.loading import load_recipe
from mtr.store.marker import NAME as MARKER
from mtr.store.trigger import NAME, Trigger, ask_for_checkpoint
from mtr.training.loop import train
from mtr.training.signals import StopSignals
from mtr.training.stopping import Stopping

Recipes = Callable[..., Path]


def during_steps(monkeypatch: pytest.MonkeyPatch, acts: dict[int, Callable[[], Any]]) -> None:
    accumulate, calls = mtr.training.loop.accumulate, iter(range(1, 100))

    def acting(*arguments: Any) -> Any:
        acts.get(next(calls), lambda: None)()
        return accumulate(*arguments)

    monkeypatch.setattr(mtr.training.loop, "accumulate", acting)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_is_asked_saves_and_goes_on(
    write_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked in step 1 by the file and in step 3 by the signal, it knows at the next one, and saves after that."""
    folder, plain = tmp_path / "run", tmp_path / "plain"
    training = {"max_steps": 5, "conversations_per_step": 1, "checkpoint_signal": "usr2"}
    train(load_recipe(write_recipe(training={**training, "output_dir": str(plain)}, date="2026-01-31")))
    by_signal = {3: lambda: os.kill(os.getpid(), signal.SIGUSR2)}
    during_steps(monkeypatch, {1: (folder / NAME).touch, **by_signal})
    before = signal.getsignal(signal.SIGUSR2)
    capsys.readouterr()
    state = train(load_recipe(write_recipe(training=training, date="2026-01-31")))
    assert (state.steps, state.stopped_by) == (5, None)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert not (folder / NAME).exists()
    said = capsys.readouterr().err
    assert (said.count("checkpoint-2, as asked for"), said.count("checkpoint-4, as asked for")) == (1, 1)
    assert losses(folder) == losses(plain)
    assert signal.getsignal(signal.SIGUSR2) is before


def test_nothing_but_the_file_is_removed(tmp_path: Path) -> None:
    trigger = Trigger(tmp_path)
    assert not trigger.is_there()
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "mine").touch()
    assert not trigger.is_there()
    trigger.remove()
    assert (tmp_path / NAME / "mine").exists(), "a folder of that name is the user's"
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("mine")
    (other / NAME).symlink_to(other / "mine")
    assert Trigger(other).is_there()
    Trigger(other).remove()
    assert [path.name for path in other.iterdir()] == ["mine"]
    assert (other / "mine").read_text() == "mine"


def test_a_file_that_cannot_be_removed_asks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).touch()
    trigger = Trigger(tmp_path)
    assert trigger.is_there()

    def refused(_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "unlink", refused)
    trigger.remove()
    assert not trigger.is_there()


def test_the_launcher_asks_only_where_a_run_has_begun(tmp_path: Path) -> None:
    ask_for_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == [], "the folder would not be taken for a new run"
    (tmp_path / MARKER).touch()
    ask_for_checkpoint(tmp_path)
    assert (tmp_path / NAME).exists()


def test_stopping_comes_before_saving() -> None:
    signals = StopSignals()
    stopping = Stopping(signals, None)
    assert stopping.code == 0
    signals.is_save_asked = True
    asked = stopping.code
    signals.received = signal.SIGHUP  # the lowest number
    assert 0 < asked < stopping.code
    stopping.agree_on(stopping.code)
    assert (stopping.signal, stopping.is_save_agreed) == (signal.SIGHUP, False)
    stopping.agree_on(asked)
    assert (stopping.signal, stopping.is_save_agreed) == (None, True)
    assert (stopping.saved(), stopping.saved()) == (True, False)


@pytest.mark.parametrize("taken", ["TERM", "INT", "USR1"])
def test_one_signal_cannot_mean_both(taken: str, write_recipe: Recipes) -> None:
    recipe = write_recipe(training={"preempt_signal": "USR1", "checkpoint_signal": ["USR2", taken]})
    with pytest.raises(UserError, match=f"SIG{taken} ends the run with a checkpoint; name another signal"):
        load_recipe(recipe)
