"""Claims: what is kept for the backward changes no gradient, and the memory as said; attention is not computed again
where its outputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import gradients, load

import mtr.model.checkpointing
from mtr.errors import UserError
from mtr.model.checkpointing import MODES, checkpoint_activations
from mtr.model.lora import add_lora
from mtr.recipe.sections import Checkpointing, LoraSection

Models = Callable[..., Path]


@pytest.mark.parametrize("backend", ["segment", "varlen", "sdpa"])
@pytest.mark.parametrize("mode", ["products", "selective", "full"])
def test_gradients_are_the_same_whatever_is_kept(models: Models, mode: Checkpointing, backend: str) -> None:
    plain, _ = gradients(load(models("qwen3")), backend)
    model = load(models("qwen3"))
    checkpoint_activations(model, mode)
    recomputed, _ = gradients(model, backend)
    assert plain.keys() == recomputed.keys()
    assert all(torch.allclose(plain[name], recomputed[name], rtol=1e-12, atol=1e-14) for name in plain)


def test_less_is_kept_as_said(models: Models) -> None:
    """The hooks see what the graph keeps; what `selective` caches it keeps beside it."""
    kept = {}
    for mode in ("none", "full"):
        model = load(models("qwen3"))
        checkpoint_activations(model, mode)
        kept[mode] = gradients(model)[1]
    assert kept["full"] < 0.5 * kept["none"]


def test_one_model_goes_from_mode_to_mode(models: Models) -> None:
    model = load(models("qwen3"))
    none, kept = gradients(model)
    for mode in (*MODES, "none"):
        checkpoint_activations(model, mode)
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == (mode != "none")
    again, kept_again = gradients(model)
    assert kept_again == kept
    assert all(torch.equal(none[name], again[name]) for name in none)


@pytest.mark.parametrize(("mode", "kept"), [("products", {"mlp", "narrow"}), ("selective", {"narrow"})])
def test_what_is_kept(models: Models, monkeypatch: pytest.MonkeyPatch, mode: Checkpointing, kept: set[str]) -> None:
    """Attention is not computed again, nor are products that do not widen; those of the MLP that do are with selective.
    LoRA's from its rank to the layer's width are with both.
    """
    asked: list[tuple[str, bool]] = []
    decide = mtr.model.checkpointing._is_worth_keeping

    def watch(operator: Any, arguments: Any, widens_by: int) -> bool:
        keep = decide(operator, arguments, widens_by)
        name = str(operator)
        if name == "aten.mm.default":
            into, out = arguments[0].shape[1], arguments[1].shape[1]
            name = "lora" if into == 1 else "mlp" if out > into else "narrow"
        asked.append((name, keep))
        return keep

    monkeypatch.setattr(mtr.model.checkpointing, "_is_worth_keeping", watch)
    model = add_lora(load(models("qwen3")), LoraSection(r=1), 0)
    checkpoint_activations(model, mode)
    gradients(model)
    assert {"lora", "mlp", "narrow", "mtr.tree_attention.default"} < {name for name, _ in asked}
    assert {name for name, keep in asked if keep} == kept | {"mtr.tree_attention.default"}
    assert {name for name, keep in asked if not keep}.isdisjoint(kept)


def test_attention_is_computed_once_where_it_is_kept(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per layer and step: once with selective, twice with full."""
    import mtr.attention.interface

    computed: dict[str, int] = {}
    forward = mtr.attention.interface.forward
    for mode in MODES[:4]:
        calls: list[int] = []
        monkeypatch.setattr(mtr.attention.interface, "forward", lambda *a, calls=calls: calls.append(1) or forward(*a))
        model = load(models("qwen3"))
        checkpoint_activations(model, mode)
        gradients(model)
        computed[mode] = len(calls)
    layers = model.config.num_hidden_layers
    assert computed == {"none": layers, "products": layers, "selective": layers, "full": 2 * layers}


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe", "gemma2", "deepseek_v3"])
def test_selective_works_for_other_architectures(models: Models, kind: str) -> None:
    """None of what it keeps is changed in place afterwards, which torch would refuse: experts add their biases so."""
    plain, _ = gradients(load(models(kind)).float())
    model = load(models(kind)).float()
    if kind != "gemma2":
        model.set_experts_implementation("grouped_mm")
    checkpoint_activations(model, "selective")
    recomputed, _ = gradients(model)
    assert plain.keys() == recomputed.keys()
    worst = max(float((plain[n] - recomputed[n]).abs().max() / (plain[n].abs().max() + 1e-6)) for n in plain)
    assert worst < 1e-3


def test_a_model_without_checkpointing_is_refused(models: Models) -> None:
    model = load(models("qwen3"))
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(UserError, match=r"training\.gradient_checkpointing: .*set it to none"):
            checkpoint_activations(model, "full")
        checkpoint_activations(model, "none")
    finally:
        type(model).supports_gradient_checkpointing = before
