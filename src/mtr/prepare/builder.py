"""One optimizer step, prepared: a fixed set of conversations, rendered, weighed, merged, packed.

    rows of the step -> Conversation -> [Turn] -> [View] -> [Layout] -> packs of every process -> own batches

Every process builds every step completely and keeps its own packs. So all of them know the totals of the step without
communication, and none waits for data that another one holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mtr.chat.rendering import Renderer
from mtr.chat.turn import Turn
from mtr.data.conversation import Conversation, SkippedRow
from mtr.prepare.counts import Counts
from mtr.prepare.step import Step
from mtr.prepare.views import check_ids, fit_turns, weigh
from mtr.recipe.sections import Recipe
from mtr.tree.batch import Batch, build_batch
from mtr.tree.layout import View
from mtr.tree.packing import BY_TOKENS, Cost, Pack, build_packs, imbalance, merge_conversations


@dataclass(frozen=True)
class Builder:
    """Makes steps from conversations."""

    recipe: Recipe
    renderer: Renderer
    process: int = 0
    num_processes: int = 1
    pad_to_multiple_of: int = 1
    cost: Cost = BY_TOKENS
    vocabulary: int | None = None
    """Ids that the model has embeddings for."""

    def turns(self, conversation: Conversation) -> list[Turn]:
        return self.fitted(self.rendered(conversation), conversation.where)

    def rendered(self, conversation: Conversation) -> list[Turn]:
        """The turns before `sequence.overlong` is applied."""
        return self.renderer.render(conversation, self.recipe.sequence)

    def fitted(self, rendered: list[Turn], where: str) -> list[Turn]:
        """
        Args:
            where: file and row of the conversation.
        """
        turns = fit_turns(rendered, self.recipe.sequence, where)
        if self.vocabulary is not None:
            check_ids(turns, self.vocabulary, where)
        return turns

    def views(self, conversation: Conversation) -> list[View]:
        return weigh(self.turns(conversation), self.recipe.loss.weighting)

    def step(self, rows: Iterable[Conversation | SkippedRow], position: int, epoch: float) -> Step:
        """
        Args:
            rows: of the whole step, skipped ones included.
            position: rows consumed after the step.
            epoch: epochs completed after the step.
        """
        counts = Counts()
        rejects: list[SkippedRow] = []
        where: list[str] = []
        views: list[list[View]] = []
        for row in rows:
            if isinstance(row, SkippedRow):
                rejects.append(row)
                counts.skipped_rows[row.reason] += 1
                continue
            turns = self.turns(row)
            where.append(row.where)
            views.append(weigh(turns, self.recipe.loss.weighting, row.where))
            counts.add(count_views(turns, views[-1]))
            counts.remarks.update(row.remarks)
        sequence = self.recipe.sequence
        strategy, budget = sequence.laid_out, sequence.budget
        layouts = merge_conversations(views, strategy, sequence.merge, budget, self.num_processes)
        counts.tokens = sum(layout.num_tokens for layout in layouts)
        counts.trees = len(layouts)
        packs = build_packs(layouts, budget, self.num_processes, self.cost, strategy)
        return Step(
            batches=tuple(self.batch(pack) for pack in packs[self.process]),
            weight_sum=float(sum(layout.weight.sum() for layout in layouts)),
            counts=counts,
            position=position,
            epoch=epoch,
            rows=tuple(where),
            rounds=max(map(len, packs)),
            imbalance=imbalance(packs, self.cost) if self.num_processes > 1 else 1.0,
            rejects=tuple(rejects),
        )

    def batch(self, pack: Pack) -> Batch:
        batch = build_batch(pack, self.pad_to_multiple_of)
        return replace(batch, pack=pack) if self.recipe.sequence.on_oom == "split" else batch


def count_views(turns: Sequence[Turn], views: Sequence[View]) -> Counts:
    """What one conversation adds to the counts of a step; tokens and trees are counted after merging."""
    return Counts(
        conversations=int(bool(views)),
        turns=len(views),
        supervised_tokens=sum(len(view.completion_ids) for view in views),
        per_turn_tokens=sum(view.num_tokens for view in views),
        untrained_turns=Counter(turn.reason for turn in turns if turn.reason is not None),
        untrained_rows=Counter([] if views else ["no turn of it is trained"]),
        notes=Counter(note for turn in turns if turn.trained for note in turn.notes),
    )
