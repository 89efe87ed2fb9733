"""Claims: a run that was killed, wherever it was, goes on as the run that nobody killed, bit for bit; what is damaged
is passed over; what may differ between the two parts may, and nothing else; an adapter can be the start of a new run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT
from support.recipes import quickstart_recipe
from support.rows import conversation_row
from support.runs import damage_of, good_checkpoint, sign_again

from mtr.errors import UserError
from mtr.files import replace_file
from mtr.recipe.loading import load_recipe
from mtr.training.feed import step_seed
from mtr.training.loop import train
from mtr.training.state import RunState

Recipes = Callable[..., Path]
SAME = ("step", "epoch", "loss", "grad_norm", "learning_rate", "position", "eval_loss", "num_tokens")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trajectory(folder: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in SAME if key in line} for line in lines(folder)]


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def go(write_recipe: Recipes, tmp_path: Path) -> Callable[..., tuple[Path, RunState]]:
    """`go("name", steps)` trains in that folder."""

    def run(name: str, steps: int = 4, resume: bool = False, **sections: Any) -> tuple[Path, RunState]:
        fixed = {"output_dir": str(tmp_path / name), "max_steps": steps, "gradient_checkpointing": False}
        training = {**fixed, "save_steps": 2, **sections.pop("training", {})}
        path = write_recipe(training=training, date="2026-01-31", **sections)
        return tmp_path / name, train(load_recipe(path), resume=resume)

    return run


Go = Callable[..., tuple[Path, RunState]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that tests copy or only read."""
    folder = tmp_path_factory.mktemp("trained")
    train(load_recipe(quickstart_recipe(folder, training={"save_steps": 2, "gradient_checkpointing": False})))
    return folder / "run"


def kill(*arguments: object, script: str = "kill_test.py") -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_run_that_is_killed_anywhere_is_the_run_that_is_not() -> None:
    result = kill("--kills", 4, "--seed", 3)
    assert (result["kills"], result["differing_runs"], result["damaged_checkpoints"]) == (4, 0, 0)
    assert result["moments"]["while saving"] >= 1


@pytest.mark.slow
def test_a_run_that_is_killed_often_is_the_run_that_is_not() -> None:
    result = kill("--kills", 12, "--seed", 4)
    assert (result["kills"], result["differing_runs"]) == (12, 0)


def test_kills_and_full_disks_at_the_moments_that_hurt_lose_nothing() -> None:
    result = kill("--kills", 3, "--full", 1, script="aimed_faults.py")
    assert sum(result["kills"]["struck"].values()) == 3
    assert sum(result["full disks"]["struck"].values()) == 1
    assert [result["kills"][key] for key in ("not resumed", "results that differ", "files of the user's harmed")] == [
        0
    ] * 3


@pytest.mark.slow
def test_kills_and_full_disks_at_every_kind_of_moment_lose_nothing() -> None:
    result = kill("--kills", 21, "--full", 14, script="aimed_faults.py")
    assert set(result["kills"]["struck"].values()) == {3}
    assert set(result["full disks"]["struck"].values()) == {2}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub streams of 7 and 5 rows, without a network."""
    import datasets

    def stream(path: str, *_: Any, streaming: bool, **__: Any) -> Any:
        assert streaming

        def rows() -> Iterator[dict[str, Any]]:
            for number in range(7 if path == "a/one" else 5):
                yield conversation_row(turns=1 + number % 3)

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr("datasets.load_dataset", stream)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("workers", [0, 1])
def test_the_shuffle_buffer_of_a_stream_is_rebuilt(go: Go, workers: int) -> None:
    """Two streams, mixed, shuffled with a buffer smaller than they are, over an epoch's end."""
    data = {"train": [{"path": "a/one"}, {"path": "a/two", "weight": 2.0}], "shuffle_buffer": 3, "num_workers": workers}
    training = {"conversations_per_step": 2}
    whole, _ = go("whole", 6, data=data, training=training)
    other, _ = go("other", 6, data={**data, "shuffle": False}, training=training)
    assert trajectory(whole) != trajectory(other), "shuffling changes nothing, so nothing is shown"
    part, _ = go("part", 6, data=data, training=training)
    shutil.rmtree(part / "checkpoint-6")
    resumed, summary = go("part", 6, resume=True, data=data, training=training)
    assert summary.steps == 6
    assert trajectory(resumed) == trajectory(whole)
    assert weights(resumed) == weights(whole)


def test_a_mixture_with_workers_and_dropout_goes_on(go: Go, write_rows: Callable[..., Path]) -> None:
    one = write_rows([conversation_row(turns=1 + i % 3) for i in range(5)], "one.jsonl")
    two = write_rows([conversation_row(turns=2, thinking=False) for _ in range(3)], "two.jsonl")
    data = {"train": [{"path": str(one), "weight": 1.5}, {"path": str(two)}], "num_workers": 2}
    sections = {"data": data, "lora": {"dropout": 0.2, "r": 4}, "training": {"conversations_per_step": 3}}
    whole, _ = go("whole", 6, **sections)
    part, _ = go("part", 6, **sections)
    shutil.rmtree(part / "checkpoint-6")
    go("part", 6, resume=True, **sections)
    assert trajectory(part) == trajectory(whole)
    assert weights(part) == weights(whole)


def test_seeds_of_steps_and_processes_are_their_own() -> None:
    seeds = [step_seed(42, step, process) for step in range(50) for process in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_more_steps_may_be_asked_for(go: Go) -> None:
    constant = {"lr_scheduler_type": "constant"}
    whole, _ = go("whole", 6, training=constant)
    go("grown", 4, training=constant)
    grown, summary = go("grown", 6, resume=True, training=constant)
    assert summary.steps == 6
    assert trajectory(grown) == trajectory(whole)
    assert weights(grown) == weights(whole)


def test_what_is_due_at_the_checkpoint_is_done_when_the_run_goes_on(go: Go, write_rows: Callable[..., Path]) -> None:
    """A run that was told to stop before an evaluation that was due does it first."""
    held_out = write_rows([conversation_row(turns=2)])
    sections = {"data": {"eval": str(held_out)}, "training": {"eval_steps": 2}}
    whole, _ = go("whole", 4, **sections)
    part, _ = go("part", 4, **sections)
    shutil.rmtree(part / "checkpoint-4")
    state_file = part / "checkpoint-2" / "training_state.json"
    state = json.loads(state_file.read_text())
    assert state["evaluated_at"] == 2
    state_file.write_text(json.dumps({**state, "evaluated_at": -1}))
    sign_again(part / "checkpoint-2")
    go("part", 4, resume=True, **sections)
    assert [(line["step"], "eval_loss" in line) for line in lines(part)] == [
        (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)
    ]  # fmt: skip
    assert trajectory(part) == trajectory(whole)


def damage_content(folder: Path) -> None:
    path = folder / "training_state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def cut_short(folder: Path) -> None:
    path = folder / "training_state.json"
    path.write_bytes(path.read_bytes()[:-5])


def remove_file(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_content, "the content of training_state.safetensors has changed"),
        (cut_short, "training_state.json has"),
        (remove_file, "adapter_model.safetensors is missing"),
        (remove_manifest, "no readable manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_seen(
    trained: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    assert damage_of(folder / "checkpoint-2") is None
    damage(folder / "checkpoint-2")
    assert words in str(damage_of(folder / "checkpoint-2"))
    with pytest.raises(UserError, match="no good checkpoint: checkpoint-2 is damaged"):
        good_checkpoint(folder)


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    whole, _ = go("whole", 6)
    part, _ = go("part", 6)
    (part / "adapter_model.safetensors").unlink()
    damage_content(part / "checkpoint-6")
    capsys.readouterr()
    _, summary = go("part", 6, resume=True)
    said = capsys.readouterr().err
    assert "note          checkpoint-6 is damaged (the content of training_state.safetensors has changed)" in said
    assert "resumed       checkpoint-4" in said
    assert summary.steps == 6
    assert trajectory(part) == trajectory(whole)
    assert damage_of(part / "checkpoint-6") is None, "it was written again"


def test_a_damaged_newer_checkpoint_does_not_push_out_good_ones(go: Go) -> None:
    part, _ = go("part", 6, training={"save_steps": 1, "save_total_limit": 2})
    damage_content(part / "checkpoint-6")
    go("part", 5, resume=True, training={"save_steps": 1, "save_total_limit": 2})
    good, _ = good_checkpoint(part)
    assert good == part / "checkpoint-5"


def test_a_half_written_checkpoint_is_never_taken_and_goes(go: Go) -> None:
    part, _ = go("part", 2)
    shutil.copytree(part / "checkpoint-2", part / ".checkpoint-3.partial")
    _, summary = go("part", 4, resume=True, training={"lr_scheduler_type": "cosine"})
    assert summary.steps == 4
    assert not list(part.glob(".checkpoint-*"))


def test_resuming_without_a_checkpoint_begins(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    whole, _ = go("whole", 2)
    part, _ = go("part", 2, training={"save_steps": None})
    (part / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    go("part", 2, resume=True, training={"save_steps": None})
    assert "starting from the beginning" in capsys.readouterr().err
    assert trajectory(part) == trajectory(whole)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    replace_file(path, "old")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, "new")
    assert path.read_text() == "old"


# --- lora.init_from ---------------------------------------------------------------------------------------------------


def test_an_adapter_can_be_the_start_of_a_new_run(go: Go) -> None:
    first, _ = go("first", 4)
    rate = {"learning_rate": 1e-12, "lr_scheduler_type": "constant"}
    second, _ = go("second", 1, lora={"init_from": str(first)}, training=rate)
    third, _ = go("third", 1, training=rate)
    fresh, going_on = lines(third)[0]["loss"], lines(second)[0]["loss"]
    assert going_on < fresh - 0.05
    assert load_recipe(second / "recipe.yaml").lora is not None


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 8}, "has r 16, the recipe says lora.r: 8"),
        ({"alpha": 8}, "has alpha 32.0, the recipe says lora.alpha: 8.0"),
        ({"use_rslora": True}, "has use_rslora False, the recipe says lora.use_rslora: True"),
        ({"target_modules": ["q_proj"]}, "adapts more:"),
        ({"modules_to_save": ["lm_head"]}, "does not adapt"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(trained: Path, go: Go, lora: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=r"lora\.init_from: ") as error:
        go("second", 1, lora={"init_from": str(trained), **lora})
    assert words in str(error.value)


def test_an_adapter_of_another_model_is_refused(trained: Path, go: Go, models: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"is an adapter of .*base, and model\.name_or_path is"):
        go("second", 1, lora={"init_from": str(trained)}, model={"name_or_path": str(models("llama"))})


def test_a_folder_without_an_adapter_is_refused(go: Go, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no adapter that can be read"):
        go("second", 1, lora={"init_from": str(tmp_path / "empty")})
