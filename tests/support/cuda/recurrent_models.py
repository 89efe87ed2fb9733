"""Small models with recurrent layers and LoRA on CUDA tensors in host memory: loss and all gradients, against float64.

Their states are fla's kernels and attention is flex's, in Triton's interpreter; the rest is the CPU's, in float32. What
is compared is a model as `mtr train` runs it: transformers' mixers with fla beside them, and the tree.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from unittest import mock

from mtr.model.float64 import keep_float64
from mtr.model.tree_model import TreeModel, use_tree
from mtr.recurrence import kernels
from support.cuda import layer_numbers
from support.cuda.host_memory import CUDA
from support.cuda.numerics import Result

KINDS = {
    "qwen3_5": kernels.GATED_DELTA_RULE,
    "kimi_linear": kernels.KIMI,
    "bamba": kernels.SIMPLE,
    "minimax": kernels.SIMPLE,
}
"""Kinds of model, and the kernel that each has to call."""
TOLERANCE = 5e-3
"""In float32 on the CPU, without a kernel, Qwen3.5 is 2e-3 away."""


def compare() -> Iterator[Result]:
    for kind, kernel in KINDS.items():
        began = time.perf_counter()
        exact, ours = layer_numbers.models(kind)
        for model in (exact, ours):
            model.set_experts_implementation("eager")  # no grouped product on tensors of this sort
        use_tree(ours.to(CUDA))
        batch, _ = layer_numbers.packs()
        with mock.patch.object(kernels, "find", wraps=kernels.find) as find:
            found = layer_numbers.outcome(TreeModel(ours, "flex"), batch.to(CUDA))
        assert mock.call(kernel) in find.mock_calls, f"{kind} has not asked for {kernel.name}"
        use_tree(exact)
        with keep_float64():
            wanted = layer_numbers.outcome(TreeModel(exact, "segment"), batch)
        assert found.keys() == wanted.keys()
        differences = {name: float((found[name] - x).abs().max() / x.abs().max()) for name, x in wanted.items()}
        yield Result(f"{kind} with LoRA", differences, TOLERANCE, time.perf_counter() - began)
