"""Claims: a model is trained in one pass where that is exact, else per turn in the rows that are; what the recipe asks
for and is not exact is refused; whatever is taken computes loss and gradients of plain passes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from support.models import save_random_model
from support.paths import QUICKSTART

from mtr.checks.verify import verify
from mtr.errors import UserError
from mtr.model import strategy
from mtr.model.probe import Verdict
from mtr.model.strategy import decide
from mtr.recipe.loading import load_recipe
from mtr.recurrence import kinds
from mtr.recurrence.segments import ConvolutionPlan, convolution_plan
from mtr.training.loop import train
from mtr.tree.mask import Tree

Recipes = Callable[..., Path]
Models = Callable[..., Path]
Mtr = Callable[..., tuple[int, str, str]]

EXACT, FOREST, ROWS = Verdict(None, None), Verdict("T", None), Verdict("T", "P")


@pytest.mark.parametrize(
    ("asked", "verdict", "taken", "reason"),
    [
        ("auto", EXACT, "single_pass", None),
        ("auto", FOREST, "per_turn", "T"),
        ("auto", ROWS, "per_turn_unpacked", "T"),
        ("single_pass", EXACT, "single_pass", None),
        ("per_turn", EXACT, "per_turn", None),
        ("per_turn", FOREST, "per_turn", None),
        ("per_turn", ROWS, "per_turn_unpacked", "P"),
        ("per_turn_unpacked", EXACT, "per_turn_unpacked", None),
        ("per_turn_unpacked", ROWS, "per_turn_unpacked", None),
    ],
)
def test_what_is_exact_is_taken(
    write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, asked: str, verdict: Verdict, taken: str, reason: str | None
) -> None:
    monkeypatch.setattr(strategy, "judge", lambda *_: verdict)
    decision = decide(load_recipe(write_recipe(sequence={"strategy": asked})), transformers.Qwen3Config())
    assert (decision.strategy, decision.reason) == (taken, reason)
    assert len(decision.notes) == (reason is not None)


@pytest.mark.parametrize("verdict", [FOREST, ROWS])
def test_one_pass_that_is_not_exact_is_refused(
    write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, verdict: Verdict
) -> None:
    monkeypatch.setattr(strategy, "judge", lambda *_: verdict)
    message = r"sequence\.strategy: .*\(qwen3\) cannot be trained exactly in one pass: T\. With auto"
    with pytest.raises(UserError, match=message):
        decide(load_recipe(write_recipe(sequence={"strategy": "single_pass"})), transformers.Qwen3Config())


SINGLE_PASS = "sequence.strategy=single_pass"
OTHERS: dict[str, Callable[[], Any]] = {
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4),
    "rwkv": lambda: transformers.RwkvConfig(
        hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=8192
    ),
}
"""ALiBi, a recurrence that is handed nothing, and a head of several layers: no tree can be laid over them."""


@pytest.fixture
def other(tmp_path: Path) -> Callable[[str], str]:
    def save(kind: str) -> str:
        save_random_model(OTHERS[kind](), QUICKSTART / "base", tmp_path / kind)
        return str(tmp_path / kind)

    return save


@pytest.mark.parametrize("kind", OTHERS)
def test_rows_of_one_turn_are_plain_passes(write_recipe: Recipes, other: Callable[[str], str], kind: str) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": other(kind)}, lora=None))
    result = verify(recipe, conversations=2)
    assert result["strategy"] == "per_turn_unpacked"
    assert result["passed"], result


def _along_the_row(tree: Tree, width: int) -> ConvolutionPlan:
    return convolution_plan(replace(tree, parent=np.arange(len(tree.parent)) - 1), width)


def test_rows_that_turns_cannot_share_are_noticed(
    write_recipe: Recipes, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose convolutions read along the row: the verdict on rows decides whether the loss is right."""
    recipe = load_recipe(write_recipe(model={"name_or_path": str(models("lfm2"))}))
    monkeypatch.setattr(kinds, "convolution_plan", _along_the_row)
    monkeypatch.setattr(strategy, "judge", lambda *_: FOREST)
    assert not verify(recipe, conversations=2)["passed"]
    monkeypatch.setattr(strategy, "judge", lambda *_: ROWS)
    assert verify(recipe, conversations=2)["passed"]


@pytest.mark.parametrize("asked", ["per_turn", "per_turn_unpacked"])
def test_strategies_agree_on_a_model_that_can_do_all(
    write_recipe: Recipes, models: Models, tmp_path: Path, asked: str
) -> None:
    losses = []
    for taken in ("auto", asked):
        output = tmp_path / taken
        model = {"name_or_path": str(models("qwen3"))}
        train(
            load_recipe(write_recipe(model=model, sequence={"strategy": taken}, training={"output_dir": str(output)}))
        )
        lines = (output / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_run_says_what_it_took_and_why(
    mtr: Mtr, write_recipe: Recipes, other: Callable[[str], str], tmp_path: Path
) -> None:
    code, out, err = mtr("train", write_recipe(model={"name_or_path": other("bloom")}))
    assert code == 0, err
    said = " ".join((out + err).split())
    assert "turns are trained one by one, each in a row of its own (per_turn_unpacked)" in said
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["strategy"]["taken"] == "per_turn_unpacked"
    assert "no tree reaches it" in environment["strategy"]["reason"]
    output = f"training.output_dir={tmp_path / 'other'}"
    code, _, err = mtr("train", write_recipe(), f"model.name_or_path={tmp_path / 'bloom'}", SINGLE_PASS, output)
    assert code == 2
    assert "sequence.strategy: " in err


def test_each_pack_is_one_turn(write_recipe: Recipes, other: Callable[[str], str]) -> None:
    """More packs than one a step, none with padding, and a split that has nothing to split."""
    path = write_recipe(
        model={"name_or_path": other("bloom")},
        sequence={"on_oom": "split"},
        training={"gradient_checkpointing": "auto"},
    )
    assert train(load_recipe(path)).steps == 2
