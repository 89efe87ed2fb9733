"""Claims: a run with any start of its adapters and any optimizer goes on from a checkpoint bit for bit; with averaged
weights, what is evaluated and exported is the average, and neither evaluating nor saving changes what is trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.rows import conversation_row

from mtr.recipe.loading import load_recipe
from mtr.training.evaluation import EvalResult
from mtr.training.loop import train
from mtr.training.state import RunState

Recipes = Callable[..., Path]
Go = Callable[..., tuple[Path, RunState]]


@pytest.fixture
def go(write_recipe: Recipes, write_rows: Callable[..., Path], tmp_path: Path) -> Go:
    """`go("name")` trains three short steps in that folder and saves after two."""
    held_out = write_rows([conversation_row(turns=2)])

    def run(name: str, resume: bool = False, **sections: Any) -> tuple[Path, RunState]:
        training = {"output_dir": str(tmp_path / name), "max_steps": 3, "save_steps": 2, "conversations_per_step": 1}
        training |= {"gradient_checkpointing": False, **sections.pop("training", {})}
        data = {"eval": str(held_out), **sections.pop("data", {})}
        path = write_recipe(training=training, data=data, date="2026-01-31", **sections)
        return tmp_path / name, train(load_recipe(path), resume=resume)

    return run


def losses(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("lora", "training"),
    [
        ({"init_lora_weights": "olora", "r": 4}, {"optim": "muon", "loraplus_lr_ratio": 4, "learning_rate": 1e-4}),
        ({}, {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant_with_warmup", "eval_steps": 2}),
    ],
)
def test_a_run_that_stopped_goes_on_bit_for_bit(go: Go, lora: dict[str, Any], training: dict[str, Any]) -> None:
    whole, _ = go("whole", lora=lora, training=training)
    shutil.copytree(whole, whole.parent / "part")
    part, state = go("part", resume=True, lora=lora, training=training)
    assert (state.steps, sorted(path.name for path in part.glob("checkpoint-*"))) == (3, ["checkpoint-2"])
    assert losses(part) == losses(whole)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()


def test_a_checkpoint_of_a_run_that_starts_from_the_weights_can_be_merged(go: Go, tmp_path: Path) -> None:
    from mtr.training.merge import merge

    run, _ = go("run", lora={"init_lora_weights": "pissa", "r": 4, "alpha": 6})
    for folder in (run, run / "checkpoint-2"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 12, True)
    found = merge(run / "checkpoint-2", tmp_path / "merged")
    assert found["difference"] < 1e-5


FREE = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "learning_rate": 0.01}


def test_averages_are_evaluated_and_exported_and_change_nothing(go: Go) -> None:
    """The exported adapter, evaluated as the start of another run, has the loss that the run reported."""
    often, state = go("often", training={**FREE, "eval_steps": 1, "save_steps": 1})
    rarely, _ = go("rarely", training={**FREE, "save_steps": None}, data={"eval": []})
    assert losses(often) == losses(rarely), "evaluating or saving changed what is trained"
    tensors = load_file(often / "checkpoint-3" / "training_state.safetensors")
    saved = load_file(often / "adapter_model.safetensors")
    for name, tensor in saved.items():
        inside = name.replace(".weight", ".default.weight")
        assert torch.equal(tensor, tensors[f"average.{inside}"])
        assert not torch.equal(tensor, tensors[f"parameter.{inside}"])
    idle = {"learning_rate": 1e-30, "lr_scheduler_type": "constant", "max_steps": 1, "save_steps": None}
    _, again = go("again", lora={"init_from": str(often)}, training=idle)
    assert again.eval_loss == pytest.approx(state.eval_loss, rel=1e-6)


def test_the_best_average_is_exported(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = iter([1.0, 2.0])
    monkeypatch.setattr("mtr.training.evaluation.evaluate", lambda *_: EvalResult(next(made_up)))
    keys = {**FREE, "max_steps": 2, "eval_steps": 1, "load_best_at_end": True, "save_steps": None}
    run, state = go("run", training=keys)
    assert state.best_step == 1
    saved = load_file(run / "adapter_model.safetensors")
    tensors = load_file(run / "checkpoint-1" / "training_state.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, tensors[f"average.{name.replace('.weight', '.default.weight')}"])


def test_a_step_that_is_not_finite_leaves_optimizer_and_averages_alone(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes no update: afterwards the run is the one that had an update less."""
    import mtr.training.loop

    accumulate, calls = mtr.training.loop.accumulate, iter(range(1, 100))

    def broken(model: Any, *arguments: Any) -> Any:
        found = accumulate(model, *arguments)
        if next(calls) == 2:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
        return found

    monkeypatch.setattr(mtr.training.loop, "accumulate", broken)
    run, state = go("run", training={**FREE, "save_steps": 1, "save_total_limit": None})
    assert state.nonfinite_steps == 1
    one, two, three = (load_file(run / f"checkpoint-{step}" / "training_state.safetensors") for step in (1, 2, 3))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(two[name], three[name]) for name in two)
