"""Claims: the estimate is what the storages of a real step take, for every mode and kind of model, however deep; and
near the resident set of the process that runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import tiny_config, wide_model
from support.resident import RESIDENT, resident
from transformers import AutoModelForCausalLM

import mtr.model.estimate
from mtr.model.checkpointing import MODES, checkpoint_activations
from mtr.model.estimate import Estimator, Storages
from mtr.model.lora import add_lora
from mtr.model.memory import Probe
from mtr.model.tree_model import TreeModel, use_tree
from mtr.recipe.loading import load_recipe
from mtr.recipe.sections import Checkpointing, LoraSection, Recipe
from mtr.training.fitting import estimator_of, least_checkpointing, modes_on
from mtr.training.optim import build_optimizer
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import View, merge
from mtr.tree.packing import Pack

CPU = torch.device("cpu")
Recipes = Callable[..., Path]
TOKENS = 384


def estimator(recipe: Recipe, config: Any, dtype: torch.dtype = torch.float32) -> Estimator:
    return estimator_of(recipe, config, dtype, ["segment"], CPU)


def batch(vocabulary: int, tokens: int = TOKENS) -> Batch:
    ids = np.random.default_rng(0).integers(0, vocabulary, tokens)
    return build_batch(Pack((merge([View(ids[:1], ids[1:], np.ones(tokens - 1))]),)))


def forked(vocabulary: int, tokens: int = TOKENS, every: int = 128) -> Batch:
    """Turns that share all but their last tokens: a branch after each piece of the trunk."""
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, vocabulary, tokens // 2)
    views = []
    for end in range(every, len(trunk) + 1, every):
        branch = rng.integers(0, vocabulary, every)
        branch[0] = (trunk[end % len(trunk)] + 1) % vocabulary
        views.append(View(trunk[:end], branch, np.ones(every)))
    return build_batch(Pack((merge(views),)))


def measured(
    recipe: Recipe, config: Any, dtype: torch.dtype, mode: Checkpointing, given: Batch | None = None
) -> tuple[int, int]:
    """Bytes that a real step takes at most beyond weights and gradients, and bytes of the weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    mixed = recipe.lora is None and dtype == torch.bfloat16
    if recipe.lora is not None:
        model = add_lora(model, recipe.lora, 0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameter.grad = torch.zeros_like(parameter)
    use_tree(model)
    checkpoint_activations(model.train(), mode)
    tree_model, storages = TreeModel(model, "segment"), Storages()
    tensors = [*model.parameters(), *model.buffers()]
    storages.ignore(iter(tensors))
    storages.ignore(p.grad for p in model.parameters() if p.grad is not None)
    given = given or batch(config.vocab_size)
    with storages:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = tree_model(given)
        torch.autograd.backward(loss)
    return storages.peak, sum({x.data_ptr(): x.nbytes for x in tensors}.values())


@pytest.mark.parametrize(
    ("kind", "dtype", "lora"),
    [
        ("qwen3", torch.bfloat16, {"r": 4}),
        ("qwen3", torch.bfloat16, None),
        ("gpt_oss", torch.float32, {"r": 4}),
        ("deepseek_v3", torch.float32, None),
        ("qwen3_5", torch.bfloat16, {"r": 4}),
    ],
    ids=["lora", "master weights", "experts", "latent attention", "recurrent"],
)
def test_the_estimate_is_what_a_step_takes(
    write_recipe: Recipes, kind: str, dtype: torch.dtype, lora: dict[str, Any] | None
) -> None:
    """Of four layers, from two and three."""
    config = tiny_config(kind, num_hidden_layers=4)
    config.pad_token_id = None
    recipe = load_recipe(write_recipe(lora=lora))
    estimates = estimator(recipe, config, dtype)
    for mode in MODES[:4]:
        peak, weights = measured(recipe, config, dtype, mode)
        assert estimates.activations(mode, TOKENS) == pytest.approx(peak, rel=0.01), mode
        assert estimates.weights() == weights


@pytest.mark.parametrize(
    ("kind", "dtype", "lora"),
    [
        ("qwen3_5", torch.bfloat16, {"r": 4}),
        ("nemotron_h", torch.float32, None),
        ("falcon_h1", torch.float32, None),
        ("mamba2", torch.float32, None),
    ],
    ids=["delta rule, lora", "four kinds of layers", "both in each layer", "no attention"],
)
def test_hybrids_are_estimated_from_a_layer_of_each_kind(
    write_recipe: Recipes, kind: str, dtype: torch.dtype, lora: dict[str, Any] | None
) -> None:
    """Of a chain and of a tree that forks every 128 tokens."""
    config = tiny_config(kind)
    recipe = load_recipe(write_recipe(lora=lora))
    estimates = estimator(recipe, config, dtype)
    for mode in ("none", "full"):
        for given in (batch(config.vocab_size, 512), forked(config.vocab_size, 512)):
            peak, weights = measured(recipe, config, dtype, mode, given)
            assert estimates.activations(mode, given.num_tokens) == pytest.approx(peak, rel=0.03), mode
        assert estimates.weights() == weights


def test_a_line_goes_on_from_where_every_chunk_of_the_loss_is_full(
    write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, config = load_recipe(write_recipe()), tiny_config("qwen3", vocab_size=2**17)
    exact = estimator(recipe, config).activations("none", 6_000)
    monkeypatch.setattr(mtr.model.estimate, "_LINEAR", 2_500)
    assert estimator(recipe, config).activations("none", 6_000) == pytest.approx(exact, rel=1e-3)


def test_layer_inputs_are_not_on_the_device_when_they_are_offloaded(write_recipe: Recipes) -> None:
    estimates = [estimator(load_recipe(write_recipe()), wide_model(n).config) for n in (3, 8)]
    full, offload = ([e.activations(mode, TOKENS) for e in estimates] for mode in MODES[3:])
    assert full[1] - full[0] == 5 * TOKENS * 256 * 4
    assert offload[1] == offload[0] == full[0] - TOKENS * 256 * 4


def test_what_was_asked_before_changes_no_estimate(write_recipe: Recipes) -> None:
    first, later = (estimator(load_recipe(write_recipe()), wide_model(5).config) for _ in range(2))
    later.activations("offload", TOKENS)
    assert later.activations("none", TOKENS) == first.activations("none", TOKENS)


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
@pytest.mark.parametrize("mode", RESIDENT)
def test_the_estimate_is_the_resident_set(write_recipe: Recipes, mode: Checkpointing) -> None:
    """Of a pack of 2,048 tokens, within a tenth."""
    recipe = load_recipe(write_recipe(lora=None))
    estimated = estimator(recipe, wide_model().config).activations(mode, 2048)
    assert resident().peak[mode] == pytest.approx(estimated, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES[:4])
def test_the_estimate_is_what_a_device_allocates(write_recipe: Recipes, mode: Checkpointing) -> None:
    """In bfloat16 with LoRA, of 8,192 tokens, within 15 %: workspaces and gathered keys are not in it."""
    device = torch.device("cuda")
    recipe = load_recipe(write_recipe())
    model = add_lora(wide_model().to(device, torch.bfloat16), LoraSection(), 0).train()
    checkpoint_activations(model, mode)
    tree_model = TreeModel(model, "varlen")
    probe = Probe(tree_model, tree_model, device)
    probe.peak(64)
    estimates = estimator_of(recipe, model.get_base_model().config, torch.bfloat16, ["varlen"], device)
    assert probe.peak(8192) == pytest.approx(estimates.activations(mode, 8192), rel=0.15)


@pytest.mark.parametrize("at_once", [True, False])
def test_what_an_update_takes(write_recipe: Recipes, at_once: bool) -> None:
    """AdamW as it is on CUDA (all weights at once) and on the CPU, by storages."""
    recipe, model = load_recipe(write_recipe(lora=None)), wide_model(4)
    estimates = replace(estimator(recipe, model.config), on_cuda=at_once)
    optimizer = build_optimizer(model, recipe.training)
    for group in optimizer.param_groups:
        group["foreach"] = at_once
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with Storages() as storages:
        storages.ignore(x for p in model.parameters() for x in (p, p.grad, *optimizer.state[p].values()))
        optimizer.step()
    assert estimates.training_state().update == pytest.approx(storages.peak, rel=0.01)


def test_the_least_checkpointing_that_fits_is_taken(write_recipe: Recipes) -> None:
    estimates = estimator(load_recipe(write_recipe()), wide_model().config)
    taken = {mode: estimates.activations(mode, 1024) for mode in MODES}
    assert sorted(taken.values(), reverse=True) == list(taken.values())
    for mode, size in taken.items():
        choice = least_checkpointing(estimates, 1024, int(size / estimates.share) + 2, MODES)
        assert choice.mode == mode
        assert f"{mode} {size / 2**30:.1f}" in choice.reason
        assert "none fits" not in choice.reason
    assert least_checkpointing(estimates, 1024, 0, MODES).mode == "offload"
    refused = least_checkpointing(estimates, 1024, 0, modes_on(CPU, wide_model()))
    assert refused.mode == "full"
    assert "none fits" in refused.reason


def test_a_model_that_cannot_be_estimated_is_checkpointed_in_full(
    write_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As code from the Hub that looks at the values of its tensors."""
    monkeypatch.setattr(TreeModel, "forward", lambda self, batch: int(batch.weight.sum()))
    choice = least_checkpointing(estimator(load_recipe(write_recipe()), wide_model().config), 128, 2**40, MODES)
    assert choice.mode == "full"
    assert "cannot be estimated (DataDependentOutputException" in choice.reason
