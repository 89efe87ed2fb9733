"""What an epoch of training computes, counted by the steps from row to packs that training takes.

    rows of a step -> RowAudit -> [Turn] -> weigh -> [View] -> merge_conversations -> build_packs

Tokens, predictors and visible pairs are whole numbers and are added as such; FLOPs are taken of the sums, by the
counter that `mtr bench` uses. Both ways are counted, whichever of them trains.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mtr.chat.turn import Turn
from mtr.checks.audit_rows import RowAudit
from mtr.data.conversation import Conversation, SkippedRow
from mtr.errors import UserError
from mtr.model.flops import FlopCounter
from mtr.plan.ways import History, Way
from mtr.prepare.builder import Builder
from mtr.prepare.views import check_ids, weigh
from mtr.tree.layout import Layout, View
from mtr.tree.packing import build_packs, merge_conversations

_FEW = 0.02
"""A share of turns that are continued by chance: they have no thinking, or their template is another one for them."""
STOPS_AT_ID = "a token id beyond the model's vocabulary"


@dataclass
class Continued:
    """How often the prompt of a trained turn begins with the one before it as that was generated.

    The token that ends the turn may differ: gpt-oss ends it with <|return|>, and with <|end|> once it is history.
    """

    yes: int = 0
    no: int = 0

    def add(self, views: Sequence[View]) -> None:
        for view, later in itertools.pairwise(views):
            ids = view.ids[:-1]
            continues = len(later.prompt_ids) > len(ids) and np.array_equal(later.prompt_ids[: len(ids)], ids)
            self.yes += continues
            self.no += not continues

    @property
    def history(self) -> History:
        if not self.yes + self.no:
            return "single"
        if not self.no:
            return "kept"
        return "dropped" if self.yes < _FEW * self.no else "mixed"


class Tally:
    """Counts rows as they come, step by step."""

    def __init__(self, builder: Builder, counter: FlopCounter | None) -> None:
        """
        Args:
            builder: of the recipe with its strategy decided, for the number of processes that would train.
            counter: of its model, if that is known.
        """
        self.audit = RowAudit(replace(builder, vocabulary=None))  # a row with other ids is counted, and said
        self.ways = {"single_pass": Way(), "per_turn": Way()}
        self.continued = Continued()
        self.supervised = 0
        self.conversations = 0
        """With a trained turn."""
        self.packs = 0
        self.largest_pack = 0
        """Tokens of the largest pack of the way that trains."""
        self.stops: dict[str, str] = {}
        self.lengths: dict[str, list[int]] = {"turns": [], "conversation": [], "prompt": [], "completion": []}
        """Of each conversation its trained turns and the tokens of its trees, of each turn those of its parts."""
        self._builder = builder
        self._spans = list(counter.per_pair) if counter else []
        self._step: list[list[View]] = []

    def add(self, row: Conversation | SkippedRow) -> list[Turn]:
        """One more row of the step.

        Returns:
            Its turns.
        """
        turns = self.audit.add(row)
        vocabulary = self._builder.vocabulary
        if vocabulary is not None:
            try:
                check_ids(turns, vocabulary, row.where)
            except UserError as error:
                self.stops.setdefault(STOPS_AT_ID, str(error))
        views = weigh(turns, self._builder.recipe.loss.weighting, row.where)
        if views:
            self._step.append(views)
        return turns

    def end_step(self) -> None:
        """Merge and pack the rows since the last step, as one step of training."""
        sequence, step = self._builder.recipe.sequence, self._step
        processes = self._builder.num_processes
        self._step = []
        if not step:
            return
        budget = sequence.budget
        own = [merge_conversations([views], "single_pass", "conversation", budget) for views in step]
        single = list(itertools.chain.from_iterable(own))
        if sequence.merge == "step":
            single = merge_conversations(step, "single_pass", "step", budget, processes)
        per_turn = merge_conversations(step, "per_turn", sequence.merge, budget, processes)
        self.ways["single_pass"].add(single, self._spans)
        self.ways["per_turn"].add(per_turn, self._spans)
        trained = single if sequence.laid_out == "single_pass" else per_turn
        packs = build_packs(trained, budget, processes, self._builder.cost, sequence.laid_out)
        self.packs += sum(map(len, packs))
        self.largest_pack = max([self.largest_pack, *(pack.num_tokens for share in packs for pack in share)])
        for views, layouts in zip(step, own, strict=True):
            self._add_lengths(views, layouts)

    def _add_lengths(self, views: Sequence[View], layouts: Sequence[Layout]) -> None:
        self.conversations += 1
        self.continued.add(views)
        self.supervised += sum(len(view.completion_ids) for view in views)
        self.lengths["turns"].append(len(views))
        self.lengths["conversation"].append(sum(layout.num_tokens for layout in layouts))
        self.lengths["prompt"] += [len(view.prompt_ids) for view in views]
        self.lengths["completion"] += [len(view.completion_ids) for view in views]
