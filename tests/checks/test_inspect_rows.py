"""Claims: `mtr inspect` looks at the rows that are asked for: by number, by what they say, by what is lost, the longest
or at random; and it renders a row only where its turns are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from support.rows import chat, conversation_row

from mtr.chat.turn import Turn
from mtr.checks.inspect_rows import Choice, NothingFoundError, Row, choose, ranges
from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.mixture import Mixture
from mtr.data.opening import open_data
from mtr.errors import UserError
from mtr.recipe.loading import load_recipe

BAD = {"messages": "nothing"}


def call(name: str, **arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


ROWS = [
    conversation_row(1),
    chat({"role": "user", "content": "A refund, please."}, {"role": "assistant", "content": "No.", "train": False}),
    BAD,
    chat(
        {"role": "user", "content": "?"},
        call("pay", what="REFUND", text="ä" * 300),
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "Paid.", "reasoning_content": "They want it back."},
    ),
    conversation_row(2),
]


@pytest.fixture
def data(write_recipe: Callable[..., Path], write_rows: Callable[..., Path]) -> Mixture:
    recipe = load_recipe(write_recipe(data={"train": str(write_rows(ROWS)), "on_bad_row": "skip"}))
    opened = open_data(recipe.data, recipe.data.train)
    assert isinstance(opened, Mixture)
    return opened


class Asked:
    """Says which turns are trained as the data says it, and keeps what was rendered and how much was watched."""

    def __init__(self) -> None:
        self.rendered: list[str] = []
        self.watched: list[int | None] = []

    def turns(self, conversation: Conversation) -> list[Turn]:
        self.rendered.append(conversation.where)
        reasons = [None if conversation.messages[i].weight else "weight 0" for i in conversation.turns]
        return [Turn(n, i, reason=reasons[n]) for n, i in enumerate(conversation.turns)]

    def watch(self, rows: Iterable[Row], total: int | None) -> Iterable[Row]:
        self.watched.append(total)
        return rows


def numbers(data: Mixture, choice: Choice, asked: Asked | None = None) -> list[int]:
    asked = asked or Asked()
    return [number for number, _ in choose(data, choice, asked.turns, asked.watch)]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(index=3), [3]),
        (Choice(index=0, count=2), [0, 1]),
        (Choice(index=3, count=9), [3, 4]),
        (Choice(index=0, count=9), [0, 1, 3, 4]),
        (Choice(count=None), [0, 1, 2, 3, 4]),
        (Choice(find="refund", count=None), [1, 3]),
        (Choice(find="REFUND,"), [1]),
        (Choice(find="back", count=None), [3]),
        (Choice(find="done", count=None), [3]),
        (Choice(find="pay", count=None), [3]),
        (Choice(find="Ä", count=None), [3]),
        (Choice(untrained=True, count=None), [1]),
        (Choice(find="refund", untrained=True, count=None), [1]),
        (Choice(order="longest"), [3]),
        (Choice(order="longest", count=3), [3, 4, 0]),
        (Choice(order="longest", count=None), [3, 4, 0, 1]),
        (Choice(find="ana", order="longest"), [4]),
    ],
)
def test_rows_are_those_asked_for(data: Mixture, choice: Choice, expected: list[int]) -> None:
    assert numbers(data, choice) == expected


def test_random_rows_are_different_ones_in_an_order_that_a_seed_repeats(data: Mixture) -> None:
    orders = {seed: numbers(data, Choice(order="random", count=None, seed=seed)) for seed in range(20)}
    assert all(sorted(order) == [0, 1, 3, 4] for order in orders.values()), "the bad row is passed over"
    assert len(set(map(tuple, orders.values()))) > 5
    assert orders[7] == numbers(data, Choice(order="random", count=None, seed=7))
    assert numbers(data, Choice(order="random", count=2, seed=7)) == orders[7][:2]


def test_rows_are_rendered_only_to_find_untrained_turns_and_the_cheap_condition_comes_first(data: Mixture) -> None:
    for choice in (Choice(find="refund"), Choice(order="longest"), Choice(order="random"), Choice(index=0)):
        asked = Asked()
        numbers(data, choice, asked)
        assert asked.rendered == []
        assert asked.watched == ([len(ROWS)] if choice.searches else [])
    asked = Asked()
    numbers(data, Choice(find="refund", untrained=True, count=None), asked)
    assert [where.rpartition("line ")[2] for where in asked.rendered] == ["2", "4"]
    asked = Asked()
    numbers(data, Choice(untrained=True), asked)
    assert len(asked.rendered) == 2, "the search ends at the first one"


def test_a_skipped_row_is_shown_among_all(data: Mixture) -> None:
    asked = Asked()
    found = dict(choose(data, Choice(count=None), asked.turns, asked.watch))
    assert [number for number, row in found.items() if isinstance(row, SkippedRow)] == [2]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (Choice(find="nowhere"), "no row with 'nowhere' in a message"),
        (Choice(find="coins", untrained=True), "no row with 'coins' in a message and with a turn that is not trained"),
    ],
)
def test_nothing_found_has_an_exit_code_of_its_own(data: Mixture, choice: Choice, words: str) -> None:
    with pytest.raises(NothingFoundError, match=words) as caught:
        numbers(data, choice)
    assert caught.value.exit_code == 1


def test_a_letter_is_not_found_as_others_that_it_folds_to(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    answer = {"role": "assistant", "content": "."}
    rows = [chat({"role": "user", "content": text}, answer) for text in ("Strasse", "Straße", "ΟΔΟΣΑ")]
    recipe = load_recipe(write_recipe(data={"train": str(write_rows(rows))}))
    opened = open_data(recipe.data, recipe.data.train)
    assert isinstance(opened, Mixture)
    for wanted, expected in (("ß", [1]), ("ss", [0]), ("ΟΔΟΣ", [2])):
        assert numbers(opened, Choice(find=wanted, count=None)) == expected


CODE = 'say("hi")\nüber'


@pytest.mark.parametrize("wanted", ['say("hi")', ")\nÜB", "run", "code"])
@pytest.mark.parametrize("arguments", [{"code": CODE}, json.dumps({"code": CODE}), json.dumps({"code": [CODE]})])
def test_what_a_tool_call_says_is_found_without_the_escapes_of_json(
    wanted: str, arguments: Any, write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    called = {**call("run"), "tool_calls": [{"type": "function", "function": {"name": "run", "arguments": arguments}}]}
    rows = [conversation_row(1), chat({"role": "user", "content": "?"}, called)]
    recipe = load_recipe(write_recipe(data={"train": str(write_rows(rows))}))
    opened = open_data(recipe.data, recipe.data.train)
    assert isinstance(opened, Mixture)
    assert numbers(opened, Choice(find=wanted, count=None)) == [1]


@pytest.mark.parametrize("count", [1, 9])
def test_a_bad_row_is_an_error_where_its_number_is_given(data: Mixture, count: int) -> None:
    with pytest.raises(UserError, match="line 3: 'messages' must be"):
        numbers(data, Choice(index=2, count=count))


def test_a_bad_row_is_an_error_where_training_stops_at_it(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    recipe = load_recipe(write_recipe(data={"train": str(write_rows(ROWS))}))
    opened = open_data(recipe.data, recipe.data.train)
    assert isinstance(opened, Mixture)
    with pytest.raises(UserError, match="line 3: 'messages' must be"):
        numbers(opened, Choice(index=0, count=9))


@pytest.mark.parametrize("index", [len(ROWS), 2**63])
def test_a_number_beyond_the_data_is_an_error(data: Mixture, index: int) -> None:
    with pytest.raises(UserError, match="5 rows, counted from 0"):
        numbers(data, Choice(index=index))


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == ["0-2", "5", "7-8"]
    assert ranges([]) == []
