"""Claims: a fused kernel of Mamba that takes a projection's weight is not called where it has an adapter, so that the
adapter has an effect and a gradient; without adapters it is called; all-linear leaves out what no adapter can train,
which is refused where it is asked for.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.models import tiny_config
from torch import Tensor

from mtr.errors import UserError
from mtr.model.fused import keep_adapters_in_use
from mtr.model.lora import add_lora
from mtr.model.tree_model import use_tree
from mtr.recipe.sections import LoraSection


def fused(projected: Tensor, *_: Any, outproj_weight: Tensor, **__: Any) -> Tensor:
    """In the place of a CUDA kernel: some output by the weight that it is handed, which is the base layer's."""
    return F.linear(projected[..., : outproj_weight.shape[1]], outproj_weight)


def bare(kind: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(tiny_config(kind))


def module_of(model: Any) -> Any:
    return sys.modules[type(model).__module__]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Bamba as on CUDA with mamba_ssm installed."""
    made = bare("bamba")
    monkeypatch.setattr(module_of(made), "mamba2_split_conv1d_scan_combined", fused)
    return made.train()


def gradients(model: Any) -> dict[str, float]:
    """The largest of each adapter of out_proj, with B no longer zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model(input_ids=torch.arange(20)[None], use_cache=False).logits.logsumexp(-1).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if ".out_proj.lora_" in name}
    return {name: 0.0 if grad is None else float(grad.abs().max()) for name, grad in found.items()}


LORA = LoraSection(r=2, alpha=4, target_modules=["in_proj", "out_proj"])


def test_an_adapter_of_out_proj_is_trained(model: Any) -> None:
    found = gradients(add_lora(model, LORA, 0))
    assert len(found) == 6
    assert min(found.values()) > 0


def test_the_kernel_would_pass_it_by(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtr.model.lora.keep_adapters_in_use", lambda _: [])
    assert set(gradients(add_lora(model, LORA, 0)).values()) == {0.0}


def test_the_order_of_switches_does_not_matter(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(model)
    monkeypatch.setattr(module, "causal_conv1d_fn", module.causal_conv1d_fn)
    monkeypatch.setattr(module, "mamba2_chunk_scan", module.mamba2_chunk_scan)
    use_tree(model)
    switched = module.mamba2_split_conv1d_scan_combined
    adapted = add_lora(model, LORA, 0)
    use_tree(adapted)
    assert module.mamba2_split_conv1d_scan_combined.mtr_original is switched.mtr_original, "switched a second time"
    assert module.mamba2_split_conv1d_scan_combined() is None


def test_without_an_adapter_of_a_mixer_the_kernel_stays(model: Any) -> None:
    add_lora(model, LoraSection(r=2, alpha=4, target_modules=["gate_proj"]), 0)
    assert module_of(model).mamba2_split_conv1d_scan_combined is not fused, "all of a file's layers do without"
    other = bare("llama")
    add_lora(other, LoraSection(r=2, alpha=4), 0)
    assert keep_adapters_in_use(other) == []


def test_other_releases_have_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bare("llama")
    monkeypatch.setattr(module_of(model), "is_fast_path_available", True, raising=False)
    adapted = add_lora(model, LoraSection(r=2, alpha=4), 0)
    assert module_of(model).is_fast_path_available is False
    assert keep_adapters_in_use(adapted) == [module_of(model).__name__]


# --- what no adapter can train ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("falcon_mamba", {"dt_proj", "out_proj"}),
        ("jamba", {"dt_proj"}),
        ("nemotron_h", {"out_proj"}),
        ("bamba", set()),
    ],
)
def test_all_linear_is_what_can_be_trained(kind: str, left_out: set[str]) -> None:
    model = bare(kind)
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    adapted = add_lora(model, LoraSection(r=2, alpha=4), 0)
    names = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    assert linear - names == {*left_out, "lm_head"}
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted(input_ids=torch.arange(60)[None], use_cache=False).logits.logsumexp(-1).sum().backward()
    trained = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert [name for name, grad in trained.items() if grad is None or not grad.abs().max()] == []


def test_a_projection_that_is_never_called_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"lora.target_modules: \S+\.dt_proj cannot be trained by an adapter, .* leave it"
    ):
        add_lora(bare("jamba"), LoraSection(r=2, alpha=4, target_modules=["dt_proj", "q_proj"]), 0)
