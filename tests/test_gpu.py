"""What only a CUDA device can show: flex and varlen are exact, forward and backward, in packs of odd shapes, and they
train.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.attention import CASES, dense_attention, inputs, results

from mtr.attention.interface import attend
from mtr.attention.masks import TreeAttention
from mtr.bench.runs import bench
from mtr.checks.verify import verify
from mtr.recipe.loading import load_recipe
from mtr.recipe.sections import Backend
from mtr.training.loop import train
from mtr.tree.mask import FULL, Span, Tree, dense_mask

pytestmark = pytest.mark.gpu
Recipes = Callable[..., Path]


def random_tree(length: int, seed: int, device: str) -> Tree:
    """A forest in pre-order: each token hangs below a token on the path to the one before it, or is a root."""
    rng = np.random.default_rng(seed)
    parent, position, path = [-1], [0], [0]
    for i in range(1, length):
        if rng.random() < 0.02:
            path = path[: rng.integers(0, len(path) + 1)]
        parent.append(path[-1] if path else -1)
        position.append(len(path))
        path.append(i)
    end = np.arange(length) + 1
    for i in range(length - 1, 0, -1):
        if parent[i] >= 0:
            end[parent[i]] = max(end[parent[i]], end[i])
    return Tree(torch.tensor(end, device=device), torch.tensor(position, device=device), np.array(parent))


SPANS = [FULL, Span("sliding", 100), Span("chunked", 96)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("span", SPANS, ids=lambda span: span.kind)
@pytest.mark.parametrize("length", [128, 640, 1280])
def test_flex_equals_dense_attention(length: int, span: Span, name: str) -> None:
    _equals_dense("flex", length, span, name, torch.float32, 5e-3)  # TF32 products inside the kernel


@pytest.mark.parametrize("backend", ["flex", "varlen"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.softcap is None])
@pytest.mark.parametrize("span", SPANS, ids=lambda span: span.kind)
@pytest.mark.parametrize("length", [5, 77, 640, 1283])
def test_half_precision_equals_dense_attention(length: int, span: Span, name: str, backend: Backend) -> None:
    if backend == "flex":
        length = -(-length // 128) * 128
    _equals_dense(backend, length, span, name, torch.bfloat16, 3e-2)


def _equals_dense(backend: Backend, length: int, span: Span, name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Output and every gradient against the dense reference in float64, on the same rounded inputs."""
    case = CASES[name]._replace(key_size=CASES[name].key_size * 8, value_size=CASES[name].value_size * 8)
    tree = random_tree(length, seed=length, device="cuda")
    given = [x.cuda() for x in inputs(case, length, dtype)]
    mask, scale = dense_mask(tree, span), case.key_size**-0.5
    ours = results(
        lambda q, k, v, s: attend(
            TreeAttention(tree, [span], backend), span, q, k, v, scale, case.softcap, s
        ).transpose(1, 2),
        given,
    )
    theirs = results(
        lambda q, k, v, s: dense_attention(q, k, v, mask, scale, case.softcap, s), [x.double() for x in given]
    )
    worst = {key: float((ours[key] - x).abs().max() / x.abs().max()) for key, x in theirs.items()}
    assert max(worst.values()) < tolerance, worst


def test_flex_compiles_twice_for_packs_of_all_lengths() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for length in (256, 640, 1280, 384):
        _equals_dense("flex", length, FULL, "grouped heads", torch.bfloat16, 3e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "qwen3_moe"])
def test_models_are_exact_in_float32(
    write_recipe: Recipes, models: Callable[..., Path], kind: str, attention: str
) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": str(models(kind))}))
    result = verify(recipe, conversations=2, dtype="float32", attention=attention)
    assert result["passed"], result


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2"])
def test_sinks_and_soft_caps_are_exact_with_flex(write_recipe: Recipes, models: Callable[..., Path], kind: str) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": str(models(kind))}))
    assert verify(recipe, conversations=2, dtype="float32", attention="flex")["passed"]


@pytest.mark.parametrize("attention", ["auto", "flex", "varlen"])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3", "gpt_oss", "deepseek_v3"])
def test_models_in_bfloat16(write_recipe: Recipes, models: Callable[..., Path], kind: str, attention: str) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": str(models(kind))}))
    result = verify(recipe, conversations=2, dtype="bfloat16", attention=attention)
    assert result["passed"], result


def test_float64_is_exact_with_a_dense_mask(write_recipe: Recipes) -> None:
    result = verify(load_recipe(write_recipe()), conversations=2)
    assert result["passed"], result


@pytest.mark.parametrize(
    ("attention", "dtype"), [("flex", "float32"), ("flex", "bfloat16"), ("varlen", "bfloat16"), ("auto", "bfloat16")]
)
@pytest.mark.parametrize("lora", [{"r": 8}, None], ids=["lora", "whole"])
def test_training_is_like_per_turn(
    write_recipe: Recipes, tmp_path: Path, attention: str, dtype: str, lora: dict[str, Any] | None
) -> None:
    losses: list[list[float]] = []
    for strategy in ("single_pass", "per_turn"):
        output: dict[str, Any] = {"output_dir": str(tmp_path / strategy), "max_steps": 4}
        recipe = write_recipe(
            model={"dtype": dtype, "attention": attention}, lora=lora, sequence={"strategy": strategy}, training=output
        )
        train(load_recipe(recipe))
        lines = (tmp_path / strategy / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == "float32" else 2e-2)


def test_the_bench_runs_on_the_device(write_recipe: Recipes) -> None:
    result = bench(load_recipe(write_recipe()), conversations=4, repeats=1)
    assert result["cases"][0]["attention"] in ("flex", "varlen")
    assert result["max_relative_loss_difference"] < 1e-3
