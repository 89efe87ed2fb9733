"""How long does the host take to prepare a step (parse, render, encode, merge, pack, tensors, mask plan), relative to
the step itself?

    python benchmarks/host_share.py --json benchmarks/results/host-share-cpu.json

A model with about 100 million parameters and LoRA on all linear layers takes optimizer steps on synthetic
conversations; preparing the same steps is timed separately, on one core.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from make_shape import small_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mtr.attention.interface import use_tree_attention
from mtr.bench.synthetic import Shape, make_rows
from mtr.bench.tokenizer import make_tokenizer, make_words
from mtr.chat.loading import make_renderer
from mtr.data.parsing import parse_row
from mtr.files import write_json
from mtr.model.device import keep_freed_memory
from mtr.model.tree_model import TreeModel
from mtr.prepare.builder import Builder
from mtr.prepare.views import weigh
from mtr.recipe.sections import Recipe
from mtr.training.environment import environment
from mtr.tree.batch import Batch, build_batch
from mtr.tree.mask import FULL
from mtr.tree.packing import build_layouts, build_packs
from mtr.tree.plan import tile_plan

DEVICE = torch.device("cpu")
VOCABULARY = 32768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--words", type=int, nargs=3, default=[60, 150, 60], metavar=("USER", "THINKING", "RESPONSE"))
    parser.add_argument("--conversations", type=int, default=2, help="per step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    shape = Shape(arguments.turns, *arguments.words)
    words = make_words(VOCABULARY)
    rows = make_rows(words, shape, arguments.conversations * (arguments.steps + 1))
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": "synthetic"},
            "data": {"train": "synthetic"},
            "sequence": {"max_length": max(4096, shape.longest), "max_tokens": max(16384, shape.longest)},
            "training": {"output_dir": "unused"},
        }
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(arguments.layers, arguments.width, VOCABULARY))
    parameters = sum(p.numel() for p in model.parameters())
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    use_tree_attention(model)
    tree_model = TreeModel(model, "segment")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    builder = Builder(recipe, make_renderer(make_tokenizer(words), {}))
    host, device, tokens = [], [], []
    for number in range(arguments.steps + 1):
        own = rows[number * arguments.conversations : (number + 1) * arguments.conversations]
        batches, weight_sum, parts = prepare(builder, own)
        began = time.perf_counter()
        for batch in batches:
            (tree_model(batch) / weight_sum).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number:  # the first step warms up
            host.append(parts)
            device.append(time.perf_counter() - began)
            tokens.append(sum(batch.num_tokens for batch in batches))
    parts = {name: statistics.median(taken[name] for taken in host) for name in host[0]}
    seconds, prepared = statistics.median(device), sum(parts.values())
    result = {
        "parameters": parameters,
        "num_tokens": statistics.median(tokens),
        "step_seconds": seconds,
        "host_seconds": parts,
        "host_share": prepared / seconds,
        "host_tokens_per_second": statistics.median(tokens) / prepared,
        "environment": environment(0, DEVICE, 1, time.strftime("%Y-%m-%d")),
    }
    print(f"{parameters:,} parameters, {result['num_tokens']:,} tokens per step of {seconds:.2f} s")
    for name, taken in parts.items():
        print(f"  {name:<24}{1e3 * taken:8.2f} ms  {taken / seconds:8.3%}")
    print(f"  {'host in total':<24}{1e3 * prepared:8.2f} ms  {prepared / seconds:8.3%}")
    if arguments.json:
        write_json(arguments.json, result)


def prepare(builder: Builder, rows: list[dict[str, Any]]) -> tuple[list[Batch], float, dict[str, float]]:
    """The batches of a step, the sum of their weights, and the seconds that each part of the preparation took."""
    budget = builder.recipe.sequence.budget
    marks = [time.perf_counter()]
    turns = [builder.turns(parse_row(row, f"row {i}")) for i, row in enumerate(rows)]
    marks.append(time.perf_counter())
    views = [weigh(own, builder.recipe.loss.weighting) for own in turns]
    layouts = [layout for group in views for layout in build_layouts(group, "single_pass", budget)]
    marks.append(time.perf_counter())
    batches = [build_batch(pack) for pack in build_packs(layouts, budget)[0]]
    marks.append(time.perf_counter())
    for batch in batches:
        tile_plan(batch.tree, FULL)
    marks.append(time.perf_counter())
    names = ("parse, render, encode", "weigh, merge", "pack, tensors", "mask plan")
    parts = {name: end - begin for name, (begin, end) in zip(names, itertools.pairwise(marks), strict=True)}
    return batches, float(sum(layout.weight.sum() for layout in layouts)), parts


if __name__ == "__main__":
    main()
