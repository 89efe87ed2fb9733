"""`mtr doctor` as text: a line a finding, under headings."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import TextIO

from rich.markup import escape

from mtr.console import console, printable
from mtr.start.finding import Finding

_SIGNS = {"ok": "[green]ok[/]", "none": "[dim]--[/]", "problem": "[bold red]!![/]"}
_NAME = 25


def show_finding(finding: Finding, before: Finding | None, file: TextIO) -> None:
    """
    Args:
        before: the finding that was shown before it.
    """
    out = console(file)
    if before is None or before.section != finding.section:
        out.print(f"\n[bold]{escape(finding.section)}[/]" if before else f"[bold]{escape(finding.section)}[/]")
    shown = finding.value if finding.section == "optional" and finding.state == "ok" else finding.text
    lines = textwrap.wrap(printable(str(shown)), max(shutil.get_terminal_size().columns, 60) - _NAME - 6) or [""]
    name = finding.name if finding.section != "mtr" else "version"
    out.print(f" {_SIGNS[finding.state]} {escape(f'{name:<{_NAME}}')} {escape(lines[0])}")
    for line in lines[1:]:
        out.print(" " * (_NAME + 5) + escape(line))


def show_end(findings: Sequence[Finding], file: TextIO) -> None:
    problems = [finding.name for finding in findings if finding.state == "problem"]
    out = console(file)
    out.print()
    if problems:
        out.print(f"[bold red]to be mended:[/] {escape(', '.join(problems))}")
    else:
        out.print("everything that training needs works here")
