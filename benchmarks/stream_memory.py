"""Memory, and time to the first step, with a large JSON-lines file: neither should grow with the file.

    python benchmarks/stream_memory.py --gigabytes 2 --json benchmarks/results/stream-memory.json \\
        --plot benchmarks/results/stream-memory.png

Writes a small and a large file of quickstart conversations to a temporary folder. For each file, a separate process
opens it, builds steps in shuffled order and records the memory after each step. Then `mtr train` runs one step on each
file, timed from the start of the process to the first line of metrics.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.data.mixture import Mixture
from mtr.data.opening import open_training_data
from mtr.files import write_json
from mtr.prepare.builder import Builder
from mtr.prepare.step import Step
from mtr.prepare.steps import IndexedSteps
from mtr.recipe.loading import load_recipe
from mtr.recipe.sections import Recipe
from mtr.training.environment import environment

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
MEGABYTE = 1 << 20


def make_file(path: Path, size: int) -> None:
    """Repeat the quickstart conversations, each row with a unique id, until the file has `size` bytes."""
    rows = [json.loads(line) for line in (ROOT / "recipes/quickstart/train.jsonl").read_text().splitlines()]
    ends = [json.dumps(row)[1:] + "\n" for row in rows]
    with path.open("w") as file:
        for number, end in enumerate(itertools.cycle(ends)):
            file.write(f'{{"id": {number}, {end}')
            if number % 1000 == 0 and file.tell() >= size:
                return


def memory() -> dict[str, float]:
    """Resident memory of this process in MiB: in total, its own, and mapped from files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {
        name: int(status[key].split()[0]) / 1024
        for name, key in (("total", "VmRSS"), ("own", "RssAnon"), ("file", "RssFile"))
    }


def recipe_for(path: Path, output_dir: Path, conversations: int) -> Recipe:
    overrides = [
        f"data.train={path}",
        "data.eval=[]",
        "generation.conversations=0",
        f"training.output_dir={output_dir}",
        f"training.conversations_per_step={conversations}",
    ]
    return load_recipe(QUICKSTART, overrides)


def curve(path: Path, rows: int) -> dict[str, Any]:
    """Open the file and build steps of 500 rows until `rows` rows have been read."""
    recipe = recipe_for(path, path.parent / "unused", 500)
    builder = Builder(recipe, load_renderer(recipe, load_tokenizer(recipe)))
    before, began = memory(), time.perf_counter()
    data, _ = open_training_data(recipe.data, recipe.training.seed)
    assert isinstance(data, Mixture)
    opened, opened_seconds = memory(), time.perf_counter() - began
    steps = IndexedSteps(builder.step, data, builder.recipe.training, shuffle=True)
    points, first_step = [], 0.0
    for number in range(min(rows // 500, steps.steps_per_epoch)):
        step = steps[number]
        assert isinstance(step, Step)
        first_step = first_step or time.perf_counter() - began
        points.append({"rows": step.position, **memory()})
    return {
        "gigabytes": path.stat().st_size / 1e9,
        "rows": len(data),
        "before": before,
        "opened": opened,
        "open_seconds": opened_seconds,
        "first_step_of_500_seconds": first_step,
        "curve": points,
    }


def seconds_to_first_step(path: Path, folder: Path) -> float:
    """Seconds from the start of `mtr train` to its first line of metrics."""
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe_for(path, folder / "run", 16).dump())
    began = time.perf_counter()
    command = [sys.executable, "-m", "mtr", "train", str(recipe), "training.max_steps=1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        metrics = folder / "run" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.02)
        seconds = time.perf_counter() - began
    assert process.returncode == 0, "mtr train failed"
    return seconds


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3), layout="constrained")
    axes = drawing.add_subplot()
    for file, colour in zip(result["files"], ("#a9b4c2", "#2a6f97"), strict=True):
        label = f"{file['gigabytes']:.2f} GB, {file['rows']:,} rows"
        axes.plot([p["rows"] for p in file["curve"]], [p["total"] for p in file["curve"]], color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows read, in shuffled order")
    axes.set_ylabel("resident memory, MiB")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rows", type=int, default=20_000, help="rows read from each file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--curve-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.curve_of:
        print(json.dumps(curve(arguments.curve_of, arguments.rows)))
        return

    files = []
    with tempfile.TemporaryDirectory(prefix="mtr-stream-") as temporary:
        folder = Path(temporary)
        for size in (0.02, arguments.gigabytes):
            path = folder / f"rows-{size}.jsonl"
            make_file(path, int(size * 1e9))
            command = [sys.executable, __file__, "--curve-of", str(path), "--rows", str(arguments.rows)]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            found["train_first_step_seconds"] = seconds_to_first_step(path, folder / f"train-{size}")
            files.append(found)
            first, last = found["curve"][0]["total"], found["curve"][-1]["total"]
            print(
                f"{found['gigabytes']:.2f} GB, {found['rows']:,} rows: opened in {found['open_seconds']:.2f} s, "
                f"memory {found['before']['total']:.0f} MiB before, {found['opened']['total']:.0f} opened, {first:.0f} "
                f"after 500 rows, {last:.0f} after {found['curve'][-1]['rows']:,}; "
                f"mtr train: first step after {found['train_first_step_seconds']:.1f} s"
            )
    result = {"files": files, "environment": environment(0, torch.device("cpu"), 1, "2026-01-31")}
    if arguments.json:
        write_json(arguments.json, result)
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
