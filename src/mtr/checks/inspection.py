"""One conversation in detail: its turns, its trees, what each token attends to and what is supervised.

`describe` is all of it as JSON; `mtr.cli.views.inspect` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mtr.chat.turn import Turn
from mtr.data.conversation import Conversation
from mtr.tree.layout import Layout, path_to


@dataclass(frozen=True)
class Segment:
    """A run of tokens without a fork, all of one kind: tokens [start, end) of a layout."""

    start: int
    end: int
    kind: Literal["trunk", "branch"]
    """branch: a trained turn as generated; trunk: context."""
    turn: int
    """Of a branch, its turn; of the trunk, the first turn that attends to it."""


@dataclass(frozen=True)
class Inspection:
    """A row of `data.train` as training lays it out."""

    index: int
    conversation: Conversation
    turns: list[Turn]
    layouts: list[Layout]
    """One tree, or several where the conversation was cut or the strategy is per_turn."""
    num_tokens: dict[str, int]
    """single_pass, per_turn: tokens to compute; supervised: completion tokens of trained turns."""
    flops: dict[str, dict[str, float]] | None = None
    """single_pass, per_turn: of a forward and backward, by `mtr.model.flops.Flops`; None where the model is unknown."""


def describe(inspection: Inspection) -> dict[str, Any]:
    """What `mtr inspect --json` prints: plain lists, no padding; of several trees, a list of each."""
    layouts = inspection.layouts
    trees = [
        (
            {name: getattr(layout, name).tolist() for name in ("input_ids", "position_ids", "subtree_end", "parent")},
            {name: getattr(layout, name).tolist() for name in ("predictor", "target_id", "weight")},
            [vars(segment) for segment in segments(layout)],
        )
        for layout in layouts
    ]
    empty: tuple[Any, ...] = (
        {"input_ids": [], "position_ids": [], "subtree_end": [], "parent": []},
        {"predictor": [], "target_id": [], "weight": []},
        [],
    )
    layout, targets, parts = (
        tuple(map(list, zip(*trees, strict=True))) if len(trees) > 1 else trees[0] if trees else empty
    )
    return {
        "index": inspection.index,
        "turns": [_describe_turn(turn) for turn in inspection.turns],
        "layout": layout,
        "targets": targets,
        "segments": parts,
        "num_tokens": inspection.num_tokens,
        "flops": inspection.flops,
    }


def _describe_turn(turn: Turn) -> dict[str, Any]:
    described: dict[str, Any] = {
        "turn": turn.turn,
        "message_index": turn.message_index,
        "prompt_ids": list(turn.prompt_ids),
        "completion_ids": list(turn.completion_ids),
        "trained": turn.trained,
    }
    if turn.reason is not None:
        described["reason"] = turn.reason
    if turn.notes:
        described["notes"] = list(turn.notes)
    return described


def segments(layout: Layout) -> list[Segment]:
    """The layout, cut where it forks, jumps, or changes from context to completion or between turns."""
    total = layout.num_tokens
    branch_of, first_seen = np.full(total, -1), np.full(total, -1)
    for leaf, view in layout.leaves:
        path = path_to(layout, leaf)
        completion = path[len(view.prompt_ids) :]
        branch_of[completion] = np.where(branch_of[completion] < 0, view.turn, branch_of[completion])
        first_seen[path] = np.where(first_seen[path] < 0, view.turn, first_seen[path])
    children = np.bincount(layout.parent[layout.parent >= 0], minlength=total)
    starts = [
        i
        for i in range(total)
        if i == 0
        or layout.parent[i] != i - 1
        or children[i - 1] > 1
        or branch_of[i] != branch_of[i - 1]
        or first_seen[i] != first_seen[i - 1]
    ]
    return [
        Segment(start, end, "trunk", int(first_seen[start]))
        if branch_of[start] < 0
        else Segment(start, end, "branch", int(branch_of[start]))
        for start, end in zip(starts, [*starts[1:], total], strict=True)
    ]
