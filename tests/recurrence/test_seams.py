"""Claims: what a release of transformers has moved is refused by name before anything is computed; models are switched
once, however often it is asked for; without a tree they compute what they did before, bit for bit, generation included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from support.hybrids import HYBRIDS
from support.models import tiny_config
from torch import Tensor, nn

from mtr.attention.interface import use_own_attention
from mtr.attention.model_parts import decoder
from mtr.errors import UserError
from mtr.model.tree_model import use_tree
from mtr.recurrence.kinds import KINDS, follow_tree
from mtr.recurrence.seams import follows_tree

# --- a release of another shape ---------------------------------------------------------------------------------------


def causal_conv1d_fn(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    return hidden_states


def torch_chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    return value, None


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A modelling module with a mixer of Gated DeltaNet."""
    module = ModuleType("modeling_of_another_release")
    vars(module).update(
        causal_conv1d_fn=causal_conv1d_fn,
        torch_chunk_gated_delta_rule=torch_chunk_gated_delta_rule,
        NewGatedDeltaNet=type("NewGatedDeltaNet", (nn.Module,), {"__module__": module.__name__}),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def model_of(release: Any) -> nn.Module:
    mixer: nn.Module = release.NewGatedDeltaNet()
    return nn.Sequential(nn.Linear(1, 1), mixer)


def test_a_module_of_the_known_shape_is_followed(release: Any) -> None:
    model = model_of(release)
    assert not any(follows_tree(module) for module in model.modules())
    follow_tree(model)
    assert [follows_tree(module) for module in model.children()] == [False, True]
    assert release.causal_conv1d_fn is not causal_conv1d_fn
    assert release.torch_chunk_gated_delta_rule is not torch_chunk_gated_delta_rule


def renamed(release: Any) -> None:
    release.chunk_delta_rule = release.torch_chunk_gated_delta_rule
    del release.torch_chunk_gated_delta_rule


def other_parameters(release: Any) -> None:
    def torch_chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None: ...

    release.torch_chunk_gated_delta_rule = torch_chunk_gated_delta_rule


def no_function(release: Any) -> None:
    release.torch_chunk_gated_delta_rule = None


@pytest.mark.parametrize("move", [renamed, other_parameters, no_function])
def test_what_has_moved_is_refused(release: Any, move: Callable[[Any], None]) -> None:
    move(release)
    with pytest.raises(UserError) as refused:
        follow_tree(model_of(release))
    said = str(refused.value)
    assert said.startswith(f"NewGatedDeltaNet of transformers {transformers.__version__} does not call torch_chunk_gat")
    assert "(Gated DeltaNet) of modeling_of_another_release" in said
    assert said.endswith("use another version of transformers, or set sequence.strategy to per_turn")
    assert release.causal_conv1d_fn is causal_conv1d_fn, "half of it is switched"


def test_what_has_moved_in_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("qwen3_next"))
    monkeypatch.delattr("transformers.models.qwen3_next.modeling_qwen3_next.torch_chunk_gated_delta_rule")
    with pytest.raises(UserError, match=r"^Qwen3NextGatedDeltaNet of transformers 5.* does not call torch_chunk_gated"):
        use_tree(model)


# --- switched once, and only with a tree ------------------------------------------------------------------------------

QUICK = ["qwen3_next", "bamba", "lfm2", "minimax", "falcon_mamba", "recurrent_gemma"]
FAMILIES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in HYBRIDS]


def seams_of(model: Any) -> dict[str, Any]:
    """Functions and forwards that may be switched, by name."""
    found: dict[str, Any] = {"decoder": type(decoder(model)).forward}
    endings = tuple(ending for kind in KINDS for ending in kind.mixers)
    for mixer in {type(module) for module in model.modules() if type(module).__name__.endswith(endings)}:
        found[mixer.__name__] = mixer.forward
        for kind in KINDS:
            names = [seam.name for seam in kind.seams]
            found |= {name: f for name in names if (f := getattr(sys.modules[mixer.__module__], name, None))}
    return found


@pytest.mark.usefixtures("unswitched")
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_tree_nothing_changes(family: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    before, as_imported = everything(model), seams_of(model)
    use_tree(model)
    once = seams_of(model)
    use_tree(model)
    assert seams_of(model) == once
    assert once != as_imported
    after = everything(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def everything(model: Any) -> dict[str, Tensor]:
    """Logits and gradients of two rows, one with padding on its left, and what is generated after them."""
    use_own_attention(model)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    model.zero_grad(set_to_none=True)
    out = model(input_ids=ids, attention_mask=mask, use_cache=False)
    out.logits.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return {**found, "logits": out.logits.detach(), "generated": generated}
