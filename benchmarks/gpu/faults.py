"""What the machinery of the parts does with cases that fail, run out of memory, or end their process. Part of a
rehearsal; it needs no device.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gpu import packs
from gpu.preflight import Found, doubts, problems, requirements
from gpu.rehearsal import summarise
from gpu.results import Measured, Results, UnavailableError
from gpu.setting import Bench, Size, first_that_fits
from gpu.smoke import verdict
from gpu.suite import run_files
from mtr.errors import UserError

BROKEN = "has its traceback"


def run(results: Results, size: Size) -> None:
    """
    Raises:
        DeviceLostError: made up, once.
        AssertionError: a fault was not treated as it should be.
    """
    results.run({"fault": "process ends"}, end)
    results.run({"fault": "error"}, fail)
    results.run({"fault": "out of memory"}, functools.partial(run_out, 3))
    results.run({"fault": "first mode out of memory"}, functools.partial(modes_run_out, Bench(size), 1))
    results.run({"fault": "all modes out of memory"}, functools.partial(modes_run_out, Bench(size), 2))
    results.run({"fault": "skipped"}, skip)
    results.run({"fault": "pack out of memory"}, functools.partial(pack_runs_out, size))
    results.run({"fault": "model cannot be loaded"}, functools.partial(open_nothing, Bench(size)))
    with mock.patch("gpu.results.device_answers", return_value=False):
        results.run({"fault": "device lost"}, fail)
    run_tests(results)
    if results.left:
        return
    check(results.path)
    go_on_later(results.path.parent / "faults" / "later.jsonl", results.until)
    assert verdict([]) == "no pack was measured"
    assert summarise(results.path.parent)
    bare = Found(dict.fromkeys([*requirements(), "triton", "pytest"]), None, None, False, None, 0.0)
    assert len(problems(bare, "all")) == len(requirements()) + 4, problems(bare, "all")
    assert len(doubts(bare)) == 2


TESTS = """
import os, pytest
pytestmark = pytest.mark.rehearsal
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_ends(): os._exit(9)
def test_is_skipped(): pytest.skip("no reason")
def test_passes_at_last(): pass
"""


def run_tests(results: Results) -> None:
    """Of a file with all that can happen; after the failure the device counts as lost."""
    folder = results.path.parent / "faults"
    folder.mkdir(exist_ok=True)
    (folder / "test_faults.py").write_text(TESTS)
    (folder / "test_syntax.py").write_text("def test_it(: pass")
    inner = Results(folder / "tests.jsonl", results.until)
    run_files(
        inner,
        "rehearsal",
        sorted(folder.glob("test_*.py")),
        root=folder,
        answers=lambda: len(_lines_of(inner.path)) != 3,
    )
    if inner.left:
        results.left += inner.left
        return
    outcomes = {line["case"]["test"]: line for line in _lines_of(inner.path)}
    for name, key, text in OUTCOMES:
        assert text in str(outcomes[name][key]), (name, outcomes[name])


OUTCOMES = [
    ("test_syntax.py", "error", "cannot be collected"),
    ("test_faults.py::test_passes", "passed", "True"),
    ("test_faults.py::test_fails", "error", "call: "),
    ("test_faults.py::test_is_skipped", "skipped", "no reason"),
    ("test_faults.py::test_ends", "error", "2 times"),
    ("test_faults.py::test_passes_at_last", "passed", "True"),
]


def _lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def go_on_later(path: Path, until: float) -> None:
    """A part whose time is up, one that was killed while it wrote, and one whose failures are tried again."""
    late = Results(path, 0.0)
    late.run({"a": 1}, fail)
    assert late.left == 1
    path.write_text('{"case": {"a": 1}, "error": ""}\n{"case": {"a"')
    again = Results(path, until, retry=True)
    again.run({"a": 1}, lambda: {"value": 1})
    assert [line["value"] for line in _lines_of(path)] == [1]
    path.unlink()


def fail() -> Measured:
    raise RuntimeError(BROKEN)


def run_out(tries: int) -> Measured:
    raise torch.OutOfMemoryError(f"tried to allocate {tries} GiB")


def modes_run_out(bench: Bench, number: int) -> Measured:
    """The first `number` of two modes do."""
    calls: list[int] = []

    def measure() -> Measured:
        calls.append(1)
        return run_out(1) if len(calls) <= number else {"calls": len(calls)}

    return first_that_fits(bench.open("qwen3-8b", 512).model, ("selective", "full"), measure)


def pack_runs_out(size: Size) -> Measured:
    def refuse(*_: object) -> Measured:
        return run_out(2)

    with mock.patch("gpu.packs.measure_pack", refuse):
        return packs.measure(Bench(size), size, 512, "qwen3-8b", "full", 512, "segment")


def skip() -> Measured:
    raise UnavailableError("not on this machine")


def open_nothing(bench: Bench) -> Measured:
    """The same error at the second call, without another attempt."""
    errors = []
    for _ in range(2):
        try:
            bench.open("no-such-model", 512)
        except FileNotFoundError as error:
            errors.append(error)
    assert errors[0] is errors[1]
    raise UserError(str(errors[0]))


def end() -> Measured:
    os._exit(9)


def check(path: Path) -> None:
    """What was written of each fault."""
    lines = {line["case"]["fault"]: line for line in _lines_of(path)}
    assert BROKEN in lines["error"]["error"]
    assert any("in fail" in text for text in lines["error"]["traceback"])
    assert lines["out of memory"]["error"].startswith("out of memory")
    assert lines["first mode out of memory"]["gradient_checkpointing"] == "full"
    assert lines["first mode out of memory"]["failed"][0]["error"].startswith("out of memory")
    assert "2 GiB" in lines["pack out of memory"]["out_of_memory"]
    assert lines["all modes out of memory"]["error"].startswith("out of memory")
    assert lines["skipped"]["skipped"] == "not on this machine"
    assert "no-such-model" in lines["model cannot be loaded"]["error"]
    assert "2 times" in lines["process ends"]["error"]
    assert lines.keys() >= {"device lost"}
