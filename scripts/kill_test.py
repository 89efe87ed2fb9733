"""Kill a training run with SIGKILL again and again, resume it, and compare the result with an uninterrupted run.

    python scripts/kill_test.py --kills 50 --json benchmarks/results/kill-50.json

Runs of a small recipe (a mixture of two sources, shuffled, two data workers, evaluations, a checkpoint after every
step) are killed at random moments: anywhere, during a step, and while a checkpoint is being written. Each run is
resumed until it is done; then a new one is started, until the number of kills is reached. Every finished run must have
the metrics (except times and memory) and the weights of the reference run, bit for bit. The exit code is 1 if one
differs.

Child processes are forked from a process that has imported everything and computed nothing, so a start takes a second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

from mtr.recipe.loading import load_recipe
from mtr.training.loop import train

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart"
TIMES = ("seconds", "per_second", "memory", "mfu")
STEPS = 12


def write_recipe(folder: Path) -> Path:
    rows = (QUICKSTART / "train.jsonl").read_text().splitlines()
    for name, part in (("one", rows[:9]), ("two", rows[9:14]), ("eval", rows[14:16])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    sources = [{"path": str(folder / "one.jsonl")}, {"path": str(folder / "two.jsonl"), "weight": 1.5}]
    recipe = {
        "model": {"name_or_path": str(QUICKSTART / "base"), "dtype": "float32"},
        "lora": {"r": 4, "dropout": 0.1},
        "data": {"train": sources, "eval": str(folder / "eval.jsonl"), "num_workers": 2},
        "date": "2026-01-31",
        "training": {
            "output_dir": str(folder / "run"),
            "conversations_per_step": 3,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "save_steps": 1,
            "eval_steps": 4,
            "gradient_checkpointing": False,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(recipe: Path) -> int:
    """Fork a child that resumes the run; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with (recipe.parent / "log.txt").open("a") as log:
            os.dup2(log.fileno(), 2)
            torch.set_num_threads(1)
            train(load_recipe(recipe), resume=True)
            code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def kill_at(child: int, run: Path, kind: str, rng: random.Random) -> int | None:
    """Wait for a moment of this kind, then kill; return the exit code if the child ended before that."""
    if kind == "anywhere":
        until = time.monotonic() + rng.uniform(0.0, 3.0)
        while time.monotonic() < until:
            if (code := ended(child)) is not None:
                return code
            time.sleep(0.001)
    else:
        before = marks(run, kind)
        while marks(run, kind) == before:
            if (code := ended(child)) is not None:
                return code
            time.sleep(0.0005)
        time.sleep(rng.uniform(0.0, 0.15 if kind == "in a step" else 0.03))
        if (code := ended(child)) is not None:
            return code
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def marks(run: Path, kind: str) -> Any:
    """Something that changes when a moment of this kind begins."""
    try:
        if kind == "in a step":
            return (run / "metrics.jsonl").stat().st_mtime_ns
        return next(iter(run.glob(".checkpoint-*.partial")), None)
    except OSError:
        return None


def result_of(run: Path) -> tuple[list[dict[str, Any]], bytes]:
    """The metrics, without times and memory, and the weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not any(word in k for word in TIMES)} for line in lines]
    return kept, (run / "adapter_model.safetensors").read_bytes()


def finish(recipe: Path) -> None:
    child = start(recipe)
    while (code := ended(child)) is None:
        time.sleep(0.01)
    if code:
        sys.exit(f"a child ended with {code}:\n{(recipe.parent / 'log.txt').read_text()[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    began = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe, run = write_recipe(folder), folder / "run"
        finish(recipe)
        reference = result_of(run)
        kinds = ("in a step", "while saving", "anywhere")
        hit: Counter[str] = Counter()
        found: Counter[str] = Counter()
        runs = differing = damaged = 0
        while runs == 0 or sum(hit.values()) < options.kills:
            shutil.rmtree(run)
            while True:
                if sum(hit.values()) >= options.kills:
                    finish(recipe)
                    break
                kind = kinds[sum(hit.values()) % len(kinds)]
                child = start(recipe)
                code = kill_at(child, run, kind, rng)
                if code == 0:
                    break
                if code is not None:
                    sys.exit(f"a child ended with {code}:\n{(folder / 'log.txt').read_text()[-3000:]}")
                hit[kind] += 1
                found["half a checkpoint"] += bool(list(run.glob(".checkpoint-*.partial")))
                found["no checkpoint"] += not list(run.glob("checkpoint-*"))
            runs += 1
            differing += result_of(run) != reference
        damaged = (folder / "log.txt").read_text().count("is damaged")
    report = {
        "kills": sum(hit.values()),
        "moments": dict(hit),
        "left_behind": dict(found),
        "runs": runs,
        "differing_runs": differing,
        "damaged_checkpoints": damaged,
        "steps_per_run": STEPS,
        "metrics_lines": len(reference[0]),
        "seed": options.seed,
        "seconds": round(time.time() - began, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
