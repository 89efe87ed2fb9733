"""Claims: a step is a function of its number; what it weighs is the same for every process, packing and strategy; each
turn weighs what the recipe says, and what is too long is treated as it says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rows import conversation_row

from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.chat.turn import Turn
from mtr.data.conversation import Conversation
from mtr.data.mixture import Mixture
from mtr.data.opening import open_data
from mtr.data.parsing import parse_row
from mtr.data.stream import Stream
from mtr.errors import UserError
from mtr.prepare.builder import Builder
from mtr.prepare.counts import Counts
from mtr.prepare.step import Step
from mtr.prepare.steps import IndexedSteps, StreamedSteps
from mtr.prepare.views import fit_turns, weigh
from mtr.prepare.workers import iterate_steps
from mtr.recipe.loading import load_recipe
from mtr.recipe.sections import Recipe, SequenceSection
from mtr.tree.layout import View
from mtr.tree.packing import build_layouts

# --- turns ------------------------------------------------------------------------------------------------------------

SHORT = Turn(0, 1, (1, 2), (3, 4))
LONG = Turn(1, 3, (1, 2, 3), (4, 5, 6), notes=("a note",))
LONG_PROMPT = Turn(2, 5, (1, 2, 3, 4, 5), (6, 7))
UNTRAINED = Turn(3, 7, tuple(range(50)), (1,), reason="a reason")
TURNS = [SHORT, LONG, LONG_PROMPT, UNTRAINED]


def sequence(overlong: str, limit: int = 5) -> SequenceSection:
    return SequenceSection.model_validate({"max_length": limit, "max_tokens": 100, "overlong": overlong})


def test_overlong_turns_are_dropped() -> None:
    short, long, long_prompt, untrained = fit_turns(TURNS, sequence("drop"), "file, line 1")
    assert short is SHORT
    assert untrained is UNTRAINED
    assert long.reason == long_prompt.reason == "longer than sequence.max_length (5)"
    assert not long.trained


def test_overlong_turns_are_truncated() -> None:
    short, long, long_prompt, untrained = fit_turns(TURNS, sequence("truncate"), "file, line 1")
    assert short is SHORT
    assert untrained is UNTRAINED
    assert long.trained
    assert (long.prompt_ids, long.completion_ids) == ((1, 2, 3), (4, 5))
    assert long.notes == ("a note", "truncated to sequence.max_length (5)")
    assert long_prompt.reason == "its prompt alone fills sequence.max_length (5)"


def test_overlong_turns_are_an_error() -> None:
    with pytest.raises(UserError, match=r"file, line 1, message 3: the turn has 6 tokens.*max_length \(5\)"):
        fit_turns(TURNS, sequence("error"), "file, line 1")
    assert fit_turns([SHORT, UNTRAINED], sequence("error"), "file, line 1") == [SHORT, UNTRAINED]


@pytest.mark.parametrize("overlong", ["drop", "truncate", "error"])
def test_what_just_fits_stays(overlong: str) -> None:
    assert fit_turns([LONG], sequence(overlong, limit=6), "here") == [LONG]


WEIGHED = [
    Turn(0, 1, (1,), (2, 3)),
    Turn(1, 3, (1,), (2, 3, 4, 5), weight=0.5),
    Turn(2, 5, (1,), (2,), reason="untrained"),
    Turn(3, 7, (1,), (6,)),
]


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("token", [1.0, 0.5, 1.0]),
        ("turn", [1 / 2, 0.5 / 4, 1.0]),
        ("conversation", [1 / 5, 0.5 / 5, 1 / 5]),  # 1 * 2 + 0.5 * 4 + 1 * 1
    ],
)
def test_weigh(weighting: str, expected: list[float]) -> None:
    views = weigh(WEIGHED, weighting)
    assert [view.turn for view in views] == [0, 1, 3]
    assert [view.weights.tolist() for view in views] == [
        pytest.approx([expected[0]] * 2),
        pytest.approx([expected[1]] * 4),
        pytest.approx([expected[2]]),
    ]
    assert [view.ids.tolist() for view in views] == [[1, 2, 3], [1, 2, 3, 4, 5], [1, 6]]


def test_weighting_decides_what_weighs_one() -> None:
    def total(weighting: str, turns: list[Turn]) -> list[float]:
        return [float(view.weights.sum()) for view in weigh(turns, weighting)]

    assert total("token", WEIGHED) == pytest.approx([2, 2, 1])
    assert total("turn", WEIGHED) == pytest.approx([1, 0.5, 1])
    assert sum(total("conversation", WEIGHED)) == pytest.approx(1)
    assert weigh([WEIGHED[2]], "conversation") == []


def test_counts_add_up() -> None:
    one = Counts(1, 2, 3, 4, 5, 6, Counter({"a": 1}), Counter({"r": 1}), Counter({"n": 2}))
    two = Counts(10, 20, 30, 40, 50, 60, Counter({"a": 2, "b": 1}), Counter(), Counter({"m": 1}))
    one.add(two)
    assert one == Counts(
        11, 22, 33, 44, 55, 66, Counter({"a": 3, "b": 1}), Counter({"r": 1}), Counter({"n": 2, "m": 1})
    )
    assert two.untrained_turns == Counter({"a": 2, "b": 1})
    with_nothing = Counts()
    with_nothing.add(one)
    assert with_nothing == one
    assert Counts().untrained_turns == Counter(), "the counters are not shared"


# --- steps ------------------------------------------------------------------------------------------------------------


def greeting_row() -> dict[str, Any]:
    """A row with no turn to train."""
    return {"messages": [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Ana?"}]}


ROWS = [conversation_row(1), conversation_row(4), conversation_row(2), greeting_row(), conversation_row(3, False)]


@pytest.fixture
def builder(write_recipe: Callable[..., Path], write_rows: Callable[..., Path]) -> Builder:
    """Five rows, two conversations a step."""
    path = write_recipe(
        data={"train": str(write_rows(ROWS))},
        training={"conversations_per_step": 2},
        sequence={"max_length": 400, "max_tokens": 400},
    )
    recipe = load_recipe(path)
    return Builder(recipe, load_renderer(recipe, load_tokenizer(recipe)))


def opened(recipe: Recipe) -> Mixture:
    data = open_data(recipe.data, recipe.data.train)
    assert isinstance(data, Mixture)
    return data


def conversations() -> list[Conversation]:
    return [parse_row(row, f"row {i}") for i, row in enumerate(ROWS)]


def changed(builder: Builder, **sections: dict[str, Any]) -> Builder:
    return replace(builder, recipe=builder.recipe.replace(**sections))


def weight_of(step: Step) -> float:
    return sum(float(batch.weight.sum()) for batch in step.batches)


def targets(steps: list[Step]) -> Counter[int]:
    return Counter(int(i) for step in steps for batch in step.batches for i in batch.target_id)


@pytest.mark.parametrize("weighting", ["token", "turn", "conversation"])
@pytest.mark.parametrize("strategy", ["single_pass", "per_turn"])
@pytest.mark.parametrize("processes", [1, 2, 3, 20])
def test_processes_share_the_step(builder: Builder, processes: int, strategy: str, weighting: str) -> None:
    asked = changed(builder, sequence={"strategy": strategy}, loss={"weighting": weighting})
    alone = asked.step(conversations(), 5, 1.0)
    steps = [replace(asked, process=i, num_processes=processes).step(conversations(), 5, 1.0) for i in range(processes)]
    assert {step.weight_sum for step in steps} == {alone.weight_sum}
    assert sum(map(weight_of, steps)) == pytest.approx(alone.weight_sum, rel=1e-12)
    assert all(step.counts == alone.counts for step in steps)
    assert targets(steps) == targets([alone])
    assert sum(batch.num_tokens for step in steps for batch in step.batches) == alone.counts.tokens
    if processes == 20:
        assert any(not step.batches for step in steps)


def test_what_a_step_weighs_is_the_recipes(builder: Builder) -> None:
    sums = {weighting: builder_sum(builder, weighting) for weighting in ("token", "turn", "conversation")}
    counts = builder.step(conversations(), 5, 1.0).counts
    assert sums["token"] == pytest.approx(counts.supervised_tokens)
    assert sums["turn"] == pytest.approx(counts.turns) == 10
    assert sums["conversation"] == pytest.approx(counts.conversations) == 4


def builder_sum(builder: Builder, weighting: str) -> float:
    return changed(builder, loss={"weighting": weighting}).step(conversations(), 5, 1.0).weight_sum


@pytest.mark.parametrize("keys", [{"strategy": "per_turn"}, {"max_tokens": 5000}, {"max_tokens": 401}], ids=str)
def test_packing_changes_speed_only(builder: Builder, keys: dict[str, Any]) -> None:
    one, other = (b.step(conversations(), 5, 1.0) for b in (builder, changed(builder, sequence=keys)))
    assert one.weight_sum == pytest.approx(other.weight_sum, rel=1e-12)
    for name in ("conversations", "turns", "supervised_tokens", "per_turn_tokens", "untrained_turns"):
        assert getattr(one.counts, name) == getattr(other.counts, name)


def test_counts_of_a_step(builder: Builder) -> None:
    alone = builder.step([conversations()[1]], 1, 0.2)
    views = builder.views(conversations()[1])
    assert alone.counts.per_turn_tokens == sum(view.num_tokens for view in views)
    assert alone.counts.tokens < alone.counts.per_turn_tokens
    assert alone.counts.trees == len(build_layouts(views, "single_pass", 16384))
    apart = changed(builder, sequence={"strategy": "per_turn"}).step([conversations()[1]], 1, 0.2)
    assert apart.counts.tokens == apart.counts.per_turn_tokens
    assert apart.counts.trees == apart.counts.turns == 4


def test_untrained_row_is_counted_with_its_reason(builder: Builder) -> None:
    step = builder.step([conversations()[3]], 1, 0.2)
    assert step.batches == ()
    assert step.weight_sum == 0
    assert (step.counts.conversations, step.counts.turns) == (0, 0)
    assert sum(step.counts.untrained_rows.values()) == 1
    ((reason, count),) = step.counts.untrained_turns.items()
    assert count == 1
    assert reason


def test_batches_are_padded(builder: Builder) -> None:
    step = replace(builder, pad_to_multiple_of=128).step(conversations(), 5, 1.0)
    assert all(batch.input_ids.shape[1] % 128 == 0 for batch in step.batches)
    assert sum(batch.num_tokens for batch in step.batches) == step.counts.tokens


def same(one: Step | UserError, other: Step | UserError) -> bool:
    assert isinstance(one, Step)
    assert isinstance(other, Step)
    rest = ("weight_sum", "counts", "position", "epoch")
    return (
        all(getattr(one, name) == getattr(other, name) for name in rest)
        and len(one.batches) == len(other.batches)
        and all(
            np.array_equal(value, vars(batch)[name])
            for batch, twin in zip(one.batches, other.batches, strict=True)
            for name, value in vars(twin).items()
            if name != "rows"
        )
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_step_is_a_function_of_its_number(builder: Builder, shuffle: bool) -> None:
    data = opened(builder.recipe)
    forward = IndexedSteps(builder.step, data, builder.recipe.training, shuffle)
    in_order = [forward[number] for number in range(9)]
    other = IndexedSteps(builder.step, data, builder.recipe.training, shuffle)
    for number in (8, 0, 4, 3, 7, 1, 8):
        assert same(other[number], in_order[number])
    assert not same(in_order[0], in_order[1])
    assert any(not same(replace_place(in_order[i]), replace_place(in_order[i + 3])) for i in range(3)) == shuffle


def replace_place(step: Step | UserError) -> Step:
    assert isinstance(step, Step)
    return replace(step, position=0, epoch=0.0)


def rows_of(steps: IndexedSteps, numbers: range) -> list[tuple[int, float, int]]:
    """Position, epoch and rows of each step."""
    found = []
    for number in numbers:
        step = steps[number]
        assert isinstance(step, Step)
        found.append((step.position, step.epoch, step.counts.conversations + sum(step.counts.untrained_rows.values())))
    return found


def test_last_step_of_an_epoch_is_short_and_kept(builder: Builder) -> None:
    steps = IndexedSteps(builder.step, opened(builder.recipe), builder.recipe.training, shuffle=True)
    assert steps.steps_per_epoch == 3
    assert rows_of(steps, range(6)) == [
        (2, 0.4, 2), (4, 0.8, 2), (5, 1.0, 1), (7, 1.4, 2), (9, 1.8, 2), (10, 2.0, 1),
    ]  # fmt: skip


def test_epoch_takes_every_row(builder: Builder) -> None:
    steps = IndexedSteps(builder.step, opened(builder.recipe), builder.recipe.training, shuffle=True)
    whole = builder.step(conversations(), 5, 1.0).counts
    for epoch in range(2):
        counts = Counts()
        for number in range(3 * epoch, 3 * epoch + 3):
            step = steps[number]
            assert isinstance(step, Step)
            counts.add(step.counts)
        assert counts == whole


def test_bad_row_comes_where_it_is_met(builder: Builder, write_rows: Callable[..., Path]) -> None:
    path = write_rows([*ROWS[:3], {"messages": []}, ROWS[4]], "bad.jsonl")
    data = opened(builder.recipe.replace(data={"train": [{"path": str(path)}]}))
    steps = IndexedSteps(builder.step, data, builder.recipe.training, shuffle=False)
    assert isinstance(steps[0], Step)
    assert isinstance(steps[1], UserError)
    assert isinstance(steps[2], Step)
    taken = iterate_steps(steps, range(3), 0)
    assert next(taken).position == 2
    with pytest.raises(UserError, match=r"bad\.jsonl, line 4"):
        next(taken)


@pytest.mark.parametrize("workers", [0, 2])
def test_iterate_steps_keeps_the_order(builder: Builder, workers: int) -> None:
    steps = IndexedSteps(builder.step, opened(builder.recipe), builder.recipe.training, shuffle=True)
    taken = list(iterate_steps(steps, range(2, 6), workers))
    assert len(taken) == 4
    assert all(same(step, steps[number]) for number, step in zip(range(2, 6), taken, strict=True))


class Listed(Stream):
    """A stream of the rows above, or of none."""

    def __init__(self, rows: list[Conversation]) -> None:
        object.__setattr__(self, "given", rows)

    def rows(self, epoch: int, seed: int, shuffle: bool) -> Iterator[Conversation]:
        yield from vars(self)["given"]


def test_streamed_steps_are_the_indexed_ones(builder: Builder) -> None:
    """Without shuffling a stream gives the very steps of the file, the short last one included, from any start."""
    indexed = IndexedSteps(builder.step, opened(builder.recipe), builder.recipe.training, shuffle=False)
    for start in (0, 1, 3, 4):
        streamed = StreamedSteps(
            builder.step, Listed(conversations()), builder.recipe.training, shuffle=False, start=start
        )
        numbers = range(start, start + 5)
        for number, step in zip(numbers, iterate_steps(streamed, numbers, 0), strict=True):
            ours, theirs = replace(step, epoch=0.0), indexed[number]
            assert isinstance(theirs, Step)
            assert same(ours, replace(theirs, epoch=0.0)), number


def test_empty_stream_is_an_error(builder: Builder) -> None:
    with pytest.raises(UserError, match="no rows"):
        list(
            iterate_steps(StreamedSteps(builder.step, Listed([]), builder.recipe.training, shuffle=False), range(2), 0)
        )


def test_targets_of_a_step_are_the_completions(builder: Builder) -> None:
    step = builder.step(conversations(), 5, 1.0)
    views: list[View] = [view for conversation in conversations() for view in builder.views(conversation)]
    expected = Counter(int(i) for view in views for i in view.completion_ids)
    assert targets([step]) == expected
    assert all(torch.isfinite(batch.weight).all() for batch in step.batches)
