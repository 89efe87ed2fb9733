"""Claims: the scripts under benchmarks/ run, and count what they say."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import hybrids
import pytest
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


def test_all_ways_to_train_a_hybrid_compute_the_same() -> None:
    """But for the bound, which leaves the scan out."""
    model = hybrids.hybrid(layers=2, width=64)
    losses = {}
    for name, case in hybrids.cases_of(model, hybrids.conversation(2)).items():
        _, losses[name] = hybrids.seconds_of(model, case.run)
        assert all(p.grad is not None for p in model.parameters()), name
    bound = losses.pop("without_scan")
    assert max(losses.values()) == pytest.approx(min(losses.values()), rel=1e-6)
    assert abs(bound - losses["single_pass"]) > 1e-4 * bound


def test_conversations_of_the_hybrid_benchmark_grow_by_a_turn() -> None:
    first, second = hybrids.conversation(2)
    assert first.num_tokens == hybrids.SYSTEM + hybrids.USER + hybrids.THINKING + hybrids.ANSWER
    assert second.num_tokens == first.num_tokens + hybrids.USER + hybrids.ANSWER  # the first turn's thinking is gone
    history = [*first.prompt_ids, *first.completion_ids[hybrids.THINKING :]]
    shared = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(history, second.prompt_ids, strict=False)))
    assert len(shared) == len(history)


@pytest.mark.slow
def test_the_hybrid_benchmark_runs(tmp_path: Path) -> None:
    small = ("--turns", 2, "--tokens", 1000, 2000, "--memory", 2, "--rounds", 1)
    done = script("hybrids.py", *small, "--json", tmp_path / "hybrids.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "hybrids.json").read_text())
    assert found["compared"][0]["cases"]["single_pass"]["speedup_over_per_turn"]["median"] > 1
    assert [row["kind"] for row in found["growth"]] == ["several conversations"] * 2 + ["one conversation"] * 2
