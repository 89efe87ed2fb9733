"""What a rehearsal did not exercise, found by the code: what asked for a device, and the lines that never ran.

    if on_device("FlexAttention's kernels"):   false where there is none, and the text is listed at the end

scripts/gpu has the package coverage count lines, where it is installed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SUMMARY, LINES = "gpu-rehearsal.json", "gpu-rehearsal.coverage"

_without_device: Counter[str] = Counter()


def on_device(what: str) -> bool:
    """Whether there is a CUDA device; where there is none, `what` is listed as not exercised."""
    import torch

    if torch.cuda.is_available():
        return True
    _without_device[what] += 1
    return False


def not_run(results: Path) -> dict[str, dict[str, Any]] | None:
    """For each file, its lines that can run and those that no part ran; None where they were not counted."""
    path = results / LINES
    if not path.exists():
        return None
    from coverage import Coverage

    counter = Coverage(data_file=str(path), include=[f"{FOLDER}/*"], config_file=False)
    counter.load()
    found = {}
    for file in sorted(FOLDER.glob("*.py")):
        _, lines, _, missing, _ = counter.analysis2(str(file))
        found[file.name] = {"lines": len(lines), "missing": missing}
    return found


def note_device_work(results: Path, part: str) -> None:
    """Add what this part could not do without a device to the summary of the rehearsal."""
    path = results / SUMMARY
    summary = json.loads(path.read_text()) if path.exists() else {}
    known = summary.setdefault("without_device", {}).setdefault(part, [])
    known += [text for text in _without_device if text not in known]
    path.write_text(json.dumps(summary, indent=2) + "\n")


def summarise(results: Path) -> list[str]:
    """What the rehearsal did not exercise, for a reader; written to the summary as well."""
    path = results / SUMMARY
    summary = json.loads(path.read_text()) if path.exists() else {"without_device": {}}
    told = ["Not exercised by this rehearsal:"]
    for part, texts in summary["without_device"].items():
        told += [f"  {part}: {text}" for text in texts]
    counted = not_run(results)
    if counted is None:
        return [*told, "  lines of benchmarks/gpu were not counted: the package coverage is not installed"]
    lines, missing = (sum(map(size, counted.values())) for size in (lambda x: x["lines"], lambda x: len(x["missing"])))
    summary["lines"] = {"run": lines - missing, "of": lines, "files": counted}
    path.write_text(json.dumps(summary, indent=2) + "\n")
    told.append(f"  lines of benchmarks/gpu: {missing} of {lines}, {100 * (lines - missing) / lines:.1f} % were run")
    for name, one in counted.items():
        texts = (FOLDER / name).read_text(encoding="utf-8").splitlines()
        told += [f"    {name}:{number}  {texts[number - 1].strip()}" for number in first_lines(one["missing"])]
    return told


def first_lines(numbers: Iterable[int]) -> list[int]:
    """Of each run of consecutive numbers the first."""
    known = set(numbers)
    return sorted(number for number in known if number - 1 not in known)
