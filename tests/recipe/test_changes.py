"""Claims: differing_keys names exactly the keys that change the mathematics of a run."""

from __future__ import annotations

from typing import Any

import pytest
from support.recipes import MINIMAL

from mtr.recipe.changes import differing_keys
from mtr.recipe.sections import Recipe


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({"training": {"learning_rate": 1e-3}}, ["training.learning_rate"]),
        ({"training": {"seed": 1}, "loss": {"weighting": "turn"}}, ["loss.weighting", "training.seed"]),
        ({"lora": {"r": 8}}, ["lora.r"]),
        ({"data": {"train": [{"path": "/other.jsonl"}]}}, ["data.train"]),
        ({"data": {"shuffle": False}}, ["data.shuffle"]),
        ({"sequence": {"max_length": 100}}, ["sequence.max_length"]),
        ({"template": {"enable_thinking": True}}, ["template.enable_thinking"]),
        ({"training": {"conversations_per_step": 2}}, ["training.conversations_per_step"]),
        ({"training": {"num_train_epochs": 2}}, ["training.num_train_epochs"]),
        ({"sequence": {"max_tokens": 5000, "strategy": "per_turn"}}, []),
        ({"training": {"output_dir": "/p", "max_steps": 9, "save_steps": 2, "logging_steps": 5}}, []),
        ({"model": {"attention": "sdpa"}, "data": {"num_workers": 1, "eval": ["/e.jsonl"]}}, []),
        ({"training": {"gradient_checkpointing": False}}, []),
    ],
)
def test_differing_keys_are_those_that_change_the_mathematics(
    change: dict[str, dict[str, Any]], different: list[str]
) -> None:
    one = Recipe.model_validate(MINIMAL)
    other = one.replace(**change)
    assert sorted(differing_keys(one, other)) == different
    assert sorted(differing_keys(other, one)) == different


def test_lora_against_all_weights_differs() -> None:
    one = Recipe.model_validate(MINIMAL)
    assert any(key.startswith("lora") for key in differing_keys(one, Recipe.model_validate({**MINIMAL, "lora": None})))
