"""`python -m support.cuda`: the checks of `scripts/cuda_check`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from support.cuda.parts import JOBS, PARTS, Finished, run_apart
from support.cuda.report import show, steps_in_short

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/cuda_check", description="A CUDA path that a CPU can check.")
    parser.add_argument("--quick", action="store_true", help="a part of each check, within two minutes on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part (may be repeated)")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes at the same time")
    arguments = parser.parse_args()
    wanted = arguments.only or PARTS
    jobs = [job for job in JOBS if job.part in wanted]
    console = Console(width=80, highlight=False)
    began = time.perf_counter()
    finished: list[Finished] = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = [(job.part, pool.submit(run_apart, job, arguments.quick)) for job in jobs]
        for part in dict.fromkeys(job.part for job in jobs):
            results = [one.result() for name, one in running if name == part]
            show(console, part, results)
            finished += results
    seconds = time.perf_counter() - began
    ok = all(one.ok for one in finished)
    console.rule(f"{'all of it holds' if ok else 'NOT all of it holds'}, {seconds:.0f} s", align="left")
    if arguments.json:
        arguments.json.write_text(json.dumps(_report(finished, arguments.quick, seconds), indent=1) + "\n")
    return 0 if ok else 1


def _report(finished: list[Finished], quick: bool, seconds: float) -> dict[str, Any]:
    return {
        "ok": all(one.ok for one in finished),
        "quick": quick,
        "seconds": round(seconds, 1),
        "machine": f"{platform.system()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "parts": [
            {
                "part": one.job.part,
                "name": one.job.name,
                "ok": one.ok,
                "seconds": round(one.seconds, 1),
                "problem": one.problem,
                "results": steps_in_short(one.results) if one.job.part == "step" else one.results,
            }
            for one in finished
        ],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
