"""Claims: whatever the chat template does to thinking, a turn's prompt is what inference is fed, and its completion is
what the model must then generate, including the stop token; turns that the data or the recipe leaves out are context.

The templates and their completions are in support/templates.py; `expected` holds the renderer to them.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date as Date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rendering import DATE, ROWS, behaving, check_turns, made_of, parsed
from support.rows import conversation_row
from support.templates import BEHAVIOURS, call, tokenizer

from mtr.chat.loading import make_renderer
from mtr.chat.rendering import Renderer
from mtr.chat.turn import INLINE_HISTORY
from mtr.data.conversation import THINKING_KEYS

# --- every template, against its expected completions -----------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """An assistant message, before anything spells it."""

    thinking: str
    response: str
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()

    @property
    def calls_as_text(self) -> str:
        calls = [{"name": name, "arguments": arguments} for name, arguments in self.calls]
        return "".join(f"<call>{json.dumps(call, ensure_ascii=False)}</call>" for call in calls)


Chat = list[tuple[str, str] | Said]


def spelled(chat: Chat, spelling: str) -> list[dict[str, Any]]:
    """As a data set would write it, with thinking in one of the fields or inline."""
    messages: list[dict[str, Any]] = []
    for said in chat:
        if not isinstance(said, Said):
            messages.append({"role": said[0], "content": said[1]})
            continue
        message: dict[str, Any] = {"role": "assistant", "content": said.response}
        if said.calls:
            message["tool_calls"] = [call(name, **arguments) for name, arguments in said.calls]
            if not said.response:
                del message["content"]
        if said.thinking and spelling == "content parts":
            text = [{"type": "text", "text": said.response}] if said.response else []
            message["content"] = [{"type": "thinking", "thinking": said.thinking}, *text]
        elif said.thinking and spelling == "inline":
            message["content"] = f"<think>\n{said.thinking}\n</think>\n\n{said.response}"
        elif said.thinking:
            message[spelling] = said.thinking
        messages.append(message)
    return messages


def expected(name: str, chat: Chat, spelling: str, tools: list[Any] | None) -> list[tuple[str, str]]:
    """Prompt and completion of each turn: the first rendered here, one by one, the second as the behaviour `says`."""
    behaviour, loaded = BEHAVIOURS[name], tokenizer(name)
    if spelling == "content parts" and spelling not in behaviour.found.get("fields", ()):
        spelling = THINKING_KEYS[0]
    messages = spelled(chat, spelling)
    for message in messages:
        if "tool_calls" in message and behaviour.found.get("call_content") == "empty":
            message.setdefault("content", "")
        for function in (c["function"] for c in message.get("tool_calls", ())):
            if behaviour.found.get("arguments") == "string":
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    dated = loaded.chat_template.replace("strftime_now(form)", f"'{Date.fromisoformat(DATE):%d %b %Y}'")

    def render(number: int, generation: bool) -> str:
        text: str = loaded.apply_chat_template(
            messages[:number], tools=tools, chat_template=dated, add_generation_prompt=generation, tokenize=False
        )
        return text

    turns = []
    for index, said in enumerate(chat):
        if isinstance(said, Said):
            prompt = render(index, generation=True)
            completion = behaviour.says(said.thinking, said.response, said.calls_as_text)
            if behaviour.straight and spelling in behaviour.found.get("fields", THINKING_KEYS[:1]):
                assert render(index + 1, generation=False).startswith(prompt + completion), "templates.py is wrong"
            turns.append((prompt, completion))
    return turns


WORDS = st.text("abcd éß漢🙂.,:!?'\"{}[]()&\\/<>-_=\n01", min_size=1, max_size=24).map(str.strip).filter(bool)


RESPONSES = WORDS.filter(lambda text: not text.startswith("<think"))


ARGUMENTS = st.dictionaries(
    st.sampled_from(["who", "wo", "größe"]),
    st.one_of(WORDS, st.integers(-9, 99), st.booleans(), st.none(), st.lists(WORDS, max_size=2)),
    max_size=2,
)


@st.composite
def chats(draw: st.DrawFn, name: str) -> Chat:
    """Any conversation that the template is meant for."""
    behaviour = BEHAVIOURS[name]
    thoughts = st.one_of(st.just(""), WORDS) if behaviour.thinks else st.just("")
    most_calls = 1 if behaviour.found.get("parallel_calls") == "lost" else 2
    beside = st.just("") if behaviour.found.get("text_beside_calls") == "lost" else st.one_of(st.just(""), RESPONSES)
    one_call = st.tuples(st.sampled_from(["count", "look_up"]), ARGUMENTS)
    chat: Chat = [("system", draw(WORDS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        chat.append(("user", draw(WORDS)))
        for _ in range(draw(st.integers(0, 2)) if behaviour.tools else 0):
            calls = tuple(draw(st.lists(one_call, min_size=1, max_size=most_calls)))
            chat.append(Said(draw(thoughts), draw(beside), calls))
            chat += [("tool", draw(WORDS)) for _ in calls]
        chat.append(Said(draw(thoughts), draw(RESPONSES)))
    if draw(st.booleans()):
        chat.append(("user", draw(WORDS)))
    return chat


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_turns_are_what_inference_sees(name: str) -> None:
    made = behaving(name)

    @given(chats(name), st.sampled_from([*THINKING_KEYS, "content parts", "inline"]), st.booleans())
    @settings(max_examples=40, deadline=None)
    def check(chat: Chat, spelling: str, with_tools: bool) -> None:
        tools = [{"type": "function", "function": {"name": "count", "parameters": {}}}] if with_tools else None
        turns = made.render(parsed({"messages": spelled(chat, spelling), "tools": tools}))
        assert [turn.message_index for turn in turns] == [i for i, said in enumerate(chat) if isinstance(said, Said)]
        for turn, (prompt, completion) in zip(turns, expected(name, chat, spelling, tools), strict=True):
            assert turn.trained, turn.reason
            plain = made.tokenizer([prompt, completion], add_special_tokens=False)["input_ids"]
            assert made.tokenizer.decode(turn.prompt_ids) == prompt
            assert made.tokenizer.decode(turn.completion_ids) == completion
            assert [list(turn.prompt_ids), list(turn.completion_ids)] == plain

    check()


def test_broken_turns_are_seen() -> None:
    """The checks are no formality: a lost thinking, a lost or doubled stop token and another context are found."""
    conversation = parsed(ROWS["thinking"])
    made = behaving("history thinking is stripped")
    turns = made.render(conversation)
    check_turns(made, conversation, turns)
    kept = behaving("history thinking is kept").render(conversation)
    last = turns[-1]
    broken = [
        replace(last, prompt_ids=kept[-1].prompt_ids),
        replace(last, completion_ids=last.completion_ids[:-1]),
        replace(last, completion_ids=(*last.completion_ids, last.completion_ids[-1])),
        replace(last, completion_ids=last.completion_ids[10:]),
        replace(last, reason="something"),
    ]
    for turn in broken:
        with pytest.raises(AssertionError):
            check_turns(made, conversation, [turn])


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("history thinking is stripped", [False, False, False]),
        ("history thinking is kept", [False, True, True]),
        ("kept since the last user message", [False, True, False]),
        ("kept until the loop is answered", [False, True, False]),
        ("channels, with another end in history", [False, True, False]),
        ("its own thinking is never rendered", [False, False, False]),
    ],
)
def test_history_is_what_the_template_leaves(name: str, kept: list[bool]) -> None:
    """Guards the templates: they differ in what later turns see of the first thinking."""
    made = behaving(name)
    prompts = [made.tokenizer.decode(list(turn.prompt_ids)) for turn in made.render(parsed(ROWS["tools"]))]
    assert ["I must ask." in prompt for prompt in prompts] == kept


@pytest.mark.parametrize("name", [name for name, behaviour in BEHAVIOURS.items() if behaviour.thinks])
def test_no_thinking_is_ever_lost(name: str) -> None:
    """Whatever the spelling: a turn that is trained holds its own thinking, and these are."""
    made = behaving(name)
    for spelling in (*THINKING_KEYS, "inline"):
        chat: Chat = [("user", "Why?"), Said("Deep thought.", "So."), ("user", "And?"), Said("Deeper.", "And so on.")]
        for turn, thought in zip(
            made.render(parsed({"messages": spelled(chat, spelling)})), ("Deep thought.", "Deeper."), strict=True
        ):
            assert turn.trained, turn.reason
            assert thought in made.tokenizer.decode(turn.completion_ids)


def test_a_completion_that_lost_its_thinking_does_not_get_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it were assembled wrongly, or rendered in a spelling that is not read, the turn would be refused."""
    conversation = parsed(ROWS["thinking"])
    broken: list[tuple[str, Callable[..., Any]]] = [
        ("built", lambda rest, *_: rest),
        ("built", lambda rest, thinking, *_: f"{thinking[1:]}\n</think>\n\n{rest}"),
        ("built", lambda rest, thinking, *_: f"{thinking}\n\n{rest}"),
        ("rendered", lambda *_: iter(["Ana has 2 coins now."])),
    ]
    for function, wrong in broken:
        with monkeypatch.context() as patched:
            patched.setattr(f"mtr.chat.draft.{function}", wrong)
            for turn in behaving("never rendered, the prompt opens it").render(conversation):
                thought = (conversation.messages[turn.message_index].thinking or "").strip()
                text = made_of("x").decode(turn.completion_ids)
                assert (not turn.trained and turn.reason) or text.startswith(f"{thought}\n</think>\n\n")


@pytest.mark.parametrize("name", BEHAVIOURS)
@pytest.mark.parametrize("empty", ["", " \n"])
def test_empty_thinking_is_none(name: str, empty: str) -> None:
    made = behaving(name)
    row = conversation_row(2, thinking=False)
    for message in row["messages"][1::2]:
        message["reasoning_content"] = empty
    for turn, message in zip(made.render(parsed(row)), row["messages"][1::2], strict=True):
        assert turn.trained, turn.reason
        said = made.tokenizer.decode(turn.completion_ids)
        assert "".join(said.split()) == "".join(BEHAVIOURS[name].says("", message["content"], "").split())


def test_a_renderer_reaches_a_worker() -> None:
    """However workers are started."""
    made = behaving("the date is printed")
    conversation = parsed(ROWS["tools"])
    assert pickle.loads(pickle.dumps(made)).render(conversation) == made.render(conversation)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_split_is_the_inverse(name: str) -> None:
    made = behaving(name)
    chat: Chat = [("user", "Why?"), Said("Deep thought.", "So."), ("user", "And?"), Said("", "And so on.")]
    for said, turn in zip(
        chat[1::2], made.render(parsed({"messages": spelled(chat, "reasoning_content")})), strict=True
    ):
        assert isinstance(said, Said)
        if turn.trained:
            assert made.split(list(turn.completion_ids[:-1])) == (said.thinking, said.response)
            assert made.split(list(turn.completion_ids)) == (said.thinking, said.response)


def test_history_is_respelled_in_parts_if_asked() -> None:
    """A template that reads thinking from parts drops that of a field: as given, or as it reads it."""
    name = "read from parts of the content"
    as_data, respelled = (behaving(name, history=history) for history in ("as_data", "respell"))
    field, parts = (
        parsed(
            {"messages": spelled([("user", "Hi"), Said("Hm.", "Yes."), ("user", "So?"), Said("Hm?", "No.")], spelling)}
        )
        for spelling in (THINKING_KEYS[0], "content parts")
    )
    assert as_data.render(parts) == respelled.render(parts) == respelled.render(field)
    first, second = as_data.render(field)
    assert first == as_data.render(parts)[0]
    assert second.completion_ids == as_data.render(parts)[1].completion_ids
    assert "Hm." not in made_text(as_data, second.prompt_ids)
    assert "<think>Hm.</think>Yes." in made_text(as_data, as_data.render(parts)[1].prompt_ids)


def made_text(made: Renderer, ids: tuple[int, ...]) -> str:
    return str(made.tokenizer.decode(list(ids)))


def test_history_is_respelled_if_asked() -> None:
    """Inline thinking that the template lets through in history, but would drop from its own field."""
    name = "history thinking is stripped"
    chat: Chat = [("user", "Why?"), Said("Deep thought.", "So."), ("user", "And?"), Said("Deeper.", "And so on.")]
    row = {"messages": spelled(chat, "inline")}
    as_data, respelled = (behaving(name, history=history) for history in ("as_data", "respell"))
    as_field = as_data.render(parsed({"messages": spelled(chat, "reasoning_content")}))
    first, second = as_data.render(parsed(row))
    assert "Deep thought." in as_data.tokenizer.decode(second.prompt_ids)
    assert (first.notes, second.notes) == ((), (INLINE_HISTORY,))
    assert respelled.render(parsed(row)) == as_field
    assert "Deep thought." not in as_data.tokenizer.decode(as_field[1].prompt_ids)
    assert respelled.prompt(row["messages"][:3]) == list(as_field[1].prompt_ids)


def test_bos_stands_there_once() -> None:
    name = "BOS is written"
    made = behaving(name)
    for turn in made.render(parsed(ROWS["thinking"])):
        assert turn.prompt_ids.count(made.tokenizer.bos_token_id) == 1
        assert turn.prompt_ids[0] == made.tokenizer.bos_token_id
    twice = made_of(BEHAVIOURS[name].text.replace("bos_token", "'<|im_start|><|im_start|>'"))
    twice.bos_token = "<|im_start|>"
    assert make_renderer(twice).findings.bos == "twice"


# --- which turns are trained ------------------------------------------------------------------------------------------


def test_train_on_last() -> None:
    every, last = behaving("history thinking is stripped"), behaving("history thinking is stripped", train_on="last")
    conversation = parsed({"messages": [*ROWS["tools"]["messages"], {"role": "user", "content": "And then?"}]})
    turns = last.render(conversation)
    assert turns[-1] == every.render(conversation)[-1]
    assert [turn.trained for turn in turns] == [False, False, True]
    assert {turn.reason for turn in turns[:-1]} == {"train_on is last, and this is not the last turn"}


def test_greeting_is_not_trained() -> None:
    greeting = {"role": "assistant", "content": "Hello."}
    row = {"messages": [greeting, *conversation_row(1)["messages"]]}
    first, second = behaving("history thinking is stripped").render(parsed(row))
    assert first.reason is not None
    assert "inference never generates it" in first.reason
    assert first.completion_ids == ()
    assert second.trained


def test_greeting_after_a_system_message_is_trained() -> None:
    row = {"messages": [{"role": "system", "content": "Greet."}, {"role": "assistant", "content": "Hello."}]}
    (turn,) = behaving("history thinking is stripped").render(parsed(row))
    assert turn.trained


@pytest.mark.parametrize("key", ["train", "weight", "loss", "loss_weight"])
def test_weight_zero_is_context(key: str) -> None:
    row = conversation_row(2)
    row["messages"][1][key] = False if key == "train" else 0
    row["messages"][3][key] = 1 if key == "train" else 0.25
    made = behaving("history thinking is stripped")
    context, trained = made.render(parsed(row))
    assert context.reason is not None
    assert "weight 0" in context.reason
    assert trained.trained
    assert (context.weight, trained.weight) == (0, 1 if key == "train" else 0.25)
    assert trained.prompt_ids == made.render(parsed(conversation_row(2)))[1].prompt_ids
