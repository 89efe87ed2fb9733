"""`mtr inspect`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mtr.cli.options import Overrides, RecipeFile
from mtr.cli.session import errors, load
from mtr.files import write_json

if TYPE_CHECKING:
    from mtr.checks.inspection import Inspection
    from mtr.prepare.builder import Builder
    from mtr.recipe.sections import Recipe


def inspect(
    recipe: RecipeFile,
    overrides: Overrides = None,
    index: Annotated[int, typer.Option(min=0, help="Row of data.train, counted from 0 in file order.")] = 0,
    every: Annotated[bool, typer.Option("--all", help="Every row, one JSON object per line.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    prove: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Prove that each path of the tree is its turn and no turn depends on data.rendering. Exit 1 if not.",
        ),
    ] = False,
) -> None:
    """Show how a conversation is laid out: turns, tree, attention mask, supervised tokens.

    Needs no weights.
    """
    with errors():
        passed = _inspect(load(recipe, overrides), None if every else index, as_json or every, prove)
    if not passed:
        raise typer.Exit(1)


def _inspect(recipe: Recipe, index: int | None, as_json: bool, prove: bool) -> bool:
    """Print one row, or all; whether all that was to be proven holds."""
    from mtr.chat.loading import load_renderer, load_tokenizer
    from mtr.checks.inspect import inspect_conversation, rows_to_inspect
    from mtr.checks.inspection import describe
    from mtr.checks.work import as_trained, flop_counter
    from mtr.cli.views.inspect import show_inspection
    from mtr.cli.views.progress import shown
    from mtr.console import console, printable
    from mtr.data.conversation import SkippedRow
    from mtr.data.mixture import Mixture
    from mtr.data.notes import describe_data
    from mtr.data.opening import open_data
    from mtr.prepare.builder import Builder

    tokenizer = load_tokenizer(recipe)
    recipe, notes = as_trained(recipe)
    builder = Builder(recipe, load_renderer(recipe, tokenizer))
    data = open_data(recipe.data, recipe.data.train)
    for note in () if as_json else (*notes, *describe_data(data)):
        print(f"note: {printable(note)}", file=sys.stderr)
    out = console(sys.stdout)
    counter = flop_counter(recipe)
    passed = True
    rows = rows_to_inspect(data, index)
    if index is None and not prove:  # which prints a line per row
        rows = shown(rows, len(data) if isinstance(data, Mixture) else None, "rows", shares_terminal=True)
    for number, row in rows:
        if isinstance(row, SkippedRow):
            skipped = {"index": number, "where": row.where, "skipped": row.problem or row.reason}
            print(write_json(None, skipped))
            continue
        inspection = inspect_conversation(builder, row, number, counter)
        if as_json:
            print(write_json(None, describe(inspection)))
        else:
            show_inspection(inspection, tokenizer, out)
        if prove:
            passed = _prove(inspection, builder) and passed
    return passed


def _prove(inspection: Inspection, builder: Builder) -> bool:
    from mtr.checks.inspect import check

    problems = check(inspection, builder.recipe.loss.weighting)
    for turn in builder.renderer.differing(inspection.conversation, builder.recipe.sequence):
        problems.append(f"turn {turn}: rendered in full, its text is different; set data.rendering: whole")
    proven = "every path of the tree is its turn, and every target is present"
    verdict = f"FAILED: {'; '.join(problems)}" if problems else proven
    print(f"row {inspection.index}: {verdict}", file=sys.stderr)
    return not problems
