"""The bench does the same work three ways and counts it right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mtr.bench import bench, plot
from mtr.flops import count_flops
from mtr.layout import View, merge
from mtr.recipe import load_recipe

Recipes = Callable[..., Path]


def test_the_cases_do_the_same_work(write_recipe: Recipes, tmp_path: Path) -> None:
    result = bench(load_recipe(write_recipe()), conversations=3, repeats=1)
    assert [case["strategy"] for case in result["cases"]] == ["single_pass", "per_turn_packed", "per_turn_padded"]
    assert result["max_relative_loss_difference"] < 1e-5
    tokens = result["shape"]["num_tokens"]
    assert tokens["single_pass"] < tokens["per_turn_packed"] <= tokens["per_turn_padded"]
    assert result["limit"]["tokens"] == pytest.approx(tokens["per_turn_packed"] / tokens["single_pass"])
    assert 1 < result["limit"]["flops"] < result["limit"]["tokens"] * 1.05
    plot(result, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_prints_json_alone(write_recipe: Recipes, mtr: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = mtr("bench", write_recipe(), "--conversations", 1, "--repeats", 1, "--json")
    assert code == 0
    result = json.loads(out)
    assert set(result) >= {"device", "shape", "cases", "speedup", "limit", "max_relative_loss_difference"}
    keys = {
        "strategy",
        "attention",
        "seconds",
        "conversations_per_second",
        "tokens_per_second",
        "supervised_tokens_per_second",
        "peak_memory_bytes",
        "loss",
    }
    assert all(set(case) >= keys and set(case["seconds"]) == {"min", "median", "max"} for case in result["cases"])


def test_the_command_prints_a_table_that_fits(
    write_recipe: Recipes, mtr: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = mtr("bench", write_recipe(), "--conversations", 1, "--repeats", 1)
    assert code == 0
    assert "single_pass" in out
    assert "per_turn_padded" in out
    assert "of the FLOP limit against the faster baseline" in out


def test_flops_are_those_of_a_model_one_can_count(models: Callable[..., Path]) -> None:
    """A Llama of 2 layers by hand: frozen products 4 FLOP a parameter and token, attention 6 (8 + 8) a head, pair."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32).requires_grad_(False)
    layout = merge([View(np.array([1, 2, 3]), np.array([4, 5]), np.ones(2))])
    linear = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    pairs = 1 + 2 + 3 + 4 + 5
    head = 32 * model.config.vocab_size
    assert count_flops(model, [layout]) == 4 * linear * 5 + 2 * 4 * 6 * 16 * pairs + 4 * head * 2
    model.lm_head.requires_grad_(True)
    assert count_flops(model, [layout]) == 4 * linear * 5 + 2 * 4 * 6 * 16 * pairs + 6 * head * 2
