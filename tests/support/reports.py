"""Folders of runs, written by what writes real ones, with made-up numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtr.data.conversation import SkippedRow
from mtr.prepare.counts import Counts
from mtr.recipe.sections import Recipe
from mtr.store.marker import LOGS, Marker
from mtr.training.exact_match import GeneratedTurn
from mtr.training.generation import write_generations
from mtr.training.metrics import MetricsFile, throughput, totals
from mtr.training.rejects import RejectsFile

LONG = "longer than sequence.max_length (512)"


def loss_at(step: int, rate: float = 1e-3) -> float:
    return round(3.0 / (1 + 1000 * rate * step / 4) + 0.1 + 0.05 * (step % 3), 6)


def train_line(step: int, counts: Counts, rate: float = 1e-3, **changes: Any) -> dict[str, Any]:
    """As `StepLog` writes it, `counts` being those of all steps until now."""
    own = Counts(conversations=4, turns=10, tokens=1000, supervised_tokens=400, per_turn_tokens=2500)
    line: dict[str, Any] = {
        "step": step,
        "epoch": step / 40,
        "loss": loss_at(step, rate),
        "learning_rate": rate * (1 - step / 100),
    }
    line |= {"grad_norm": 1 / step, **throughput(own, 0.5), "position": 4 * step, "data_wait_seconds": 0.05}
    line |= {"flops_per_second": 1e9, "mfu": 0.4, "imbalance": 1.0, "peak_memory_bytes": (1 + step) * 2**20}
    line |= {"total_seconds": 0.5 * step, "total_data_wait_seconds": 0.05 * step, "totals": totals(counts)}
    return {**line, **changes}


def eval_line(step: int, rate: float = 1e-3) -> dict[str, Any]:
    counts = Counts(conversations=2, turns=5, tokens=500, supervised_tokens=200, per_turn_tokens=1200)
    return {"step": step, "epoch": step / 40, "eval_loss": loss_at(step, rate) + 0.2, **throughput(counts, 0.2)}


def write_metrics(path: Path, steps: int, rate: float = 1e-3, every: int = 1) -> None:
    """Steps and an evaluation after each fifth one.

    Args:
        every: logging_steps.
    """
    metrics, counts = MetricsFile(path, 0), Counts()
    for step in range(1, steps + 1):
        counts.add(Counts(4, 10, 1000, 400, 2500, 4, Counter({LONG: 2}), notes=Counter({"cut": 1})))
        if step % every == 0:
            metrics.write(train_line(step, counts, rate))
        if step % 5 == 0:
            metrics.write(eval_line(step, rate))


def played(right: bool, thinking: str = "Hm.", response: str = "Ana has 5.") -> list[GeneratedTurn]:
    """Two conversations of two turns each; the first turn of the first is right if asked for."""
    one, two = ("/data/eval.jsonl, line 1", "/data/eval.jsonl, line 2")
    said = [GeneratedTurn(one, 0, thinking, response if right else "?", response, asked="Ana: 5.")]
    said += [GeneratedTurn(one, 1, "", "Seven.", "Six.", asked="One more.")]
    return said + [GeneratedTurn(two, turn, "", "x", "x", asked="Hi.") for turn in (0, 1)]


def environment(**changes: Any) -> dict[str, Any]:
    made_from: dict[str, Any] = {"template": "t", "tokenizer": "k", "weights": {"w": {"bytes": 1, "samples": "s"}}}
    made_from |= {"data": {"sources": [{"name": "a", "content": "c"}]}, "evaluation": {"e": {"sources": []}}}
    known: dict[str, Any] = {
        "mtr": "0.1.0",
        "python": "3.11.7",
        "packages": {"torch": "2.13.0"},
        "device": "AMD EPYC (2 cores)",
    }
    known |= {"seed": 1, "date": "2026-01-31", "strategy": {"taken": "single_pass", "reason": None}}
    return known | {"made_from": made_from, "accepted_changes": [], **changes}


def write_run(
    folder: Path,
    steps: int = 20,
    *,
    max_steps: int | None = 20,
    rate: float = 1e-3,
    every: int = 1,
    result: bool = True,
    generated: Sequence[tuple[int, Sequence[GeneratedTurn]]] = (),
    **training: Any,
) -> Path:
    """A run that made so many of its steps.

    Args:
        result: whether it was exported.
        generated: what was played, by step.
        training: more keys of that section.
    """
    folder.mkdir(parents=True)
    section = {"output_dir": str(folder), "max_steps": max_steps, "learning_rate": rate, **training}
    data = {"train": "/data/train.jsonl", "eval": "/data/eval.jsonl"}
    recipe = Recipe.model_validate({"model": {"name_or_path": "base"}, "data": data, "training": section})
    files: dict[str, str | None] = dict.fromkeys([*LOGS, *(["adapter_model.safetensors"] if result else [])])
    Marker().with_files(files).write(folder)
    (folder / "recipe.yaml").write_text(recipe.dump())
    (folder / "environment.json").write_text(json.dumps(environment()))
    if result:
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
    write_metrics(folder / "metrics.jsonl", steps, rate, every)
    for step, turns in generated:
        write_generations(folder, step, list(turns))
    return folder


def write_checkpoint(folder: Path, step: int, **state: Any) -> None:
    """What the report reads of one."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "training_state.json").write_text(json.dumps({"step": step, **state}))


def write_rejects(folder: Path, *reasons: str) -> None:
    rows = [SkippedRow(i, f"/data/train.jsonl, line {i + 1}", "bad", problem=why) for i, why in enumerate(reasons)]
    RejectsFile(folder / "rejects.jsonl").write(rows)
