"""The recipe decides the mathematics: strategy, packs, checkpointing and processes leave every step as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import QUICKSTART
from support.processes import in_processes
from support.recipes import quickstart_recipe

import mtr.prepare.builder
import mtr.training.loop
from mtr.errors import UserError
from mtr.recipe.loading import load_recipe
from mtr.training.loop import train
from mtr.training.metrics import totals
from mtr.training.state import RunState
from mtr.tree.batch import Batch, build_batch
from mtr.tree.packing import Pack

Recipes = Callable[..., Path]
SAME: dict[str, dict[str, Any]] = {
    "per_turn": {"sequence": {"strategy": "per_turn"}},
    "small_packs": {"sequence": {"max_length": 200, "max_tokens": 200}},
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "dense": {"model": {"attention": "sdpa"}},
    "per_turn_in_small_packs": {"sequence": {"strategy": "per_turn", "max_length": 200, "max_tokens": 200}},
}
METRICS = {
    "step", "epoch", "loss", "learning_rate", "grad_norm", "num_conversations", "num_turns", "num_tokens",
    "num_supervised_tokens", "num_per_turn_tokens", "seconds", "tokens_per_second", "per_turn_tokens_per_second",
    "peak_memory_bytes",
}  # fmt: skip


def merge(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {key: {**one.get(key, {}), **other.get(key, {})} for key in {**one, **other}}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trajectory(folder: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in lines(folder) if "loss" in line]


def differs(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """The largest relative difference of losses and gradient norms, step by step."""
    assert len(one) == len(other) > 0
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return max(abs(a - b) / abs(a) for a, b in pairs)


@pytest.fixture
def run(write_recipe: Recipes, tmp_path: Path) -> Callable[..., tuple[Path, RunState]]:
    def go(name: str, steps: int = 4, resume: bool = False, **sections: Any) -> tuple[Path, RunState]:
        fixed = {"training": {"output_dir": str(tmp_path / name), "max_steps": steps, "gradient_checkpointing": False}}
        recipe = load_recipe(write_recipe(**merge(fixed, sections)))
        return tmp_path / name, train(recipe, resume=resume)

    return go


Run = Callable[..., tuple[Path, RunState]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, RunState]]:
    """`shared(loss={...})` is a run of four steps that tests only read, trained for the first of them."""
    made: dict[str, tuple[Path, RunState]] = {}

    def go(**sections: Any) -> tuple[Path, RunState]:
        key = repr(sections)
        if key not in made:
            folder = tmp_path_factory.mktemp("shared")
            fixed = {"training": {"max_steps": 4, "gradient_checkpointing": False}}
            made[key] = folder / "run", train(load_recipe(quickstart_recipe(folder, **fixed, **sections)))
        return made[key]

    return go


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    rows = (QUICKSTART / "eval.jsonl").read_text().splitlines()
    (tmp_path / "eval.jsonl").write_text("\n".join(rows[:6]))
    return str(tmp_path / "eval.jsonl")


@pytest.mark.parametrize("other", SAME)
def test_what_cannot_change_a_step_does_not(shared: Run, run: Run, other: str) -> None:
    one, _ = shared()
    two, _ = run("two", **SAME[other])
    assert differs(trajectory(one), trajectory(two)) < 1e-4
    if "small" in other:
        tokens = [sum(line["num_tokens"] for line in lines(folder)) for folder in (one, two)]
        assert tokens[1] > tokens[0], "no conversation was cut, so nothing was compared"


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["token", "turn", "conversation"])
@pytest.mark.parametrize("other", SAME)
def test_what_cannot_change_20_steps_does_not(run: Run, other: str, weighting: str) -> None:
    loss = {"loss": {"weighting": weighting}}
    one, _ = run("one", steps=20, **loss)
    two, _ = run("two", steps=20, **merge(SAME[other], loss))
    assert differs(trajectory(one), trajectory(two)) < 1e-4


@pytest.mark.parametrize("weighting", ["turn", "conversation"])
def test_weightings_differ_and_are_each_exact(shared: Run, run: Run, weighting: str) -> None:
    token, _ = shared()
    one, _ = shared(loss={"weighting": weighting})
    two, _ = run("two", loss={"weighting": weighting}, sequence={"strategy": "per_turn"})
    assert differs(trajectory(one), trajectory(two)) < 1e-4
    assert differs(trajectory(token), trajectory(one)) > 1e-3


def test_another_normalisation_is_seen(shared: Run, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = shared()

    def per_pack(pack: Pack, *arguments: Any) -> Batch:
        """Each pack normalised by itself, the error that a mean of means makes."""
        batch = build_batch(pack, *arguments)
        return Batch(**{**vars(batch), "weight": batch.weight / batch.weight.mean()})

    monkeypatch.setattr(mtr.prepare.builder, "build_batch", per_pack)
    loss = {"weighting": "turn"}
    two, _ = run("two", loss=loss)
    monkeypatch.undo()
    three, _ = shared(loss=loss)
    assert differs(trajectory(two), trajectory(three)) > 1e-3
    assert differs(trajectory(one), trajectory(three)) > 1e-3


def test_what_fits_the_memory_changes_no_step(shared: Run, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Packs as large as the memory holds, and as much kept for the backward as fits."""
    one, _ = shared()
    two, summary = run(
        "two",
        sequence={"max_tokens": "auto", "max_length": 1024},
        training={"gradient_checkpointing": "auto"},
        data={"num_workers": 0},
    )
    assert differs(trajectory(one), trajectory(two)) < 1e-4
    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("memory"))
    assert "GiB estimated" in said
    assert "checkpointing none" in said
    assert summary.peak_memory_bytes > 0


def test_the_work_of_a_step_is_told(shared: Run) -> None:
    folder, summary = shared()
    told = lines(folder)
    assert all(line["mfu"] > 0 and line["flops_per_second"] > 0 for line in told)
    assert summary.flops == pytest.approx(sum(line["flops_per_second"] * line["seconds"] for line in told))
    assert told[-1]["totals"] == totals(summary.counts)
    assert told[-1]["totals"]["tokens"] == sum(line["num_tokens"] for line in told)
    assert told[-1]["total_seconds"] == summary.seconds


@pytest.mark.distributed
def test_two_processes_are_one(run: Run, write_recipe: Recipes, tmp_path: Path) -> None:
    """Also in steps where a process has no pack: a step of one conversation, and the short last one of an epoch."""
    rows = (QUICKSTART / "train.jsonl").read_text().splitlines()[:7]
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    sections = {"data": {"train": str(tmp_path / "few.jsonl")}, "training": {"conversations_per_step": 3}}
    one, _ = run("one", steps=6, **sections)
    done = in_processes(2, "train", tmp_path / "recipe.yaml", f"training.output_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert differs(trajectory(one), trajectory(tmp_path / "two")) < 1e-5
    counted = [{k: line[k] for k in ("num_conversations", "num_turns", "num_tokens")} for line in lines(one)]
    assert counted == [{k: line[k] for k in counted[0]} for line in lines(tmp_path / "two")]


def test_a_run_that_is_resumed_is_the_run_that_never_stopped(run: Run) -> None:
    whole, _ = run("whole", steps=6)
    folder, _ = run("halves", steps=6, training={"save_steps": 2})
    (folder / "adapter_model.safetensors").unlink()
    (folder / "checkpoint-6").rename(folder / "old")
    resumed, summary = run("halves", steps=6, resume=True, training={"save_steps": 2})
    assert summary.steps == 6
    assert summary.counts.conversations == 24
    assert trajectory(resumed) == trajectory(whole)
    assert (resumed / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_run_that_is_done_is_resumed_without_writing_a_line_twice(run: Run, held_out: str) -> None:
    sections = {"training": {"save_steps": 1}, "data": {"eval": held_out}}
    folder, once = run("run", steps=2, **sections)
    before = lines(folder)
    _, again = run("run", steps=2, resume=True, **sections)
    assert [(line["step"], "eval_loss" in line) for line in lines(folder)] == [(1, False), (2, False), (2, True)]
    assert [line.get("loss", line.get("eval_loss")) for line in lines(folder)] == [
        line.get("loss", line.get("eval_loss")) for line in before
    ]
    assert again.eval_loss == once.eval_loss


def test_a_checkpoint_of_another_recipe_is_refused(run: Run) -> None:
    run("run", steps=2, training={"save_steps": 1})
    with pytest.raises(ValueError, match=r"another recipe; these keys differ: .*training\.learning_rate"):
        run("run", steps=2, resume=True, training={"save_steps": 1, "learning_rate": 0.5})


def test_metrics_and_files_are_those_of_the_contract(run: Run, held_out: str) -> None:
    folder, summary = run("run", steps=2, data={"eval": held_out})
    written = lines(folder)
    assert [line["step"] for line in written] == [1, 2, 2]
    assert set(written[0]) >= METRICS
    assert set(written[-1]) >= METRICS - {"loss", "learning_rate", "grad_norm"} | {"eval_loss"}
    assert written[-1]["eval_loss"] == summary.eval_loss
    assert written[0]["per_turn_tokens_per_second"] == pytest.approx(
        written[0]["num_per_turn_tokens"] / written[0]["seconds"]
    )
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "environment.json"}
    template = (QUICKSTART / "base" / "chat_template.jinja").read_text()
    assert (folder / "chat_template.jinja").read_text() == template
    assert load_recipe(folder / "recipe.yaml").training.max_steps == 2


def test_the_adapter_loads_elsewhere_and_is_what_was_trained(shared: Run) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = shared()
    base = AutoModelForCausalLM.from_pretrained(QUICKSTART / "base", dtype=torch.float32)
    ids = torch.arange(10)[None]
    before = base(ids).logits
    after = PeftModel.from_pretrained(base, str(folder))(ids).logits
    assert (before - after).abs().max() > 1e-3


def test_a_step_without_a_trained_turn_makes_no_update_and_is_counted(
    run: Run, write_rows: Callable[..., Path]
) -> None:
    good = json.loads((QUICKSTART / "train.jsonl").read_text().splitlines()[0])
    silent = json.loads(json.dumps(good))
    for message in silent["messages"]:
        if message["role"] == "assistant":
            message["train"] = False
    data = {"train": str(write_rows([silent, good])), "shuffle": False}
    folder, summary = run("run", steps=2, data=data, training={"conversations_per_step": 1})
    written = lines(folder)
    assert written[0]["loss"] is None
    assert written[0]["grad_norm"] is None
    assert written[1]["loss"] > 0
    assert summary.empty_steps == 1
    assert summary.counts.untrained_rows["no turn of it is trained"] == 1


def test_every_trainable_tensor_learns(shared: Run) -> None:
    """All of LoRA's B start at zero, and none is there at the end."""
    from safetensors.torch import load_file

    folder, _ = shared()
    tensors = load_file(folder / "adapter_model.safetensors")
    moved = [name for name, tensor in tensors.items() if ".lora_B." in name and tensor.abs().max() > 0]
    assert len(moved) == sum(".lora_B." in name for name in tensors) > 0


def test_a_loss_that_is_not_finite_makes_no_update_and_stops_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(pack: Pack, *arguments: Any) -> Batch:
        batch = build_batch(pack, *arguments)
        return Batch(**{**vars(batch), "weight": batch.weight * float("nan")})

    monkeypatch.setattr(mtr.prepare.builder, "build_batch", poisoned)
    with pytest.raises(ValueError, match="not finite in 2 steps in a row"):
        run("run", steps=4, training={"max_nonfinite_steps": 2})


def test_dropout_of_the_model_is_off_and_said(
    write_recipe: Recipes, models: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = models("llama")
    noisy = tmp_path / "noisy"
    noisy.mkdir()
    for path in folder.iterdir():
        (noisy / path.name).write_bytes(path.read_bytes())
    config = json.loads((noisy / "config.json").read_text())
    (noisy / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5, "hidden_dropout_prob": 0.5}))
    from mtr.model.loading import load_model

    model = load_model(load_recipe(write_recipe(model={"name_or_path": str(noisy)})), torch.device("cpu"))
    for key in ("attention_dropout", "hidden_dropout_prob"):
        assert getattr(model.config, key) == 0.0
        assert f"{key} of the model is set to 0" in caplog.text


def test_offloading_from_a_cpu_is_refused(write_recipe: Recipes) -> None:
    recipe = load_recipe(write_recipe(training={"gradient_checkpointing": "offload"}))
    with pytest.raises(UserError, match=r"offload moves layer inputs from a GPU .* use full"):
        train(recipe)
