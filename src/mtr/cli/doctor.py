"""`mtr doctor`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from mtr.cli.session import errors, quiet_libraries
from mtr.errors import UserError
from mtr.files import write_json

if TYPE_CHECKING:
    from mtr.start.finding import Finding

EXAMPLES = """Examples:

  mtr doctor               # packages, devices, attention, Hub

  mtr doctor --no-hub      # asks nothing of the network

  mtr doctor | tee doctor.txt      # text to paste into an issue
"""


def doctor(
    hub: Annotated[bool, typer.Option("--hub/--no-hub", help="Ask whether the Hugging Face Hub answers.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Report what is installed and what works on this machine.

    Package versions, CPU, GPUs and their speed, each attention backend (run on a small tree and compared with a
    reference), disk and the Hub. The text holds no secrets and can be pasted into an issue. Exits with 1 if something
    must be mended before training works here.
    """
    from mtr.cli.views.doctor import show_end, show_finding
    from mtr.start.doctor import as_json as described
    from mtr.start.doctor import diagnose

    findings: list[Finding] = []
    with errors():
        try:
            os.getcwd()
        except OSError:  # no library could be imported
            raise UserError("the working folder was removed; change into another") from None
        with suppress(Exception):  # transformers is broken: a finding says so
            quiet_libraries()
        for finding in diagnose(hub):
            if not as_json:
                show_finding(finding, findings[-1] if findings else None, sys.stdout)
            findings.append(finding)
        if as_json:
            print(write_json(None, described(findings)))
        else:
            show_end(findings, sys.stdout)
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)
