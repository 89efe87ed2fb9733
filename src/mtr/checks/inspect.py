"""One conversation, laid open: its turns, its tree, what each token sees and what is supervised.

Needs a tokenizer and the data, no weights. `describe` is the whole truth as JSON; `mtr.cli.views` draws it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mtr.chat.turn import Turn
from mtr.data.conversation import Conversation
from mtr.prepare.builder import Builder
from mtr.prepare.views import weigh
from mtr.tree.layout import Layout, path_to
from mtr.tree.packing import build_layouts


@dataclass(frozen=True)
class Segment:
    """A run of tokens without a fork that are all trunk or all branch."""

    start: int
    end: int
    kind: Literal["trunk", "branch"]
    """branch: a trained turn as generated; trunk: context."""
    turn: int
    """Of a branch, the turn; of the trunk, the first turn that sees it."""


@dataclass(frozen=True)
class Inspection:
    index: int
    conversation: Conversation
    turns: list[Turn]
    layouts: list[Layout]
    """One tree, or several where the conversation was cut or the strategy is per_turn."""
    num_tokens: dict[str, int]


def inspect_conversation(builder: Builder, conversation: Conversation, index: int) -> Inspection:
    recipe = builder.recipe
    turns = builder.turns(conversation)
    views = weigh(turns, recipe.loss.weighting)
    single = build_layouts(views, "single_pass", recipe.sequence.budget)
    layouts = (
        single
        if recipe.sequence.strategy == "single_pass"
        else build_layouts(views, "per_turn", recipe.sequence.budget)
    )
    counts = {
        "single_pass": sum(layout.num_tokens for layout in single),
        "per_turn": sum(view.num_tokens for view in views),
        "supervised": sum(len(view.completion_ids) for view in views),
    }
    return Inspection(index, conversation, turns, layouts, counts)


def describe(inspection: Inspection) -> dict[str, Any]:
    """What `mtr inspect --json` prints: plain lists, no padding; lists of trees where there are several."""
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
    """Cut the layout where it forks, jumps, or turns from context into a completion."""
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


def check(inspection: Inspection, weighting: str) -> list[str]:
    """Prove on the spot that the tree is its turns; what is wrong, or nothing.

    The paths are read from `parent`, the views from the rendering, and what a token sees from `subtree_end`.
    """
    problems = []
    numbers: dict[tuple[int, int], int] = {}

    def longer(path: int, token: int) -> int:
        """The number of a path that goes on with a token; equal paths have equal numbers, the empty one has 0."""
        return numbers.setdefault((path, token), len(numbers) + 1)

    wanted: Counter[tuple[int, int]] = Counter()
    for view in weigh(inspection.turns, weighting):
        path, start = 0, len(view.prompt_ids)
        for i, token in enumerate(view.ids.tolist()):
            if i >= start and view.weights[i - start] > 0:
                wanted[path, token] += view.weights[i - start]
            path = longer(path, token)
    found: Counter[tuple[int, int]] = Counter()
    for layout in inspection.layouts:
        for leaf, view in layout.leaves:
            if not np.array_equal(layout.input_ids[path_to(layout, leaf)], view.ids):
                problems.append(f"turn {view.turn}: its path through the tree is another sequence")
        paths: list[int] = []
        depths: list[int] = []
        for i, (token, parent) in enumerate(zip(layout.input_ids.tolist(), layout.parent.tolist(), strict=True)):
            assert parent < i, "a parent comes before its children"
            paths.append(longer(paths[parent] if parent >= 0 else 0, token))
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        if layout.position_ids.tolist() != depths:
            problems.append("a position is not the depth of its token")
        if not _sees_its_ancestors(layout, depths):
            problems.append("a token sees other tokens than its ancestors")
        for p, target, weight in zip(layout.predictor, layout.target_id, layout.weight, strict=True):
            found[paths[p], int(target)] += weight
    if wanted.keys() != found.keys() or any(abs(wanted[key] - found[key]) > 1e-9 for key in wanted):
        problems.append("the targets of the tree are not those of the turns")
    return problems


def _sees_its_ancestors(layout: Layout, depths: list[int]) -> bool:
    """Each token is seen by all its descendants, and no token sees more tokens than it has ancestors and itself."""
    total = layout.num_tokens
    last = np.arange(total)
    for i in range(total - 1, 0, -1):
        if layout.parent[i] >= 0:
            last[layout.parent[i]] = max(last[layout.parent[i]], last[i])
    changes = np.zeros(total + 1, np.int64)
    np.add.at(changes, np.arange(total), 1)
    np.add.at(changes, np.clip(layout.subtree_end, 0, total), -1)
    seen = np.cumsum(changes)[:total]
    return bool((last < layout.subtree_end).all() and (seen == np.array(depths) + 1).all())
