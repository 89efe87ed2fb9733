"""`mtr inspect`: a row of `data.train` laid out as in training, and the proof that the trees hold the turns.

Needs a tokenizer and the data, no weights.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from mtr.checks.inspection import Inspection
from mtr.data.conversation import Conversation
from mtr.model.flops import FlopCounter
from mtr.prepare.builder import Builder
from mtr.prepare.views import weigh
from mtr.tree.layout import Layout, path_to
from mtr.tree.packing import build_layouts


def inspect_conversation(
    builder: Builder, conversation: Conversation, index: int, counter: FlopCounter | None = None
) -> Inspection:
    """Render a conversation and lay it out with the recipe's strategy and budget; with a counter, count its FLOPs."""
    recipe = builder.recipe
    turns = builder.turns(conversation)
    views = weigh(turns, recipe.loss.weighting)
    single, per_turn = (
        build_layouts(views, strategy, recipe.sequence.budget) for strategy in ("single_pass", "per_turn")
    )
    layouts = single if recipe.sequence.laid_out == "single_pass" else per_turn
    by_strategy = {"single_pass": single, "per_turn": per_turn}
    flops = {name: vars(counter.by_part(trees)) for name, trees in by_strategy.items()} if counter else None
    counts = {
        "single_pass": sum(layout.num_tokens for layout in single),
        "per_turn": sum(view.num_tokens for view in views),
        "supervised": sum(len(view.completion_ids) for view in views),
    }
    return Inspection(index, conversation, turns, layouts, counts, flops)


def check(inspection: Inspection, weighting: str) -> list[str]:
    """Prove that the trees hold the turns and nothing else: a list of problems, empty if there are none.

    Paths are read from `parent`, the turns from the rendering, and what a token attends to from `subtree_end`.
    """
    problems = []
    numbers: dict[tuple[int, int], int] = {}

    def longer(path: int, token: int) -> int:
        """The number of a path extended by a token; equal paths have equal numbers, the empty one has 0."""
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
                problems.append(f"turn {view.turn}: its path through the tree is a different sequence")
        paths: list[int] = []
        depths: list[int] = []
        for i, (token, parent) in enumerate(zip(layout.input_ids.tolist(), layout.parent.tolist(), strict=True)):
            assert parent < i, "a parent comes before its children"
            paths.append(longer(paths[parent] if parent >= 0 else 0, token))
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        if layout.position_ids.tolist() != depths:
            problems.append("a position is not the depth of its token in the tree")
        if not _sees_its_ancestors(layout, depths):
            problems.append("a token attends to other tokens than its ancestors and itself")
        for p, target, weight in zip(layout.predictor, layout.target_id, layout.weight, strict=True):
            found[paths[p], int(target)] += weight
    if wanted.keys() != found.keys() or any(abs(wanted[key] - found[key]) > 1e-9 for key in wanted):
        problems.append("the targets of the tree differ from those of the turns")
    return problems


def _sees_its_ancestors(layout: Layout, depths: list[int]) -> bool:
    """Each token is visible to all its descendants, and as many are visible to it as it has ancestors and itself."""
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
