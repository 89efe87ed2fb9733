"""What the views share: tables, and words for numbers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.table import Table


def plain_table(title: str, columns: Sequence[str], left: Collection[str] = (), dense: bool = False) -> Table:
    """A table without lines.

    Args:
        columns: headings; a column is aligned right unless it is named in `left`.
        dense: one space between columns, not two.
    """
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False, collapse_padding=dense)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", vertical="top", no_wrap=True)
    return table


def count(number: int, what: str) -> str:
    """`1 turn`, `1,200 turns`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
