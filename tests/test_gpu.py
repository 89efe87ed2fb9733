"""What only a CUDA device can show: flex is exact, forward and backward, in packs of odd shapes, and trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtr.bench import bench
from mtr.mask import FULL, Span, Tree, block_mask, dense_mask
from mtr.recipe import load_recipe
from mtr.train import train
from mtr.verify import verify

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


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("span", [FULL, Span("sliding", 100), Span("chunked", 96)], ids=lambda span: span.kind)
@pytest.mark.parametrize("length", [128, 640, 1280])
def test_flex_equals_dense_attention(length: int, span: Span, heads: tuple[int, int]) -> None:
    from torch.nn.attention.flex_attention import flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    torch.manual_seed(0)
    tree = random_tree(length, seed=length, device="cuda")
    query, key, value = (
        torch.randn(1, n, length, 64, device="cuda", requires_grad=True) for n in (heads[0], heads[1], heads[1])
    )
    compiled = torch.compile(flex_attention)
    out = compiled(query, key, value, block_mask=block_mask(tree, span), enable_gqa=True)
    doubles = [x.detach().double().requires_grad_() for x in (query, key, value)]
    mask = dense_mask(tree, span)[None, None]
    wanted = scaled_dot_product_attention(doubles[0], doubles[1], doubles[2], attn_mask=mask, enable_gqa=True)
    gradient = torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, (query, key, value), gradient))
    reference = (wanted, *torch.autograd.grad(wanted, doubles, gradient.double()))
    for mine, right in zip(got, reference, strict=True):
        assert (mine - right).abs().max() < 5e-3 * right.abs().max()  # TF32 products inside the kernel


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "qwen3_moe"])
def test_models_are_exact_in_float32(
    write_recipe: Recipes, models: Callable[..., Path], kind: str, attention: str
) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": str(models(kind))}))
    result = verify(recipe, conversations=2, dtype="float32", attention=attention)
    assert result["passed"], result


def test_sinks_are_exact_with_flex(write_recipe: Recipes, models: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": str(models("gpt_oss"))}))
    assert verify(recipe, conversations=2, dtype="float32", attention="flex")["passed"]


def test_float64_is_exact_with_a_dense_mask(write_recipe: Recipes) -> None:
    result = verify(load_recipe(write_recipe()), conversations=2)
    assert result["passed"], result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flex_trains_like_per_turn(write_recipe: Recipes, tmp_path: Path, dtype: str) -> None:
    losses: list[list[float]] = []
    for strategy in ("single_pass", "per_turn"):
        output: dict[str, Any] = {"output_dir": str(tmp_path / strategy), "max_steps": 4}
        recipe = write_recipe(model={"dtype": dtype}, sequence={"strategy": strategy}, training=output)
        train(load_recipe(recipe))
        lines = (tmp_path / strategy / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == "float32" else 2e-2)


def test_the_bench_runs_on_the_device(write_recipe: Recipes) -> None:
    result = bench(load_recipe(write_recipe()), conversations=4, repeats=1)
    assert result["cases"][0]["attention"] == "flex"
    assert result["max_relative_loss_difference"] < 1e-3
