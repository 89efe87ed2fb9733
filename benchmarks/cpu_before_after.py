"""Are CPU results no worse than those of an older checkout? Both run in turn on the same machine, each with its own
code and recipes: `mtr bench` on the quickstart, `mtr bench --sweep` on a model of 111 million parameters, and the
quickstart itself.

    python benchmarks/cpu_before_after.py OLDER_CHECKOUT --json benchmarks/results/cpu-before-after.json

Ratios are new / old within a round, so that a machine that slows down slows both; their spread says what they are
worth. The order within a round changes from round to round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent.parent
Figures = dict[str, float]


class Scale(NamedTuple):
    """How much is run."""

    conversations: int
    repeats: int
    turns: int
    steps: int
    generated: int


FULL, QUICK = Scale(8, 3, 8, 120, 60), Scale(1, 1, 2, 2, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("older", type=Path, help="the older checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quickstarts", type=int, default=1, help="rounds that train the quickstart too")
    parser.add_argument("--quick", action="store_true", help="tiny, to try this script")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL
    checkouts = {"old": arguments.older.resolve(), "new": HERE}
    figures: dict[str, list[Figures]] = {"old": [], "new": []}
    with tempfile.TemporaryDirectory() as folder:
        shape = make_shape(Path(folder))
        for number in range(arguments.rounds):
            for side in ("old", "new") if number % 2 == 0 else ("new", "old"):
                measured = bench(checkouts[side], scale) | sweep(checkouts[side], shape, scale)
                if number < arguments.quickstarts:
                    measured |= quickstart(checkouts[side], Path(folder) / f"{side}-{number}", scale)
                figures[side].append(measured)
                print(number, side, json.dumps(measured), flush=True)
    result = {
        "commits": {side: commit(path) for side, path in checkouts.items()},
        "rounds": arguments.rounds,
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
        "figures": compared(figures["old"], figures["new"]),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    for name, row in result["figures"].items():
        ratio = ", ".join(f"{row['ratio'][key]:.3f}" for key in ("min", "median", "max"))
        print(f"{name:40} old {row['old']['median']:12.4f}  new {row['new']['median']:12.4f}  new/old {ratio}")


def compared(old: list[Figures], new: list[Figures]) -> dict[str, Any]:
    """Each figure: its values on both sides, and the ratios within the rounds that have it."""
    rows = {}
    for name in old[0]:
        pairs = [(a[name], b[name]) for a, b in zip(old, new, strict=True) if name in a and name in b]
        ratios = [b / a if a else float(b == a) for a, b in pairs]
        values = {"old": [a for a, _ in pairs], "new": [b for _, b in pairs], "ratio": ratios}
        rows[name] = {key: {**spread(found), "all": found} for key, found in values.items()}
    return rows


def spread(values: list[float]) -> Figures:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def mtr(checkout: Path, *arguments: object) -> str:
    """Standard output of a command, with the code of this checkout."""
    paths = os.pathsep.join(filter(None, [str(checkout / "src"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "mtr", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    if done.returncode:
        sys.exit(f"{checkout}: mtr {arguments[0]} failed:\n{done.stderr}")
    return done.stdout


def bench(checkout: Path, scale: Scale) -> Figures:
    counts = ("--conversations", scale.conversations, "--repeats", scale.repeats)
    result = json.loads(mtr(checkout, "bench", checkout / "recipes" / "quickstart.yaml", "--json", *counts))
    return cases("quickstart", result)


def sweep(checkout: Path, recipe: Path, scale: Scale) -> Figures:
    options = ("--sweep", "--turns", scale.turns, "--repeats", scale.repeats, "--no-padded", "--json")
    result = json.loads(mtr(checkout, "bench", recipe, *options))
    return cases(f"{scale.turns} turns", result["points"][0])


def cases(name: str, result: dict[str, Any]) -> Figures:
    found = {f"{name}: {case['strategy']} seconds": case["seconds"]["median"] for case in result["cases"]}
    memory = {f"{name}: {case['strategy']} bytes": case["peak_memory_bytes"] for case in result["cases"]}
    return {**found, **memory, f"{name}: loss": result["cases"][0]["loss"]}


def make_shape(folder: Path) -> Path:
    """The recipe of a random model, which both sides load."""
    script = HERE / "benchmarks" / "make_shape.py"
    path = os.pathsep.join([str(HERE / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(script), str(folder / "shape")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": path})
    return next((folder / "shape").rglob("recipe.yaml"))


def quickstart(checkout: Path, output: Path, scale: Scale) -> Figures:
    """Seconds of its steps, and how well it does at the end."""
    overrides = [f"training.output_dir={output}", f"training.max_steps={scale.steps}"]
    overrides.append(f"generation.conversations={scale.generated}")
    began = time.perf_counter()
    mtr(checkout, "train", checkout / "recipes" / "quickstart.yaml", *overrides)
    total = time.perf_counter() - began
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    last = {key: value for line in lines for key, value in line.items() if isinstance(value, (int, float))}
    found = {
        "quickstart: total seconds": total,
        "quickstart: tokens per second": statistics.median(line["tokens_per_second"] for line in trained),
        "quickstart: peak bytes": max(line["peak_memory_bytes"] for line in trained),
    }
    turns = [json.loads(line) for line in (output / "generations.jsonl").read_text().splitlines()]
    accuracy = statistics.mean(turn["exact_match"] for turn in turns if turn["step"] == scale.steps)
    return found | {"quickstart: eval_loss": last["eval_loss"], "quickstart: accuracy": accuracy}


def commit(checkout: Path) -> str:
    """Its hash, with a + for changes that are not committed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True)
        return done.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if git("status", "--porcelain") else "")


if __name__ == "__main__":
    main()
