"""Claims: the chunked loss and its gradients are those of plain cross-entropy, whatever the chunk, and no more logits
than one chunk's are made at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.paths import ROOT
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtr.model.loss import chunk_size, weighted_nll
from mtr.model.tree_model import OutputHead

N, SIZE, VOCABULARY = 23, 6, 11
CHUNKS = [1, 5, 8, 23, 100]


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    """Hidden states, head with bias, targets, weights."""
    torch.manual_seed(0)
    hidden = torch.randn(N, SIZE, dtype=dtype, requires_grad=True)
    head = nn.Linear(SIZE, VOCABULARY, dtype=dtype)
    return hidden, head, torch.randint(VOCABULARY, (N,)), torch.rand(N, dtype=torch.float64) + 0.1


def capped(linear: nn.Linear, **config: Any) -> OutputHead:
    text = SimpleNamespace(model_type="any", vocab_size=VOCABULARY, **config)
    return OutputHead(SimpleNamespace(config=text, get_output_embeddings=lambda: linear))


HEADS: dict[str, Callable[[nn.Linear], Callable[[Tensor], Tensor]]] = {
    "plain": lambda linear: linear,
    "soft cap": lambda linear: capped(linear, final_logit_softcapping=0.7),
    "soft cap by another name": lambda linear: capped(linear, logits_soft_cap=0.7),
    "scale": lambda linear: capped(linear, logit_scale=0.25),
    "scaling": lambda linear: capped(linear, logits_scaling=8.0),
    "scale and soft cap": lambda linear: capped(linear, logit_scale=3.0, final_logit_softcapping=2.0),
}
LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "soft cap": lambda x: 0.7 * torch.tanh(x / 0.7),
    "soft cap by another name": lambda x: 0.7 * torch.tanh(x / 0.7),
    "scale": lambda x: x / 4,
    "scaling": lambda x: x / 8,
    "scale and soft cap": lambda x: 2 * torch.tanh(3 * x / 2),
}


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss * 0.37, leaves))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", HEADS)
def test_equals_plain_cross_entropy(name: str, chunk: int) -> None:
    hidden, linear, target, weight = problem()
    leaves = [hidden, linear.weight, linear.bias]
    logits = LOGITS[name](linear(hidden))
    plain = (cross_entropy(logits, target, reduction="none") * weight).sum()
    ours = weighted_nll(hidden, HEADS[name](linear), list(linear.parameters()), target, weight, chunk)
    torch.testing.assert_close(ours, plain, rtol=1e-13, atol=0)
    for one, other in zip(gradients(ours, *leaves), gradients(plain, *leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hidden_states_in_float32_before_a_narrower_head(dtype: torch.dtype) -> None:
    """As state space models end, which add up in float32; their gradient is in float32 again."""
    hidden, linear, target, weight = problem(torch.float32)
    linear = linear.to(dtype)
    logits = capped(linear)(hidden)
    torch.testing.assert_close(logits, linear(hidden.to(dtype)), rtol=0, atol=0)
    loss = weighted_nll(hidden, capped(linear), list(linear.parameters()), target, weight, N)
    assert [grad.dtype for grad in gradients(loss, hidden, linear.weight)] == [torch.float32, dtype]
    with torch.autocast("cpu", torch.bfloat16):
        assert capped(linear)(hidden).dtype == torch.bfloat16


def test_frozen_head_gets_no_gradient() -> None:
    hidden, head, target, weight = problem()
    head.requires_grad_(False)
    torch.autograd.backward(weighted_nll(hidden, head, [], target, weight, 5))
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_gradient_accumulates_and_flows_on() -> None:
    """Twice the loss of a hidden state that is itself computed is twice the gradient of its parameter."""
    hidden, head, target, weight = problem()
    below = nn.Linear(SIZE, SIZE, dtype=torch.float64)
    parameters = list(head.parameters())
    grads = []
    for times in (1, 2):
        head.zero_grad()
        below.zero_grad()
        for _ in range(times):
            torch.autograd.backward(weighted_nll(below(hidden), head, parameters, target, weight, 5))
        assert below.weight.grad is not None
        assert head.weight.grad is not None
        grads.append((below.weight.grad.clone(), head.weight.grad.clone()))
    torch.testing.assert_close([2 * x for x in grads[0]], list(grads[1]))


def test_without_gradients() -> None:
    hidden, head, target, weight = problem()
    expected = weighted_nll(hidden, head, list(head.parameters()), target, weight, 5).detach()
    with torch.no_grad():
        loss = weighted_nll(hidden, head, list(head.parameters()), target, weight, 5)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_no_target(grad: bool) -> None:
    _, head, target, weight = problem()
    hidden = torch.zeros(0, SIZE, dtype=torch.float64, requires_grad=True)
    with torch.set_grad_enabled(grad):
        loss = weighted_nll(hidden, head, list(head.parameters()), target[:0], weight[:0], 4)
    assert loss.item() == 0
    assert loss.shape == ()
    if grad:
        torch.autograd.backward(loss)
        assert head.weight.grad is not None
        assert not head.weight.grad.any()


def test_no_more_logits_than_a_chunk() -> None:
    hidden, head, target, weight = problem()
    shapes: list[tuple[int, ...]] = []
    head.register_forward_hook(lambda module, given, logits: shapes.append(tuple(logits.shape)))
    loss = weighted_nll(hidden, head, list(head.parameters()), target, weight, 5)
    torch.autograd.backward(loss)
    assert shapes == [(5, VOCABULARY)] * 4 + [(3, VOCABULARY)], "each logit once, in the forward"


def test_logits_are_dropped_before_the_next_chunk() -> None:
    import weakref

    hidden, head, target, weight = problem()
    alive: list[weakref.ref[Tensor]] = []

    def watch(module: nn.Module, given: Any, logits: Tensor) -> None:
        assert all(one() is None for one in alive), "the logits of an earlier chunk are still held"
        alive.append(weakref.ref(logits))

    head.register_forward_hook(watch)
    loss = weighted_nll(hidden, head, list(head.parameters()), target, weight, 5)
    assert len(alive) == 5
    assert all(one() is None for one in alive)
    torch.autograd.backward(loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    hidden, head, target, weight = problem()
    low_hidden, low_head = hidden.detach().to(dtype).requires_grad_(), nn.Linear(SIZE, VOCABULARY, dtype=dtype)
    low_head.load_state_dict(head.state_dict())
    loss = weighted_nll(low_hidden, low_head, list(low_head.parameters()), target, weight, 5)
    exact = (cross_entropy(low_head(low_hidden).float(), target, reduction="none") * weight.float()).sum()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(loss, [low_hidden])
    assert grad.dtype == dtype


def test_shifted_targets_are_seen() -> None:
    hidden, head, target, weight = problem()
    right = weighted_nll(hidden, head, [], target, weight, 5)
    wrong = weighted_nll(hidden, head, [], target.roll(1), weight, 5)
    assert abs(float((right - wrong).detach())) > 1e-2 * float(right.detach())


def test_weights_matter() -> None:
    hidden, head, target, weight = problem()
    halved = weight.clone()
    halved[7] /= 2
    with torch.no_grad():
        loss = weighted_nll(hidden, head, [], target, weight, 5)
        other = weighted_nll(hidden, head, [], target, halved, 5)
        own = cross_entropy(head(hidden[7:8]), target[7:8]) * halved[7]
    torch.testing.assert_close(loss - other, own)


def test_chunk_size_bounds_the_logits() -> None:
    for vocabulary in (100, 32_000, 151_936, 262_144, 2**21):
        assert 128 <= chunk_size(vocabulary) <= 4096
        assert chunk_size(vocabulary) % 128 == 0, "whole tiles of a matmul"
        assert chunk_size(vocabulary) * vocabulary <= max(2**26 + 64 * vocabulary, 128 * vocabulary)


def test_a_large_loss_moves_few_bytes() -> None:
    """Per logit beyond the products, in bfloat16: a pass to log p in float32 and one back to the logits' dtype."""
    hidden, head, target, weight = problem(torch.bfloat16)
    counted = Elementwise()
    with counted:
        torch.autograd.backward(weighted_nll(hidden, head.requires_grad_(False), [], target, weight, 8))
    assert counted.passes == {"_to_copy": 6, "_log_softmax": 8, "exp": 6}, "bytes per logit, read and written"


class Elementwise(TorchDispatchMode):
    """Bytes per logit that each operator over all logits reads and writes, products and look-ups of targets aside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.passes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        of_logits = [
            x for x in tree_leaves((args, out)) if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == VOCABULARY
        ]
        if of_logits and not func.is_view and name not in UNCOUNTED:
            self.passes[name] = sum(x.element_size() for x in of_logits)
        return out


UNCOUNTED = {"addmm", "mm", "t", "detach", "empty_like", "gather", "scatter_"}


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_weights_scale_the_gradients_of_low_precision(trained: bool) -> None:
    """As those of the loss in float32, to what bfloat16 tells apart, whichever side the weights are applied on."""
    hidden, head, target, weight = problem()
    low = nn.Linear(SIZE, VOCABULARY, dtype=torch.bfloat16)
    low.load_state_dict(head.state_dict())
    given = hidden.detach().bfloat16().requires_grad_()
    wide = nn.Linear(SIZE, VOCABULARY, dtype=torch.float32)
    wide.load_state_dict(low.state_dict())
    parameters = list(low.requires_grad_(trained).parameters()) if trained else []
    loss = weighted_nll(given, low, parameters, target, weight, 5)
    exact = given.detach().float().requires_grad_()
    plain = (cross_entropy(wide(exact), target, reduction="none") * weight.float()).sum()
    leaves, others = [given, *parameters], [exact, *(wide.parameters() if trained else [])]
    for one, other in zip(gradients(loss, *leaves), gradients(plain, *others), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=3e-2, atol=3e-2 * float(other.abs().max()))


def test_a_sure_target_keeps_its_small_gradient() -> None:
    """Of a target with p = 0.999: in bfloat16, p - 1 taken from p would be 0 or 4 times too large."""
    logits = torch.tensor([[8.0, 1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = weighted_nll(logits, lambda x: x * 1, [], torch.tensor([0]), torch.ones(1, dtype=torch.float64), 1)
    (grad,) = torch.autograd.grad(loss, [logits])
    exact = logits.detach().double().softmax(-1) - torch.tensor([[1.0, 0.0, 0.0]])
    torch.testing.assert_close(grad.double(), exact, rtol=2**-8, atol=0)


@pytest.mark.slow
def test_the_loss_of_a_large_vocabulary_takes_a_tenth_of_its_logits() -> None:
    """16k predictors over 150k words, by the resident set of a process that has done nothing else."""
    script = ROOT / "benchmarks" / "loss_memory.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["share_of_full_logits"] < 0.1, result
    assert result["max_relative_gradient_difference"] < 1e-5, result
