"""One pass gives the loss and gradients of one pass per turn, and verify fails where it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.paths import SHARED, needs_shared
from support.rows import conversation_row

import mtr.attention.interface
import mtr.checks.verify
import mtr.prepare.builder
import mtr.tree.batch
from mtr.checks.verify import verify
from mtr.model.probe import Verdict
from mtr.recipe.loading import load_recipe
from mtr.tree.batch import Batch
from mtr.tree.layout import View
from mtr.tree.mask import FULL, Span, Tree
from mtr.tree.packing import Pack
from mtr.tree.plan import Tile

EXACT = ("qwen3", "llama", "gemma2", "gemma3", "gpt_oss", "qwen3_moe", "deepseek_v3")
Recipes = Callable[..., Path]
Models = Callable[..., Path]


@pytest.mark.parametrize("weighting", ["token", "turn", "conversation"])
def test_the_quickstart_model_is_exact(write_recipe: Recipes, weighting: str) -> None:
    result = verify(load_recipe(write_recipe(loss={"weighting": weighting})), conversations=3)
    assert result["passed"], result
    assert result["max_relative_difference"]["gradient"] < 1e-6
    assert result["max_relative_difference"]["loss"] < 1e-7
    assert result["attention"] == "segment"
    assert result["turns"] > result["conversations"] == 3


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", EXACT)
def test_every_kind_of_model_is_exact(write_recipe: Recipes, models: Models, kind: str, dtype: str) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": str(models(kind))}))
    result = verify(recipe, conversations=2, dtype=dtype)
    assert result["passed"], result


OTHER_BACKENDS = [("qwen3", "sdpa"), ("gemma3", "sdpa"), ("gpt_oss", "eager")]
OTHER_BACKENDS += [(kind, "varlen") for kind in ("qwen3", "gemma3", "gpt_oss", "deepseek_v3")]


@pytest.mark.parametrize(("kind", "attention"), OTHER_BACKENDS)
def test_the_other_backends_are_exact(write_recipe: Recipes, models: Models, kind: str, attention: str) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": str(models(kind))}))
    result = verify(recipe, conversations=2, attention=attention)
    assert result["passed"], result
    assert result["attention"] == attention


def test_all_weights_trained_is_exact(write_recipe: Recipes, models: Models) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": str(models("qwen3"))}, lora=None))
    result = verify(recipe, conversations=2)
    assert result["passed"], result
    assert result["tensors"] > 20


def test_message_weights_and_several_trees_are_exact(write_recipe: Recipes, write_rows: Callable[..., Path]) -> None:
    row = conversation_row(turns=5)
    row["messages"][1]["weight"] = 0.25
    row["messages"][5]["train"] = False
    recipe = load_recipe(
        write_recipe(
            data={"train": str(write_rows([row, conversation_row(turns=2, thinking=False)]))},
            sequence={"max_length": 200, "max_tokens": 200},
            loss={"weighting": "conversation"},
        )
    )
    result = verify(recipe, conversations=2)
    assert result["passed"], result
    assert result["turns"] == 6


@needs_shared
@pytest.mark.parametrize(
    ("kind", "tokenizer"),
    [("qwen3", "qwen3"), ("gemma3", "qwen3"), ("gpt_oss", "gpt-oss"), ("deepseek_v3", "r1-distill-qwen")],
)
def test_real_tokenizers_and_data_are_exact(write_recipe: Recipes, models: Models, kind: str, tokenizer: str) -> None:
    folder = models(kind, SHARED / "tokenizers" / tokenizer)
    data = str(SHARED / "data" / "mathchat_followup.jsonl")
    result = verify(load_recipe(write_recipe(model={"name_or_path": str(folder)}, data={"train": data})), 1)
    assert result["passed"], result


@needs_shared
@pytest.mark.parametrize(
    ("kind", "tokenizer"),
    [
        pytest.param("qwen3", "qwen3", marks=pytest.mark.slow),
        ("gpt_oss", "gpt-oss"),
        pytest.param("llama", "r1-distill-qwen", marks=pytest.mark.slow),
    ],
)
def test_a_tool_loop_is_exact(
    write_recipe: Recipes, write_rows: Recipes, models: Models, kind: str, tokenizer: str
) -> None:
    """Thinking within the loop and after it, on the three real templates."""
    call = {"type": "function", "function": {"name": "count", "arguments": {"who": "Ana"}}}
    loop = [
        {"role": "user", "content": "How many coins has Ana?"},
        {"role": "assistant", "reasoning_content": "I must ask.", "tool_calls": [call]},
        {"role": "tool", "name": "count", "content": "7"},
        {"role": "assistant", "reasoning_content": "It says 7.", "content": "Ana has 7 coins."},
    ]
    folder = models(kind, SHARED / "tokenizers" / tokenizer)
    data = write_rows([{"messages": [{"role": "system", "content": "Count."}, *loop, *loop]}])
    result = verify(load_recipe(write_recipe(model={"name_or_path": str(folder)}, data={"train": str(data)})), 1)
    assert result["passed"], result
    assert result["turns"] == 4


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("data", ["reason_tool_use", "tau2_retail", "mathchat_followup"])
@pytest.mark.parametrize("tokenizer", ["qwen3", "gpt-oss", "r1-distill-qwen"])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_tool_loops_are_exact(write_recipe: Recipes, models: Models, kind: str, tokenizer: str, data: str) -> None:
    folder = models(kind, SHARED / "tokenizers" / tokenizer)
    recipe = write_recipe(
        model={"name_or_path": str(folder)},
        data={"train": str(SHARED / "data" / f"{data}.jsonl")},
        sequence={"max_length": 16384, "max_tokens": 32768},
    )
    result = verify(load_recipe(recipe), conversations=1)
    assert result["passed"], result


# --- and verify fails where the two are not the same ---


def _causal_plan(tree: Tree, span: Span = FULL) -> list[Tile]:
    """Every token sees every token before it in the row: branches leak into each other."""
    length = len(tree.parent)
    return [Tile(0, length, 0, length)]


def _fails(write_recipe: Recipes, dtype: str = "float64") -> None:
    result = verify(load_recipe(write_recipe()), conversations=2, dtype=dtype)
    assert not result["passed"]
    assert result["max_relative_difference"]["gradient"] > 1e-3


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_broken_mask_fails(write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(mtr.attention.interface, "tile_plan", _causal_plan)
    monkeypatch.setattr("mtr.model.strategy.judge", lambda *_: Verdict(None, None))  # it would be per turn
    _fails(write_recipe, dtype)


def _breaking(change: Callable[[Batch], Batch]) -> Callable[..., Batch]:
    def build(pack: Pack, *arguments: Any) -> Batch:
        return change(mtr.tree.batch.build_batch(pack, *arguments))

    return build


def test_positions_of_the_row_fail(write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    def shift(batch: Batch) -> Batch:
        positions = np.arange(batch.input_ids.shape[1])[None]
        return replace(batch, position_ids=batch.position_ids.new_tensor(positions))

    monkeypatch.setattr(mtr.checks.verify, "build_batch", _breaking(shift))
    _fails(write_recipe)


def test_one_wrong_predictor_fails(write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(batch: Batch) -> Batch:
        predictor = batch.predictor.clone()
        predictor[len(predictor) // 2] += 1
        return replace(batch, predictor=predictor)

    monkeypatch.setattr(mtr.checks.verify, "build_batch", _breaking(move))
    _fails(write_recipe)


def test_another_normalisation_fails(write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(batch: Batch) -> Batch:
        return replace(batch, weight=batch.weight * 1.01)

    monkeypatch.setattr(mtr.checks.verify, "build_batch", _breaking(twice))
    _fails(write_recipe)


def test_a_missing_target_fails(write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(batch: Batch) -> Batch:
        return replace(batch, predictor=batch.predictor[1:], target_id=batch.target_id[1:], weight=batch.weight[1:])

    monkeypatch.setattr(mtr.checks.verify, "build_batch", _breaking(drop))
    _fails(write_recipe)


def test_the_command_exits_with_1_when_it_fails(
    write_recipe: Recipes, mtr: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtr.checks import verify as module

    assert mtr("verify", write_recipe(), "--conversations", 1, "--json")[0] == 0
    monkeypatch.setitem(module.TOLERANCE, "float64", {"loss": 1e-30, "gradient": 1e-30})
    code, out, _ = mtr("verify", write_recipe(), "--conversations", 1, "--json")
    assert code == 1
    result = json.loads(out)
    assert not result["passed"]
    assert set(result) >= {"conversations", "turns", "dtype", "loss", "max_relative_difference", "tolerance", "passed"}


def test_the_per_turn_side_never_sees_a_tree(write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tree code made unusable, the per-turn side still gives the same loss."""
    recipe = load_recipe(write_recipe())
    expected = verify(recipe, conversations=1)["loss"]["per_turn"]

    def unusable(*_: Any) -> float:
        return 0.0

    monkeypatch.setattr(mtr.checks.verify, "_trained", unusable)
    monkeypatch.setattr("mtr.tree.layout.Tree.layout", None)
    monkeypatch.setattr("mtr.tree.plan.tile_plan", None)
    monkeypatch.setattr("mtr.model.strategy.judge", lambda *_: Verdict(None, None))
    assert verify(recipe, conversations=1)["loss"]["per_turn"] == pytest.approx(expected, rel=1e-12)
    assert View is not None
