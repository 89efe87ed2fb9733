"""Claims: the shapes of the picture cover exactly the pairs of the mask, each once; a wrong mask looks different."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from matplotlib.path import Path as Polygon
from support.inspections import inspected
from support.rows import conversation_row
from support.trees import groups, visible

from mtr.checks.inspection import Inspection
from mtr.checks.roles import ROLES, TokenRoles
from mtr.pages.mask_picture import blocks, outline, write_mask_picture
from mtr.tree.layout import Layout, View, merge


def covered(
    layout: Layout, role: np.ndarray[tuple[int], np.dtype[np.int8]]
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """How often the middle of each cell lies in a shape."""
    total = layout.num_tokens
    q, k = np.indices((total, total))
    middles = np.stack([k.ravel() + 0.5, q.ravel() + 0.5], 1)
    times = np.zeros(total * total, np.int64)
    for start, stop, end, _ in blocks(layout.subtree_end, role):
        times += Polygon([*outline(start, stop, end), (start, start)]).contains_points(middles)
    return times.reshape(total, total)


@given(groups)
def test_the_shapes_are_the_mask(views: list[View]) -> None:
    layout = merge(views)
    role = (np.arange(layout.num_tokens) // 2 % len(ROLES)).astype(np.int8)
    assert np.array_equal(covered(layout, role), visible(layout))


def test_a_wrong_end_is_another_picture() -> None:
    layout = inspected([conversation_row()])[0][0].layouts[0]
    role = np.zeros(layout.num_tokens, np.int8)
    ends = layout.subtree_end.copy()
    ends[3] -= 1
    assert not np.array_equal(covered(replace(layout, subtree_end=ends), role), visible(layout))


def test_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mask.png"
    inspection, roles = inspected([conversation_row()], "sequence.strategy=per_turn")[0]
    assert len(inspection.layouts) == 3
    write_mask_picture(path, inspection, roles)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) < 300_000


def test_without_a_tree_there_is_no_picture(tmp_path: Path) -> None:
    inspection, roles = inspected([conversation_row()])[0]
    without: tuple[Inspection, list[TokenRoles]] = (replace(inspection, layouts=[]), roles[:0])
    with pytest.raises(ValueError, match="no turn of this row is trained"):
        write_mask_picture(tmp_path / "mask.png", *without)
    assert not list(tmp_path.iterdir())
