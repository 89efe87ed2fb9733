"""Claims: a gradient beyond float16 costs its step and no more; the scale of the loss comes down until it fits, and is
kept over a resume; only a gradient that no scale makes finite ends the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import mtr.training.setup
from mtr.training import loop, parallel

Recipes = Callable[..., Path]
Mtr = Callable[..., tuple[int, str, str]]
Patch = pytest.MonkeyPatch
SCALES: list[float] = []
"""Of the loss, in each step that was asked for."""


@pytest.fixture
def scaled(monkeypatch: Patch) -> Callable[[float], None]:
    """`scaled(2.0**28)` trains with a scaler that starts at this scale, and gradients that end where float16 does."""
    build, accumulate = parallel.build_accelerator, loop.accumulate

    def set_up(scale: float) -> None:
        def built(*arguments: Any) -> Accelerator:
            accelerator = build(*arguments)
            scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            monkeypatch.setattr(
                accelerator, "unscale_gradients", lambda: scaler.unscale_(accelerator._optimizers[0].optimizer)
            )
            return accelerator

        SCALES.clear()
        monkeypatch.setattr(mtr.training.setup, "build_accelerator", built)

    def limited(model: Any, step: Any, accelerator: Accelerator, *arguments: Any) -> Any:
        SCALES.append(accelerator.scaler.get_scale())
        result = accumulate(model, step, accelerator, *arguments)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.half().float()
        return result

    monkeypatch.setattr(loop, "accumulate", limited)
    return set_up


@pytest.fixture
def recipe(write_recipe: Recipes) -> Path:
    return write_recipe(
        training={"max_steps": 14, "save_steps": 14, "conversations_per_step": 1, "learning_rate": 1e-4}
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_overflow_costs_its_step(recipe: Path, mtr: Mtr, scaled: Callable[[float], None], tmp_path: Path) -> None:
    scaled(2.0**28)
    code, _, err = mtr("train", recipe)
    assert code == 0, err
    written = lines(tmp_path / "run")
    skipped = [line for line in written if "skipped" in line]
    assert 5 < len(skipped) < 14, "more in a row than max_nonfinite_steps"
    assert skipped == written[: len(skipped)]
    assert [line["skipped"] for line in skipped] == ["float16 overflow"] * len(skipped)
    assert [line["loss_scale"] for line in skipped] == [2.0 ** (27 - i) for i in range(len(skipped))]
    assert all(line["loss"] > 0 for line in written)
    assert [2.0**28 / 2 ** min(i, len(skipped)) for i in range(14)] == SCALES
    assert f"{len(skipped)} steps had a gradient beyond float16" in err
    assert "no update: float16 overflow" in err

    scaled(2.0**28)
    code, _, err = mtr("train", recipe, "--resume", "training.max_steps=15")
    assert code == 0, err
    assert [2.0**28 / 2 ** len(skipped)] == SCALES


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(
    recipe: Path, mtr: Mtr, scaled: Callable[[float], None], monkeypatch: Patch, tmp_path: Path
) -> None:
    accumulate = loop.accumulate

    def poisoned(model: Any, *arguments: Any) -> Any:
        result = accumulate(model, *arguments)
        next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return result

    monkeypatch.setattr(loop, "accumulate", poisoned)
    scaled(4.0)
    code, _, err = mtr("train", recipe, "training.save_steps=null", "training.max_nonfinite_steps=3")
    assert code == 4
    assert SCALES == [4.0, 2.0, 1.0, 0.5, 0.25]
    assert [line["skipped"] for line in lines(tmp_path / "run")] == ["float16 overflow"] * 2 + ["not finite"] * 3
    assert "not finite in 3 steps in a row" in err
