"""Claims: LoRA computes in the model's dtype and learns in float32; it is PEFT's, to the last bits of float64, in all
that PEFT can do with it; an input that several layers share is read once, and never taken for another one.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import load_file
from support.models import gradients, load, tiny_config
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from mtr.attention.model_parts import decoder
from mtr.model import adapter_layers
from mtr.model.adapter_layers import LoraLinear
from mtr.model.checkpointing import checkpoint_activations
from mtr.model.lora import add_lora
from mtr.recipe.sections import LoraSection, TrainingSection
from mtr.training.optim import build_optimizer

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 7}},
    "dora": {"use_dora": True},
    "dropout": {"dropout": 0.5},
    "some layers": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
}


def model_with_lora(dtype: torch.dtype, kind: str = "qwen3", **lora: Any) -> Any:
    """LoRA's B has random values, so that it changes the output."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind, vocab_size=700), dtype=dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    adapted = add_lora(model, LoraSection(**{"r": 4, "alpha": 6, **lora}), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


def as_peft(model: Any) -> Any:
    """A copy that computes as PEFT does."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if type(module) is LoraLinear:
            module.__class__ = PeftLinear
    return other


def lora_layers(model: Any) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators by name and dtype of their output."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.seen[func.overloadpacket.__name__, out.dtype] += 1
        return out

    def products(self, dtype: torch.dtype) -> int:
        return sum(self.seen[name, dtype] for name in ("mm", "addmm", "bmm"))


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_product_of_a_layer_is_in_float32(dtype: torch.dtype) -> None:
    layer = model_with_lora(dtype).base_model.model.model.layers[0].mlp
    x = torch.randn(1, 50, 32).to(dtype).requires_grad_()
    with Operators() as operators:
        torch.autograd.backward(layer(x).sum())
    assert operators.products(torch.float32) == 0
    assert operators.products(dtype) > 9
    assert operators.seen["_to_copy", torch.float32] == 5, "gradients of A (gate and up are one), and of B"


def test_what_learns_is_float32(tmp_path: Path) -> None:
    model = model_with_lora(torch.bfloat16)
    found, _ = gradients(model)
    assert len(found) == 28
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(model, TrainingSection(output_dir="run"))
    optimizer.step()
    state = [value for values in optimizer.state.values() for key, value in values.items() if key != "step"]
    assert {tensor.dtype for tensor in (*trained, *found.values(), *state)} == {torch.float32}
    model.save_pretrained(str(tmp_path))
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}


def test_a_small_update_is_kept() -> None:
    """In bfloat16, 1 + 1e-4 is 1: only float32 sums up many of them."""
    model = model_with_lora(torch.bfloat16)
    weight = lora_layers(model)[0].lora_B["default"].weight
    with torch.no_grad():
        weight.fill_(1.0)
        for _ in range(100):
            weight.add_(1e-4)
    assert weight.mean().item() == pytest.approx(1.01, rel=1e-4)


def test_half_as_much_is_kept_for_the_backward() -> None:
    model = model_with_lora(torch.bfloat16)
    _, kept = gradients(model)
    _, kept_by_peft = gradients(as_peft(model))
    assert kept < 0.75 * kept_by_peft


def test_sixteen_bits_are_as_near_to_the_truth_as_with_peft() -> None:
    model = model_with_lora(torch.bfloat16)
    exact, _ = gradients(copy.deepcopy(model).double())

    def error(model: Any) -> float:
        found, _ = gradients(model)
        return sum(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact) / len(exact)

    ours, peft = error(model), error(as_peft(model))
    assert 0 < ours < 1.5 * peft


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype: torch.dtype) -> None:
    layer = model_with_lora(dtype).base_model.model.model.layers[0].mlp
    x = torch.randn(1, 50, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, peft = layer(x), as_peft(layer)(x)
    assert ours.dtype == peft.dtype == torch.bfloat16
    assert torch.allclose(ours, peft, rtol=0.02, atol=0.02 * float(peft.abs().max()))


# --- PEFT's own -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_peft(kind: str) -> None:
    model = model_with_lora(torch.float64, **KINDS[kind])
    assert len(lora_layers(model)) == (6 if kind == "some layers" else 14)
    assert not [module for module in model.modules() if type(module) is PeftLinear]
    torch.manual_seed(0)
    ours, _ = gradients(model)
    torch.manual_seed(0)
    peft, _ = gradients(as_peft(model))
    assert ours.keys() == peft.keys()
    for name in ours:
        assert float((ours[name] - peft[name]).abs().max()) <= 1e-13 * float(peft[name].abs().max()), name


def test_peft_switches_merges_and_loads(tmp_path: Path) -> None:
    model = model_with_lora(torch.float64)
    ids = torch.arange(20)[None]
    adapted = model(ids).logits
    plain = as_peft(model).unload()(ids).logits
    assert (adapted - plain).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
    model.merge_adapter()
    assert torch.allclose(model(ids).logits, adapted, rtol=0, atol=1e-12)
    model.unmerge_adapter()
    assert torch.allclose(model(ids).logits, adapted, rtol=0, atol=1e-12)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    assert torch.equal(model(ids).logits, plain), "B of a new adapter is zero"
    model.base_model.set_adapter(["default", "other"])
    assert torch.allclose(model(ids).logits, adapted, rtol=0, atol=1e-12)


def test_experts_are_pefts_and_in_the_models_dtype() -> None:
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = model_with_lora(torch.bfloat16, "qwen3_moe", target_parameters=experts, target_modules=["q_proj"])
    assert len(lora_layers(model)) == 2
    layer = model.base_model.model.model.layers[0].mlp
    with Operators() as operators:
        layer(torch.randn(1, 50, 32, dtype=torch.bfloat16))
    assert operators.seen["baddbmm", torch.bfloat16] >= 2, "of gate and up, and of down"
    assert operators.products(torch.float32) == 0


def test_another_peft_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(adapter_layers, "_READS", ("lora_A", "renamed"))
    model = model_with_lora(torch.bfloat16)
    assert lora_layers(model) == []
    assert "this version of peft has no renamed in LoRA layers; adapters compute in float32" in caplog.text


# --- one input, several layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lora", "products"), [({}, 7 + 4 + 7), ({"dropout": 0.1}, 7 + 7 + 7)])
def test_a_shared_input_is_read_once(lora: dict[str, Any], products: int) -> None:
    """7 products with weights; 4 with A: of q, k and v, of o, of gate and up, of down; 7 with B."""
    model = model_with_lora(torch.float64, **lora)
    model.eval()
    with torch.no_grad(), Operators() as operators:
        model(torch.arange(20)[None])
    assert operators.seen["mm", torch.float64] == 2 * products + 1, "two layers and the head"


ORDERS = [*itertools.permutations(("q_proj", "k_proj", "v_proj")), ("q_proj", "q_proj", "v_proj"), ("k_proj",)]


@pytest.mark.parametrize("order", ORDERS)
def test_layers_may_be_called_in_any_order(order: tuple[str, ...]) -> None:
    attention = model_with_lora(torch.float64).base_model.model.model.layers[0].self_attn
    peft = as_peft(attention)
    for _ in range(2):
        x = torch.randn(1, 9, 32, dtype=torch.float64)
        for name in order:
            assert torch.allclose(getattr(attention, name)(x), getattr(peft, name)(x), rtol=0, atol=1e-13)


def test_another_input_is_never_taken_for_the_first() -> None:
    layers = model_with_lora(torch.float64).base_model.model.model.layers
    first, second = layers[0].self_attn, layers[1].self_attn
    peft = as_peft(first)
    x, y = torch.randn(2, 1, 9, 32, dtype=torch.float64).unbind()
    wanted = as_peft(second).k_proj(x)
    first.q_proj(x)
    assert torch.allclose(second.k_proj(x), wanted, rtol=0, atol=1e-13)
    for name, given in (("k_proj", y), ("v_proj", x), ("q_proj", y), ("k_proj", x.clone()), ("v_proj", y)):
        found, wanted = getattr(first, name)(given), getattr(peft, name)(given)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-13), name


@pytest.mark.parametrize("failing", [None, "k_proj", "up_proj"])
def test_no_input_outlives_its_use(failing: str | None) -> None:
    """A pack that does not fit in memory ends anywhere: its graph must not be kept by what the layers share."""
    model = model_with_lora(torch.float64)
    inputs: list[weakref.ref[Tensor]] = []

    def read(layer: Any, given: tuple[Tensor, ...]) -> None:
        inputs.append(weakref.ref(given[0]))

    def fail(layer: Any, given: tuple[Tensor, ...]) -> None:
        raise torch.OutOfMemoryError

    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            module.register_forward_pre_hook(fail if failing and name.endswith(failing) else read)
    with contextlib.nullcontext() if failing is None else pytest.raises(torch.OutOfMemoryError):
        model(torch.arange(20)[None])
    gc.collect()
    assert len(inputs) == {None: 14, "k_proj": 1, "up_proj": 5}[failing]
    assert not any(given() is not None for given in inputs)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_computes_the_same(mode: Any) -> None:
    model = model_with_lora(torch.bfloat16)
    kept_all, most = gradients(model)
    checkpoint_activations(model, mode)
    recomputed, kept = gradients(model)
    assert kept < most
    assert all(torch.equal(recomputed[name], kept_all[name]) for name in kept_all)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch looks, where an input is no leaf
def test_all_layers_are_one_graph() -> None:
    model = model_with_lora(torch.float64)
    counter = CompileCounter()
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    place = decoder(model).rotary_emb(x, torch.arange(20)[None])

    def through(layers: Any) -> Tensor:
        y = x.clone().requires_grad_()
        out = y
        for layer in layers:
            out = layer(out, position_embeddings=place)
        torch.autograd.backward(out.square().sum())
        assert y.grad is not None
        return y.grad

    wanted = through(copy.deepcopy(decoder(model).layers))
    torch.compiler.reset()
    for layer in decoder(model).layers:
        layer.forward = torch.compile(layer.forward, backend=counter, fullgraph=True)
    assert torch.equal(through(decoder(model).layers), wanted)
    assert counter.frame_count == 1


def test_a_model_with_adapters_has_its_own_eager_attention(models: Callable[..., Path]) -> None:
    """It is looked up in the Python module of the attention layer's class."""
    plain, _ = gradients(_with_lora(models("qwen3")), "sdpa")
    eager, _ = gradients(_with_lora(models("qwen3")), "eager")
    assert plain.keys() == eager.keys()
    worst = max(float((plain[name] - eager[name]).abs().max() / plain[name].abs().max().clamp(1e-9)) for name in plain)
    assert worst < 1e-5, "the model's softmax is in float32"


def _with_lora(folder: Path) -> Any:
    return add_lora(load(folder), LoraSection(r=4), 0)
