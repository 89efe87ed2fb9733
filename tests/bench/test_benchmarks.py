"""Claims: the scripts under benchmarks/ run, and count what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from cpu_before_after import compared
from support.paths import ROOT


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_flex_visits_few_blocks_beyond_the_pairs(tmp_path: Path) -> None:
    done = script("blocks.py", "--json", tmp_path / "blocks.json")
    assert done.returncode == 0, done.stderr
    counted = json.loads((tmp_path / "blocks.json").read_text())
    committed = json.loads((ROOT / "benchmarks" / "results" / "blocks.json").read_text())
    assert counted == committed
    assert counted["blocks"] <= 1.12 * counted["pair_minimum"]
    assert counted["blocks"] < counted["per_turn_blocks"] < counted["dense_causal_blocks"]


def test_figures_of_two_checkouts_are_compared_round_by_round() -> None:
    """A figure that only some rounds have is compared in these."""
    old: list[dict[str, float]] = [{"seconds": 2.0, "accuracy": 0.0}, {"seconds": 4.0}]
    new: list[dict[str, float]] = [{"seconds": 1.0, "accuracy": 0.0}, {"seconds": 6.0}]
    rows = compared(old, new)
    assert rows["seconds"]["ratio"] == {"min": 0.5, "median": 1.0, "max": 1.5, "all": [0.5, 1.5]}
    assert rows["seconds"]["new"]["median"] == 3.5
    assert rows["accuracy"]["ratio"]["all"] == [1.0]
