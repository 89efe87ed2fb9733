"""The calls of FlashAttention's operators, held against what their CUDA kernels take.

Every plan of a set of trees goes through tree attention on fake cuda tensors: the calls are bound to the operators'
schemas and their fake kernels run. What the kernels check themselves, beyond schema and shapes, is written down here
(`problems`), after `mha_varlen_fwd` and `mha_varlen_bwd` of torch's flash_api.cpp.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtr.attention.varlen import MAX_HEAD_SIZE
from mtr.tree.mask import FULL, Span, Tree
from mtr.tree.plan import VarlenPlan, varlen_plan
from support.attention import CASES, Case
from support.cuda.layer import attend
from support.cuda.watch import Run, Watch
from support.masks import random_forest

_aten = torch.ops.aten
_FORWARD, _BACKWARD = _aten._flash_attention_forward, _aten._flash_attention_backward
_SPANS = (FULL, Span("sliding", 9), Span("sliding", 128), Span("chunked", 33))
_WIDE = {"head size 192, values 128": Case(16, 16, 192, 128), "head size 256": Case(16, 8, 256, 256)}


@dataclass
class Call:
    """One call, by the names of the schema."""

    operator: str
    arguments: dict[str, Any]


@dataclass
class Outcome:
    case: str
    calls: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.calls > 0 and not self.problems


class _Calls(Watch):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[Call] = []

    def call(self, func: Any, args: Any, kwargs: Any, run: Run) -> Any:
        if func.overloadpacket in (_FORWARD, _BACKWARD):
            names = [argument.name for argument in func._schema.arguments]
            self.made.append(Call(func.overloadpacket.__name__, {**dict(zip(names, args, strict=False)), **kwargs}))
        return super().call(func, args, kwargs, run)


def run(quick: bool) -> list[Outcome]:
    """Each case of heads with each dtype, over trees and spans."""
    cases = {name: case for name, case in {**CASES, **_WIDE}.items() if case.softcap is None}
    trees = [random_forest(seed, 60) for seed in range(2 if quick else 8)]
    trees.append(random_forest(0, 60, 128))
    return [
        check(name, case, dtype, trees)
        for (name, case), dtype in itertools.product(cases.items(), (torch.bfloat16, torch.float16))
    ]


def check(name: str, case: Case, dtype: torch.dtype, trees: list[Tree]) -> Outcome:
    began = time.perf_counter()
    outcome = Outcome(f"{name}, {str(dtype).removeprefix('torch.')}")
    for tree, span in itertools.product(trees, _SPANS):
        plan = varlen_plan(tree, span)
        for call in calls(case, dtype, tree, span):
            outcome.calls += 1
            outcome.problems += [f"{call.operator}: {problem}" for problem in problems(call, plan)]
    outcome.seconds = time.perf_counter() - began
    return outcome


def calls(case: Case, dtype: torch.dtype, tree: Tree, span: Span) -> list[Call]:
    """What one layer's forward and backward call."""
    watch = _Calls()
    attend("varlen", case, dtype, tree, span, watch)
    return watch.made


def problems(call: Call, plan: VarlenPlan) -> Iterator[str]:
    """What the CUDA kernel would refuse, or compute something else from.

    Args:
        plan: the same one on the host, whose values are known.
    """
    given = call.arguments
    query, key, value = (given[name] for name in ("query", "key", "value"))
    yield from _problems_of_tensors(given)
    total, heads, size = query.shape
    gathered, key_heads = key.shape[:2]
    checks = {
        "a head size that is no multiple of 8": size % 8 != 0,
        f"a head size above {MAX_HEAD_SIZE}": size > MAX_HEAD_SIZE,
        "head sizes that differ": key.shape[2] != size or value.shape[2] != size,
        "query heads that are no multiple of the key heads": heads % key_heads != 0,
        "keys and values of different lengths": value.shape[:2] != key.shape[:2],
        "cum_seq_q and cum_seq_k of different lengths": len(given["cum_seq_q"]) != len(given["cum_seq_k"]),
        "cum_seq_q that does not end at the last query": int(plan.cu_seq_q[-1]) != total,
        "cum_seq_k that does not end at the last key": int(plan.cu_seq_k[-1]) != gathered,
        "max_q that is not the longest row's": given["max_q"] != int(plan.cu_seq_q.diff().max()),
        "max_k that is not the longest row's": given["max_k"] != int(plan.cu_seq_k.diff().max()),
        "a row with more queries than keys": bool((plan.cu_seq_q.diff() > plan.cu_seq_k.diff()).any()),
        "dropout": given["dropout_p"] != 0.0,
        "no scale": not isinstance(given.get("scale"), float),
    }
    yield from (problem for problem, found in checks.items() if found)
    window = (given["is_causal"], given.get("window_size_left"), given.get("window_size_right"))
    wanted = (False, plan.window - 1, 0) if plan.window else (True, None, None)
    if window != wanted:
        yield f"is_causal and window {window}, not {wanted}"
    if call.operator == _BACKWARD.__name__:
        expected = {"grad_out": query.shape, "out": query.shape, "logsumexp": torch.Size((heads, total))}
        yield from (
            f"{name} of shape {given[name].shape}" for name, shape in expected.items() if given[name].shape != shape
        )


def _problems_of_tensors(given: dict[str, Any]) -> Iterator[str]:
    """Devices, dtypes and strides."""
    rows = {name: given[name] for name in ("query", "key", "value", "grad_out", "out") if name in given}
    dtype = rows["query"].dtype
    if dtype not in (torch.float16, torch.bfloat16):
        yield f"query is {dtype}"
    for name, x in given.items():
        if isinstance(x, Tensor) and x.device.type != "cuda":
            yield f"{name} is on {x.device}"
    for name, x in rows.items():
        if x.dim() != 3 or x.stride(-1) != 1:
            yield f"{name} is not [tokens, heads, size] with one head's numbers side by side"
        if x.dtype != dtype:
            yield f"{name} is {x.dtype} and query {dtype}"
    for name in ("cum_seq_q", "cum_seq_k"):
        if given[name].dtype != torch.int32 or not given[name].is_contiguous():
            yield f"{name} is {given[name].dtype}, not a contiguous int32"
    if "logsumexp" in given and (given["logsumexp"].dtype != torch.float32 or not given["logsumexp"].is_contiguous()):
        yield "logsumexp is not a contiguous float32"
    if "rng_state" in given and (given["rng_state"].dtype != torch.uint64 or given["rng_state"].shape != (2,)):
        yield "rng_state is not two uint64"
