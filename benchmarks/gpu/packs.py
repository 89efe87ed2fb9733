"""tokens/s, MFU, memory and mask building of full packs, by backend and gradient checkpointing. Running out of memory
is a result.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu.rehearsal import on_device
from gpu.results import Case, Measured, Results, failure
from gpu.setting import MODELS, Bench, Size, compiled_layers, keep, layouts_of, tokens_of
from mtr.attention.choice import activate_flash_attention, pad_to_multiple_of
from mtr.bench.setup import Setup
from mtr.bench.synthetic import Shape
from mtr.bench.timing import spread, wait
from mtr.model.device import peak_memory, reset_peak_memory
from mtr.model.tree_model import TreeModel
from mtr.recipe.sections import Backend, Checkpointing
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import Layout
from mtr.tree.mask import Tree, block_mask
from mtr.tree.packing import Pack
from mtr.tree.plan import tile_plan, varlen_plan

TURNS = 8


def run(results: Results, size: Size) -> None:
    bench = Bench(size)
    for name in MODELS:
        for mode, tokens, backend in itertools.product(size.modes, size.packs, backends()):
            case: Case = {"model": name, "gradient_checkpointing": mode, "max_tokens": tokens, "attention": backend}
            results.run(case, functools.partial(measure, bench, size, max(size.packs), **case))
        bench.close()


def backends() -> tuple[Backend, ...]:
    return ("flex", "varlen") if on_device("packs with flex and varlen (segment ran in their place)") else ("segment",)


def measure(
    bench: Bench,
    size: Size,
    largest: int,
    model: str,
    gradient_checkpointing: Checkpointing,
    max_tokens: int,
    attention: Backend,
) -> Measured:
    own = bench.open(model, largest)
    keep(own.model, gradient_checkpointing)
    shape = Shape(TURNS, *size.shape)
    conversations = max_tokens // tokens_of(shape, own.vocabulary)
    layouts = layouts_of(shape, conversations, own, max_tokens)
    try:
        return measure_pack(own, attention, layouts, size.repeats)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": failure(error)["error"]}


def measure_pack(own: Setup, backend: Backend, layouts: list[Layout], repeats: int) -> Measured:
    """Time and memory of the forward and backward pass of one pack, after a first one that compiles."""
    if backend == "varlen":
        activate_flash_attention()
    model = TreeModel(own.model, backend)
    batch: Batch = build_batch(Pack(tuple(layouts)), pad_to_multiple_of([backend])).to(own.device)
    taken = []
    for repeat in range(repeats + 1):
        own.model.zero_grad(set_to_none=True)
        if repeat == 1:
            reset_peak_memory(own.device)
        wait(own.device)
        began = time.perf_counter()
        model(batch).backward()
        wait(own.device)
        taken.append(time.perf_counter() - began)
    seconds = sorted(taken[1:])[(repeats - 1) // 2]
    mask = mask_seconds(batch.tree, model)
    flops = own.counter.of_layouts(layouts)
    return {
        "num_tokens": batch.num_tokens,
        "trees": len(layouts),
        "first_seconds": taken[0],
        "seconds": seconds,
        "spread": spread(taken[1:]),
        "tokens_per_second": batch.num_tokens / seconds,
        "flops_per_second": flops / seconds,
        "mfu": flops / seconds / own.matrix_rate["flops_per_second"],
        "matrix_rate": own.matrix_rate["flops_per_second"],
        "peak_memory_bytes": peak_memory(own.device),
        "mask_seconds": mask,
        "mask_share": mask / seconds,
        "compiled_layers": compiled_layers(own.model),
    }


def mask_seconds(tree: Tree, model: TreeModel) -> float:
    """Seconds to build the backend's form of the mask, once for each kind of layer, as in a training step."""
    build: dict[str, Callable[..., Any]] = {"flex": block_mask, "varlen": varlen_plan, "segment": tile_plan}
    (backend,) = model.backends
    device, taken = tree.subtree_end.device, []
    for _ in range(4):
        wait(device)
        began = time.perf_counter()
        for span in set(model.spans):
            build[backend](tree, span)
        wait(device)
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])[1]
