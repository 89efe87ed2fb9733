"""Try to make mtr do harm: damage valid recipes, rows, templates and run folders at random, and see how it ends.

    python scripts/hostile_test.py --examples 10000 --json FILE
    python scripts/hostile_test.py --attempts      # the table of tests/hostile, with those that take long

A trial may end well, with a right result, or with a documented exit code and one line (see tests/hostile/fuzzing.py).
The report counts, for each kind, how trials ended, and has the input of each that ended otherwise. The exit code is 1
if there is one. The same --seed tries the same inputs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from hostile.fuzzing import KINDS, Kind  # noqa: E402
from hostile.table import TABLE  # noqa: E402
from support.hostile import Place, run  # noqa: E402

MOST_FAILURES = 20
"""Of a kind, in the report."""


def fuzz(kind: Kind, examples: int, seed: int, place: Place) -> dict[str, Any]:
    """Ends by exit code, and what ended otherwise."""
    ends: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    began = time.monotonic()
    kind.setup(place)

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.inputs)
    def attempt(value: Any) -> None:
        try:
            outcome = kind.attempt(place, value)
            code, problem = str(outcome.code), outcome.problem
        except Exception as error:
            code, problem = "exception", f"{type(error).__name__}: {error}"
        ends[code] += 1
        if problem:
            failures.append({"input": repr(value), "problem": problem[:2000]})

    attempt()
    return {
        "examples": sum(ends.values()),
        "ends": dict(sorted(ends.items())),
        "failures": len(failures),
        "first_failures": failures[:MOST_FAILURES],
        "seconds": round(time.monotonic() - began, 1),
    }


def try_table(folder: Path) -> dict[str, Any]:
    """Every attempt of tests/hostile, by its kind: how many, and what is wrong with how they ended."""
    number: Counter[str] = Counter()
    failures: dict[str, list[str]] = {}
    began = time.monotonic()
    for name, attempt in TABLE.items():
        number[name.partition(":")[0]] += 1
        _, problems = run(attempt, folder)
        if problems:
            failures[name] = problems
    return {"attempts": dict(number), "failures": failures, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=0, help="over all kinds together")
    parser.add_argument("--kind", choices=KINDS, help="this kind only")
    parser.add_argument("--attempts", action="store_true", help="try the table too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.attempts and not options.examples:
        parser.error("give --examples, --attempts or both")
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {
        "seed": options.seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    packages = ("mtr", "torch", "transformers", "tokenizers", "peft", "hypothesis")
    report["packages"] = {name: importlib.metadata.version(name) for name in packages}
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        if options.attempts:
            report["table"] = try_table(Path(name) / "table" / "place")
            bad += len(report["table"]["failures"])
        chosen = {options.kind: KINDS[options.kind]} if options.kind else KINDS
        shares = sum(kind.share for kind in chosen.values())
        for kind_name, kind in chosen.items() if options.examples else ():
            examples = round(options.examples * kind.share / shares)
            report[kind_name] = fuzz(kind, examples, options.seed, Place(Path(name) / kind_name / "place"))
            bad += report[kind_name]["failures"]
            print(
                f"{kind_name}: {report[kind_name]['ends']}, {report[kind_name]['failures']} failures", file=sys.stderr
            )
    report["failures"] = bad
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
