"""`mtr bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtr.cli.options import (
    STDOUT,
    JsonFile,
    Overrides,
    RecipeFile,
    check_attention,
    check_spared,
    check_target,
    files_of,
    write_result,
)
from mtr.cli.session import errors, load, writing
from mtr.errors import UserError

EXAMPLES = """Examples:
  mtr bench my.yaml  # 8 conversations of data.train
  mtr bench my.yaml --all-backends --plot bench.png
  mtr bench my.yaml --sweep --random-weights  # only a config.json is needed
  mtr bench my.yaml --json > bench.json
"""

if TYPE_CHECKING:
    from mtr.bench.setup import Options
    from mtr.recipe.sections import Recipe


_Conversations = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Conversations, from the start of data.train (default 8); with --sweep, per shape (default 1).",
        show_default=False,
    ),
]
_Repeats = Annotated[int, typer.Option(min=1, metavar="N", help="Timed repeats of each case, after one warm-up.")]
_Attention = Annotated[
    list[str] | None,
    typer.Option(
        metavar="BACKEND", help="Attention backend instead of the recipe's; give it several times to compare backends."
    ),
]
_AllBackends = Annotated[bool, typer.Option("--all-backends", help="Time every attention backend that is usable here.")]
_NoPadded = Annotated[
    bool, typer.Option("--no-padded", help="Skip the padded baseline, which is slow where there are many turns.")
]
_RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Random weights: model.name_or_path needs none, only a config.")
]
_Sweep = Annotated[
    bool, typer.Option("--sweep", help="Synthetic conversations of several shapes instead of data.train.")
]
_Turns = Annotated[str, typer.Option(metavar="N,N", help="With --sweep: numbers of turns, comma-separated.")]
_Thinking = Annotated[
    str, typer.Option(metavar="N,N", help="With --sweep: words of thinking per turn, comma-separated.")
]
_Words = Annotated[
    tuple[int, int],
    typer.Option(metavar="USER RESPONSE", help="With --sweep: words per user message and per response."),
]
_Versus = Annotated[
    str | None,
    typer.Option("--vs", metavar="trl", help="Also time another trainer, if installed, on the same turns."),
]
_Plot = Annotated[
    Path | None, typer.Option(metavar="FILE.png", help="Plot the times and the limit (.png, .svg or .pdf).")
]


def bench(
    recipe: RecipeFile,
    overrides: Overrides = None,
    conversations: _Conversations = None,
    repeats: _Repeats = 5,
    attention: _Attention = None,
    all_backends: _AllBackends = False,
    no_padded: _NoPadded = False,
    random_weights: _RandomWeights = False,
    sweep: _Sweep = False,
    turns: _Turns = "2,4,8,16,32,64",
    thinking: _Thinking = "150",
    words: _Words = (60, 60),
    versus: _Versus = None,
    json_file: JsonFile = None,
    plot: _Plot = None,
) -> None:
    """Time one pass against one pass per turn, forward and backward, on your model and data.

    Needs the model's weights, or its config with --random-weights. The baselines are one pass per turn, packed without
    padding (the fair one) and padded. Beside the measured speed-up stands the limit that the counted work sets.
    """
    with errors():
        _check(plot, versus)
        check_target("--plot", plot)
        check_target("--json", json_file)
        grid = _grid(turns, thinking, words)
        for name in attention or []:
            check_attention(name)
        loaded = load(recipe, overrides, needed="config" if random_weights else "weights", tokenizer=not sweep)
        check_spared({"--plot": plot, "--json": json_file}, files_of(recipe, loaded))
        from mtr.bench.setup import Options

        options = Options(tuple(attention or ()), all_backends, random_weights, not no_padded, versus == "trl")
        _output(_measure(loaded, options, conversations, repeats, grid if sweep else None), json_file, plot)


_Grid = tuple[list[int], list[int], int, int]


def _check(plot: Path | None, versus: str | None) -> None:
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot: {plot} must end in .png, .svg or .pdf")
    if versus not in (None, "trl"):
        raise UserError(f"--vs: {versus!r} is not a trainer that mtr can time; the only one is trl")


def _grid(turns: str, thinking: str, words: tuple[int, int]) -> _Grid:
    """Turns, words of thinking, and words of a user message and of a response: what `shapes_of` takes."""
    grid = (_numbers("--turns", turns, least=1), _numbers("--thinking", thinking, least=0), *words)
    if min(words) < 1:
        raise UserError("--words: both numbers must be at least 1")
    return grid


def _numbers(option: str, text: str, least: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UserError(f"{option}: {text!r} is not a comma-separated list of integers from {least} up, such as 2,4,8")
    return [int(part) for part in parts]


def _measure(
    recipe: Recipe, options: Options, conversations: int | None, repeats: int, grid: _Grid | None
) -> dict[str, Any]:
    from mtr.bench.runs import bench as run
    from mtr.bench.runs import sweep as run_sweep
    from mtr.bench.synthetic import shapes_of

    if grid is None:
        return run(recipe, conversations or 8, repeats, options)
    return run_sweep(recipe, shapes_of(*grid), conversations or 1, repeats, options)


def _output(result: dict[str, Any], json_file: str | None, plot: Path | None) -> None:
    from mtr.bench.plot import plot as draw
    from mtr.cli.views.bench import show_bench, show_sweep
    from mtr.console import console

    if json_file != STDOUT:
        (show_sweep if "points" in result else show_bench)(result, console(sys.stdout))
    write_result(result, json_file)
    if plot is not None:
        with writing("--plot", plot):
            draw(result, plot)
