"""The benchmarks that need a CUDA device, in parts that each fit into a time limit. Every case is written as soon as it
is measured, so an interrupted call can be continued; running out of memory is a result.

    python benchmarks/gpu.py packs   tokens/s, MFU, memory and mask building for packs of 16k, 32k and 64k tokens, by
                                     backend and gradient checkpointing
    python benchmarks/gpu.py turns   single pass against one pass per turn, packed and padded, at 4, 8, 16 and 32 turns
    python benchmarks/gpu.py long    trains on a tree of 128k tokens

The models have the architectures of Qwen3-8B and Llama-3-8B, with random weights and LoRA of rank 16 on all linear
layers, in bfloat16. Conversations are synthetic: 60 + 600 + 200 tokens per turn (user, thinking, response).

`--rehearse` runs everything with a tiny model and short packs, on any device, into a separate folder.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtr.attention.choice import fastest, pad_to_multiple_of
from mtr.attention.interface import use_tree_attention
from mtr.attention.model_parts import base_model
from mtr.bench.runs import measure, set_up
from mtr.bench.setup import Options, Setup
from mtr.bench.synthetic import Shape, make_views
from mtr.bench.timing import wait
from mtr.errors import UserError
from mtr.files import write_json
from mtr.model.device import peak_memory, reset_peak_memory
from mtr.model.memory import checkpoint_activations
from mtr.model.tree_model import TreeModel
from mtr.recipe.sections import Checkpointing, Recipe
from mtr.training.environment import environment
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import Layout
from mtr.tree.mask import Tree, block_mask
from mtr.tree.packing import Pack, build_layouts
from mtr.tree.plan import tile_plan, varlen_plan

HERE = Path(__file__).parent
MODELS = ("qwen3-8b", "llama-3-8b")
UNFINISHED = 3
"""Exit code: the time is up and cases are left; run the part again."""


@dataclass(frozen=True)
class Size:
    """Sizes of the cases."""

    packs: tuple[int, ...] = (16384, 32768, 65536)
    turns: tuple[int, ...] = (4, 8, 16, 32)
    shape: tuple[int, int, int] = (60, 600, 200)
    long: tuple[int, int, int, int] = (39, 200, 2000, 600)
    """Turns, user, thinking, response."""
    modes: tuple[Checkpointing, ...] = ("none", "selective", "full")
    repeats: int = 3


TINY = Size((512, 1024), (2, 4), (4, 12, 6), (8, 4, 40, 12), repeats=1)


class Results:
    """One JSON object per line, with the case as its key; a case that is there is not measured again."""

    def __init__(self, path: Path, until: float) -> None:
        self.path, self._until = path, until
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self._done = {json.dumps(json.loads(line)["case"], sort_keys=True) for line in lines}
        self.left = 0

    def has(self, case: dict[str, Any]) -> bool:
        return json.dumps(case, sort_keys=True) in self._done

    def wants(self, case: dict[str, Any]) -> bool:
        """Whether to measure a case now; once the time is up, a case is counted as left."""
        if self.has(case):
            return False
        if time.monotonic() > self._until:
            self.left += 1
            return False
        return True

    def write(self, case: dict[str, Any], measured: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(write_json(None, {"case": case, **measured}) + "\n")
        shown = {key: value for key, value in measured.items() if isinstance(value, (int, float, str))}
        print(json.dumps(case), json.dumps(shown), flush=True)


def recipe_for(name: str, rehearse: bool, max_tokens: int) -> Recipe:
    folder = HERE / "shapes" / name
    if rehearse:
        config = json.loads((folder / "config.json").read_text())
        small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
        config |= small | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "dtype": "float32"}
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-tiny-"))
        (folder / "config.json").write_text(json.dumps(config))
    return Recipe.model_validate(
        {
            "model": {"name_or_path": str(folder)},
            "data": {"train": "synthetic"},
            "lora": {"r": 16, "alpha": 32, "target_modules": "all-linear"},
            "sequence": {"max_length": max_tokens, "max_tokens": max_tokens},
            "training": {"output_dir": "unused", "gradient_checkpointing": "none"},
        }
    )


def open_bench(name: str, rehearse: bool, max_tokens: int, all_backends: bool = False) -> Setup:
    gc.collect()
    torch.cuda.empty_cache()
    options = Options(random_weights=True, all_backends=all_backends)
    own = set_up(recipe_for(name, rehearse, max_tokens), options)
    use_tree_attention(own.model)
    return own


@contextmanager
def out_of_memory(record: Callable[[dict[str, Any]], None], device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        record({"error": f"out of memory: {str(error).splitlines()[0]}"})
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def keep(model: Any, mode: Checkpointing) -> None:
    """Switch to this mode of gradient checkpointing."""
    base_model(model).gradient_checkpointing_disable()
    checkpoint_activations(model, mode)


def layouts_of(shape: Shape, conversations: int, own: Setup, budget: int) -> list[Layout]:
    views = make_views(shape, conversations, own.vocabulary)
    return [layout for group in views for layout in build_layouts(group, "single_pass", budget)]


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


def measure_pack(own: Setup, backend: Any, layouts: list[Layout], repeats: int) -> dict[str, Any]:
    """Time and memory of the forward and backward pass of one pack."""
    model = TreeModel(own.model, backend)
    batch: Batch = build_batch(Pack(tuple(layouts)), pad_to_multiple_of([backend])).to(own.device)
    taken = []
    reset_peak_memory(own.device)
    for _ in range(repeats + 1):
        own.model.zero_grad(set_to_none=True)
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
        "tokens_per_second": batch.num_tokens / seconds,
        "flops_per_second": flops / seconds,
        "mfu": flops / seconds / own.matrix_rate["flops_per_second"],
        "matrix_rate": own.matrix_rate["flops_per_second"],
        "peak_memory_bytes": peak_memory(own.device),
        "mask_seconds": mask,
        "mask_share": mask / seconds,
    }


def packs(results: Results, size: Size, models: list[str], rehearse: bool) -> None:
    backends = ("flex", "varlen") if torch.cuda.is_available() else ("segment",)
    ways = list(itertools.product(size.modes, size.packs, backends))
    for name in models:
        wanted = [
            {"model": name, "gradient_checkpointing": mode, "max_tokens": tokens, "attention": backend}
            for mode, tokens, backend in ways
        ]
        if all(results.has(case) for case in wanted):
            continue
        own = open_bench(name, rehearse, max(size.packs))
        for case, (mode, tokens, backend) in zip(wanted, ways, strict=True):
            if not results.wants(case):
                continue
            with out_of_memory(functools.partial(results.write, case), own.device):
                keep(own.model, mode)
                (one,) = layouts_of(Shape(8, *size.shape), 1, own, tokens)
                layouts = layouts_of(Shape(8, *size.shape), tokens // one.num_tokens, own, tokens)
                results.write(case, measure_pack(own, backend, layouts, size.repeats))
        del own


def turns(results: Results, size: Size, models: list[str], rehearse: bool) -> None:
    longest = max(size.turns)
    for name in models:
        own: Setup | None = None
        for number in size.turns:
            case = {"model": name, "turns": number, "words": list(size.shape)}
            if not results.wants(case):
                continue
            if own is None:
                tree = Shape(longest, *size.shape)
                room = tree.longest + longest * (size.shape[1] + size.shape[2] + 8)
                own = open_bench(name, rehearse, room, all_backends=True)
            views = make_views(Shape(number, *size.shape), max(1, 8 // number), own.vocabulary)
            errors: list[dict[str, Any]] = []
            for mode in ("selective", "full"):
                keep(own.model, mode)
                with out_of_memory(errors.append, own.device):
                    try:
                        measured = measure(own, views, pad_id=0, repeats=size.repeats)
                    except UserError as error:
                        errors.append({"error": str(error)})
                        continue
                    results.write(case, {"gradient_checkpointing": mode, "matrix_rate": own.matrix_rate, **measured})
                    break
            else:
                results.write(case, errors[-1])


def long(results: Results, size: Size, models: list[str], rehearse: bool) -> None:
    """Three AdamW steps on one tree: the loss must fall."""
    for name in models:
        case = {"model": name, "long": list(size.long)}
        if not results.wants(case):
            continue
        own = open_bench(name, rehearse, 2**18)
        (layout,) = layouts_of(Shape(*size.long), 1, own, 2**18)
        errors: list[dict[str, Any]] = []
        for mode in ("full", "offload"):  # the second if the first does not fit
            with out_of_memory(errors.append, own.device):
                keep(own.model, mode)
                measured = train_on(own, layout)
                results.write(case, {"gradient_checkpointing": mode, **measured, "failed": errors})
                break
        else:
            results.write(case, errors[-1])


def train_on(own: Setup, layout: Layout) -> dict[str, Any]:
    model = TreeModel(own.model, *own.usable, choose=fastest)
    batch = build_batch(Pack((layout,)), pad_to_multiple_of(own.usable)).to(own.device)
    trained = [p for p in own.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses, taken = [], []
    reset_peak_memory(own.device)
    for _ in range(3):
        began = time.perf_counter()
        loss = model(batch) / float(layout.weight.sum())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        taken.append(time.perf_counter() - began)
    assert losses[2] < losses[0], f"the loss did not fall: {losses}"
    seconds = min(taken)  # the first step compiles
    return {
        "num_tokens": layout.num_tokens,
        "attention": model.backends[0],
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second": layout.num_tokens / seconds,
        "mfu": own.counter.of_layouts([layout]) / seconds / own.matrix_rate["flops_per_second"],
        "peak_memory_bytes": peak_memory(own.device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["packs", "turns", "long"])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=480, help="start no case after this many seconds")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on any device")
    arguments = parser.parse_args()
    if arguments.rehearse:
        if arguments.results.resolve() == (HERE / "results").resolve():
            arguments.results = Path(tempfile.mkdtemp(prefix="mtr-rehearsal-"))
    elif not torch.cuda.is_available():
        sys.exit("this machine has no CUDA device; --rehearse runs the parts at a tiny size on any device")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = environment(0, device, 1, time.strftime("%Y-%m-%d")) | {"rehearsal": arguments.rehearse}
    write_json(arguments.results / "gpu-environment.json", about)
    results = Results(arguments.results / f"gpu-{arguments.part}.jsonl", time.monotonic() + arguments.seconds)
    part = {"packs": packs, "turns": turns, "long": long}[arguments.part]
    part(results, TINY if arguments.rehearse else Size(), arguments.models, arguments.rehearse)
    print(f"{results.path}: {results.left} cases left" if results.left else f"{results.path}: complete")
    sys.exit(UNFINISHED if results.left else 0)


if __name__ == "__main__":
    main()
