"""The mask of a tree as a small picture: rows of tokens attend to columns of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from mtr.checks.inspect_rows import ranges
from mtr.checks.roles import ROLES, TokenRoles
from mtr.cli.views.inspect_style import FILLS, Style
from mtr.tree.layout import Ints, Layout, path_to

_MOST = 64
"""Characters across; half as many down, since they are twice as high as wide."""
_SAMPLES = 8
"""Tokens of each block that are looked at, in both directions."""


def mask_lines(layout: Layout, roles: TokenRoles, style: Style) -> Iterator[Text]:
    """A line for each block of tokens that attend, with the sign of what most of them are, and the turns that begin."""
    yield Text("mask: each row of tokens sees the columns that are filled", "dim")
    total = layout.num_tokens
    across = min(_MOST, style.width - 14, total)
    columns = _samples(total, across)
    colours = [FILLS[ROLES[role]] for role in _most(roles.role[columns])]
    begins = [(int(path_to(layout, leaf)[len(view.prompt_ids)]), view.turn) for leaf, view in layout.leaves]
    edges = [row * total // max(across // 2, 1) for row in range(max(across // 2, 1) + 1)]
    for start, end in pairwise(edges):
        row = start + (np.arange(_SAMPLES) + 0.5) * (end - start) / _SAMPLES
        line = _row(layout, roles, row.astype(np.int64), columns, colours, style)
        named = sorted(turn for at, turn in begins if start <= at < end)
        if named:
            line.append(f"  turn{'s' if len(named) > 1 else ''} {', '.join(ranges(named))}", "dim")
        yield line


def _row(
    layout: Layout, roles: TokenRoles, row: Ints, columns: NDArray[np.int64], colours: list[str], style: Style
) -> Text:
    """
    Args:
        row: [samples] tokens that attend.
        columns: [across, samples] tokens that may be attended to.
        colours: [across] of the columns.
    """
    visible = (columns[None] <= row[:, None, None]) & (row[:, None, None] < layout.subtree_end[columns][None])
    shades = np.ceil(visible.mean(axis=(0, 2)) * (len(style.signs.shades) - 1)).astype(int)
    weighted = roles.weight[row] > 0
    trained = bool(weighted.mean() >= 0.5)
    line = Text.assemble(style.bar(_most(roles.role[row][weighted == trained][None])[0], trained), " ")
    for shade, colour in zip(shades.tolist(), colours, strict=True):
        line.append(style.signs.shades[shade], colour if trained else f"dim {colour}")
    line.rstrip()
    return line


def _samples(total: int, blocks: int) -> NDArray[np.int64]:
    """[blocks, samples] tokens, spread evenly over each block."""
    at = (np.arange(blocks * _SAMPLES) + 0.5) * total / (blocks * _SAMPLES)
    return at.astype(np.int64).reshape(blocks, _SAMPLES)


def _most(roles: NDArray[np.int8]) -> list[int]:
    """The role that most tokens of each block have.

    Args:
        roles: [blocks, samples]
    """
    return [int(np.bincount(block, minlength=len(ROLES)).argmax()) for block in roles]
