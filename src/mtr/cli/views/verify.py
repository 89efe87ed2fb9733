"""The result of `mtr verify` as a table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from mtr.cli.views.tables import count, plain_table
from mtr.console import first_few, printable


def show_verification(result: dict[str, Any], out: Console) -> None:
    """Print what `mtr.checks.verify.verify` returned."""
    strategy = str(result["strategy"]).replace("_", " ")
    columns = ["", strategy, "plain passes", "relative\ndifference", "tolerance"]
    table = plain_table("what is trained, compared with one plain pass per turn", columns, left=[""])
    difference, tolerance, loss = result["max_relative_difference"], result["tolerance"], result["loss"]
    losses = (f"{loss[side]:.12f}" for side in ("trained", "per_turn"))
    table.add_row("loss", *losses, f"{difference['loss']:.1e}", f"{tolerance['loss']:.0e}")
    name = f"worst of {count(result['tensors'], 'gradient')}"
    table.add_row(name, "", "", f"{difference['gradient']:.1e}", f"{tolerance['gradient']:.0e}")
    out.print(table)
    out.print(
        f"{count(result['conversations'], 'conversation')}, {count(result['turns'], 'turn')}, {result['dtype']}, "
        f"attention {result['attention']} on {result['device']}"
    )
    if result["zero_gradients"]:
        out.print(f"gradients that are zero on both sides: {escape(printable(first_few(result['zero_gradients'])))}")
    failed = f"[red]FAILED[/]: {strategy} differs from one plain pass per turn"
    out.print("[green]passed[/]" if result["passed"] else failed)
