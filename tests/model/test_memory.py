"""Claims: what is kept for the backward changes no gradient, and the memory as said; the cost of a pack is predicted
from two short ones, and a pack that cannot fit is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import gradients, load

import mtr.model.memory
from mtr.attention.interface import use_tree_attention
from mtr.errors import UserError
from mtr.model.memory import PackMemory, checkpoint_activations, choose_checkpointing, fit_pack, measure
from mtr.model.tree_model import TreeModel
from mtr.recipe.sections import Checkpointing

CPU = torch.device("cpu")
Models = Callable[..., Path]


@pytest.mark.parametrize("backend", ["segment", "varlen", "sdpa"])
@pytest.mark.parametrize("mode", ["selective", "full"])
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


def test_what_selective_keeps(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is not computed again, nor are products that do not widen; those of the MLP that do are."""
    asked: list[tuple[str, bool]] = []
    decide = mtr.model.memory._is_worth_keeping

    def watch(operator: Any, arguments: Any) -> bool:
        asked.append((str(operator), decide(operator, arguments)))
        return asked[-1][1]

    monkeypatch.setattr(mtr.model.memory, "_is_worth_keeping", watch)
    model = load(models("qwen3"))
    checkpoint_activations(model, "selective")
    gradients(model)
    attention = [keep for name, keep in asked if "flash_attention_for_cpu" in name]
    products = [keep for name, keep in asked if name == "aten.mm.default"]
    assert attention
    assert all(attention)
    assert any(products)
    assert not all(products)
    assert not any(keep for name, keep in asked if "mm" not in name and "flash_attention" not in name)


def test_a_model_without_checkpointing_is_refused(models: Models) -> None:
    model = load(models("qwen3"))
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(UserError, match=r"training\.gradient_checkpointing: .*set it to none"):
            checkpoint_activations(model, "full")
        checkpoint_activations(model, "none")
    finally:
        type(model).supports_gradient_checkpointing = before


@pytest.fixture
def wide() -> TreeModel:
    """A model whose packs take megabytes, in float32."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = AutoModelForCausalLM.from_config(config)
    use_tree_attention(model)
    return TreeModel(model.train(), "segment")


def test_the_cost_of_a_pack_is_predicted(wide: TreeModel) -> None:
    """From packs of 512 and 1,024 tokens to one of 4,096, within a quarter: the resident set is a rough measure."""
    memory = measure(wide, CPU, 1024)
    assert all(p.grad is None for p in wide.parameters()), "the probe leaves no gradient behind"
    assert memory.bytes(4096) == pytest.approx(mtr.model.memory._peak(wide, 4096, CPU), rel=0.25)
    checkpoint_activations(wide.model, "full")
    assert measure(wide, CPU, 1024).per_token < 0.75 * memory.per_token


def test_the_largest_pack_fits_what_is_free() -> None:
    memory = PackMemory(fixed=1e9, per_token=1e6, free=20 * 10**9)
    assert memory.most_tokens == 17_400 // 128 * 128
    assert memory.bytes(memory.most_tokens) < 0.92 * memory.free < memory.bytes(memory.most_tokens + 128)
    assert PackMemory(1e9, 1e6, 10**8).most_tokens == 0
    assert PackMemory(0, 1, 10**12).most_tokens == 2**17


def test_a_turn_that_cannot_fit_is_refused(wide: TreeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, memory = fit_pack(wide, CPU, 256)
    assert tokens % 128 == 0
    assert tokens >= 256
    assert memory.bytes(tokens) <= memory.free
    monkeypatch.setattr(mtr.model.memory, "available_memory", lambda _: 60 * 2**20)
    with pytest.raises(UserError, match=r"sequence\.max_length: a turn of 4096 tokens takes .* GiB are free"):
        fit_pack(wide, CPU, 4096)


def test_out_of_memory_in_the_probe_is_one_line(wide: TreeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(mtr.model.memory, "_peak", full)
    with pytest.raises(UserError, match=r"a pack of 1024 tokens does not fit on cpu"):
        measure(wide, CPU, 1024)


@pytest.mark.parametrize(("most", "mode"), [(2**16, "none"), (10_000, "selective"), (2_000, "full")])
def test_auto_keeps_as_much_as_fits(wide: TreeModel, monkeypatch: pytest.MonkeyPatch, most: int, mode: str) -> None:
    """With twice the room for selective as for none."""
    asked: list[int] = []

    def measured(*_: Any) -> PackMemory:
        asked.append(0)
        return PackMemory(0.0, 1.0, int(most * (len(asked) if most < 2**16 else 1) / 0.92))

    monkeypatch.setattr(mtr.model.memory, "measure", measured)
    assert choose_checkpointing(wide, CPU, 16_384) == mode
    assert wide.model.is_gradient_checkpointing == (mode != "none")
