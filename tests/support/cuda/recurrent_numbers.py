"""Recurrent layers over trees by flash-linear-attention's and mamba-ssm's own kernels: output and every gradient
against the recurrence along each path, token by token in float64, relative to the largest element.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtr.recurrence.kernels import MAMBA, SIMPLE, by_mamba, by_simple, delta_rule_scan, find
from mtr.recurrence.rows import row_plan, state_space_by_rows
from mtr.recurrence.sequences import delta_rule_by_segments, segment_plan
from mtr.tree.mask import Tree
from support import recurrences
from support.cuda.host_memory import CUDA
from support.cuda.numerics import Result
from support.forests import chain_of_forks, num_used
from support.recurrent_kernels import delta_rule_inputs, state_space_inputs

Change = Callable[[Any], Any]
"""Of a plan."""


class Case(NamedTuple):
    name: str
    kind: str
    """"delta", "channels" (Kimi) or the package that computes a state space model"""
    heads: tuple[int, int]
    """Of key and value; of a state space model, and its groups."""
    sizes: tuple[int, int]
    """Of key and value; of a head and a state."""
    turns: int = 3
    length: int = 20
    """Tokens of a turn, and of the branch before it."""
    dtype: str = "float32"
    quick: bool = False


CASES = (
    Case("Gated DeltaNet", "delta", (1, 2), (16, 16), quick=True),
    Case("Gated DeltaNet, many short turns", "delta", (1, 1), (16, 16), 6, 4),
    Case("Gated DeltaNet, turns of several chunks", "delta", (1, 1), (16, 32), 2, 150),
    Case("Gated DeltaNet, 3:1 heads, bfloat16", "delta", (1, 3), (32, 16), dtype="bfloat16"),
    Case("Gated DeltaNet, one path", "delta", (1, 2), (16, 16), 1, 70),
    Case("Kimi Delta Attention", "channels", (1, 1), (16, 16), 2, 20),
    Case("Mamba-2 by fla", "fla-core", (4, 2), (16, 16), quick=True),
    Case("Mamba-2 by fla, turns of several rows", "fla-core", (2, 1), (16, 32), 2, 150),
    Case("lightning attention by fla, bfloat16", "fla-core", (2, 2), (16, 16), dtype="bfloat16"),
    Case("Mamba-2 by mamba-ssm", "mamba-ssm", (4, 2), (16, 16)),
    Case("Mamba-2 by mamba-ssm, bfloat16", "mamba-ssm", (4, 1), (16, 32), 2, 150, dtype="bfloat16"),
)
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""fla adds up the gradient of a decay from differences of larger terms; all else is within 5e-6."""


def compare(quick: bool) -> Iterator[Result]:
    """Each result as soon as it is known. mamba-ssm's cases are left out where it is not installed."""
    for case in CASES:
        there = case.kind != MAMBA.package or not isinstance(find(MAMBA), str)
        if there and (case.quick or not quick):
            yield _result(case)
    yield from _controls()


def _result(case: Case, change: Change | None = None, name: str = "") -> Result:
    began = time.perf_counter()
    found, calls = differences(case, change)
    wanted = 2 if case.turns > 1 and case.kind in ("delta", "channels") else 1
    assert calls == wanted, f"{case.name}: {calls} calls of the kernel"
    seconds = time.perf_counter() - began
    return Result(name or case.name, found, TOLERANCE[case.dtype], seconds, control=bool(name))


def differences(case: Case, change: Change | None = None) -> tuple[dict[str, float], int]:
    """To the reference; and calls of the kernel in the forward."""
    tree = chain_of_forks(case.turns, case.length)
    total, delta = num_used(tree), case.kind in ("delta", "channels")
    by_channel = case.kind == "channels"
    if delta:
        given = delta_rule_inputs(total, case.heads, case.sizes, by_channel)
    else:
        given = state_space_inputs(total, case.heads, case.sizes)
    names = ("query", "key", "value", "g", "beta") if delta else ("x", "dt", "A", "B", "C", "D")
    dtypes = [torch.float32 if name in ("g", "dt", "A", "D") else getattr(torch, case.dtype) for name in names]
    given = [x.to(dtype) for x, dtype in zip(given, dtypes, strict=True)]
    calls: list[int] = []
    there = Tree(tree.subtree_end.to(CUDA), tree.position_ids.to(CUDA), tree.parent)

    def ours(*inputs: Tensor) -> Tensor:
        return (_delta_rule if delta else _state_space)(case, inputs, there, change, calls)

    def exact(*inputs: Tensor) -> Tensor:
        reference: Any = recurrences.delta_rule if delta else recurrences.state_space
        out: Tensor = reference(*inputs, tree.parent)
        return out

    found, wanted = _outcome(ours, [x.to(CUDA) for x in given]), _outcome(exact, [x.double() for x in given])
    pairs = zip(("out", *names), found, wanted, strict=True)
    return {name: float((x.cpu() - y).abs().max() / y.abs().max()) for name, x, y in pairs}, len(calls)


def _outcome(run: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in given]
    out = run(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def _counted(scan: Any, calls: list[int]) -> Any:
    def call(*given: Any) -> Any:
        calls.append(len(given))
        return scan(*given)

    return call


def _delta_rule(case: Case, given: Any, tree: Tree, change: Change | None, calls: list[int]) -> Tensor:
    scan = delta_rule_scan(given[1], given[2], given[3], normalize=False)
    assert scan is not None, "a kernel is there and takes this"
    plan = segment_plan(tree)
    over_tree: Any = delta_rule_by_segments
    out: Tensor = over_tree(_counted(scan, calls), *given, change(plan) if change else plan)
    return out


def _state_space(case: Case, given: Any, tree: Tree, change: Change | None, calls: list[int]) -> Tensor:
    kernel, scan = (MAMBA, by_mamba) if case.kind == MAMBA.package else (SIMPLE, by_simple)
    function: Any = find(kernel)
    plan = row_plan(tree)
    over_tree: Any = state_space_by_rows
    out: Tensor = over_tree(_counted(scan(function), calls), *given, change(plan) if change else plan)
    return out


def _controls() -> Iterator[Result]:
    """What is wrong on purpose has to be found."""

    def siblings(plan: Any) -> Any:
        return replace(plan, before=plan.before.roll(1))

    def another_start(plan: Any) -> Any:
        plan.start(1, 16, 16).mul_(0.5)
        return plan

    delta, rows = CASES[1], next(case for case in CASES if case.kind == "fla-core")
    yield _result(delta, siblings, "control: a sibling's state")
    yield _result(delta, another_start, "control: a start that is not the identity")
    yield _result(rows, siblings, "control: a sibling's state, Mamba-2")
