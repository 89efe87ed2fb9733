"""The first minutes on a device, cheapest and most telling first:

machine   versions, driver, memory, what is installed
kernel    flex and varlen against dense attention in float64, for the head sizes and ratios of the recipes
train     two steps and an evaluation of each recipe through `mtr train`, with few layers and random weights
pack      a whole 8B model, one pack of 16k tokens: tokens/s and MFU, with each backend
"""

from __future__ import annotations

import functools
import shutil
import time

import torch
from support.attention import Case as Heads
from support.attention import difference
from support.gpu import random_tree

from gpu.packs import TURNS, backends, measure_pack
from gpu.preflight import look
from gpu.rehearsal import on_device
from gpu.results import Case, Measured, Results
from gpu.setting import BENCHMARKS, Bench, Size, first_that_fits, layouts_of, shape_config, tokens_of
from gpu.training_runs import train_model, write_model
from mtr.bench.synthetic import Shape
from mtr.bench.timing import wait
from mtr.model.device import pick_device
from mtr.recipe.sections import Backend, Checkpointing
from mtr.tree.mask import FULL, Span

HEADS: dict[str, tuple[Heads, Span]] = {
    "qwen3-8b, llama-3-8b": (Heads(32, 8, 128, 128), FULL),
    "r1-distill-qwen-7b": (Heads(28, 4, 128, 128), FULL),
    "gpt-oss-20b, sliding": (Heads(64, 8, 64, 64, sinks=True), Span("sliding", 128)),
    "gpt-oss-20b, full": (Heads(64, 8, 64, 64, sinks=True), FULL),
    "gemma-2-9b": (Heads(16, 8, 256, 256, softcap=50.0), FULL),
    "deepseek-v3, 16 heads": (Heads(16, 16, 192, 128), FULL),
}
TOLERANCE = 3e-2
"""Of bfloat16: the largest difference over the largest element."""
RECIPES = ("qwen3-8b", "r1-distill-qwen-7b", "gpt-oss-20b")
FEW = {"num_hidden_layers": 2, "vocab_size": 4096, "num_local_experts": 8}
"""What is less than in the recipes' models; all else is theirs."""
PACK_MODEL = "llama-3-8b"
PEER = "NeMo Automodel has published 12,473 tokens/s, 402 TFLOP/s (one H100, LoRA r 16, sequences of 4,096)"
PACK_MODES: tuple[Checkpointing, ...] = ("products", "selective", "full")
"""The first that fits is used."""


def run(results: Results, size: Size) -> None:
    results.run({"smoke": "machine"}, machine)
    for name, (heads, span) in HEADS.items():
        for backend in ("flex", "varlen"):
            if heads.softcap is None or backend == "flex":
                case: Case = {"smoke": "kernel", "heads": name, "attention": backend}
                results.run(case, functools.partial(kernel, heads, span, backend, size))
    for name in RECIPES:
        results.run({"smoke": "train", "recipe": name}, functools.partial(train_recipe, name, size))
    bench, cases = Bench(size), []
    for backend in backends():
        case = {"smoke": "pack", "model": PACK_MODEL, "max_tokens": size.tokens, "attention": backend}
        results.run(case, functools.partial(pack, bench, size, backend))
        cases.append(case)
    bench.close()
    print(verdict([found for case in cases if (found := results.of(case)) and "mfu" in found]))


def machine() -> Measured:
    found = look()._asdict()
    if not on_device("the properties of the device"):
        return found
    properties = torch.cuda.get_device_properties(0)
    flash = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return {
        **found,
        "device": properties.name,
        "devices": torch.cuda.device_count(),
        "capability": [properties.major, properties.minor],
        "memory_bytes": properties.total_memory,
        "free_bytes": torch.cuda.mem_get_info()[0],
        "multiprocessors": properties.multi_processor_count,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "bfloat16": torch.cuda.is_bf16_supported(),
        "flash_attention": flash,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def kernel(heads: Heads, span: Span, backend: Backend, size: Size) -> Measured:
    """Output and gradients at several lengths: what was compiled for the first serves the others."""
    device = pick_device()
    seconds: list[float] = []
    worst: dict[str, float] = {}
    if size.rehearsal:
        heads = heads._replace(heads=heads.heads // 4, key_heads=max(1, heads.key_heads // 4))
    if backend == "flex" and not on_device("FlexAttention's kernels (segment ran in their place)"):
        backend = "segment"
    for length in size.kernel_lengths:
        tree = random_tree(length, 0, device)
        wait(device)
        began = time.perf_counter()
        for name, value in difference(tree, span, heads, dtype=torch.bfloat16, backend=backend).items():
            worst[name] = max(worst.get(name, 0.0), value)
        seconds.append(time.perf_counter() - began)
    assert max(worst.values()) < TOLERANCE, f"differs from dense attention by {worst}"
    return {"worst": worst, "tolerance": TOLERANCE, "first_seconds": seconds[0], "last_seconds": seconds[-1]}


def train_recipe(name: str, size: Size) -> Measured:
    config = shape_config(name, size)
    folder = write_model(config | {key: value for key, value in FEW.items() if key in config}, size)
    try:
        return train_model(folder, BENCHMARKS.parent / "recipes" / f"{name}.yaml", Shape(4, *size.shape))
    finally:
        shutil.rmtree(folder.parent)


def pack(bench: Bench, size: Size, backend: Backend) -> Measured:
    own = bench.open(PACK_MODEL, size.tokens)
    shape = Shape(TURNS, *size.shape)
    layouts = layouts_of(shape, max(1, size.tokens // tokens_of(shape, own.vocabulary)), own, size.tokens)
    return first_that_fits(own.model, PACK_MODES, functools.partial(measure_pack, own, backend, layouts, size.repeats))


def verdict(packs: list[Measured]) -> str:
    """The faster of the packs beside what it is held against."""
    if not packs:
        return "no pack was measured"
    best = max(packs, key=lambda measured: measured["tokens_per_second"])
    return (
        f"{PACK_MODEL}: {best['tokens_per_second']:,.0f} tokens/s, {best['flops_per_second'] / 1e12:.1f} TFLOP/s, "
        f"{100 * best['mfu']:.1f} % of the device's matmuls, with {best['case']['attention']} and checkpointing "
        f"{best['gradient_checkpointing']}; {PEER}"
    )
