"""Claims: what needs a GPU says at once what is missing, writes each result as soon as it is there, goes on after a
case that failed, ended its process or was cut off, and rehearses all of its lines that need no device.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu.rehearsal
import gpu.results
import gpu.smoke
import pytest
import torch
from gpu.preflight import Found, doubts, fits, look, problems, requirements
from gpu.results import DeviceLostError, Results, UnavailableError
from gpu.setting import MODELS, TINY
from support.paths import ROOT

from mtr.errors import UserError

SCRIPT = ROOT / "scripts" / "gpu"


def no_time() -> float:
    return time.monotonic() - 1


def much_time() -> float:
    return time.monotonic() + 100


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- results ----------------------------------------------------------------------------------------------------------


def measure(value: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"value": value}


def fail(error: Exception) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        raise error

    return run


def test_a_case_is_written_at_once_and_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    Results(path, much_time()).run({"a": 1}, measure(1))
    assert lines(path)[0]["value"] == 1
    again = Results(path, much_time())
    again.run({"a": 1}, measure(2))
    again.run({"a": 2}, measure(3))
    assert [line["value"] for line in lines(path)] == [1, 3]
    assert again.of({"a": 2}) == lines(path)[1]


def test_what_is_left_when_the_time_is_up_is_counted(tmp_path: Path) -> None:
    results = Results(tmp_path / "part.jsonl", no_time())
    results.run({"a": 1}, measure(1))
    assert results.left == 1
    assert not results.path.exists()


@pytest.mark.parametrize(
    ("error", "text", "has_traceback"),
    [
        (RuntimeError("a kernel failed"), "RuntimeError: a kernel failed", True),
        (UserError("set this key"), "set this key", False),
        (torch.OutOfMemoryError("Tried to allocate 3 GiB\nmore"), "out of memory: Tried to allocate 3 GiB", False),
    ],
    ids=["bug", "user", "memory"],
)
def test_a_failure_is_a_result_and_the_next_case_goes_on(
    tmp_path: Path, error: Exception, text: str, has_traceback: bool
) -> None:
    results = Results(tmp_path / "part.jsonl", much_time())
    results.run({"a": 1}, fail(error))
    results.run({"a": 2}, measure(1))
    failed, fine = lines(results.path)
    assert failed["error"] == text
    assert any("in run" in line for line in failed["traceback"]) == has_traceback
    assert fine["value"] == 1
    assert results.failed == 1


def test_failures_can_be_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    first = Results(path, much_time())
    first.run({"a": 1}, measure(1))
    first.run({"a": 2}, fail(RuntimeError("mended since")))
    second = Results(path, much_time(), retry=True)
    second.run({"a": 1}, fail(RuntimeError("not run again")))
    second.run({"a": 2}, measure(2))
    assert [line["value"] for line in lines(path)] == [1, 2]
    assert second.failed == 0


def test_what_a_machine_cannot_do_is_no_failure(tmp_path: Path) -> None:
    results = Results(tmp_path / "part.jsonl", much_time())
    results.run({"a": 1}, fail(UnavailableError("no such package")))
    assert lines(results.path)[0]["skipped"] == "no such package"
    assert results.failed == 0


def test_a_case_that_ends_its_process_is_tried_twice(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    for _ in range(2):
        assert Results(path, much_time()).begin({"a": (1, 2)})  # and the process is gone
    last = Results(path, much_time())
    last.run({"a": (1, 2)}, measure(1))
    last.run({"b": 1}, measure(2))
    ended, fine = lines(path)
    assert "2 times" in ended["error"]
    assert fine["value"] == 2


def test_half_a_line_of_a_killed_process_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    path.write_text('{"case": {"a": 1}, "value": 1}\n{"case": {"a": 2}, "val')
    results = Results(path, much_time())
    assert results.has({"a": 1})
    assert not results.has({"a": 2})
    results.run({"a": 2}, measure(2))
    assert [line["value"] for line in lines(path)] == [1, 2]


def test_a_broken_device_ends_the_process_with_the_error_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.results, "device_answers", lambda: False)
    results = Results(tmp_path / "part.jsonl", much_time())
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        results.run({"a": 1}, fail(RuntimeError("CUDA error: illegal memory access")))
    assert "illegal memory access" in lines(results.path)[0]["error"]


# --- what is missing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "wanted", "does"),
    [
        ("2.13.0+cu128", ">=2.11,<2.14", True),
        ("2.11.0", ">=2.11,<2.14", True),
        ("2.10.1", ">=2.11,<2.14", False),
        ("2.14.0.dev20260101+cu130", ">=2.11,<2.14", False),
        ("5.24.0", ">=5.0,<6", True),
        ("6.0.0rc1", ">=5.0,<6", False),
    ],
)
def test_versions(version: str, wanted: str, does: bool) -> None:
    assert fits(version, wanted) == does


def complete() -> Found:
    versions: dict[str, str | None] = {
        name: re.findall(r"[\d.]+", wanted)[0] for name, wanted in requirements().items()
    }
    return Found({**versions, "triton": "3.7.0", "pytest": "9.0"}, "12.8", "/usr/bin/cc", True, "H100", 100.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cuda_build": None}, "a build without CUDA"),
        ({"compiler": None}, "install gcc"),
        ({"room": 3.0}, "set TMPDIR"),
        ({"versions": {**complete().versions, "triton": None}}, "triton is not installed"),
        ({"versions": {**complete().versions, "torch": "2.10.0"}}, "torch 2.10.0 is installed, and mtr needs torch>="),
        ({"versions": {**complete().versions, "peft": None}}, "peft is not installed"),
        ({"versions": {**complete().versions, "pytest": None}}, "pytest is not installed"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_thing_that_is_missing_is_named(change: dict[str, Any], words: str) -> None:
    assert problems(complete(), "all") == []
    (problem,) = problems(complete()._replace(**change), "all")
    assert words in problem


def test_what_may_be_missing_stops_nothing() -> None:
    doubtful = complete()._replace(headers=False, driver=None)
    assert problems(doubtful, "all") == []
    assert [line.split()[0] for line in doubts(doubtful)] == ["no", "nvidia-smi"]
    assert doubts(complete()) == []


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    assert look().cuda_build == torch.version.cuda


def test_a_machine_without_cuda_is_told_so_in_the_first_second(tmp_path: Path) -> None:
    """All that is missing at once; torch is not imported for it."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexport PYTHONPROFILEIMPORTTIME=1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    if torch.version.cuda:
        pytest.skip("this torch is built for CUDA")
    done = run_script("smoke", tmp_path, PYTHON=str(python))
    assert done.returncode == 2
    assert "missing: torch" in done.stderr
    assert re.search(r"\| +torch$", done.stderr, re.MULTILINE) is None, "torch was imported"
    assert re.search(r"\| +subprocess$", done.stderr, re.MULTILINE), "imports are listed"


# --- the script -------------------------------------------------------------------------------------------------------


def run_script(part: str, results: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    names = ("REHEARSE", "WHEELS", "RETRY", "LIMIT")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        ["bash", str(SCRIPT), part, str(results)], capture_output=True, text=True, env={**inherited, **given}
    )


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = run_script("everything", tmp_path)
    assert done.returncode == 2
    assert "not one of all, smoke" in done.stderr


@pytest.mark.parametrize("script", sorted(path for path in (ROOT / "scripts").iterdir() if path.suffix == ""))
def test_no_list_that_may_be_empty_is_expanded(script: Path) -> None:
    """Under `set -u`, bash 3.2 (macOS) takes an empty array for an unset variable."""
    text = script.read_text() if script.is_file() else ""
    empty = set(re.findall(r"^\s*(\w+)=\(\)", text, re.MULTILINE))
    used = set(re.findall(r'(?<!\+)"\$\{(\w+)\[@\]\}"', text))
    assert empty & used == set()


STUB = """#!/bin/sh
# A Python that notes how it is called, and what it would import first; nothing else is installed.
echo "$PYTHONPATH: $*" >> {log}
case "$*" in *preflight*) exit 2 ;; esac
"""


def test_wheels_are_installed_without_a_network_beside_what_is_there(tmp_path: Path) -> None:
    """Exactly those of the folder: no other torch than that of the machine."""
    python, log, wheels = tmp_path / "python", tmp_path / "calls", tmp_path / "wheels"
    python.write_text(STUB.format(log=log))
    python.chmod(0o755)
    wheels.mkdir()
    (wheels / "peft-0.21-py3-none-any.whl").touch()
    done = run_script("smoke", tmp_path, PYTHON=str(python), WHEELS=str(wheels), TMPDIR=str(tmp_path))
    assert done.returncode == 2, done.stderr
    install, preflight = (line for line in log.read_text().splitlines() if "pip" in line or "preflight" in line)
    assert "--no-index --no-deps" in install
    assert install.endswith(f"--target {tmp_path}/mtr-gpu-wheels {wheels}/peft-0.21-py3-none-any.whl")
    assert f"{tmp_path}/mtr-gpu-wheels:" in preflight


def test_no_device_is_said_before_anything_is_installed(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a device")
    checkout = tmp_path / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    (checkout / "scripts" / "gpu").write_text(SCRIPT.read_text())
    given = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "REHEARSE", "WHEELS")}
    done = subprocess.run(["bash", str(checkout / "scripts" / "gpu")], capture_output=True, text=True, env=given)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (checkout / ".venv").exists()


# --- rehearsals -------------------------------------------------------------------------------------------------------


def test_a_rehearsal_says_what_it_did_not_exercise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu.rehearsal, "_without_device", type(gpu.rehearsal._without_device)())
    assert not gpu.rehearsal.on_device("a kernel")
    gpu.rehearsal.note_device_work(tmp_path, "smoke")
    gpu.rehearsal.note_device_work(tmp_path, "smoke")
    assert [line.strip() for line in gpu.rehearsal.summarise(tmp_path)[1:2]] == ["smoke: a kernel"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.rehearsal.on_device("another kernel")


def test_the_kernels_of_smoke_see_a_wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, span = gpu.smoke.HEADS["gpt-oss-20b, sliding"]
    measured = gpu.smoke.kernel(heads, span, "varlen", TINY)
    assert max(measured["worst"].values()) < gpu.smoke.TOLERANCE
    monkeypatch.setattr(gpu.smoke, "TOLERANCE", min(measured["worst"].values()) / 2)
    with pytest.raises(AssertionError, match="differs from dense attention"):
        gpu.smoke.kernel(heads, span, "varlen", TINY)


@pytest.mark.slow
def test_everything_is_rehearsed(tmp_path: Path) -> None:
    """In parts that are cut off and go on; each line of the benchmarks that needs no device runs."""
    stopped = run_script("all", tmp_path, REHEARSE="1", LIMIT="0")
    assert stopped.returncode == 3, stopped.stderr
    done = run_script("all", tmp_path, REHEARSE="1", LIMIT="1200")
    assert done.returncode == 0, done.stderr
    assert "Not exercised by this rehearsal" in done.stdout
    wanted = {
        "smoke": {"case", "case_seconds"},
        "tests": {"case", "passed"},
        "packs": {"num_tokens", "seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "mask_share"},
        "turns": {"cases", "speedup", "limit", "figure_of_merit", "gradient_checkpointing"},
        "long": {"losses", "seconds", "peak_memory_bytes"},
        "hybrids": {"num_tokens"},
        "qlora": {"losses", "eval_losses", "tokens_per_second"},
    }
    for part, keys in wanted.items():
        found = lines(tmp_path / f"gpu-{part}.jsonl")
        assert found
        assert all(line.keys() >= keys for line in found), part
    assert {line["case"]["model"] for line in lines(tmp_path / "gpu-packs.jsonl")} == set(MODELS)
    assert json.loads((tmp_path / "gpu-environment.json").read_text())["rehearsal"] is True
    summary = json.loads((tmp_path / "gpu-rehearsal.json").read_text())
    assert summary["without_device"]["smoke"]
    assert summary["lines"]["run"] / summary["lines"]["of"] > 0.95, done.stdout
    written = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")}
    assert run_script("all", tmp_path, REHEARSE="1").returncode == 0
    assert {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")} == written


def test_a_rehearsal_writes_no_results() -> None:
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    done = run_script("faults", ROOT / "benchmarks" / "results", REHEARSE="1")
    assert done.returncode == 2
    assert "a rehearsal writes no results" in done.stderr
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before
