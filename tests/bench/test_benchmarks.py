"""Claims: the scripts under benchmarks/ run, count what they say, and the GPU's parts go on where they were cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

PARTS = {
    "packs": {"num_tokens", "seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "mask_seconds", "mask_share"},
    "turns": {"cases", "speedup", "limit", "figure_of_merit", "gradient_checkpointing"},
    "long": {"losses", "seconds", "peak_memory_bytes"},
}


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


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_what_is_owed_to_a_gpu_can_be_rehearsed(part: str, tmp_path: Path) -> None:
    arguments = (part, "--rehearse", "--models", "qwen3-8b", "--results", tmp_path)
    stopped = script("gpu.py", *arguments, "--seconds", 0)
    assert stopped.returncode == 3, stopped.stderr
    assert "cases left" in stopped.stdout
    done = script("gpu.py", *arguments)
    assert done.returncode == 0, done.stderr
    path = tmp_path / f"gpu-{part}.jsonl"
    lines = path.read_text().splitlines()
    assert lines
    for line in map(json.loads, lines):
        assert line["case"]["model"] == "qwen3-8b"
        assert line.keys() >= PARTS[part], line
    assert json.loads((tmp_path / "gpu-environment.json").read_text())["rehearsal"] is True
    again = script("gpu.py", *arguments)
    assert again.returncode == 0
    assert path.read_text().splitlines() == lines


@pytest.mark.slow
def test_a_rehearsal_never_writes_results(tmp_path: Path) -> None:
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    done = script("gpu.py", "long", "--rehearse", "--models", "llama-3-8b")
    assert done.returncode == 0, done.stderr
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before
