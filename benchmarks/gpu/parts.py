"""The command line of the parts."""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gpu.rehearsal import note_device_work, summarise

PARTS = ("smoke", "tests", "packs", "turns", "long", "hybrids", "qlora", "faults")
LIMIT = 480.0
GRACE = 90.0
"""Seconds that a case may go on after the limit before the process ends itself."""
FAILED, MISSING, UNFINISHED, AGAIN = 1, 2, 3, 4
"""Exit codes: all done and some failed; no device; the time is up and cases are left; a new process has to go on."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu", description="What needs a CUDA device, part by part.")
    parser.add_argument("part", choices=[*PARTS, "summary"], help="summary: what a rehearsal did not exercise")
    parser.add_argument("--results", type=Path, required=True, help="folder")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="start no case after this many seconds")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--retry", action="store_true", help="run failed cases again")
    arguments = parser.parse_args()
    results: Path = arguments.results
    results.mkdir(parents=True, exist_ok=True)
    if arguments.part == "summary":
        print("\n".join(summarise(results)))
        return 0
    until = time.monotonic() + arguments.seconds
    faulthandler.dump_traceback_later(max(arguments.seconds, 0) + GRACE, exit=True)
    code = run_part(arguments.part, results, until, arguments.rehearse, arguments.retry)
    if arguments.rehearse:
        note_device_work(results, arguments.part)
    faulthandler.cancel_dump_traceback_later()
    return code


def run_part(part: str, folder: Path, until: float, rehearse: bool, retry: bool) -> int:
    """Run the cases of a part, and return the exit code."""
    import torch

    from gpu import faults, hybrids, long, packs, qlora, smoke, suite, turns
    from gpu.results import DeviceLostError, Results
    from gpu.setting import TINY, Size
    from mtr.files import write_json
    from mtr.training.environment import environment

    if not (rehearse or torch.cuda.is_available()):
        print("torch finds no CUDA device; --rehearse runs the parts at a tiny size on any device", file=sys.stderr)
        return MISSING
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = environment(0, device, 1, time.strftime("%Y-%m-%d")) | {"rehearsal": rehearse}
    write_json(folder / "gpu-environment.json", about)
    results = Results(folder / f"gpu-{part}.jsonl", until, retry)
    run: dict[str, Callable[[Results, Size], None]] = {
        "smoke": smoke.run,
        "tests": suite.run,
        "packs": packs.run,
        "turns": turns.run,
        "long": long.run,
        "hybrids": hybrids.run,
        "qlora": qlora.run,
        "faults": faults.run,
    }
    try:
        run[part](results, TINY if rehearse else Size())
    except DeviceLostError as error:
        print(f"the device answers no more in this process: {error}", file=sys.stderr)
        return AGAIN
    print(f"{results.path}: {results.failed} failed, {results.left} left")
    failed = results.failed and part != "faults"  # its cases are meant to
    return UNFINISHED if results.left else FAILED if failed else 0
