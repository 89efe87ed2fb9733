"""Claims: what happens to real runs ends as it is documented, with the last good checkpoint and a reason: signals in
every phase, a disk that is full, a loss that is not finite, memory that does not hold a pack, a worker that dies.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.rows import conversation_row
from support.runs import good_checkpoint
from torch.utils.data import get_worker_info

import mtr.model.loading
import mtr.model.tree_model
import mtr.prepare.builder
import mtr.training.checkpoint
import mtr.training.faults
import mtr.training.generation
import mtr.training.setup
from mtr.chat.rendering import Renderer
from mtr.errors import DeviceMemoryError, SaveError
from mtr.prepare.steps import IndexedSteps
from mtr.recipe.loading import load_recipe
from mtr.training import export, loop
from mtr.training.loop import train
from mtr.training.state import RunState
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import View, merge
from mtr.tree.packing import Pack

Recipes = Callable[..., Path]
Mtr = Callable[..., tuple[int, str, str]]
Patch = pytest.MonkeyPatch


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in lines(folder) if "loss" in line]


@pytest.fixture
def recipe(write_recipe: Recipes, write_rows: Callable[..., Path]) -> Recipes:
    """A recipe of six steps with an evaluation, held-out conversations and a checkpoint every second step."""
    rows = [conversation_row(turns=1 + i % 3) for i in range(8)]

    def write(**sections: Any) -> Path:
        data = {"train": str(write_rows(rows)), "eval": str(write_rows(rows[:2], "eval.jsonl"))}
        training = {"max_steps": 6, "conversations_per_step": 2, "save_steps": 2, "eval_steps": 3}
        generation = {"conversations": 2, "max_new_tokens": 3}
        merged: dict[str, Any] = {"data": data, "training": training, "generation": generation}
        for name, keys in sections.items():
            merged[name] = {**merged.get(name, {}), **keys}
        return write_recipe(**merged)

    return write


# --- signals ----------------------------------------------------------------------------------------------------------


def raise_at(monkeypatch: Patch, owner: Any, name: str, number: int, call: int = 1) -> None:
    """The process gets a signal when a function is called for the `call`-th time."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def signalled(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, signalled)


PHASES: dict[str, tuple[Any, str, int, int | None]] = {
    "loading": (mtr.training.setup, "load_model", 1, None),
    "generating": (mtr.training.generation, "_generate", 1, None),
    "in a step": (loop, "accumulate", 3, 3),
    "clipping": (loop, "clip_gradients", 4, 4),
    "saving": (mtr.training.checkpoint, "save_model", 1, 2),
    "syncing": (mtr.training.checkpoint, "sync", 3, 2),
    "evaluating": (IndexedSteps, "first_epoch", 1, 3),
    "last evaluation": (IndexedSteps, "first_epoch", 2, 6),
}
"""Where, at which call, and the step whose checkpoint is left."""


SIGNALLED = [(phase, signal.SIGTERM) for phase in PHASES]
SIGNALLED += [(phase, signal.SIGINT) for phase in ("loading", "in a step")]  # the same handler


@pytest.mark.parametrize(("phase", "number"), SIGNALLED, ids=lambda value: getattr(value, "name", value))
def test_a_signal_in_any_phase_saves_and_the_run_goes_on(
    recipe: Recipes, mtr: Mtr, monkeypatch: Patch, tmp_path: Path, phase: str, number: int
) -> None:
    module, name, call, saved = PHASES[phase]
    path = recipe()
    with monkeypatch.context() as patch:
        raise_at(patch, module, name, number, call)
        code, _, err = mtr("train", path)
    assert code == 128 + number
    assert "Traceback" not in err
    run = tmp_path / "run"
    good, notes = good_checkpoint(run) if run.exists() else (None, [])
    assert (good and good.name, notes) == (saved and f"checkpoint-{saved}", [])
    if saved:
        assert f"stopped by {signal.Signals(number).name} after step {saved}; continue with --resume" in err
    else:
        assert "before the first step" in err or "after step 0" in err
    assert mtr("train", path, "--resume")[0] == 0
    steps = [line["step"] for line in lines(run) if "loss" in line]
    evaluations = [line["step"] for line in lines(run) if "eval_loss" in line]
    assert (steps, evaluations) == ([1, 2, 3, 4, 5, 6], [3, 6])


def test_a_signal_in_the_export_lets_it_finish(recipe: Recipes, mtr: Mtr, monkeypatch: Patch, tmp_path: Path) -> None:
    raise_at(monkeypatch, export, "write_model_card", signal.SIGTERM)
    assert mtr("train", recipe())[0] == 0
    assert (tmp_path / "run" / "README.md").exists()


def test_the_signal_of_a_scheduler_is_named_in_the_recipe(
    recipe: Recipes, mtr: Mtr, monkeypatch: Patch, tmp_path: Path
) -> None:
    path = recipe(training={"preempt_signal": "USR1"})
    raise_at(monkeypatch, loop, "accumulate", signal.SIGUSR1, 2)
    code, _, err = mtr("train", path)
    assert code == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1 after step 2" in err
    assert good_checkpoint(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint-2"
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL, "handlers are put back"


def test_a_second_signal_ends_the_process_at_once() -> None:
    script = (
        "import os, signal, sys, time\n"
        "from mtr.training.signals import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    signals.can_save = True\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "still here\n")
    assert "second signal (SIGINT)" in done.stderr


# --- a full disk ------------------------------------------------------------------------------------------------------


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fail_at(monkeypatch: Patch, name: str, call: int) -> None:
    original, calls = getattr(mtr.training.checkpoint, name), iter(range(1, 1000))

    def failing(*arguments: Any, **options: Any) -> Any:
        return no_space() if next(calls) == call else original(*arguments, **options)

    monkeypatch.setattr(mtr.training.checkpoint, name, failing)


@pytest.mark.parametrize("writer", ["save_model", "save_file", "sync"])
def test_a_full_disk_stops_the_run_and_the_last_checkpoint_stays(
    recipe: Recipes, mtr: Mtr, monkeypatch: Patch, tmp_path: Path, writer: str
) -> None:
    path, run = recipe(), tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_at(patch, writer, 14 if writer == "sync" else 2)  # eleven in the first checkpoint
        code, _, err = mtr("train", path)
    assert code == 3
    assert "checkpoint-4 could not be written (No space left on device; " in err
    assert "MiB free" in err
    assert "checkpoint-2 is the last good one. Free disk space, then continue with --resume" in err
    assert not list(run.glob(".checkpoint-*"))
    assert mtr("train", path, "--resume")[0] == 0
    assert [line["step"] for line in lines(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_run_continues_on_a_full_disk_where_the_recipe_says_so(
    recipe: Recipes, mtr: Mtr, monkeypatch: Patch, tmp_path: Path
) -> None:
    fail_at(monkeypatch, "save_file", 1)
    code, _, err = mtr("train", recipe(training={"on_save_error": "continue"}))
    assert code == 0
    assert "warning       checkpoint-2 could not be written" in err
    assert "there is none yet; continuing" in err
    assert "1 checkpoints could not be written" in err
    assert good_checkpoint(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint-6"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 7 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_really_fills_up(recipe: Recipes, mtr: Mtr, small_disk: Path) -> None:
    """A checkpoint needs 2.6 MiB here: the third one has no room until the first one is gone."""
    path = recipe(training={"output_dir": str(small_disk / "run"), "save_total_limit": None})
    code, _, err = mtr("train", path)
    assert code == 3, err
    assert "could not be written" in err
    assert "o space left on device" in err
    good, notes = good_checkpoint(small_disk / "run")
    assert good is not None
    assert notes == []
    assert f"{good.name} is the last good one" in err
    shutil.rmtree(small_disk / "run" / "checkpoint-2")
    code, _, err = mtr("train", path, "--resume")
    assert code == 0, err
    assert [line["step"] for line in lines(small_disk / "run") if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_quota_is_a_full_disk(recipe: Recipes, write_recipe: Recipes, tmp_path: Path) -> None:
    """No file may grow beyond a limit: the optimizer's is the largest one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(SaveError, match=r"checkpoint-2 could not be written .*there is none yet"):
            train(load_recipe(recipe()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_lines_of_metrics_wait_until_there_is_room(tmp_path: Path, monkeypatch: Patch) -> None:
    from mtr.training.metrics import MetricsFile

    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.write({"step": 1})
    real = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *a, **k: no_space() if a[1:] == ("a",) else real(*a, **k))
        for step in (2, 3):
            with pytest.raises(SaveError, match="No space left"):
                metrics.write({"step": step})
    metrics.write({"step": 4})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


# --- a loss that is not finite ----------------------------------------------------------------------------------------


def poison(monkeypatch: Patch, *numbers: int) -> None:
    """Some rows have no finite loss."""

    def poisoned(pack: Pack, *arguments: Any) -> Batch:
        batch = build_batch(pack, *arguments)
        bad = any(row.endswith(f"line {number}") for row in batch.rows for number in numbers)
        return replace(batch, weight=batch.weight * float("nan")) if bad else batch

    monkeypatch.setattr(mtr.prepare.builder, "build_batch", poisoned)


def test_a_poisoned_row_costs_its_step_and_is_named(
    recipe: Recipes, mtr: Mtr, monkeypatch: Patch, tmp_path: Path
) -> None:
    poison(monkeypatch, 3)
    path = recipe(data={"shuffle": False, "eval": []}, generation={"conversations": 0}, training={"logging_steps": 6})
    code, _, err = mtr("train", path, "training.max_steps=6")
    assert code == 4, "the last step is not finite either"
    run = tmp_path / "run"
    skipped = [line for line in lines(run) if line.get("skipped")]
    assert [line["step"] for line in skipped] == [2, 6], "written whatever logging_steps says"
    rows = [f"{tmp_path / 'rows.jsonl'}, line {number}" for number in (3, 4)]
    assert all(line["loss"] is None and line["skipped"] == "not finite" for line in skipped)
    assert skipped[0]["rows"] == rows
    assert "not finite in 1 steps in a row, the last one step 6" in err
    assert f"{rows[0]}; {rows[1]}" in err


def test_a_skipped_step_leaves_the_weights_as_they_were(recipe: Recipes, monkeypatch: Patch, tmp_path: Path) -> None:
    sections = {"data": {"shuffle": False, "eval": []}, "generation": {"conversations": 0}}
    poison(monkeypatch, 3)
    summary = train(load_recipe(recipe(**sections, training={"max_steps": 3, "save_steps": 1})))
    assert (summary.nonfinite_steps, summary.nonfinite_in_a_row) == (1, 0)
    assert [name.rsplit(" ", 1)[1] for name in summary.nonfinite_rows] == ["3", "4"]
    from safetensors.torch import load_file

    two, three = (load_file(tmp_path / "run" / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (2, 3))
    assert any(not torch.equal(two[name], three[name]) for name in two)
    assert all(torch.isfinite(tensor).all() for tensor in three.values())


def test_too_many_in_a_row_stop_the_run(recipe: Recipes, mtr: Mtr, monkeypatch: Patch, tmp_path: Path) -> None:
    poison(monkeypatch, 3, 5)
    code, _, err = mtr("train", recipe(data={"shuffle": False}), "training.max_nonfinite_steps=2")
    assert code == 4
    assert "not finite in 2 steps in a row, the last one step 3" in err
    assert good_checkpoint(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint-3"


# --- memory -----------------------------------------------------------------------------------------------------------


def limit_memory(monkeypatch: Patch, most: int, phase: str) -> list[int]:
    """Packs of more tokens than `most` do not fit, in the forward or in the backward; returns the sizes that did."""
    forward = mtr.model.tree_model.TreeModel.forward
    fitted: list[int] = []

    def limited(self: Any, batch: Batch | None, *arguments: Any, **options: Any) -> Any:
        loss = forward(self, batch, *arguments, **options)
        if batch is None or not torch.is_grad_enabled():
            return loss
        if batch.num_tokens <= most:
            fitted.append(batch.num_tokens)
            return loss
        if phase == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        def full(_: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        first = next(p for p in self.parameters() if p.requires_grad)
        first.register_hook(full) if not hasattr(self, "_full") else None
        return loss

    monkeypatch.setattr(mtr.model.tree_model.TreeModel, "forward", limited)
    return fitted


MEMORY: dict[str, Any] = {"data": {"eval": []}, "generation": {"conversations": 0}}


@pytest.fixture
def one(recipe: Recipes, tmp_path: Path) -> Callable[..., tuple[Path, RunState]]:
    def go(name: str, **sequence: Any) -> tuple[Path, RunState]:
        training = {"output_dir": str(tmp_path / name), "max_steps": 4, "conversations_per_step": 4}
        return tmp_path / name, train(load_recipe(recipe(**MEMORY, sequence=sequence, training=training)))

    return go


def test_a_step_is_done_again_with_smaller_packs(one: Callable[..., tuple[Path, RunState]], monkeypatch: Patch) -> None:
    """Also a single conversation is cut, and a pack that fails after others of its step costs none of their share."""
    whole, _ = one("whole", max_length=180, max_tokens=400)
    fitted = limit_memory(monkeypatch, 110, "forward")
    split, summary = one("split", max_length=180, max_tokens=400, on_oom="split")
    assert summary.pack_splits >= 2
    assert max(fitted) <= 110
    pairs = [(a, b) for x, y in zip(losses(whole), losses(split), strict=True) for a, b in zip(x, y, strict=True)]
    assert max(abs(a - b) / abs(a) for a, b in pairs) < 1e-5


def test_gradients_of_a_backward_that_failed_are_dropped(
    one: Callable[..., tuple[Path, RunState]], monkeypatch: Patch
) -> None:
    whole, _ = one("whole", max_length=180, max_tokens=400)
    backward = torch.Tensor.backward
    failed: list[int] = []

    def failing(self: torch.Tensor, *arguments: Any, **options: Any) -> None:
        backward(self, *arguments, **options)  # type: ignore[no-untyped-call]
        if len(failed) < 3:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", failing)
    split, summary = one("split", max_length=180, max_tokens=400, on_oom="split")
    assert len(failed) == 3
    assert summary.pack_splits == 3
    pairs = [(a, b) for x, y in zip(losses(whole), losses(split), strict=True) for a, b in zip(x, y, strict=True)]
    assert max(abs(a - b) / abs(a) for a, b in pairs) < 1e-5


def test_without_splitting_the_message_names_the_pack_and_the_way_out(
    recipe: Recipes, mtr: Mtr, monkeypatch: Patch, tmp_path: Path
) -> None:
    limit_memory(monkeypatch, 10, "forward")
    code, _, err = mtr("train", recipe(**MEMORY))
    assert code == 5
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("error: out of memory in a pack of ")
    assert f"2 conversations ({tmp_path / 'rows.jsonl'}, line" in last
    assert "lower sequence.max_tokens" in last
    assert "sequence.on_oom to split" in last


@pytest.mark.parametrize(
    "sequence", [{"on_oom": "split"}, {"strategy": "per_turn_unpacked"}], ids=["split", "each turn a row of its own"]
)
def test_a_single_turn_that_does_not_fit_is_the_end(
    recipe: Recipes, monkeypatch: Patch, sequence: dict[str, str]
) -> None:
    limit_memory(monkeypatch, 10, "forward")
    with pytest.raises(DeviceMemoryError) as raised:
        train(load_recipe(recipe(**MEMORY, sequence=sequence)))
    said = str(raised.value)
    assert "1 conversation (" in said
    assert "a single turn, so it cannot be split: lower sequence.max_length" in said
    assert "max_tokens" not in said


def test_split_packs_hold_the_same_targets() -> None:
    import numpy as np

    from mtr.tree.packing import split_pack

    def view(*ids: int) -> View:
        return View(np.array(ids[:-2]), np.array(ids[-2:]), np.ones(2), where=f"row {ids[0]}")

    pack = Pack((merge([view(1, 2, 3, 4), view(1, 2, 5, 6, 7)]), merge([view(8, 9, 10)])))
    assert pack.num_tokens == 10
    for limit in (1, 5, 7, 100):
        parts = split_pack(pack, limit)
        assert all(part.num_tokens <= max(limit, 5) for part in parts)
        weights = sum(float(layout.weight.sum()) for part in parts for layout in part.layouts)
        assert weights == 6.0
    assert build_batch(pack).rows == ("row 1", "row 8")


# --- workers ----------------------------------------------------------------------------------------------------------


def fail_in_worker(monkeypatch: Patch, line: int, how: Callable[[], Any]) -> None:
    render = Renderer.render

    def failing(self: Renderer, conversation: Any, *arguments: Any) -> Any:
        if get_worker_info() is not None and conversation.where.endswith(f"line {line}"):
            how()
        return render(self, conversation, *arguments)

    monkeypatch.setattr(Renderer, "render", failing)


def test_a_worker_that_dies_surfaces_with_its_row(
    recipe: Recipes, mtr: Mtr, monkeypatch: Patch, tmp_path: Path
) -> None:
    fail_in_worker(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGKILL))
    code, _, err = mtr("train", recipe(**{**MEMORY, "data": {"eval": [], "shuffle": False, "num_workers": 1}}))
    assert code == 6
    assert "Traceback" not in err
    assert f"a data worker died at step 4, {tmp_path / 'rows.jsonl'}, line 7" in err


def test_a_bug_in_a_worker_is_shown_with_its_row(recipe: Recipes, monkeypatch: Patch, tmp_path: Path) -> None:
    def bug() -> None:
        raise KeyError("a bug")

    fail_in_worker(monkeypatch, 3, bug)
    with pytest.raises(KeyError) as error:
        train(load_recipe(recipe(**{**MEMORY, "data": {"eval": [], "shuffle": False, "num_workers": 1}})))
    assert f"while step 2 was prepared, {tmp_path / 'rows.jsonl'}, line 3" in str(error.value)
