"""Claims: compiled layers compute the same, and a kind of layer is compiled once however many there are; what Liger
cannot do is refused with the way out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.models import gradients, load

import mtr.model.kernels
from mtr.errors import UserError
from mtr.model.kernels import compile_layers, use_liger_kernel
from mtr.model.memory import checkpoint_activations

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's tracing
Models = Callable[..., Path]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt_oss"])
def test_compiled_layers_compute_the_same(models: Models, kind: str, checkpointing: Any) -> None:
    """Traced and run without code generation, which takes a compiler and half a minute."""
    torch.compiler.reset()
    plain, _ = gradients(load(models(kind)))
    model = load(models(kind))
    checkpoint_activations(model, checkpointing)
    assert compile_layers(model, backend="aot_eager") == model.config.num_hidden_layers
    compiled, _ = gradients(model)
    assert plain.keys() == compiled.keys()
    assert all(torch.allclose(plain[name], compiled[name], rtol=1e-9, atol=1e-12) for name in plain)


def test_layers_of_a_kind_are_compiled_once() -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    graphs = []
    for layers in (2, 10):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        config = Qwen3Config(num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, **sizes)
        model = AutoModelForCausalLM.from_config(config)
        compile_layers(model, backend="eager")
        gradients(model)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_a_model_without_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtr.model.kernels, "decoder", lambda _: torch.nn.Sequential(torch.nn.Linear(1, 1)))
    with pytest.raises(UserError, match="no list of decoder layers"):
        compile_layers(object())


def test_liger_is_refused_where_it_cannot_be(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(models("qwen3"))
    with pytest.raises(UserError, match="need CUDA and this is cpu"):
        use_liger_kernel(model, CPU)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        use_liger_kernel(model, CUDA)
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no kernels for qwen3"):
        use_liger_kernel(model, CUDA)
