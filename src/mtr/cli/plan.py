"""`mtr plan`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtr.cli.options import (
    PICTURES,
    STDOUT,
    JsonFile,
    Overrides,
    RecipeFile,
    check_spared,
    check_suffix,
    check_target,
    files_of,
    write_result,
)
from mtr.cli.session import errors, load, writing
from mtr.console import shorten
from mtr.errors import UserError

if TYPE_CHECKING:
    from mtr.plan.gpus import Gpu
    from mtr.plan.result import Plan
    from mtr.recipe.sections import Recipe

MOST_GPUS = 16_384
MOST_USD = 1e6
"""Of one GPU for an hour; what is not finite is no price."""
EXAMPLES = """Examples:
  mtr plan my.yaml
  mtr plan my.yaml --gpu h100-sxm --gpu 4090 --price 2.50 --price 0.40
  mtr plan my.yaml --gpu h100-sxm --num-gpus 8 training.parallel=fsdp2
  mtr plan my.yaml --rows 2000  # a sample of large data, extrapolated
  mtr plan my.yaml --plot plan.png --json plan.json
"""


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Rows to count, drawn at random, instead of all.", show_default=False),
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A GPU to train on, by name; several times for several.",
            show_default="four usual ones",
        ),
    ] = None,
    num_gpus: Annotated[
        int, typer.Option(min=1, max=MOST_GPUS, metavar="N", help="How many of them train together.")
    ] = 1,
    price: Annotated[
        list[float] | None,
        typer.Option(
            min=0, max=MOST_USD, metavar="USD", help="Price of one GPU for an hour; one for all, or one for each --gpu."
        ),
    ] = None,
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw lengths, roles and work (.png, .svg or .pdf).")
    ] = None,
) -> None:
    """Say what training would take and save, before a GPU is touched: rows, turns, tokens, FLOPs, memory, time, money.

    Rows are rendered, merged and packed as training does it, so that counts are exact. Needs the tokenizer; the model's
    config, not its weights, for FLOPs, memory and time.
    """
    with errors():
        check_target("--plot", plot)
        check_suffix("--plot", plot, PICTURES)
        check_target("--json", json_file)
        if plot is not None and json_file is not None and plot.resolve() == Path(json_file).resolve():
            raise UserError(f"--plot and --json name the same file, {shorten(str(plot), 300)}; name two")
        from mtr.cli.views.tables import count

        gpus, prices = _gpus(gpu), price or []
        if len(prices) == 1:
            prices = prices * len(gpus)
        if len(prices) not in (0, len(gpus)):
            raise UserError(
                f"--price: {len(prices)} prices for {count(len(gpus), 'GPU')}: give one for all, or one for each --gpu"
            )
        loaded = load(recipe, overrides)
        check_spared({"--plot": plot, "--json": json_file}, files_of(recipe, loaded))
        _output(_plan(loaded, rows, gpus, num_gpus, prices), json_file, plot)


def _gpus(names: list[str] | None) -> list[Gpu]:
    from mtr.plan.gpus import USUAL, find_gpu

    return [find_gpu(name) for name in names or USUAL]


def _plan(recipe: Recipe, rows: int | None, gpus: Sequence[Gpu], num_gpus: int, prices: Sequence[float]) -> Plan:
    from dataclasses import replace
    from functools import partial

    from mtr.cli.views.progress import shown
    from mtr.plan.on_gpu import on_gpus
    from mtr.plan.planning import plan as run
    from mtr.plan.verdict import verdict

    found = run(recipe, rows, num_gpus, partial(shown, doing="rows"))
    return replace(found, verdict=verdict(found), gpus=on_gpus(found, gpus, num_gpus, prices))


def _output(found: Plan, json_file: str | None, plot: Path | None) -> None:
    from mtr.cli.views.plan import show_plan
    from mtr.console import console
    from mtr.plan.plot import draw

    if json_file != STDOUT:
        show_plan(found, console(sys.stdout))
    write_result(found.as_json(), json_file)
    if plot is not None:
        with writing("--plot", plot):
            draw(found, plot)
