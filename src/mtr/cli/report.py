"""`mtr report`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mtr.cli.options import PAGES, PICTURES, check_spared, check_suffix, check_target
from mtr.cli.session import errors, writing

EXAMPLES = """Examples:
  mtr report runs/chats                           # a summary in the terminal
  mtr report runs/chats --html chats.html         # one page, without network
  mtr report runs/lr-* --html lr.html --png lr.png
  mtr report runs/lr-* --json | jq '.runs[].results'
"""


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folders of runs: training.output_dir of recipes.", show_default=False),
    ],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page that needs no network.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Draw curves and results (.png, .svg or .pdf).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the summary.")] = False,
) -> None:
    """Show what became of one run, or of several side by side: curves, results, what was not trained, recipes.

    Runs may be at work or have been killed: they are shown as far as they are. Reads the folders only; writes nothing
    but the files that are named, and replaces those.
    """
    with errors():
        for option, file, suffixes in (("--html", html, PAGES), ("--png", png, PICTURES)):
            check_target(option, file)
            check_suffix(option, file, suffixes)
        check_spared({"--html": html, "--png": png}, [run for run in runs if os.path.isdir(run)])
        _report(runs, html, png, as_json)


def _report(folders: list[Path], html: Path | None, png: Path | None, as_json: bool) -> None:
    from mtr.cli.views.report import show_report
    from mtr.console import console, printable
    from mtr.files import write_json
    from mtr.report.report import report as read

    found = read(folders)
    if html is not None:
        from mtr.pages.report import write_report_page

        with writing("--html", html):
            write_report_page(html, found)
    if png is not None:
        from mtr.pages.report_picture import write_report_picture

        with writing("--png", png):
            write_report_picture(png, found)
    if as_json:
        print(write_json(None, found))
    else:
        show_report(found, console(sys.stdout))
    for path in (html, png):
        if path is not None:
            print(f"written to {printable(str(path))}", file=sys.stderr)
