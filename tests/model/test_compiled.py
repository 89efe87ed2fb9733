"""Claims: compiled layers compute the same in every mode of checkpointing; a kind of layer is compiled once, for
packs of every length; a layer that cannot be compiled runs as it is, or is refused if compiling was asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from support.models import gradients, load

import mtr.attention.interface
import mtr.model.compiled
from mtr.attention.interface import use_own_attention, use_tree_attention
from mtr.attention.segment import segment_forward
from mtr.errors import UserError
from mtr.model.checkpointing import checkpoint_activations
from mtr.model.compiled import compile_layers, uncompiled, wants_compiling
from mtr.model.lora import add_lora
from mtr.model.tree_model import TreeModel
from mtr.recipe.sections import LoraSection
from mtr.tree.batch import build_batch
from mtr.tree.layout import View, merge
from mtr.tree.packing import Pack

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch's tracing
]
Models = Callable[..., Path]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def unique_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Compiled(NamedTuple):
    """What one pack through compiled layers gave."""

    gradients: dict[str, torch.Tensor]
    kept: int
    graphs: int
    attention_calls: int
    layers: int


@pytest.fixture(scope="module")
def compiled_run(models: Models) -> Callable[[str, Any], Compiled]:
    """`compiled_run("qwen3", "full")` is of that mode of checkpointing, run once for all tests.

    Traced and run without code generation, which takes a compiler and half a minute.
    """
    runs: dict[tuple[str, Any], Compiled] = {}

    def run(kind: str, mode: Any) -> Compiled:
        if (kind, mode) not in runs:
            model = load(models(kind))
            assert compile_layers(model, backend="aot_eager") == model.config.num_hidden_layers
            checkpoint_activations(model, mode)
            calls: list[int] = []
            with mock.patch.object(mtr.attention.interface, "segment_forward", _counted(calls)):
                found, kept = gradients(model)
            runs[kind, mode] = Compiled(found, kept, unique_graphs(), len(calls), model.config.num_hidden_layers)
        return runs[kind, mode]

    return run


CompiledRun = Callable[[str, Any], Compiled]


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        ("qwen3", "none"),
        ("qwen3", "selective"),
        ("qwen3", "full"),
        pytest.param("gemma3", "none", marks=pytest.mark.slow),
        pytest.param("gemma3", "selective", marks=pytest.mark.slow),
        ("gemma3", "full"),
    ],
)
def test_compiled_layers_compute_the_same(
    models: Models, compiled_run: CompiledRun, kind: str, checkpointing: Any
) -> None:
    plain, _ = gradients(load(models(kind)))
    compiled = compiled_run(kind, checkpointing)
    assert plain.keys() == compiled.gradients.keys()
    assert all(torch.allclose(plain[name], compiled.gradients[name], rtol=1e-9, atol=1e-12) for name in plain)
    assert compiled.graphs > 0


@pytest.mark.parametrize("kind", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_experts_are_compiled_as_well(models: Models, kind: str) -> None:
    """In float32, for which there are grouped products; in float64 each expert asks which tokens are its own."""
    plain, _ = gradients(_with_grouped_experts(models(kind)))
    model = _with_grouped_experts(models(kind))
    compile_layers(model, backend="aot_eager")
    compiled, _ = gradients(model)
    assert all(torch.allclose(plain[name], compiled[name], rtol=1e-4, atol=1e-5) for name in plain)
    assert unique_graphs() > 0


def _with_grouped_experts(folder: Path) -> Any:
    model = load(folder).float()
    model.set_experts_implementation("grouped_mm")
    return model


def test_layers_of_a_kind_are_compiled_once_for_all_lengths() -> None:
    """One graph for training, one without gradients; the first layer's input needs no gradient, which is one more.

    Of more layers than dynamo compiles versions of a function.
    """
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    config = Qwen3Config(num_hidden_layers=10, num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = add_lora(AutoModelForCausalLM.from_config(config), LoraSection(r=4), 0).train()
    use_tree_attention(model)
    tree_model = TreeModel(model, "segment")
    compile_layers(model, backend="eager")
    for length in (40, 7, 90, 33, 64):
        ids = np.arange(length) % 1024
        batch = build_batch(Pack((merge([View(ids[:1], ids[1:], np.ones(length - 1))]),)))
        tree_model(batch).backward()
        with torch.no_grad():
            tree_model(batch)
    assert 2 <= unique_graphs() <= 3


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_attention_of_a_compiled_layer_is_kept(compiled_run: CompiledRun, mode: Any, times: int) -> None:
    compiled = compiled_run("qwen3", mode)
    assert compiled.attention_calls == times * compiled.layers


def _counted(calls: list[int]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        calls.append(1)
        return segment_forward(*arguments)

    return run


def test_selective_keeps_less_than_none(compiled_run: CompiledRun) -> None:
    """Inside a compiled layer, where the backward's inputs are what is kept."""
    kept = {mode: compiled_run("qwen3", mode).kept for mode in ("none", "selective")}
    assert kept["selective"] < 0.8 * kept["none"], kept


def test_a_layer_that_cannot_be_compiled_runs_as_it_is(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="mtr")
    plain, kept_plain = _selective(load(models("qwen3")))
    model = load(models("qwen3"))
    compile_layers(model, may_fall_back=True, backend=_broken)
    uncompiled, kept = _selective(model)
    assert all(torch.equal(plain[name], uncompiled[name]) for name in plain)
    assert kept == kept_plain
    (record,) = caplog.records
    assert "layers run uncompiled: Qwen3DecoderLayer cannot be compiled" in record.getMessage()
    assert "no code for this" in record.getMessage()


def test_compiling_that_was_asked_for_is_refused_where_it_fails(models: Models) -> None:
    model = load(models("qwen3"))
    compile_layers(model, backend=_broken)
    with pytest.raises(UserError, match=r"training.torch_compile: Qwen3DecoderLayer cannot be compiled.*false or auto"):
        gradients(model)


def _selective(model: Any) -> Any:
    checkpoint_activations(model, "selective")
    return gradients(model)


def _broken(graph: Any, inputs: Any) -> Any:
    raise NotImplementedError("no code for this")


def test_generation_compiles_nothing(models: Models) -> None:
    model = load(models("qwen3")).eval()
    use_own_attention(model)
    ids = torch.arange(1, 9)[None]
    wanted = model.generate(ids, max_new_tokens=3, do_sample=False)
    compile_layers(model, backend="aot_eager")
    with uncompiled():
        found = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, wanted)
    assert unique_graphs() == 0


@pytest.mark.parametrize(
    ("asked", "device", "liger", "wanted"),
    [
        ("auto", CUDA, False, True),
        ("auto", CPU, False, False),
        ("auto", CUDA, True, False),
        (True, CUDA, True, True),
        (True, CPU, False, True),
        (False, CUDA, False, False),
    ],
)
def test_where_layers_are_compiled(asked: Any, device: torch.device, liger: bool, wanted: bool) -> None:
    assert wants_compiling(asked, device, liger) is wanted


def test_a_model_without_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtr.model.compiled, "decoder", lambda _: torch.nn.Sequential(torch.nn.Linear(1, 1)))
    with pytest.raises(UserError, match="no list of decoder layers"):
        compile_layers(object())
    assert compile_layers(object(), may_fall_back=True) == 0
