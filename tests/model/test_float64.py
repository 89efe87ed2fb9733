"""Claims: within `keep_float64` a model whose weights are float64 computes in float64 throughout, in layers that
checkpointing runs again in the backward, too; outside, nothing has changed.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.families.catalogue import config_of
from support.families.evidence import gather
from torch import Tensor, nn

from mtr.model.checkpointing import checkpoint_activations
from mtr.model.float64 import keep_float64
from mtr.model.probe import small_model
from mtr.model.shrink import shrink
from mtr.recipe.sections import Checkpointing

HALF = torch.ones(2, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.to(device="cpu", dtype=torch.float32),
        lambda x: x.type(torch.float32),
        lambda x: x.softmax(-1, dtype=torch.float32),
        lambda x: nn.functional.softmax(x, dim=-1, dtype=torch.float32),
        lambda x: x.sum(dtype=torch.float32),
        lambda x: torch.zeros(2, dtype=torch.float32),
        lambda x: torch.arange(0, 4, 2, dtype=torch.float32),
        lambda x: torch.full_like(x, 2.0, dtype=torch.float32),
        lambda x: x.new_zeros(2, dtype=torch.float32),
    ],
)
def test_what_asks_for_float32_is_float64(make: Any) -> None:
    third = torch.full((2,), 1 / 3, dtype=torch.float64)
    assert make(third).dtype == torch.float32
    with keep_float64():
        assert make(third).dtype == torch.float64
    assert make(third).dtype == torch.float32


def test_other_dtypes_stay() -> None:
    with keep_float64():
        assert HALF.to(torch.float16).dtype == torch.float16
        assert torch.zeros(1, dtype=torch.int64).dtype == torch.int64
        assert HALF.long().dtype == torch.int64


class Seen(nn.Module):
    """Where a model casts: the dtypes that it then computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        self.dtypes.append(x.dtype)
        return x


def trained(mode: Checkpointing, inside: bool = True) -> tuple[Any, Seen, dict[str, Tensor]]:
    """A model with gradients; `Seen` runs in each of its layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_model(shrink(config_of("qwen3_5_text")))
    seen = Seen()
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, arguments: (seen(arguments[0]).double(),))
    checkpoint_activations(model.train(), mode)
    with keep_float64() if inside else nullcontext():
        loss = model(input_ids=torch.arange(40)[None], use_cache=False).logits.square().mean()
        loss.backward()
    return model, seen, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["full", "products"])
def test_layers_that_run_again_are_float64(mode: Checkpointing) -> None:
    model, seen, gradients = trained(mode)
    assert len(seen.dtypes) > len(model.model.layers), "they have run again"
    assert set(seen.dtypes) == {torch.float64}
    _, once, expected = trained("none")
    assert len(once.dtypes) == len(model.model.layers)
    assert max(float((gradients[name] - expected[name]).abs().max()) for name in expected) < 1e-12


def test_without_it_they_are_not() -> None:
    _, seen, _ = trained("full", inside=False)
    assert set(seen.dtypes) == {torch.float32}


def test_everything_is_put_back() -> None:
    model, _, _ = trained("full")
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]
    with keep_float64():
        model(input_ids=torch.arange(40)[None], use_cache=False)
        assert all(layer._gradient_checkpointing_func not in functions for layer in model.model.layers)
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == functions
    with pytest.raises(KeyError), keep_float64():
        raise KeyError
    assert not torch._C._len_torch_function_stack()
    assert HALF.float().dtype == torch.float32
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_without_it_a_hybrid_is_not_shown_to_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recurrence and norms are computed in float32, and two exact ways differ by that."""
    config = config_of("qwen3_5_text")
    assert gather(config, cases=("none",)).differences["none"].worst < 1e-12
    monkeypatch.setattr("support.families.evidence.keep_float64", nullcontext)
    found = gather(config, cases=("none",))
    assert 1e-9 < found.differences["none"].worst < 1e-2
    assert found.problem is not None
