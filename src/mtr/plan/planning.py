"""`mtr plan`: the rows of a recipe as training takes them, counted.

    recipe, tokenizer, config  ->  the rows of an epoch, or some of them, step by step  ->  Tally  ->  Plan

No weights are read and nothing is computed on a device. `mtr.plan.verdict` and `mtr.plan.on_gpu` add to the plan.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.chat.turn import Turn
from mtr.checks.inspection import Inspection
from mtr.checks.roles import ROLES, token_roles
from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.opening import open_training_data
from mtr.data.stream import Stream
from mtr.errors import UserError
from mtr.model.config import check_reach
from mtr.model.flops import FlopCounter, Flops
from mtr.plan.counting import Tally
from mtr.plan.lengths import spread
from mtr.plan.model import Known, read_model
from mtr.plan.result import Plan, Rows, Run, Work
from mtr.plan.ways import Way
from mtr.prepare.builder import Builder
from mtr.prepare.views import weigh
from mtr.recipe.sections import Recipe
from mtr.tree.packing import build_layouts

STREAMED = 1000
"""Rows of a stream that are counted unless it is said how many."""
STOPS_AT_REACH = "the model does not go with its tokenizer or sequence.max_length"
STOPS_WITHOUT_STEPS = "training.max_steps is missing"
ROLE_ROWS = 30
"""Conversations whose tokens are told apart by role: that renders their prompts once more."""

Row = Conversation | SkippedRow
Shown = Callable[[Iterable[Row], int], Iterable[Row]]
"""Takes rows and their number, and gives the rows while it shows how far they are."""


def plan(recipe: Recipe, rows: int | None = None, num_processes: int = 1, shown: Shown | None = None) -> Plan:
    """
    Args:
        rows: how many rows to count, drawn with the recipe's seed; None: all.
        num_processes: that train together.

    Raises:
        UserError: the data, the tokenizer or the model cannot be loaded.
    """
    tokenizer = load_tokenizer(recipe)
    known = read_model(recipe)
    recipe = known.recipe
    renderer = load_renderer(recipe, tokenizer)
    builder = Builder(recipe, renderer, num_processes=num_processes, cost=known.cost, vocabulary=known.vocabulary)
    taken, about = _rows(recipe, rows)
    tally, roles = Tally(builder, known.counter), _Roles(builder, about.counted)
    size, number = recipe.training.conversations_per_step, 0
    for number, row in enumerate(shown(taken, about.counted) if shown else taken, 1):
        roles.add(row, tally.add(row))
        if number % size == 0:
            tally.end_step()
    tally.end_step()
    if number < about.counted:  # a stream that ends
        if not number:
            raise UserError("data: the stream has no rows")
        about = replace(about, counted=number, of_epoch=number)
    report = tally.audit.report(about.of_epoch)
    refused, warnings = _reach(known, tokenizer)
    single, per_turn = (_work(tally.ways[name], known.counter) for name in ("single_pass", "per_turn"))
    return Plan(
        recipe=recipe,
        model=known.model,
        findings=renderer.findings,
        report=report,
        rows=about,
        conversations=tally.conversations,
        unmerged=sum(tally.lengths["conversation"]),
        supervised=tally.supervised,
        single_pass=single,
        per_turn=per_turn,
        history=tally.continued.history,
        continued=(tally.continued.yes, tally.continued.no),
        lengths={name: found for name, values in tally.lengths.items() if (found := spread(values))},
        stops={**refused, **_endless(recipe, about), **report.stops, **tally.stops},
        warnings=warnings,
        largest_pack=tally.largest_pack,
        roles=roles.tokens,
        role_rows=roles.conversations,
        run=_run(recipe, about, single if recipe.sequence.laid_out == "single_pass" else per_turn, tally.packs),
    )


def _reach(known: Known, tokenizer: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """Why the model would be refused with this tokenizer or length of turns, or what there is to know of them."""
    if known.model.config is None:
        return {}, ()
    try:
        return {}, check_reach(known.model.config, tokenizer, known.recipe.sequence.max_length)
    except UserError as error:
        return {STOPS_AT_REACH: str(error)}, ()


def _endless(recipe: Recipe, rows: Rows) -> dict[str, str]:
    if not rows.streamed or recipe.training.max_steps is not None:
        return {}
    return {STOPS_WITHOUT_STEPS: "of a stream, epochs cannot be counted"}


def _rows(recipe: Recipe, most: int | None) -> tuple[Iterator[Row], Rows]:
    """The rows of the first epoch in its order, or some of them."""
    seed, size = recipe.training.seed, recipe.training.conversations_per_step
    data, held_out = open_training_data(recipe.data.model_copy(update={"on_bad_row": "skip"}), seed)
    if isinstance(data, Stream):
        number = most or STREAMED
        return itertools.islice(data.rows(0, seed, recipe.data.shuffle), number), Rows(number, None, streamed=True)
    order = data.epoch(0, seed, recipe.data.shuffle, size)
    total, held = len(order), 0 if held_out is None else held_out.num_rows
    if not total:
        raise UserError("data.train: the weights of the sources leave no row in an epoch; raise weight")
    if most is None or most >= total:
        return map(data.take, order.tolist()), Rows(total, total, held)
    drawn = _sample(order, most, size if recipe.sequence.merge == "step" else 1, seed)
    return map(data.take, drawn.tolist()), Rows(len(drawn), total, held, seed)


def _sample(order: Any, most: int, together: int, seed: int) -> Any:
    """About so many rows, drawn at random, in their order; `together` rows at a time, the rows of a step."""
    starts = np.arange(0, len(order), together)
    drawn = np.random.default_rng((seed, 0x91A4)).choice(starts, max(1, most // together), replace=False)
    return np.concatenate([order[start : start + together] for start in np.sort(drawn)])


class _Roles:
    """Tokens by role of some conversations, evenly spaced."""

    def __init__(self, builder: Builder, rows: int) -> None:
        self.tokens: dict[str, int] = dict.fromkeys(ROLES, 0)
        self.conversations = 0
        self._builder = builder
        self._every = max(1, math.ceil(rows / ROLE_ROWS))
        self._rows = 0

    def add(self, row: Row, turns: list[Turn]) -> None:
        self._rows += 1
        if (self._rows - 1) % self._every or not isinstance(row, Conversation):
            return
        recipe = self._builder.recipe
        views = weigh(turns, recipe.loss.weighting)
        layouts = build_layouts(views, "single_pass", recipe.sequence.budget)
        found: Counter[int] = Counter()
        for roles in token_roles(Inspection(0, row, turns, layouts, {}), self._builder):
            found.update(roles.role.tolist())
        self.conversations += bool(layouts)
        for number, name in enumerate(ROLES):
            self.tokens[name] += found[number]


def _work(way: Way, counter: FlopCounter | None) -> Work:
    return Work(way, None if counter is None else way.flops(counter))


def _run(recipe: Recipe, rows: Rows, work: Work, packs: int) -> Run:
    training, size = recipe.training, recipe.training.conversations_per_step
    of_epoch = None if rows.of_epoch is None else math.ceil(rows.of_epoch / size)
    steps = training.max_steps
    if steps is None and of_epoch is not None and not rows.streamed:
        steps = max(1, math.ceil(training.num_train_epochs * of_epoch))
    if steps is None:
        return Run(None, None, None, None, None)
    taken = steps * size
    if rows.of_epoch is not None and of_epoch is not None:  # an epoch's last step may be a small one
        taken = steps // of_epoch * rows.of_epoch + steps % of_epoch * size
    factor = taken / rows.counted
    flops = work.flops and Flops(*(factor * part for part in vars(work.flops).values()))
    return Run(steps, of_epoch, round(factor * work.way.tokens), math.ceil(factor * packs), flops)
