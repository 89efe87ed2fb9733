"""`mtr doctor`: what is installed, what this machine has, and which parts of mtr work on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtr import __version__
from mtr.start.finding import Finding
from mtr.start.packages import check_imports, check_packages


def diagnose(hub: bool = True) -> Iterator[Finding]:
    """Findings in the order in which they are shown, each as soon as it is known.

    Args:
        hub: ask the Hub whether it answers.
    """
    yield Finding("mtr", "version", "ok", __version__, __version__)
    broken = False
    for check in (check_packages, check_imports):
        for finding in check():
            broken |= finding.state == "problem"
            yield finding
        if broken:  # all that follows needs them
            return
    from mtr.start.backends import check_backends
    from mtr.start.machine import check_devices, check_hub, check_machine

    yield from check_machine()
    yield from check_devices()
    yield from check_backends()
    if hub:
        yield check_hub()


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """What `mtr doctor --json` prints."""
    problems = [f"{finding.name}: {finding.text}" for finding in findings if finding.state == "problem"]
    return {"findings": [vars(finding) for finding in findings], "problems": problems, "passed": not problems}
