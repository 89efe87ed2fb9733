"""Claims: the evaluation loss is the weighted mean over all held-out data, whole and by source, in either strategy; the
best checkpoint is the one that is exported; a run stops when it has not improved for long enough.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import QUICKSTART
from support.rows import conversation_row

import mtr.training.evaluation
from mtr.data.mixture import Mixture
from mtr.data.opening import open_eval_data
from mtr.errors import UserError
from mtr.recipe.loading import load_recipe
from mtr.training.evaluation import EvalResult
from mtr.training.loop import train
from mtr.training.state import RunState

Recipes = Callable[..., Path]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def sources(write_rows: Callable[..., Path]) -> list[dict[str, Any]]:
    """Two sources of different lengths, one of which each row takes twice."""
    one = write_rows([conversation_row(turns=1 + i % 3) for i in range(3)], "one.jsonl")
    two = write_rows([conversation_row(turns=4, thinking=False)], "two.jsonl")
    return [{"path": str(one)}, {"path": str(two), "weight": 2.0}]


def by_hand(recipe_path: Path, path: str) -> tuple[float, int]:
    """Sum of -log p over every completion token, one plain forward a turn, and their number."""
    from mtr.attention.interface import use_own_attention
    from mtr.chat.loading import load_renderer, load_tokenizer
    from mtr.model.loading import load_model
    from mtr.prepare.builder import Builder

    recipe = load_recipe(recipe_path)
    model = load_model(recipe, torch.device("cpu"))
    use_own_attention(model)
    model.eval()
    builder = Builder(recipe, load_renderer(recipe, load_tokenizer(recipe)))
    data = open_eval_data(load_recipe(recipe_path, [f"data.eval={path}"]).data)
    total, tokens = 0.0, 0
    for mixture in data.values():
        for index in range(len(mixture)):
            for view in builder.views(mixture.conversation(index)):
                ids = torch.from_numpy(view.ids)
                with torch.no_grad():
                    logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
                first = len(view.prompt_ids)
                predicted = logits[first - 1 : -1].log_softmax(-1)
                total -= float(predicted.gather(1, ids[first:, None]).sum())
                tokens += len(ids) - first
    return total, tokens


@pytest.mark.parametrize("strategy", ["single_pass", "per_turn"])
def test_the_loss_is_exact_whole_and_by_source(
    write_recipe: Recipes, sources: list[dict[str, Any]], strategy: str, tmp_path: Path
) -> None:
    training = {"max_steps": 1, "learning_rate": 1e-30, "lr_scheduler_type": "constant", "conversations_per_step": 2}
    path = write_recipe(data={"eval": sources}, training=training, sequence={"strategy": strategy})
    summary = train(load_recipe(path))
    one, two = by_hand(path, sources[0]["path"]), by_hand(path, sources[1]["path"])
    assert summary.eval_loss_by_source.keys() == {"one.jsonl", "two.jsonl"}
    assert summary.eval_loss_by_source["one.jsonl"] == pytest.approx(one[0] / one[1], rel=1e-5)
    assert summary.eval_loss_by_source["two.jsonl"] == pytest.approx(two[0] / two[1], rel=1e-5)
    whole = (one[0] + 2 * two[0]) / (one[1] + 2 * two[1])
    assert summary.eval_loss == pytest.approx(whole, rel=1e-5)
    assert abs(whole - sum(summary.eval_loss_by_source.values()) / 2) > 1e-3, "a mean of means would pass too"
    assert lines(tmp_path / "run")[-1]["eval_loss_by_source"] == summary.eval_loss_by_source


def test_one_source_is_not_told_apart(write_recipe: Recipes, sources: list[dict[str, Any]]) -> None:
    summary = train(load_recipe(write_recipe(data={"eval": sources[:1]}, training={"max_steps": 1})))
    assert summary.eval_loss_by_source == {}


def test_sources_of_one_name_are_told_apart_by_their_paths(tmp_path: Path, write_recipe: Recipes) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "rows.jsonl")
        paths[-1].write_text(json.dumps(conversation_row()))
    opened = open_eval_data(load_recipe(write_recipe(data={"eval": [{"path": str(path)} for path in paths]})).data)
    assert list(opened) == [str(path) for path in paths]
    assert all(isinstance(data, Mixture) for data in opened.values())


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`evaluated(3.0, 2.0, ...)`: what the evaluations of a run will say."""

    def will_be(*losses: float) -> None:
        left = iter(losses)
        monkeypatch.setattr(mtr.training.evaluation, "evaluate", lambda *_: EvalResult(next(left)))

    return will_be


Evaluated = Callable[..., None]
HELD_OUT = {"eval": str(QUICKSTART / "eval.jsonl")}


def test_the_best_checkpoint_is_exported(write_recipe: Recipes, evaluated: Evaluated, tmp_path: Path) -> None:
    training = {"max_steps": 5, "eval_steps": 1, "load_best_at_end": True, "save_steps": 1, "save_total_limit": 1}
    evaluated(3.0, 2.0, 2.5, 2.2, math.nan)
    summary = train(load_recipe(write_recipe(data=HELD_OUT, training=training)))
    run = tmp_path / "run"
    assert (summary.best_step, summary.best_eval_loss, summary.steps) == (2, 2.0, 5)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]
    exported = (run / "adapter_model.safetensors").read_bytes()
    assert exported == (run / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    assert exported != (run / "checkpoint-5" / "adapter_model.safetensors").read_bytes()
    card = (run / "README.md").read_text()
    assert "| evaluation loss | 2.0000 |" in card
    assert "| taken from step | 2 |" in card


def test_without_it_the_last_weights_are(write_recipe: Recipes, evaluated: Evaluated, tmp_path: Path) -> None:
    evaluated(2.0, 3.0)
    training = {"max_steps": 2, "eval_steps": 1, "save_steps": 1}
    train(load_recipe(write_recipe(data=HELD_OUT, training=training)))
    run = tmp_path / "run"
    exported = (run / "adapter_model.safetensors").read_bytes()
    assert exported == (run / "checkpoint-2" / "adapter_model.safetensors").read_bytes()


def test_a_run_stops_when_it_does_not_improve(
    write_recipe: Recipes, evaluated: Evaluated, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    training = {"max_steps": 9, "eval_steps": 1, "early_stopping_patience": 2, "save_steps": 1}
    evaluated(3.0, 2.0, 2.5, 1.9, 2.0, 1.95)
    path = write_recipe(data=HELD_OUT, training=training)
    summary = train(load_recipe(path))
    assert (summary.steps, summary.best_step) == (6, 4)
    assert "eval loss has not improved in 2 evaluations; the lowest was 1.9000 at step 4" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    again: RunState = train(load_recipe(path), resume=True)
    assert again.steps == 6, "a run that stopped stays stopped"


@pytest.mark.parametrize("key", ["load_best_at_end", "early_stopping_patience"])
def test_what_needs_an_evaluation_says_so(write_recipe: Recipes, key: str) -> None:
    path = write_recipe(training={key: 1 if "patience" in key else True, "eval_steps": 1})
    with pytest.raises(UserError, match=f"training.{key} needs data.eval"):
        train(load_recipe(path))


def test_patience_needs_eval_steps(write_recipe: Recipes) -> None:
    with pytest.raises(UserError, match=r"early_stopping_patience needs training\.eval_steps"):
        load_recipe(write_recipe(data=HELD_OUT, training={"early_stopping_patience": 1}))


def test_the_quickstart_evaluates_stops_and_plays(mtr: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """The recipe of the quickstart, a few steps of it, with all of it switched on."""
    rows = (QUICKSTART / "eval.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join(rows[:4]))
    with_answers = [json.loads(row) | {"answer": "7"} for row in rows[4:8]]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, with_answers)))
    run = tmp_path / "run"
    code, _, err = mtr(
        "train",
        QUICKSTART.parent / "quickstart.yaml",
        f"training.output_dir={run}",
        f"data.eval=[{tmp_path / 'a.jsonl'}, {tmp_path / 'b.jsonl'}]",
        "training.max_steps=4",
        "training.eval_steps=1",
        "training.load_best_at_end=true",
        "training.early_stopping_patience=3",
        "generation={conversations: 5, max_new_tokens: 8}",
    )
    assert code == 0, err
    assert "(a.jsonl " in err
    assert ", turn 0: " in err
    evaluations = [line for line in lines(run) if "eval_loss" in line]
    assert len(evaluations) == 4
    assert set(evaluations[0]["eval_loss_by_source"]) == {"a.jsonl", "b.jsonl"}
    played = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    assert {row["step"] for row in played} == {0, 4}
    assert {row["conversation"].rsplit("/", 1)[1] for row in played} == {
        "a.jsonl, line 1", "a.jsonl, line 2", "a.jsonl, line 3", "a.jsonl, line 4", "b.jsonl, line 1"
    }  # fmt: skip
    assert sum(row.get("answer") == "7" for row in played) == 2, "the last turn of the one conversation with an answer"
