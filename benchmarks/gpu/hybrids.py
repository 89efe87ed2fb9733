"""One recurrent layer's state, forward and backward, over the tree of a conversation: right, and how fast.

    tree, kernels       the plans of `mtr.recurrence`, by flash-linear-attention or mamba-ssm
    tree, torch         the same in chunks, without a kernel
    per turn, kernels   every turn's whole path, packed: the work that the tree saves

Output and gradients are compared with the chunks in float64. Running out of memory is a result.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from support.recurrent_kernels import (
    chunk_gated_delta_rule,
    chunk_simple_gla,
    delta_rule_inputs,
    mamba_chunk_scan_combined,
    state_space_inputs,
)
from torch import Tensor

from gpu.rehearsal import on_device
from gpu.results import Case, Measured, Results, failure
from gpu.setting import Size
from mtr.bench.synthetic import Shape, make_views
from mtr.bench.timing import spread, wait
from mtr.model.device import peak_memory, reset_peak_memory
from mtr.recurrence import kernels
from mtr.recurrence.chunks import chunk_plan
from mtr.recurrence.delta_rule import delta_rule
from mtr.recurrence.rows import row_plan, state_space_by_rows
from mtr.recurrence.sequences import delta_rule_by_segments, segment_plan
from mtr.recurrence.state_space import state_space
from mtr.tree.batch import build_batch
from mtr.tree.layout import View, merge
from mtr.tree.mask import Tree
from mtr.tree.packing import Pack

WAYS = ("tree, kernels", "tree, torch", "per turn, kernels")
TOLERANCE = 0.05
"""Of the largest element: bfloat16."""
VOCABULARY = 512


class Layer(NamedTuple):
    """Heads and sizes of a released model."""

    kernel: kernels.Kernel
    heads: tuple[int, int]
    """Of key and value; of a state space model, and its groups."""
    sizes: tuple[int, int]
    """Of key and value; of a head and a state."""

    @property
    def is_delta_rule(self) -> bool:
        return self.kernel in (kernels.GATED_DELTA_RULE, kernels.KIMI)


LAYERS = {
    "Gated DeltaNet, Qwen3-Next": Layer(kernels.GATED_DELTA_RULE, (16, 32), (128, 128)),
    "Kimi Delta Attention, Kimi-Linear": Layer(kernels.KIMI, (32, 32), (128, 128)),
    "Mamba-2, Nemotron-H, by mamba-ssm": Layer(kernels.MAMBA, (128, 8), (64, 128)),
    "Mamba-2, Nemotron-H, by fla": Layer(kernels.SIMPLE, (128, 8), (64, 128)),
    "lightning attention, MiniMax": Layer(kernels.SIMPLE, (64, 64), (128, 128)),
}
REFERENCES: dict[str, Callable[..., Any]] = {
    "chunk_simple_gla": chunk_simple_gla,
    "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
}
"""In a kernel's place where there is no device."""


def run(results: Results, size: Size) -> None:
    for name, turns in itertools.product(LAYERS, size.turns):
        results.run({"layer": name, "turns": turns, "check": True}, functools.partial(check, size, name, turns))
        for way in WAYS:
            case: Case = {"layer": name, "turns": turns, "way": way}
            results.run(case, functools.partial(measure, size, name, turns, way))


def layer_of(name: str, size: Size) -> Layer:
    layer = LAYERS[name]
    if not size.rehearsal:
        return layer
    small = (2, 2) if layer.heads[0] == layer.heads[1] else (2, 4) if layer.is_delta_rule else (4, 2)
    return layer._replace(heads=small, sizes=(8, 8))


def views_of(turns: int, size: Size) -> list[View]:
    (views,) = make_views(Shape(turns, *size.shape), 1, VOCABULARY)
    return views


def tree_of(views: list[View], per_turn: bool, device: torch.device) -> Tree:
    """Each view a path of its own, or all of them one tree."""
    groups = [[view] for view in views] if per_turn else [views]
    return build_batch(Pack(tuple(merge(group) for group in groups))).to(device).tree


def inputs_of(layer: Layer, total: int, device: torch.device) -> list[Tensor]:
    """In bfloat16; decays in float32."""
    if layer.is_delta_rule:
        given, wide = delta_rule_inputs(total, layer.heads, layer.sizes, layer.kernel is kernels.KIMI), {3}
    else:
        given, wide = state_space_inputs(total, layer.heads, layer.sizes), {1, 2, 5}
    return [
        x.to(device, torch.float32 if number in wide else torch.bfloat16).requires_grad_()
        for number, x in enumerate(given)
    ]


def kernel_of(layer: Layer) -> Any:
    """The function, or why it is not used."""
    if on_device(f"{layer.kernel.name} of {layer.kernel.package} (a reference in torch ran in its place)"):
        return kernels.find(layer.kernel)
    return REFERENCES.get(layer.kernel.name, chunk_gated_delta_rule)


def by_kernels(layer: Layer, tree: Tree) -> Callable[..., Tensor]:
    function, over_tree = kernel_of(layer), cast(Any, delta_rule_by_segments)
    if layer.is_delta_rule:
        scan, plan = kernels.varlen_scan(function, normalize=False), segment_plan(tree)
        return lambda *given: over_tree(scan, *given, plan)
    rows = kernels.by_mamba(function) if layer.kernel is kernels.MAMBA else kernels.by_simple(function)
    over_tree, row = cast(Any, state_space_by_rows), row_plan(tree)
    return lambda *given: over_tree(rows, *given, row)


def by_torch(layer: Layer, tree: Tree) -> Callable[..., Tensor]:
    plan, options = chunk_plan(tree), (False,) if layer.is_delta_rule else ()
    over_tree: Any = delta_rule if layer.is_delta_rule else state_space
    return lambda *given: over_tree(*given, plan, *options)


def outcome(run: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    out = run(*given)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, given, weight)]


def device_of() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check(size: Size, name: str, turns: int) -> Measured:
    """
    Raises:
        AssertionError: the kernels compute something else.
    """
    layer, device = layer_of(name, size), device_of()
    if isinstance(reason := kernel_of(layer), str):
        return {"skipped": reason}
    layer = layer._replace(heads=(layer.heads[0] // 2, layer.heads[1] // 2))  # float64 takes room
    tree = tree_of(views_of(turns, size), False, device)
    given = inputs_of(layer, len(tree.parent), device)
    found = outcome(by_kernels(layer, tree), given)
    exact = outcome(by_torch(layer, tree), [x.detach().double().requires_grad_() for x in given])
    names = (
        "out",
        *(("query", "key", "value", "g", "beta") if layer.is_delta_rule else ("x", "dt", "A", "B", "C", "D")),
    )
    worst = {
        part: float((x.double() - y).abs().max() / y.abs().max())
        for part, x, y in zip(names, found, exact, strict=True)
    }
    assert max(worst.values()) < TOLERANCE, f"{name} differs from float64: {worst}"
    return {"worst": worst, "num_tokens": len(tree.parent)}


def measure(size: Size, name: str, turns: int, way: str) -> Measured:
    layer, device = layer_of(name, size), device_of()
    if way.endswith("kernels") and isinstance(reason := kernel_of(layer), str):
        return {"skipped": reason}
    tree = tree_of(views_of(turns, size), way.startswith("per turn"), device)
    given = inputs_of(layer, len(tree.parent), device)
    run = (by_torch if way.endswith("torch") else by_kernels)(layer, tree)
    taken = []
    try:
        for repeat in range(size.repeats + 1):
            if repeat == 1:
                reset_peak_memory(device)
            wait(device)
            began = time.perf_counter()
            outcome(run, given)
            wait(device)
            taken.append(time.perf_counter() - began)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": failure(error)["error"]}
    return {
        "num_tokens": len(tree.parent),
        "first_seconds": taken[0],
        "seconds": sorted(taken[1:])[(size.repeats - 1) // 2],
        "spread": spread(taken[1:]),
        "peak_memory_bytes": peak_memory(device),
    }
