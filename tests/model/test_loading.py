"""Claims: a model without values is the same model, and refuses the same weights with the same words; an auxiliary loss
of experts is switched off, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import changed_model
from torch import Tensor

from mtr.errors import UserError
from mtr.model.loading import load_model
from mtr.recipe.loading import load_recipe

Recipes = Callable[..., Path]
Models = Callable[..., Path]
CPU, META = torch.device("cpu"), torch.device("meta")
HEAD = "lm_head.weight"


def described(model: Any) -> list[tuple[object, ...]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors]


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt_oss", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["whole", "lora"])
def test_a_model_on_meta_is_the_same_but_for_its_values(
    write_recipe: Recipes, models: Models, kind: str, lora: dict[str, Any] | None
) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": str(models(kind)), "dtype": "bfloat16"}, lora=lora))
    empty = load_model(recipe, CPU, placement=META)
    assert described(empty) == described(load_model(recipe, CPU))
    assert {tensor.device for tensor in (*empty.parameters(), *empty.buffers())} == {META}


def without_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def narrow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, HEAD: tensors[HEAD][:, :16]}


def compiled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("change", [without_head, narrow, compiled])
def test_the_same_weights_are_refused(
    write_recipe: Recipes, models: Models, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    folder = changed_model(models("qwen3"), tmp_path / "changed", change)
    recipe = load_recipe(write_recipe(model={"name_or_path": str(folder)}))
    said = []
    for placement in (CPU, META):
        with pytest.raises(UserError) as raised:
            load_model(recipe, CPU, placement=placement)
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_the_loss_is_that_of_tokens(
    write_recipe: Recipes, models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With output_router_logits, transformers would keep router logits and add a loss of the whole row to its own."""
    folder = changed_model(models("qwen3_moe"), tmp_path / "changed", output_router_logits=True)
    model = load_model(load_recipe(write_recipe(model={"name_or_path": str(folder)})), CPU)
    assert model.config.output_router_logits is False
    assert "output_router_logits of the model is set to false" in caplog.text
