"""`python -m support.families`: what `scripts/support_table` runs. Each family has a process of its own."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from support.families.catalogue import FAMILIES
from support.families.page import page
from support.paths import ROOT

PAGE, RESULTS = ROOT / "docs" / "models.md", ROOT / "benchmarks" / "results" / "models.json"
_AT_ONCE = 12
"""Families that a process tries one after another: loading the libraries takes longer than most of them."""
_LONGEST = 600
"""Seconds for them."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/support_table", description="Which models are exact, and how.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these families; prints their rows")
    parser.add_argument("--json", type=Path, metavar="FILE", default=RESULTS, help="where the figures go")
    parser.add_argument("--page", type=Path, metavar="FILE", default=PAGE, help="where the page goes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at the same time")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return _child(arguments.names)
    known = [family.name for family in FAMILIES]
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"no such family: {', '.join(unknown)}")
    names, began = arguments.names or known, time.perf_counter()
    groups = [names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = {name: row for rows in pool.map(_run, groups) for name, row in rows.items()}
    console = Console(highlight=False, soft_wrap=True)
    for name, row in found.items():
        worst = [f"{case} {max(one['loss'], one['gradient']):.0e}" for case, one in row["differences"].items()]
        said = row["problem"] or row["reason"] or ""
        console.print(f"{name:24} {row['strategy']:18} {'  '.join(worst)}  {said}", markup=False)
    problems = [name for name, row in found.items() if row["problem"]]
    if not arguments.names:
        results: dict[str, Any] = {"versions": _versions(), "date": str(datetime.date.today()), "cores": arguments.jobs}
        results |= {"seconds": round(time.perf_counter() - began, 1), "families": found}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        arguments.page.write_text(page(results), encoding="utf-8")
    console.print(f"{len(found)} families, {len(problems)} problems: {', '.join(problems) or 'none'}", markup=False)
    return 1 if problems else 0


def _run(names: list[str]) -> dict[str, Any]:
    """In a process of their own; what it did not get to is tried again without the family that ended it."""
    command = [sys.executable, "-m", "support.families", "--child", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=None, check=False)
    rows = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    left = [name for name in names if name not in rows]
    if not left:
        return rows
    said = done.stderr.strip().splitlines()
    problem = f"the process ended with {done.returncode}: {said[-1] if said else ''}"
    rows[left[0]] = _no_evidence(problem)
    return rows | (_run(left[1:]) if left[1:] else {})


def _child(names: list[str]) -> int:
    import resource

    import torch
    import transformers

    from support.families.catalogue import config_of
    from support.families.evidence import gather

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    resource.setrlimit(resource.RLIMIT_CPU, (_LONGEST, _LONGEST))
    for name in names:
        try:
            row = gather(config_of(name)).to_json()
        except Exception as error:  # whatever the code of a model raises is a row of the table
            row = _no_evidence(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        print(json.dumps([name, row]), flush=True)
    return 0


def _no_evidence(problem: str) -> dict[str, Any]:
    return {"strategy": "refused", "reason": None, "differences": {}, "problem": problem}


def _versions() -> dict[str, str]:
    packages = ("mtr", "torch", "transformers", "peft")
    return {name: version("mtr" if name == "mtr" else name) for name in packages}


if __name__ == "__main__":
    sys.exit(main())
