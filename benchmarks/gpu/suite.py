"""The tests marked `gpu`, each with a line of its own, so that a run that was cut off goes on where it was.

A rehearsal runs the tests marked `rehearsal` in their place: the same bodies on the CPU.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from gpu.rehearsal import on_device
from gpu.results import TRACEBACK_LINES, DeviceLostError, Results, clear_memory, device_answers
from gpu.setting import Size

ROOT = Path(__file__).parent.parent.parent
OPTIONS = ["-q", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that this process has imported already
MARKED = re.compile(r"\bmark\.gpu\b|support\.gpu")


def run(results: Results, size: Size) -> None:
    """
    Raises:
        DeviceLostError: a test has left the device unusable; it is written down.
    """
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARKED.search(path.read_text())]
    run_files(results, "rehearsal" if size.rehearsal else "gpu", files)


def run_files(
    results: Results,
    marker: str,
    files: Iterable[Path],
    root: Path = ROOT,
    answers: Callable[[], bool] = device_answers,
) -> None:
    """Run the tests with this marker that have no line yet.

    Args:
        root: the tests are named by their path from here.
        answers: whether the device is usable.

    Raises:
        DeviceLostError: it is not, after a test.
    """
    recorder = Recorder(results, marker, answers)
    code = pytest.main([*OPTIONS, "--rootdir", str(root), *map(str, files)], plugins=[recorder])
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    assert code not in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR), f"pytest ended with {code!r}"
    results.left += len(recorder.waiting)
    if recorder.lost:
        raise DeviceLostError(recorder.lost)


class Recorder:
    """A pytest plugin: leaves out what is done, writes the outcome of each test, stops when the time is up."""

    def __init__(self, results: Results, marker: str, answers: Callable[[], bool]) -> None:
        self._results, self._marker, self._answers = results, marker, answers
        self._reports: dict[str, list[pytest.TestReport]] = {}
        self._began = 0.0
        self.waiting: list[str] = []
        """Tests that have not run yet."""
        self.lost = ""
        """The test after which the device did not answer."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        wanted = [item for item in items if item.get_closest_marker(self._marker)]
        if self._marker != "gpu":
            for name, number in Counter(_function(i) for i in items if i.get_closest_marker("gpu")).items():
                on_device(f"{name}: {number} case{'s' * (number > 1)} on CUDA")
        chosen = [item for item in wanted if not self._results.has({"test": item.nodeid})]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
        self.waiting = [item.nodeid for item in chosen]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        case = {"test": report.nodeid}
        if report.failed and not self._results.has(case):
            self._results.write(case, {"error": "cannot be collected", "traceback": _last(report.longrepr)})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._began = time.monotonic()
        if not self._results.begin({"test": nodeid}):
            self._results.give_up({"test": nodeid})
            self.waiting.remove(nodeid)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self._results.has({"test": item.nodeid}):
            pytest.skip("it ended its process before")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.setdefault(report.nodeid, []).append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        reports, case = self._reports.pop(nodeid, []), {"test": nodeid}
        if self._results.has(case):
            return
        self._results.write(case, {**_outcome(reports), "case_seconds": time.monotonic() - self._began})
        self.waiting.remove(nodeid)
        clear_memory()
        if not self._answers():
            self.lost = nodeid

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        if self.lost or self._results.time_is_up:
            item.session.shouldstop = f"the device is lost after {self.lost}" if self.lost else "the time is up"
            pytest.exit(str(item.session.shouldstop), returncode=0)


def _outcome(reports: list[pytest.TestReport]) -> dict[str, Any]:
    for report in reports:
        if report.failed:
            lines = _last(report.longrepr)
            return {"error": f"{report.when}: {lines[-1] if lines else 'failed'}", "traceback": lines}
        if report.skipped:
            return {"skipped": str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)}
    return {"passed": True}


def _last(text: object) -> list[str]:
    return str(text).splitlines()[-TRACEBACK_LINES:]


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]
