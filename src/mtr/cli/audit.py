"""`mtr audit`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mtr.cli.options import Overrides
from mtr.cli.session import errors, load, load_for_tokenizer
from mtr.files import write_json

EXAMPLES = """Examples:
  mtr audit my.yaml  # template and up to 1,000 rows
  mtr audit my.yaml --rows 20000
  mtr audit Qwen/Qwen3-8B  # the template of a tokenizer
  mtr audit Qwen/Qwen3-8B template.enable_thinking=false
"""


def audit(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE|TOKENIZER", help="YAML recipe, or folder or Hub id of a tokenizer.")
    ],
    overrides: Overrides = None,
    rows: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Most rows of data.train to check, evenly spaced; 0 checks the template only."
        ),
    ] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Report what the chat template does and what training with it would lose.

    Needs the tokenizer, no weights. The template is rendered on conversations of every kind, and on your rows: which
    thinking later turns still see, which turns are refused and why. Exits with 1 if anything would be lost.
    """
    with errors():
        with_data = source.endswith((".yaml", ".yml")) or Path(source).is_file()
        recipe = load(Path(source), overrides) if with_data else load_for_tokenizer(source, overrides)
        from mtr.chat.loading import load_renderer, load_tokenizer
        from mtr.checks.audit import audit as run
        from mtr.checks.audit_rows import audit_rows, sample_rows
        from mtr.cli.views.audit import show_audit
        from mtr.cli.views.progress import shown
        from mtr.console import console
        from mtr.prepare.builder import Builder

        renderer = load_renderer(recipe, load_tokenizer(recipe))
        data = None
        if with_data and rows:
            sample, of_rows = sample_rows(recipe, rows)
            total = rows if of_rows is None else min(rows, of_rows)
            data = audit_rows(Builder(recipe, renderer), shown(sample, total, "rows"), of_rows)
        report = run(renderer, recipe.model.name_or_path, data)
        if as_json:
            print(write_json(None, report.as_json()))
        else:
            show_audit(report, console(sys.stdout))
    if report.losses:
        raise typer.Exit(1)
