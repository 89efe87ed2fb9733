"""Claims: what is assembled from pieces is the template's own text, for every template behaviour; the work is linear in
the length of the conversation; text that depends on distant messages is noticed, by the pieces themselves or by the
comparison with the full rendering, and is never used from then on.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import SHARED, needs_shared
from support.rendering import DATE, behaving, made_of
from support.rows import copy_tokenizer
from support.templates import BEHAVIOURS, CALLS, CONTENT, PROMPT, call, template, thinking

import mtr.chat.comparison
from mtr.chat.history import Cut, History, PieceHistory, TangledError
from mtr.chat.loading import make_renderer
from mtr.chat.rendering import Renderer
from mtr.chat.template import RefusedError, Template
from mtr.data.conversation import Conversation
from mtr.data.parsing import parse_row
from mtr.errors import UserError

TOOLS = [{"type": "function", "function": {"name": "count", "parameters": {}}}]


def chat(
    stretches: Sequence[int], seed: int = 0, *, calls: int = 2, posing: bool = False, thinks: float = 0.8
) -> Conversation:
    """Questions, each with so many rounds of tool calls before its answer; what else there is varies by the seed."""
    rng = random.Random(seed)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Count."}] if rng.random() < 0.5 else []
    if rng.random() < 0.2:
        messages.append({"role": "assistant", "content": "Whose coins?"})

    def say(content: str, **more: Any) -> None:
        thought = {"reasoning_content": f"I think of {rng.random()}."} if rng.random() < thinks else {}
        messages.append({"role": "assistant", "content": content, **more, **thought})

    for number, rounds in enumerate(stretches):
        messages.append({"role": "user", "content": f"Question {number}: {rng.random()}?\n"})
        for _ in range(rounds):
            several = rng.randint(1, calls)
            say(rng.choice(["", "I look."]), tool_calls=[call("count", who=str(rng.random())) for _ in range(several)])
            messages += [{"role": "tool", "content": f"{rng.random()}"} for _ in range(several)]
        if posing and number % 3 == 1:
            say("I ask.")
            messages.append({"role": "user", "content": f"<tool_response>{rng.random()}</tool_response>"})
        say(f"Answer {rng.random()}.")
    return parse_row({"messages": messages, "tools": TOOLS if any(stretches) else None}, "row 1")


def histories(made: Renderer, conversation: Conversation) -> tuple[PieceHistory, History]:
    whole = made._history(conversation)
    return PieceHistory(whole), whole


def texts(history: History, conversation: Conversation) -> list[str] | None:
    """Each turn's prompt, and what the template makes of the turn after it; None where pieces will not do."""

    def text(index: int, own: Mapping[str, Any] | None) -> str:
        try:
            return history.render(index, own)
        except RefusedError as error:
            return str(error)

    try:
        return [text(i, own) for i in conversation.turns if i for own in (None, history.messages[i])]
    except TangledError:
        return None


UNCUT = {"no generation prompt, and the system message only before the last user message"}
"""Behaviours that leave no text as it was when a message is added."""


class Counter:
    """Messages that templates were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages, plain = 0, Template.render

        def counted(template: Template, messages: Sequence[Mapping[str, Any]], *rest: Any, **keys: Any) -> str:
            self.messages += len(messages)
            return plain(template, messages, *rest, **keys)

        monkeypatch.setattr(Template, "render", counted)

    def during(self, work: Callable[[], object]) -> int:
        before = self.messages
        work()
        return self.messages - before


# --- the pieces are the template's own text ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_pieces_are_the_text_of_the_whole(name: str) -> None:
    made = behaving(name)
    most = 1 if BEHAVIOURS[name].found.get("parallel_calls") == "lost" else 2

    @given(st.lists(st.integers(0, 5), min_size=1, max_size=7), st.integers(0, 999), st.booleans())
    @settings(max_examples=10, deadline=None)
    def check(stretches: list[int], seed: int, posing: bool) -> None:
        conversation = chat(stretches, seed, calls=most, posing=posing)
        pieces, whole = histories(made, conversation)
        in_pieces = texts(pieces, conversation)
        assert in_pieces == texts(whole, conversation) or (in_pieces is None and name in UNCUT)

    check()


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_turns_of_long_conversations_are_those_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtr.chat.comparison, "_COMPARED_FIRST", 0)
    made, whole = behaving(name), behaving(name, rendering="whole")
    for stretches in ([0] * 36, [35], [0, 4, 0, 0, 6, 1, 9, 0, 5, 3]):
        conversation = chat(stretches, seed=len(stretches))
        assert made.render(conversation) == whole.render(conversation)
    assert made._comparison.in_pieces
    assert made._comparison.uncompared.total() > 3 * 28 or name in UNCUT


@needs_shared
@pytest.mark.parametrize("name", ["gpt-oss", "qwen3", "r1-distill-qwen"])
def test_real_conversations_one_after_the_other(name: str) -> None:
    """Ten of them as one long one, tools and all."""
    rows = [json.loads(line) for line in (SHARED / "data" / "tau2_retail.jsonl").read_text().splitlines()[:10]]
    messages = [message for row in rows for message in row["messages"] if message["role"] != "system"]
    conversation = parse_row({"messages": [rows[0]["messages"][0], *messages], "tools": rows[0]["tools"]}, "row 1")
    made = make_renderer(transformers.AutoTokenizer.from_pretrained(str(SHARED / "tokenizers" / name)), date=DATE)
    pieces, whole = histories(made, conversation)
    assert len(conversation.turns) > 80
    drafted = [[made._draft(conversation, h.before(i)) for i in conversation.turns[:60]] for h in (pieces, whole)]
    assert drafted[0] == drafted[1]
    assert len(pieces._at_users) > 20


# --- work -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stretches", [[0], [1], [10]], ids=["chat", "short loops", "loops"])
def test_work_grows_with_the_conversation(stretches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter(monkeypatch)
    made = behaving("kept since the last user message")
    work = []
    for times in (1, 4):
        conversation = chat(stretches * (times * 60 // (1 + stretches[0])), calls=1)
        pieces, whole = histories(made, conversation)
        work.append([counter.during(functools.partial(texts, h, conversation)) for h in (pieces, whole)])
    (pieces_short, whole_short), (pieces_long, whole_long) = work
    assert pieces_long < 6 * pieces_short
    assert whole_long > 12 * whole_short


def test_one_long_loop_does_not_cost_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter(monkeypatch)
    made = behaving("kept since the last user message")
    work = []
    for rounds in (60, 240):
        conversation = chat([rounds], calls=1)
        pieces, _ = histories(made, conversation)
        work.append(counter.during(functools.partial(texts, pieces, conversation)))
    assert work[1] < 6 * work[0]


# --- text that depends on messages far away ---------------------------------------------------------------------------

STATE = "{%- set ns = namespace(n=0, called=false) -%}"
FAR = {
    "thinking of the last three questions": template(
        "{%- set ns = namespace(users=0) -%}{%- for m in messages[loop.index0:] -%}{%- if m.role == 'user' -%}"
        "{%- set ns.users = ns.users + 1 -%}{%- endif -%}{%- endfor -%}" + thinking(when="ns.users < 3") + CONTENT
    ),
    "thinking of the latest answer": template(thinking(when="at.answer <= loop.index0") + CONTENT + CALLS),
    "messages are numbered": template(
        thinking() + CONTENT, header="{{- '<|im_start|>' + message.role + '\n' + (loop.index | string) -}}"
    ),
    "the number of messages comes first": template(thinking() + CONTENT, head="{{- (messages | length) -}}"),
    "calls are numbered": template(
        thinking() + CONTENT + "{%- for call in message.tool_calls or [] -%}"
        "{{- '<call ' + (ns.n | string) + '>' + (call.function | tojson) + '</call>' -}}"
        "{%- set ns.n = ns.n + 1 -%}{%- endfor -%}",
        head=STATE,
    ),
    "the first call is announced": template(
        thinking()
        + "{%- if message.tool_calls and not ns.called -%}{{- '<calls>' -}}{%- set ns.called = true -%}{%- endif -%}"
        + CONTENT
        + CALLS,
        head=STATE,
    ),
    "no generation prompt once a tool was called": template(
        "{%- if message.tool_calls -%}{%- set ns.called = true -%}{%- endif -%}" + thinking() + CONTENT + CALLS,
        "{%- if not ns.called -%}" + PROMPT + "{%- endif -%}",
        head=STATE,
    ),
}
LONG_CHATS = [[0] * 14, [6, 0, 0, 5, 4], [0, 1, 0, 2, 0, 0, 1, 0], [14]]


@pytest.mark.parametrize("name", FAR)
def test_text_that_depends_on_messages_far_away_is_rendered_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_renderer(made_of(FAR[name]), date=DATE)
    chats = [chat(stretches, seed) for seed, stretches in enumerate(LONG_CHATS)]
    for conversation in chats:
        pieces, whole = histories(made, conversation)
        assert texts(pieces, conversation) in (None, texts(whole, conversation))

    def trusting(self: PieceHistory, cut: Cut, at: int, *contexts: tuple[int, ...]) -> Cut:
        context = cut.contexts[-1]
        text = self._text_to((*context, *range(cut.at, at + 1)))
        return Cut(at, contexts, (*cut.pieces, text[len(self._text_to((*context, cut.at))) :]))

    def only_the_last(_: PieceHistory, parts: Iterable[Sequence[int]]) -> list[int]:
        return [*([[], *parts][-1])]

    monkeypatch.setattr(PieceHistory, "_next", trusting)
    monkeypatch.setattr(PieceHistory, "_representatives", only_the_last)
    wrong = [texts(pieces, c) != texts(whole, c) for c in chats for pieces, whole in [histories(made, c)]]
    assert any(wrong), "the test could not fail"


def test_a_tool_result_that_poses_as_a_user_message_is_rendered_right() -> None:
    """The thinking before it stays while it is the last message, and goes later."""
    text = template(thinking(when="loop.index0 > at.user") + CONTENT).replace(
        "m.role == 'user'", "m.role == 'user' and not m.content.startswith('<tool_response>')"
    )
    conversation = chat([0] * 14, posing=True)
    made = make_renderer(made_of(text), date=DATE)
    pieces, whole = histories(made, conversation)
    assert texts(pieces, conversation) == texts(whole, conversation)
    assert len(pieces._at_users) > 14, "it was not cut at all"


# --- comparison with full renderings ----------------------------------------------------------------------------------

REMINDER = template(
    thinking(when="loop.index0 > at.user") + CONTENT,
    "{%- if (messages | length) in (15, 16) -%}{{- '<|im_start|>system\nBe brief.<|im_end|>\n' -}}{%- endif -%}"
    + PROMPT,
)
UNSEEN = {
    "thinking of the last three questions": FAR["thinking of the last three questions"],
    "a reminder in the middle": REMINDER,
}
"""Wrong in pieces, and the pieces do not tell."""


@pytest.mark.parametrize("name", UNSEEN)
def test_first_conversations_are_compared_in_all_turns(name: str) -> None:
    made, whole = (make_renderer(made_of(UNSEEN[name]), date=DATE, rendering=how) for how in ("auto", "whole"))
    conversation = chat([0] * 40, seed=3, thinks=1.0)
    in_pieces, at_once = (texts(history, conversation) for history in histories(made, conversation))
    assert in_pieces not in (None, at_once)
    assert made.render(conversation) == whole.render(conversation)
    assert not made._comparison.in_pieces, "it must continue with full renderings"
    assert made.render(conversation) == whole.render(conversation)


def test_a_difference_found_late_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtr.chat.comparison, "_COMPARED_FIRST", 0)
    made = make_renderer(made_of(template(thinking(when="loop.index0 > at.user") + CONTENT)), date=DATE)
    conversation = chat([0] * 40, seed=3)
    made.render(conversation)
    plain = History.render

    def changed(self: History, count: int, own: Mapping[str, Any] | None) -> str:
        return plain(self, count, own).replace("Question 2", "Question Two")

    monkeypatch.setattr(History, "render", changed)
    with pytest.raises(UserError) as error:
        made.render(conversation)
    compared = 40 - made._comparison.uncompared.total()
    assert 2 <= compared <= 4
    message = str(error.value).split()[3].rstrip(":")
    assert int(message) in conversation.turns
    assert str(error.value) == (
        f"row 1, message {message}: rendered in pieces, its context differs from the full rendering, and "
        f"{made._comparison.uncompared.total()} earlier turns were not compared; "
        "set data.rendering: whole and train again"
    )


@pytest.fixture
def inspect(
    write_recipe: Callable[..., Path],
    write_rows: Callable[..., Path],
    mtr: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Callable[..., tuple[int, str]]:
    """`mtr inspect` of conversations with a template, compared in samples only: exit code and last line of output."""
    monkeypatch.setattr("mtr.chat.comparison._COMPARED_FIRST", 0)

    def run(text: str, chats: list[Conversation], *arguments: str) -> tuple[int, str]:
        folder, rows = copy_tokenizer(tmp_path / "tokenizer", text), write_rows([c.row for c in chats])
        recipe = write_recipe(model={"name_or_path": str(folder)}, data={"train": str(rows)}, date=DATE)
        code, _, said = mtr("inspect", recipe, "sequence.max_length=8192", *arguments)
        return code, said.strip().splitlines()[-1] if said.strip() else ""

    return run


def test_inspect_compares_all_turns(inspect: Callable[..., tuple[int, str]]) -> None:
    conversation = chat([0] * 40, seed=3)
    good = inspect(template(thinking(when="loop.last") + CONTENT), [conversation], "--verify")
    assert good == (0, "row 0: every path of the tree is its turn, and every target is present")
    (number,) = (n for n, index in enumerate(conversation.turns) if index in (15, 16))
    assert inspect(REMINDER, [conversation], "--verify") == (
        1,
        f"row 0: FAILED: turn {number}: rendered in full, its text is different; set data.rendering: whole",
    )


def test_a_difference_found_late_is_told_in_one_line(inspect: Callable[..., tuple[int, str]]) -> None:
    """A template that changes its ways in conversations longer than all before."""
    text = REMINDER.replace("in (15, 16)", "> 90")
    chats = [chat([0] * turns, seed=0, thinks=1.0) for turns in (40, 60)]
    code, said = inspect(text, chats, "--all")
    assert code == 2
    assert "rows.jsonl, line 2, message " in said
    assert said.endswith("earlier turns were not compared; set data.rendering: whole and train again")
    assert inspect(text, chats, "--all", "data.rendering=whole")[0] == 0


def test_each_kind_of_conversation_is_compared_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtr.chat.comparison, "_COMPARED_FIRST", 80)
    made = behaving("history thinking is kept")
    uncompared = []
    for stretches in ([0] * 40, [0] * 40, [0] * 40, [39], [39], [39]):
        made.render(chat(stretches, seed=1))
        uncompared.append(made._comparison.uncompared.total())
    assert uncompared[:2] == [0, 0]
    assert 36 <= uncompared[2] <= 38
    assert uncompared[2] == uncompared[4] < uncompared[5]


def test_the_first_conversation_is_compared_in_all_turns_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtr.chat.comparison, "_COMPARED_FIRST", 10)
    made = behaving("history thinking is kept")
    made.render(chat([0] * 40, seed=1))
    assert made._comparison.uncompared.total() == 0
    made.render(chat([0] * 40, seed=1))
    assert made._comparison.uncompared.total() > 0


@pytest.mark.parametrize("turns", [31, 32])
def test_short_conversations_and_whole_rendering_use_no_pieces(turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used = [0]
    plain = PieceHistory.render

    def counted(self: PieceHistory, count: int, own: Mapping[str, Any] | None) -> str:
        used[0] += 1
        return plain(self, count, own)

    monkeypatch.setattr(PieceHistory, "render", counted)
    behaving("history thinking is kept", rendering="whole").render(chat([0] * turns, seed=3))
    assert used[0] == 0
    behaving("history thinking is kept").render(chat([0] * turns, seed=3))
    assert (used[0] > 0) == (turns >= 32)
