"""Claims: a run with any start of its adapters, any optimizer and any schedule goes on from a checkpoint bit for bit;
the rates that it logs are those of transformers' schedules; with averaged weights, what is evaluated and exported is
the average, and neither evaluating nor saving changes what is trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from support.rows import conversation_row
from transformers import get_scheduler

from mtr.recipe.loading import load_recipe
from mtr.recipe.schedules import KWARGS
from mtr.recipe.training_section import Optimizer, TrainingSection
from mtr.training.evaluation import EvalResult
from mtr.training.loop import train
from mtr.training.optim import build_schedule
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


def rates(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if "loss" in line]


def rates_of_transformers(
    learning_rate: float = 1e-3,
    lr_scheduler_type: str = "cosine",
    lr_scheduler_kwargs: Any = None,
    warmup_steps: int = 1,
    **others: Any,
) -> list[float]:
    """Of four steps; 0.03 of them are one step of warmup."""
    del others
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=learning_rate)
    given = {"scheduler_specific_kwargs": lr_scheduler_kwargs or {}}
    schedule = get_scheduler(lr_scheduler_type, optimizer, warmup_steps, num_training_steps=4, **given)
    found = []
    for _ in range(4):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


CONSTANT = {"lr_scheduler_type": "constant_with_warmup"}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    name: {"optim": name, "learning_rate": 1e-3, "weight_decay": 0.1, **(CONSTANT if "free" in name else {})}
    for name in get_args(Optimizer)
    if "8bit" not in name
}
"""Those of 8 bits need bitsandbytes."""
SCHEDULES: dict[str, dict[str, Any]] = {kind: {} for kind in KWARGS} | {
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4, "warmup_lr_rate": 0.2},
    "inverse_sqrt": {"timescale": 2},
    "warmup_stable_decay": {"num_decay_steps": 2, "decay_type": "1-sqrt"},
}
SMALL: dict[str, Any] = {"r": 4}
RUNS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "olora, muon and LoRA+": (
        {"init_lora_weights": "olora", "r": 4},
        {"optim": "muon", "loraplus_lr_ratio": 4, "learning_rate": 1e-4},
    ),
    "averages evaluated": ({}, {"optim": "schedule_free_adamw", **CONSTANT, "eval_steps": 2}),
    **{f"{name}, adapters, LoRA+": (SMALL, {**keys, "loraplus_lr_ratio": 16}) for name, keys in OPTIMIZERS.items()},
    **{f"{name}, all weights": (None, keys) for name, keys in OPTIMIZERS.items()},
    **{
        kind: (SMALL, {"lr_scheduler_type": kind, "lr_scheduler_kwargs": kwargs, "warmup_steps": 2})
        for kind, kwargs in SCHEDULES.items()
    },
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_stopped_goes_on_bit_for_bit(go: Go, kind: str) -> None:
    """With every optimizer, of adapters and of all weights, and with every schedule."""
    lora, training = RUNS[kind]
    whole, _ = go("whole", lora=lora, training={"max_steps": 4, **training})
    assert (whole / "checkpoint-2").exists()
    shutil.copytree(whole, whole.parent / "part", ignore=shutil.ignore_patterns("checkpoint-4"))
    part, state = go("part", resume=True, lora=lora, training={"max_steps": 4, **training})
    assert (state.steps, state.stopped_by) == (4, None)
    assert losses(part) == losses(whole)
    assert rates(part) == rates(whole) == rates_of_transformers(**training)
    assert len({loss for _, loss, _ in losses(whole)}) == 4
    for name in ("model.safetensors",) if lora is None else ("adapter_model.safetensors", "adapter_config.json"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    state_file = "checkpoint-4/training_state.safetensors"
    assert (part / state_file).read_bytes() == (whole / state_file).read_bytes()


def test_a_run_that_becomes_longer_has_the_rates_of_the_longer_one_at_once(go: Go) -> None:
    """At the end of a schedule the rate is 0, with which a step would see its conversations and learn nothing."""
    training: dict[str, Any] = {"optim": "adamw_torch", "loraplus_lr_ratio": 4, "lr_scheduler_type": "linear"}
    run, _ = go("run", lora=SMALL, training={**training, "max_steps": 4})
    go("run", resume=True, lora=SMALL, training={**training, "max_steps": 8})
    section = TrainingSection.model_validate({"output_dir": "x", "learning_rate": 1e-3, **training})
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1e-3)
    schedule, wanted = build_schedule(optimizer, section, num_steps=8), []
    for _ in range(8):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(run)[4:] == wanted[4:]
    saved = json.loads((run / "checkpoint-6" / "training_state.json").read_text())["optimizer"]["param_groups"]
    assert [group["lr"] for group in saved] == [wanted[6], pytest.approx(4 * wanted[6])]


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
