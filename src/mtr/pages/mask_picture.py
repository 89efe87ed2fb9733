"""The mask of a conversation as a picture: which token attends to which, coloured by the role of what is seen.

Row q and column k are filled where visible(q, k) = (k <= q) & (q < subtree_end[k]). A run of columns with one end is a
staircase on the diagonal and a rectangle below it, so the picture is exact and needs no T x T array. Several trees
stand one after another, as in a pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mtr.checks.inspection import Inspection, segments
from mtr.checks.role_colours import ON_WHITE
from mtr.checks.roles import ROLES
from mtr.files import written_whole
from mtr.tree.layout import Ints

if TYPE_CHECKING:
    from mtr.checks.roles import TokenRoles

_NAMES = {"tool": "tool result", "copy": "context copy"}
_INK, _MUTED, _LINE = "#181b20", "#535b69", "#d5dae2"


def write_mask_picture(path: Path, inspection: Inspection, roles: Sequence[TokenRoles]) -> None:
    """Draw the mask; the suffix of the path is the format.

    Args:
        roles: `token_roles` of the inspection.

    Raises:
        ValueError: no turn is trained, so there is no tree, or matplotlib does not write such files.
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    if not inspection.layouts:
        raise ValueError("no turn of this row is trained, so there is no mask to draw")
    drawing = Figure(figsize=(8, 8.2), layout="constrained")
    axes = drawing.add_subplot()
    total = sum(layout.num_tokens for layout in inspection.layouts)
    start = 0
    for layout, found in zip(inspection.layouts, roles, strict=True):
        _draw_tree(axes, start, layout.subtree_end, found.role)
        _draw_supervised(axes, start, layout.predictor, total)
        start += layout.num_tokens
    _label_turns(axes, inspection, total)
    _finish(axes, inspection, roles, total)
    with written_whole(path) as partial:
        drawing.savefig(partial, dpi=150, bbox_inches="tight", pad_inches=0.15)


def blocks(subtree_end: Ints, role: NDArray[np.int8]) -> Iterator[tuple[int, int, int, int]]:
    """Runs of columns [start, stop) that rows see up to the same end, with their role."""
    changed = (np.diff(subtree_end) != 0) | (np.diff(role) != 0)
    starts = [0, *(np.flatnonzero(changed) + 1).tolist()]
    for start, stop in zip(starts, [*starts[1:], len(subtree_end)], strict=True):
        yield start, stop, int(subtree_end[start]), int(role[start])


def outline(start: int, stop: int, end: int) -> list[tuple[int, int]]:
    """The corners of what rows see of columns [start, stop): a staircase, then straight down to the end."""
    corners = [corner for k in range(start, stop) for corner in ((k, min(k, end)), (k + 1, min(k, end)))]
    return [*corners, (stop, end), (start, end)]


def _draw_tree(axes: Any, offset: int, subtree_end: Ints, role: NDArray[np.int8]) -> None:
    from matplotlib.collections import PolyCollection

    found = list(blocks(subtree_end, role))
    shapes = [np.array(outline(start, stop, end)) + offset for start, stop, end, _ in found]
    colours = [ON_WHITE[ROLES[number]] for *_, number in found]
    axes.add_collection(PolyCollection(shapes, facecolors=colours, edgecolors=colours, linewidths=0.15))


def _draw_supervised(axes: Any, offset: int, predictor: Ints, total: int) -> None:
    """A bar at the left of the rows that are trained to predict something."""
    rows = np.unique(predictor) + offset
    for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
        axes.broken_barh([(-0.022 * total, 0.012 * total)], (run[0], len(run)), color=_INK, linewidth=0)


def _label_turns(axes: Any, inspection: Inspection, total: int) -> None:
    """The turn at the right of the rows that it has as generated, where there is room for the words."""
    offset = 0
    for layout in inspection.layouts:
        for part in segments(layout):
            if part.kind == "branch" and part.end - part.start > 0.018 * total:
                middle = offset + (part.start + part.end) / 2
                axes.annotate(
                    f"turn {part.turn}", (1.012 * total, middle), va="center", fontsize=9, annotation_clip=False
                )
        offset += layout.num_tokens


def _finish(axes: Any, inspection: Inspection, roles: Sequence[TokenRoles], total: int) -> None:
    from matplotlib.patches import Patch

    counts = inspection.num_tokens
    axes.set(xlim=(-0.03 * total, total), ylim=(total, 0), aspect="equal")
    axes.set_title(
        f"Row {inspection.index}: {counts['single_pass']:,} tokens in a single pass, {counts['per_turn']:,} per turn, "
        f"{counts['supervised']:,} supervised",
        fontsize=11,
        color=_INK,
        loc="left",
    )
    axes.set_xlabel("what it sees (index)", color=_MUTED)
    axes.set_ylabel("token (index); black bar: trained to predict what follows", color=_MUTED)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(colors=_MUTED, labelsize=9)
    for spine in axes.spines.values():
        spine.set_color(_LINE)
    used = np.unique(np.concatenate([found.role for found in roles]))
    names = [ROLES[number] for number in used.tolist()]
    handles = [Patch(color=ON_WHITE[name], label=_NAMES.get(name, name)) for name in names]
    axes.legend(handles=handles, loc="upper right", frameon=False, fontsize=10, title="role of what is seen")
