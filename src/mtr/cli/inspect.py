"""`mtr inspect`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mtr.cli import inspect_options as given
from mtr.cli.inspect_options import MOST_ON_A_PAGE, Output, Wanted
from mtr.cli.options import Overrides, RecipeFile, check_spared, files_of
from mtr.cli.session import errors, load, writing
from mtr.console import printable
from mtr.errors import UserError
from mtr.files import write_json

if TYPE_CHECKING:
    from rich.console import Console

    from mtr.checks.inspect_rows import Choice, Row
    from mtr.checks.inspection import Inspection
    from mtr.checks.roles import TokenRoles
    from mtr.data.conversation import Conversation, SkippedRow
    from mtr.data.mixture import Mixture
    from mtr.data.stream import Stream
    from mtr.model.flops import FlopCounter
    from mtr.prepare.builder import Builder
    from mtr.recipe.sections import Recipe

EXAMPLES = """Examples:

  mtr inspect my.yaml                          # the first row
  mtr inspect my.yaml --index 3 --turn 1       # what inference sees there
  mtr inspect my.yaml --random --rows 5        # a sample
  mtr inspect my.yaml --find refund --longest  # the longest that says it
  mtr inspect my.yaml --untrained              # a row that loses a turn
  mtr inspect my.yaml --rows 20 --html rows.html  # to click on tokens
  mtr inspect my.yaml --all > rows.jsonl       # every row as JSON
"""


def inspect(
    recipe: RecipeFile,
    overrides: Overrides = None,
    index: given.Index = None,
    rows: given.Rows = None,
    every: given.Every = False,
    find: given.Find = None,
    untrained: given.Untrained = False,
    random: given.Random = False,
    seed: given.Seed = None,
    longest: given.Longest = False,
    turn: given.Turn = None,
    as_json: given.AsJson = False,
    html: given.Html = None,
    png: given.Png = None,
    pager: given.Pager = True,
    prove: given.Verify = False,
) -> None:
    """Show conversations as training lays them out: turns, tree, mask, and what is supervised.

    Conditions (--find, --untrained) select rows, --random and --longest order them, --rows says how many are shown. A
    row that training leaves out is shown by --all only. Needs no weights. Exits with 1 if no row meets the conditions.
    """
    with errors():
        wanted = Wanted(index, rows, every, find, untrained, random, longest, seed)
        output = Output(turn, as_json or (every and html is None), html, png, pager, prove, every)
        wanted.check()
        output.check(several=every or (rows or 1) > 1)
        loaded = load(recipe, overrides)
        check_spared({"--html": html, "--png": png}, files_of(recipe, loaded))
        passed = _inspect(loaded, wanted, output)
    if not passed:
        raise typer.Exit(1)


def _inspect(recipe: Recipe, wanted: Wanted, output: Output) -> bool:
    """Show the rows; whether all that was to be proven holds."""
    from mtr.chat.loading import load_renderer, load_tokenizer
    from mtr.checks.work import as_trained, flop_counter
    from mtr.cli.views.pager import paged
    from mtr.data.notes import describe_data
    from mtr.data.opening import open_data
    from mtr.prepare.builder import Builder

    tokenizer = load_tokenizer(recipe)
    recipe, notes = as_trained(recipe)
    builder = Builder(recipe, load_renderer(recipe, tokenizer))
    data = open_data(recipe.data, recipe.data.train)
    choice, chosen = wanted.choice()
    for note in () if output.as_json else (*notes, *describe_data(data), *chosen):
        print(f"note: {printable(note)}", file=sys.stderr)
    rows = _rows(data, choice, builder, output)
    with paged(output.pager and output.to_terminal) as out:
        show = _Show(output, builder, flop_counter(recipe), out)
        for number, row in rows:
            show.row(number, row)
    show.finish()
    return show.passed


def _rows(data: Mixture | Stream, choice: Choice, builder: Builder, output: Output) -> Iterable[Row]:
    """The chosen rows; a bar shows how far the search is, or the work on many rows."""
    from mtr.checks.inspect_rows import choose
    from mtr.cli.views.progress import shown
    from mtr.data.mixture import Mixture

    prints_meanwhile = output.as_json and choice.count is None

    def watch(rows: Iterable[Row], total: int | None) -> Iterable[Row]:
        return shown(rows, total, "searching", shares_terminal=prints_meanwhile)

    rows = choose(data, choice, builder.turns, watch)
    if choice.searches:
        return rows if choice.count is None else list(rows)
    if output.to_terminal or output.prove:  # which prints lines
        return rows
    total = choice.count if choice.count is not None else len(data) if isinstance(data, Mixture) else None
    return shown(rows, total, "rows", shares_terminal=output.as_json)


class _Show:
    """Does with each row what is asked for."""

    def __init__(self, output: Output, builder: Builder, counter: FlopCounter | None, out: Console) -> None:
        self._output = output
        self._builder = builder
        self._counter = counter
        self._out = out
        self._page: list[tuple[Inspection, Sequence[TokenRoles]] | SkippedRow] = []
        self._left_out = 0
        self.passed = True

    def row(self, number: int, row: Conversation | SkippedRow) -> None:
        from mtr.checks.inspect import inspect_conversation
        from mtr.data.conversation import SkippedRow

        if self._output.html is not None and len(self._page) == MOST_ON_A_PAGE:
            self._left_out += 1
            return
        if isinstance(row, SkippedRow):
            self._page += [row] if self._output.html is not None else []
            if self._output.as_json or self._output.html is None:
                print(write_json(None, {"index": number, "where": row.where, "skipped": row.problem or row.reason}))
            return
        inspection = inspect_conversation(self._builder, row, number, self._counter)
        if self._output.turn is not None:
            self._turn(inspection, self._output.turn)
        else:
            self._whole(inspection)
        if self._output.prove:
            self.passed = _prove(inspection, self._builder) and self.passed

    def _turn(self, inspection: Inspection, number: int) -> None:
        from mtr.checks.roles import turn_tokens
        from mtr.cli.views.inspect_turn import describe_turn, show_turn

        tokens = turn_tokens(inspection, self._builder, number)
        tokenizer = self._builder.renderer.tokenizer
        if self._output.as_json:
            print(write_json(None, describe_turn(inspection, tokens, tokenizer)))
        else:
            show_turn(inspection, tokens, tokenizer, self._out)

    def _whole(self, inspection: Inspection) -> None:
        from mtr.checks.inspection import describe
        from mtr.checks.roles import describe_roles, token_roles
        from mtr.cli.views.inspect import show_inspection

        if self._output.plain:
            print(write_json(None, describe(inspection)))
            return
        roles = token_roles(inspection, self._builder)
        if self._output.as_json:
            print(write_json(None, describe(inspection) | {"roles": describe_roles(roles)}))
        elif self._output.to_terminal:
            show_inspection(inspection, roles, self._builder.renderer.tokenizer, self._out)
        if self._output.html is not None:
            self._page.append((inspection, roles))
        if self._output.png is not None:
            _draw(self._output.png, inspection, roles)

    def finish(self) -> None:
        """Write the page."""
        from mtr.pages.inspect import write_inspect_page

        if (html := self._output.html) is None:
            return
        with writing("--html", html):
            write_inspect_page(html, self._page, self._builder.renderer.tokenizer)
        more = f"; {self._left_out:,} more rows are left out, choose with --rows" if self._left_out else ""
        print(
            f"wrote {printable(str(html))}: {len(self._page):,} row{'' if len(self._page) == 1 else 's'}{more}",
            file=sys.stderr,
        )


def _draw(path: Path, inspection: Inspection, roles: Sequence[TokenRoles]) -> None:
    from mtr.pages.mask_picture import write_mask_picture

    if not inspection.layouts:
        raise UserError(f"--png: row {inspection.index} has no trained turn, so there is no mask to draw")
    with writing("--png", path):
        write_mask_picture(path, inspection, roles)
    print(f"wrote {printable(str(path))}", file=sys.stderr)


def _prove(inspection: Inspection, builder: Builder) -> bool:
    from mtr.checks.inspect import check

    problems = check(inspection, builder.recipe.loss.weighting)
    for turn in builder.renderer.differing(inspection.conversation, builder.recipe.sequence):
        problems.append(f"turn {turn}: rendered in full, its text is different; set data.rendering: whole")
    proven = "every path of the tree is its turn, and every target is present"
    verdict = f"FAILED: {'; '.join(problems)}" if problems else proven
    print(f"row {inspection.index}: {verdict}", file=sys.stderr)
    return not problems
