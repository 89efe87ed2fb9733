"""Tests that need a CUDA device, and what stands in for it when they are rehearsed on the CPU.

    @on_cuda("backend", ["flex", "varlen"], rehearsed=["varlen"])
    def test(device: str, backend: str)        on CUDA with each value, marked gpu; on the CPU with the rehearsed ones

A rehearsal runs every line of the test. Backends are chosen as on CUDA; flex runs the graph that Inductor would get,
operator by operator, and varlen its own reference: what is left to a device is the kernels and their compilation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mtr.tree.mask import Tree

LIBRARY_WARNINGS = (
    r"ignore::UserWarning:(torch|triton)([.]|$)",
    r"ignore::RuntimeWarning:(torch|triton)([.]|$)",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
"""Not errors in gpu tests: hints of torch and Triton about the device (TF32 is off, few SMs), and files and processes
of their compilers that the garbage collector closes. Warnings of other modules stay errors.
"""
_WIDE = {"head_dim": 32, "hidden_size": 64, "moe_intermediate_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": _WIDE,
    "llama": _WIDE,
    "gemma2": _WIDE,
    "gemma3": _WIDE,
    "gpt_oss": _WIDE,
    "qwen3_moe": _WIDE,
    "deepseek_v3": {"hidden_size": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
}
"""Changes of the tiny models: heads that all kernels take as they are."""


def on_cuda(names: str, values: Sequence[Any], rehearsed: Sequence[Any] = ()) -> pytest.MarkDecorator:
    """Parameters of a test that takes `device` first: all values on CUDA, some on the CPU too.

    Args:
        names: of the other parameters, as in `pytest.mark.parametrize`; "" for a test without any.
    """

    def row(device: str, value: Any, mark: pytest.MarkDecorator) -> Any:
        rest = value if isinstance(value, tuple) else (value,)
        label = "-".join([device, *map(str, rest)])
        return pytest.param(device, *rest, marks=mark, id=label)

    rows = [row("cuda", value, pytest.mark.gpu) for value in values]
    rows += [row("cpu", value, pytest.mark.rehearsal) for value in rehearsed]
    return pytest.mark.parametrize(", ".join(filter(None, ["device", names])), rows)


def stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU take the backends of CUDA."""
    import mtr.attention.choice
    import mtr.attention.flex_kernels
    import mtr.bench.runs
    import mtr.checks.verify
    import mtr.training.loop

    for name in ("usable_backends", "choose_backends"):
        own = getattr(mtr.attention.choice, name)
        there = _with_cuda(own)
        for module in [module for key, module in sys.modules.items() if key.startswith("mtr.")]:
            if getattr(module, name, None) is own:
                monkeypatch.setattr(module, name, there)
    monkeypatch.setattr(mtr.attention.flex_kernels, "_kernels", {})
    monkeypatch.setattr(mtr.attention.flex_kernels, "_compile", lambda graph, inputs: graph)


def _with_cuda(choose: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(*arguments: Any) -> Any:
        given = (torch.device("cuda") if isinstance(x, torch.device) else x for x in arguments)
        return choose(*given)

    return chosen


def random_tree(length: int, seed: int, device: str | torch.device) -> Tree:
    """A forest in pre-order: each token hangs below a token on the path to the one before it, or is a root."""
    rng = np.random.default_rng(seed)
    parent, position, path = [-1], [0], [0]
    for i in range(1, length):
        if rng.random() < 0.02:
            path = path[: rng.integers(0, len(path) + 1)]
        parent.append(path[-1] if path else -1)
        position.append(len(path))
        path.append(i)
    end = np.arange(length) + 1
    for i in range(length - 1, 0, -1):
        if parent[i] >= 0:
            end[parent[i]] = max(end[parent[i]], end[i])
    return Tree(torch.tensor(end, device=device), torch.tensor(position, device=device), np.array(parent))
