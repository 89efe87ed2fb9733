"""Claims: a long conversation is rendered up to where all further prompts are too long, and its turns are trained,
dropped, cut and refused exactly as if each was rendered; the work does not grow with the turns that are too long.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from support.rendering import DATE, behaving, made_of
from support.templates import BEHAVIOURS, CONTENT, call, template, thinking
from support.work import count_work, short_messages

import mtr.chat.reach
from mtr.chat.loading import make_renderer
from mtr.chat.reach import Fate, decided
from mtr.chat.rendering import Renderer
from mtr.chat.turn import NOT_LAST, WEIGHT_ZERO, Turn
from mtr.data.conversation import Conversation
from mtr.data.parsing import parse_row
from mtr.errors import UserError
from mtr.prepare.views import fit_turns
from mtr.recipe.sections import SequenceSection


def chat(turns: int, seed: int = 0, loops: bool = False) -> Conversation:
    """Questions and answers with thinking; some thoughts are long, and some answers come after rounds of tool calls."""
    rng = random.Random(seed)
    messages: list[dict[str, Any]] = []

    def think() -> str:
        return f"I think of {rng.random()}." * (9 if rng.random() < 0.2 else 1)

    while sum(message["role"] == "assistant" for message in messages) < turns:
        messages.append({"role": "user", "content": f"Question {rng.random()}?"})
        for _ in range(rng.randint(0, 4) if loops else 0):
            asked = {"tool_calls": [call("count", who=str(rng.random()))], "reasoning_content": think()}
            messages += [{"role": "assistant", "content": "", **asked}, {"role": "tool", "content": str(rng.random())}]
        weight = {"weight": 0} if rng.random() < 0.1 else {}
        messages.append(
            {"role": "assistant", "content": f"Answer {rng.random()}.", "reasoning_content": think()} | weight
        )
    return parse_row({"messages": messages}, "row 1")


def outcome(made: Renderer, conversation: Conversation, sequence: SequenceSection, early: bool) -> Any:
    """What training gets of each turn; or the error."""
    try:
        turns = made.render(conversation, sequence) if early else made.render(conversation)
        fitted = fit_turns(turns, sequence, conversation.where)
    except UserError as error:
        return str(error)
    return [(t.turn, t.message_index, t.weight, t.reason, *_ids(t)) for t in fitted]


def _ids(turn: Turn) -> tuple[Any, ...]:
    return (turn.prompt_ids, turn.completion_ids, turn.notes) if turn.trained else ()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    return count_work(monkeypatch)


@pytest.fixture
def nothing_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtr.chat.reach, "_CHEAP", 0)


ODD = {
    "the number of messages comes first": template(CONTENT, head="{{- (messages | length) -}}"),
    "messages are numbered": template(
        CONTENT, header="{{- '<|im_start|>' + message.role + '\n' + (loop.index | string) -}}"
    ),
    "only the last four messages": template(
        "{%- if loop.index > (messages | length) - 4 -%}" + thinking() + CONTENT + "{%- endif -%}"
    ),
    "refused from message 30 on": template(
        thinking() + CONTENT, head="{%- if messages | length > 30 -%}{{- raise_exception('enough') -}}{%- endif -%}"
    ),
    "nothing in the middle": template(
        thinking() + CONTENT,
        head="{%- if 20 < messages | length < 40 -%}{%- set messages = messages[:1] -%}{%- endif -%}",
    ),
}


@pytest.mark.parametrize("overlong", ["drop", "truncate", "error"])
@pytest.mark.parametrize("name", [*BEHAVIOURS, *ODD])
def test_turns_are_those_of_rendering_each(name: str, overlong: Any, nothing_is_cheap: None) -> None:
    made = behaving(name) if name in BEHAVIOURS else make_renderer(made_of(ODD[name]), date=DATE)
    for turns, limit, loops in ((12, 200, False), (40, 600, True), (25, 20, False), (6, 5000, True)):
        conversation = chat(turns, limit, loops and BEHAVIOURS.get(name) is not None)
        sequence = SequenceSection(max_length=limit, overlong=overlong)
        early, each = (outcome(made, conversation, sequence, early) for early in (True, False))
        if isinstance(early, str) or isinstance(each, str):
            assert early == each
            continue
        for turn, other in zip(early, each, strict=True):
            length = {"longer than sequence.max_length", "its prompt alone fills sequence.max_length"}
            refused_and_too_long = None not in (turn[3], other[3]) and turn[3].partition(" (")[0] in length
            assert turn == other or (refused_and_too_long and turn[:3] == other[:3])


def test_what_the_data_leaves_out_keeps_its_reason(nothing_is_cheap: None) -> None:
    conversation = chat(30, 3)
    left_out = [number for number, i in enumerate(conversation.turns) if conversation.messages[i].weight == 0]
    turns = behaving("history thinking is kept").render(conversation, SequenceSection(max_length=30))
    assert left_out
    assert [turn.turn for turn in turns if turn.reason == WEIGHT_ZERO] == left_out
    last = behaving("history thinking is kept", train_on="last").render(conversation, SequenceSection(max_length=30))
    assert [turn.reason for turn in last[:-1]] == [NOT_LAST] * 29
    assert last[-1].reason == "longer than sequence.max_length (30)"


# --- where the fates end ----------------------------------------------------------------------------------------------


def found(fates: Sequence[Fate]) -> tuple[list[Fate], int]:
    """The fates of the last turns of a conversation whose turns have these, and how many turns were looked at."""
    conversation, asked = chat(len(fates)), set()

    def fate(index: int) -> Fate:
        asked.add(index)
        return fates[conversation.turns.index(index)]

    return decided(conversation, [True] * len(fates), fate), len(asked)


LONG, OTHER = (1, 2, 3), (1, 2, 4)


def test_turns_that_share_the_fate_of_the_last_one(nothing_is_cheap: None) -> None:
    fates, looked_at = found([None] * 100 + [LONG] * 400)
    assert fates == [LONG] * 400
    assert looked_at < 20
    assert found([None] * 50)[0] == []
    assert found([LONG] * 50)[0] == [LONG] * 50
    assert found([None, LONG, OTHER, None, LONG, LONG])[0] == [LONG] * 2
    assert found([None] * 9 + [LONG] * 40 + ["no more"] * 30)[0] == [LONG] * 40 + ["no more"] * 30


def test_a_fate_that_comes_and_goes_decides_nothing(nothing_is_cheap: None) -> None:
    """Between the first turn by bisection and the last, others fit."""
    fates: Sequence[Fate] = [None] * 8 + [LONG] * 9 + [None] * 40 + [LONG] * 3
    pattern: Sequence[Fate] = [None if number % 3 else LONG for number in range(60)]
    for wrong in (fates, pattern):
        known, _ = found(wrong)
        assert known == wrong[len(wrong) - len(known) :]


def test_cheap_conversations_are_not_looked_at() -> None:
    assert found([LONG] * 100) == ([], 0)


def test_far_longer_than_is_looked_at(monkeypatch: pytest.MonkeyPatch, work: dict[str, int]) -> None:
    """Of ten thousand turns no prompt with much more than _FAR characters is rendered."""
    monkeypatch.setattr(mtr.chat.reach, "_FAR", 100_000)
    made = behaving("history thinking is kept")
    work.update(messages=0, characters=0)
    turns = made.render(parse_row(short_messages(10_000), "row 1"), SequenceSection(max_length=512))
    assert work["messages"] < 60_000
    trained = [turn.turn for turn in turns if turn.trained]
    assert trained == list(range(len(trained)))
    assert {turn.reason for turn in turns[len(trained) :]} == {"longer than sequence.max_length (512)"}
