"""Three AdamW steps on one tree of 128k tokens: it fits, and the loss falls."""

from __future__ import annotations

import functools
import time

import torch

from gpu.results import Case, Measured, Results
from gpu.setting import MODELS, Bench, Size, compiled_layers, first_that_fits, layouts_of
from mtr.attention.choice import fastest, pad_to_multiple_of
from mtr.bench.setup import Setup
from mtr.bench.synthetic import Shape
from mtr.model.device import peak_memory, reset_peak_memory
from mtr.model.tree_model import TreeModel
from mtr.recipe.sections import Checkpointing
from mtr.tree.batch import build_batch
from mtr.tree.layout import Layout
from mtr.tree.packing import Pack

STEPS = 3
MOST_TOKENS = 2**18
MODES: tuple[Checkpointing, ...] = ("full", "offload")
"""The second where the first does not fit."""


def run(results: Results, size: Size) -> None:
    bench = Bench(size)
    for name in MODELS:
        case: Case = {"model": name, "long": list(size.long)}
        results.run(case, functools.partial(measure, bench, size, name))
        bench.close()


def measure(bench: Bench, size: Size, name: str) -> Measured:
    own = bench.open(name, MOST_TOKENS)
    (layout,) = layouts_of(Shape(*size.long), 1, own, MOST_TOKENS)
    return first_that_fits(own.model, MODES, functools.partial(train_on, own, layout))


def train_on(own: Setup, layout: Layout) -> Measured:
    model = TreeModel(own.model, *own.usable, choose=fastest)
    batch = build_batch(Pack((layout,)), pad_to_multiple_of(own.usable)).to(own.device)
    trained = [p for p in own.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses, taken = [], []
    reset_peak_memory(own.device)
    for _ in range(STEPS):
        began = time.perf_counter()
        loss = model(batch) / float(layout.weight.sum())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        taken.append(time.perf_counter() - began)
    assert losses[-1] < losses[0], f"the loss did not fall: {losses}"
    seconds = min(taken)  # the first step compiles
    return {
        "num_tokens": layout.num_tokens,
        "attention": model.backends[0],
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second": layout.num_tokens / seconds,
        "mfu": own.counter.of_layouts([layout]) / seconds / own.matrix_rate["flops_per_second"],
        "matrix_rate": own.matrix_rate["flops_per_second"],
        "peak_memory_bytes": peak_memory(own.device),
        "compiled_layers": compiled_layers(own.model),
    }
