"""Do time and memory on the CPU grow with the tree's visible pairs, or with the square of its tokens?

    python benchmarks/growth.py --json benchmarks/results/growth-cpu.json

There are two ways up to 32k tokens: one conversation with more and more turns, and more and more conversations of one
shape in a pack, where pairs grow in proportion to tokens. Measured are attention alone (8 heads of size 64, forward and
backward), a dense mask for comparison up to --dense tokens, and a complete model with 6 layers and width 512. Memory is
the growth of the resident set.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from make_shape import small_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from mtr.attention.interface import attend, use_tree_attention
from mtr.attention.masks import TreeAttention
from mtr.bench.synthetic import Shape, make_views
from mtr.files import write_json
from mtr.model.device import keep_freed_memory, peak_memory, reset_peak_memory
from mtr.model.tree_model import TreeModel
from mtr.training.environment import environment
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import Layout
from mtr.tree.mask import FULL
from mtr.tree.packing import Pack, build_layouts

DEVICE = torch.device("cpu")
HEADS, HEAD_SIZE = 8, 64
WORDS = (60, 150, 60)
VOCABULARY = 4096


def layouts(turns: int, conversations: int) -> list[Layout]:
    views = make_views(Shape(turns, *WORDS), conversations, VOCABULARY)
    return [layout for group in views for layout in build_layouts(group, "single_pass", 2**20)]


def turns_for(tokens: int) -> int:
    """Turns of a conversation whose tree has about this many tokens: each adds its own and a copy of its response."""
    user, thinking, response = WORDS
    return round(tokens / (user + thinking + 2 * response + 9))


def measure(run: Callable[[], None]) -> dict[str, float]:
    """Growth of the resident set in the first run, and seconds of the fastest run of up to five, within 4 seconds."""
    reset_peak_memory(DEVICE)
    before, memory = peak_memory(DEVICE), 0
    taken: list[float] = []
    while len(taken) < 5 and sum(taken) < 4:
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
        memory = memory or peak_memory(DEVICE) - before
    return {"seconds": min(taken), "memory_bytes": memory}


def attention_of(batch: Batch, backend: Any) -> Callable[[], None]:
    length = batch.input_ids.shape[1]
    query, key, value = (torch.randn(1, HEADS, length, HEAD_SIZE, requires_grad=True) for _ in range(3))

    def run() -> None:
        tree = TreeAttention(batch.tree, [FULL], backend)
        out: Tensor = attend(tree, FULL, query, key, value, HEAD_SIZE**-0.5)
        torch.autograd.grad(out, (query, key, value), torch.ones_like(out))

    return run


def model_of(batch: Batch, model: TreeModel) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(batch).backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--dense", type=int, default=8192, help="most tokens for which the dense mask is measured")
    parser.add_argument("--part", choices=["attention", "model", "all"], default="all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(6, 512, VOCABULARY))
    use_tree_attention(model)
    tree_model = TreeModel(model, "segment")
    first = turns_for(arguments.tokens[0])
    warm_up = build_batch(Pack(tuple(layouts(first, 1))))
    for run in (attention_of(warm_up, "segment"), attention_of(warm_up, "sdpa"), model_of(warm_up, tree_model)):
        run()
    rows = []
    for kind in ("one conversation", "several conversations"):
        for tokens in arguments.tokens:
            one = kind == "one conversation"
            trees = layouts(turns_for(tokens), 1) if one else layouts(first, tokens // arguments.tokens[0])
            batch = build_batch(Pack(tuple(trees)))
            length = batch.num_tokens
            row: dict[str, Any] = {"kind": kind, "num_tokens": length, "pairs": int((batch.position_ids + 1).sum())}
            row["square"] = length * (length + 1) // 2
            if arguments.part in ("attention", "all"):
                row["attention"] = measure(attention_of(batch, "segment"))
                if length <= arguments.dense * 1.1:
                    row["dense"] = measure(attention_of(batch, "sdpa"))
            if arguments.part in ("model", "all"):
                row["model"] = measure(model_of(batch, tree_model))
            rows.append(row)
            print(row, flush=True)
    show(rows)
    if arguments.json:
        about = environment(0, DEVICE, 1, time.strftime("%Y-%m-%d"))
        write_json(arguments.json, {"words": WORDS, "rows": rows, "environment": about})


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows, with multiples of the first row of the same kind."""
    names = [name for name in ("attention", "dense", "model") if any(name in row for row in rows)]
    print(f"{'':<23}{'tokens':>8}{'pairs':>8}{'square':>8}", *(f"{f'{n} s':>13}{'GiB':>7}" for n in names))
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        base = own[0]
        for row in own:
            counts = [f"{row[key] / base[key]:>7.1f}x" for key in ("pairs", "square")]
            cells = [
                f"{row[n]['seconds']:>6.2f}{row[n]['seconds'] / base[n]['seconds']:>6.1f}x"
                f"{row[n]['memory_bytes'] / 2**30:>7.2f}"
                if n in row
                else f"{'-':>20}"
                for n in names
            ]
            print(f"{kind:<23}{row['num_tokens']:>8,}", *counts, *cells, sep="")


if __name__ == "__main__":
    main()
