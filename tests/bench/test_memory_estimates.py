"""Claims: each recipe says what it takes of an 80 GB card, as benchmarks/memory.py counts it today, and fits one."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
from support.paths import ROOT

RECIPES = ("qwen3-8b", "r1-distill-qwen-7b", "gpt-oss-20b")


def script() -> Any:
    spec = importlib.util.spec_from_file_location("memory_estimates", ROOT / "benchmarks" / "memory.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_takes(name: str) -> None:
    memory = script()
    recipe = ROOT / "recipes" / f"{name}.yaml"
    result = memory.estimate(recipe)
    comment = " ".join(re.findall(r"^# (.*)$", recipe.read_text(), re.MULTILINE))
    assert memory.described(result).split(", ", 1)[1] in comment
    assert f"python benchmarks/memory.py recipes/{name}.yaml" in comment
    assert result["fits"]


def test_what_is_counted_adds_up() -> None:
    memory = script()
    result = memory.estimate(ROOT / "recipes" / "quickstart.yaml", tokens=256)
    beside = result["weights"] + result["gradients"] + result["optimizer"]
    assert all(result["total"][mode] == pytest.approx(beside + size) for mode, size in result["activations"].items())
    assert result["fits"][0] == "none"
    assert memory.estimate(ROOT / "recipes" / "quickstart.yaml", 256, card=beside)["fits"] == []


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-8b", 8.19), ("llama-3-8b", 8.03), ("r1-distill-qwen-7b", 7.62), ("gpt-oss-20b", 20.9)],
)
def test_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(ROOT / "benchmarks" / "shapes" / name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.002)
