"""The numbers of flex attention's CUDA kernels, as Inductor emits them: forward and backward in Triton's interpreter.

    mtr::tree_attention on CUDA tensors in host memory  ->  graphs, Inductor, Triton  ->  interpreted kernels
        against dense attention in float64: output and every gradient, relative to the largest element

A process of its own, because the interpreter has to be chosen before Triton is imported. The last cases are controls:
one token's place in the tree is changed for the kernels alone, and that has to show.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

_FLOAT32, _BFLOAT16 = 3e-6, 2e-2
_QUICK = 5


@dataclass
class Result:
    name: str
    differences: dict[str, float]
    """Of the output and each gradient."""
    tolerance: float
    seconds: float
    control: bool = False
    """The tree was changed, so the difference has to be larger than the tolerance."""

    @property
    def ok(self) -> bool:
        worst = max(self.differences.values())
        return worst > 100 * self.tolerance if self.control else worst <= self.tolerance


def run(quick: bool) -> list[Result]:
    """
    Raises:
        RuntimeError: the process ended otherwise; with what it said.
    """
    command = [sys.executable, "-m", "support.cuda.numerics", *(["--quick"] if quick else [])]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-1500:])
    return [Result(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    from support.cuda import stub

    stub.load()
    stub.pretend(90, generate=True)
    import torch
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    from support.cuda import host_memory, interpreter

    host_memory.activate()
    interpreter.activate()
    inductor.compile_threads, inductor.fx_graph_cache, functorch.enable_autograd_cache = 1, False, False
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cases = _cases(torch)
    chosen = [*cases[:_QUICK], cases[-1]] if "--quick" in sys.argv else cases
    for name, case, span, length, dtype, control in chosen:
        began = time.perf_counter()
        differences = _differences(case, span, length, dtype, control)
        tolerance = _FLOAT32 if dtype == torch.float32 else _BFLOAT16
        result = Result(name, differences, tolerance, time.perf_counter() - began, control)
        print(json.dumps(dataclasses.asdict(result)), flush=True)


def _cases(torch: Any) -> list[tuple[Any, ...]]:
    """Name, heads, span, tokens, dtype, control."""
    from mtr.tree.mask import FULL, Span
    from support.attention import Case

    float32, bfloat16 = torch.float32, torch.bfloat16
    window, chunk = Span("sliding", 100), Span("chunked", 96)
    plain = Case(key_size=16, value_size=16)
    return [
        ("full, 4:2 heads", plain, FULL, 256, float32, False),
        ("window of 100", plain, window, 256, float32, False),
        ("sinks", plain._replace(sinks=True), FULL, 128, float32, False),
        ("soft cap", plain._replace(softcap=1.5), FULL, 128, float32, False),
        ("full, 7:1 heads, bfloat16", Case(7, 1, 16, 16), FULL, 128, bfloat16, False),
        ("chunks of 96", plain, chunk, 256, float32, False),
        ("6:2 heads, head sizes 24 and 16", Case(6, 2, 24, 16), FULL, 128, float32, False),
        ("head size 8, widened", Case(key_size=8, value_size=8), FULL, 128, float32, False),
        ("sinks and soft cap, window, bfloat16", plain._replace(sinks=True, softcap=2.0), window, 256, bfloat16, False),
        ("head size 64, 8:1 heads, sinks, window", Case(8, 1, 64, 64, None, True), window, 128, float32, False),
        ("three blocks by kernels made before", plain, FULL, 384, float32, False),
        ("five blocks, the last one padding", plain, FULL, 640, bfloat16, False),
        ("control: a window's token elsewhere", plain, window, 256, float32, True),
        ("control: a token elsewhere in the tree", plain, FULL, 256, float32, True),
    ]


def _differences(case: Any, span: Any, length: int, dtype: Any, control: bool) -> dict[str, float]:
    import torch

    from mtr.attention.interface import attend
    from mtr.attention.masks import TreeAttention
    from mtr.tree.mask import Tree, dense_mask
    from support.attention import dense_attention, inputs, results

    tree, scale = random_tree(length - 37, length, seed=length), 1.7 * case.key_size**-0.5
    given, mask = inputs(case, length, dtype), dense_mask(tree, span)
    end = tree.subtree_end.clone()
    if control:  # no token sees this one any more
        end[length // 4] = length // 4 + 1
    theirs_tree = Tree(end.cuda(), tree.position_ids.cuda(), tree.parent)
    attention = TreeAttention(theirs_tree, [span], "flex")
    ours = results(
        lambda q, k, v, s: attend(attention, span, q, k, v, scale, case.softcap, s).transpose(1, 2),
        [x.cuda() for x in given],
    )
    wanted = results(
        lambda q, k, v, s: dense_attention(q, k, v, mask, scale, case.softcap, s), [x.double() for x in given]
    )
    assert ours.keys() == wanted.keys()
    assert all(torch.isfinite(x).all() for x in wanted.values())
    return {name: float((ours[name].cpu() - x).abs().max() / x.abs().max()) for name, x in wanted.items()}


def random_tree(tokens: int, length: int, seed: int) -> Any:
    """Branches off branches; after `tokens` padding, which sees itself alone."""
    import numpy as np
    import torch

    from mtr.tree.mask import Tree

    rng = np.random.default_rng(seed)
    parent, position, path = [-1], [0], [0]
    for i in range(1, tokens):
        if rng.random() < 0.03:
            path = path[: rng.integers(1, len(path) + 1)]
        parent.append(path[-1])
        position.append(len(path))
        path.append(i)
    parent += [-1] * (length - tokens)
    position += [0] * (length - tokens)
    end = np.arange(length) + 1
    for i in range(tokens - 1, 0, -1):
        end[parent[i]] = max(end[parent[i]], end[i])
    return Tree(torch.tensor(end), torch.tensor(position), np.array(parent))


if __name__ == "__main__":
    main()
