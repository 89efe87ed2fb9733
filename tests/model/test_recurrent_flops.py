"""Claims: a recurrent layer's FLOPs are what a hand count gives, and what torch's own counter sees of the recurrence
written out token by token; the rest of a hybrid is counted as in any model; layers without attention have no pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import tiny_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from mtr.attention.interface import use_own_attention
from mtr.attention.model_parts import decoder
from mtr.model.flops import FlopCounter, cost_of
from mtr.model.layer_kinds import attends, layer_kinds
from mtr.model.recurrent_flops import STATES, recurrence_flops
from mtr.recurrence.kinds import KINDS
from mtr.tree.mask import FULL, Span

TOKENS = 5


def model_of(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind, **changes))


def mixers(model: Any) -> list[Any]:
    return [module for module in decoder(model).modules() if recurrence_flops(module) is not None]


# --- the recurrence ---------------------------------------------------------------------------------------------------


def gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """[H, T, K], [H, T, K], [H, T, V], [H, T], [H, T], [H, K, V] -> [H, T, V], token by token."""
    outs = []
    for t in range(query.shape[1]):
        state = state * decay[:, t, None, None].exp()
        correction = (value[:, t, None] - key[:, t, None] @ state) * beta[:, t, None, None]
        state = torch.baddbmm(state, key[:, t, :, None], correction)
        outs.append(query[:, t, None] @ state)
    return torch.cat(outs, 1)


def state_space(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    outs = []
    for t in range(query.shape[1]):
        state = torch.baddbmm(state * decay[:, t, None, None].exp(), key[:, t, :, None], value[:, t, None])
        outs.append(query[:, t, None] @ state)
    return torch.cat(outs, 1)


def seen_by_torch(run: Callable[..., Tensor], *inputs: Tensor) -> int:
    counted = FlopCounterMode(display=False)
    with counted:
        torch.autograd.backward(run(*(x.requires_grad_() for x in inputs)).sum())
    return counted.get_total_flops()


def test_the_delta_rule_is_counted_as_torch_counts_it() -> None:
    mixer = mixers(model_of("qwen3_5"))[0]
    heads, key, value = mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim
    assert key != value
    counted = recurrence_flops(mixer) or 0.0
    assert counted == 3.0 * 3 * 2 * heads * key * value  # forward and two gradients of three products
    queries, keys = torch.randn(2, heads, TOKENS, key)
    given = (queries, keys, torch.randn(heads, TOKENS, value), *-torch.rand(2, heads, TOKENS))
    assert seen_by_torch(gated_delta_rule, *given, torch.zeros(heads, key, value)) == counted * TOKENS


def test_a_state_space_is_counted_as_torch_counts_it() -> None:
    mixer = mixers(model_of("bamba"))[0]
    heads, size, states = mixer.num_heads, mixer.head_dim, mixer.ssm_state_size
    counted = recurrence_flops(mixer) or 0.0
    assert counted == 3 * 2 * 2 * heads * size * states
    queries, keys = torch.randn(2, heads, TOKENS, states)
    given = (queries, keys, torch.randn(heads, TOKENS, size), -torch.rand(heads, TOKENS))
    assert seen_by_torch(state_space, *given, torch.zeros(heads, states, size)) == counted * TOKENS


def test_the_delta_rule_written_out_is_that_of_transformers() -> None:
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    queries, keys, values = torch.randn(3, 4, TOKENS, 8)
    decay, beta = -torch.rand(4, TOKENS), torch.rand(4, TOKENS)
    by_token = (x.transpose(0, 1)[None] for x in (queries, keys, values, decay, beta))
    wanted = torch_chunk_gated_delta_rule(*by_token)[0][0].transpose(0, 1)
    found = gated_delta_rule(queries * 8**-0.5, keys, values, decay, beta, torch.zeros(4, 8, 8))
    torch.testing.assert_close(found, wanted)


def test_every_kind_of_mixer_is_counted() -> None:
    assert {kind.name for kind in KINDS} == set(STATES)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("kimi_linear", 18 * 3 * 8 * 8),  # three heads of 8 x 8
        ("minimax", 12 * 4 * 16 * 16),
        ("falcon_mamba", 12 * 96 * 6),  # a state of 6 for each of 2 * 48 channels
        ("jamba", 12 * 96 * 6),
        ("recurrent_gemma", 0),
        ("lfm2", 0),
    ],
)
def test_other_kinds_by_hand(kind: str, flops: int) -> None:
    assert {recurrence_flops(mixer) for mixer in mixers(model_of(kind))} == {flops}


def test_sizes_that_are_not_known_are_not_guessed() -> None:
    model = model_of("qwen3_5")
    del mixers(model)[0].head_k_dim
    assert math.isnan(FlopCounter(model).recurrence_per_token)


def test_a_mixer_of_no_known_kind_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen3_5")
    monkeypatch.setattr("mtr.model.recurrent_flops.KINDS", [kind for kind in KINDS if kind.name != "Gated DeltaNet"])
    assert math.isnan(FlopCounter(model).recurrence_per_token)
    assert FlopCounter(model_of("llama")).recurrence_per_token == 0


# --- the model around it ----------------------------------------------------------------------------------------------


def test_a_hybrid_by_hand() -> None:
    model = model_of("qwen3_5").requires_grad_(False)
    counter, config = FlopCounter(model), model.config
    found = mixers(model)
    linear = [part for part in decoder(model).modules() if isinstance(part, nn.Linear)]
    convolutions = sum(mixer.conv_dim * mixer.conv_kernel_size for mixer in found)
    assert len(found) == config.layer_types.count("linear_attention") > 1
    assert counter.per_token == 4 * (sum(part.weight.numel() for part in linear) + convolutions)
    assert counter.recurrence_per_token == sum(18 * m.num_v_heads * m.head_k_dim * m.head_v_dim for m in found)
    attending = config.layer_types.count("full_attention")
    assert counter.per_pair == {FULL: attending * 12 * config.num_attention_heads * config.head_dim}
    done = counter.count(7, 3, {FULL: 22})
    assert done.recurrence == 7 * counter.recurrence_per_token
    assert done.total == done.linear + done.attention + done.recurrence + done.head


WITHOUT_SCANS = (
    "qwen3_5",
    "qwen3_next",
    "olmo_hybrid",
    "bamba",
    "mamba2",
    "falcon_h1",
    "nemotron_h",
    "zamba2",
    "lfm2",
    "kimi_linear",
    "recurrent_gemma",
)


@pytest.mark.parametrize("kind", WITHOUT_SCANS)
def test_torch_counts_the_same_around_the_recurrence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention computes all T x T pairs and the head every token; a scan is replaced by a sum of its inputs."""
    model = model_of(kind, attn_implementation="eager")
    leave_scans_out(model, monkeypatch)
    model.set_experts_implementation("eager")
    use_own_attention(model)
    model.set_attn_implementation("eager")
    counted = FlopCounterMode(display=False)
    with counted:
        model(input_ids=torch.arange(12)[None], use_cache=False).logits.sum().backward()
    by_module = counted.get_flop_counts()
    rotary = sum(sum(flops.values()) for name, flops in by_module.items() if name.endswith("rotary_emb"))
    convolved = sum(flops for operator, flops in by_module["Global"].items() if "convolution" in str(operator))
    counter = FlopCounter(model)
    done = counter.count(12, 12, dict.fromkeys(counter.per_pair, 12 * 12))
    weights = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Conv1d))
    # torch takes a depthwise convolution's gradient for one of all pairs of channels
    wanted = counted.get_total_flops() - rotary - convolved
    assert done.total - done.recurrence - 6 * 12 * weights == wanted


def leave_scans_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurrence becomes its first input that has the output's shape, plus nothing of the others."""
    import sys

    def touched(like: Tensor, *others: Any) -> Tensor:
        return like + sum(0 * x.sum() for x in others if isinstance(x, Tensor))

    for module in {sys.modules[type(mixer).__module__] for mixer in mixers(model)}:
        for name in ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda q, k, v, *a, g, beta, **o: (touched(v, q, k, g, beta), None))
        if hasattr(module, "mamba2_chunk_scan"):
            monkeypatch.setattr(module, "mamba2_chunk_scan", lambda x, *a, **o: touched(x, *a, *o.values()))
            monkeypatch.setattr(module, "mamba2_split_conv1d_scan_combined", lambda *a, **o: None)


@pytest.mark.parametrize(
    ("kind", "layers"), [("qwen3_5", 1), ("falcon_h1", 3), ("mamba2", 0), ("nemotron_h", 1), ("lfm2", 1)]
)
def test_only_layers_with_attention_have_pairs(kind: str, layers: int) -> None:
    config = tiny_config(kind)
    assert sum(map(attends, layer_kinds(config))) == layers
    shares = sum(share for _, share in cost_of(config, trained_whole=False).spans)
    assert shares == pytest.approx(layers / config.num_hidden_layers)
    assert (cost_of(config, trained_whole=False).pair > 0) == (layers > 0)


def test_layers_of_a_model_without_a_list_all_attend() -> None:
    config = tiny_config("llama")
    assert layer_kinds(config) == ["full_attention"] * config.num_hidden_layers
    assert cost_of(tiny_config("gemma3"), trained_whole=True).spans == ((24, 2 / 3), (None, 1 / 3))
    assert Span("sliding", 24) in FlopCounter(model_of("gemma3")).per_pair
