"""Claims: whatever the chat template does to thinking, a turn's prompt is what inference is fed and its completion is
what the model must then say, stop token included; a turn of which that cannot be had is refused with the reason.

The templates and what must be said with them are in templates.py; `expected` holds the renderer to them.
"""

from __future__ import annotations

import functools
import itertools
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date as Date
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import QUICKSTART, SHARED, needs_shared
from support.rows import conversation_row
from support.templates import BEHAVIOURS, CALLS, CONTENT, LAST, call, template, tokenizer

from mtr.chat.encoding import Encoder
from mtr.chat.rendering import Renderer
from mtr.chat.turn import INLINE_HISTORY, Turn
from mtr.data.conversation import THINKING_KEYS, Conversation
from mtr.data.parsing import parse_row
from mtr.errors import UserError

DATE = "2025-01-02"


@functools.cache
def made_of(chat_template: str) -> Any:
    loaded = transformers.AutoTokenizer.from_pretrained(str(QUICKSTART / "base"))
    loaded.chat_template = chat_template
    return loaded


def renderer(chat_template: str, **keys: Any) -> Renderer:
    """With the quickstart's tokenizer."""
    return Renderer(made_of(chat_template), **keys)


def behaving(name: str, **keys: Any) -> Renderer:
    """With the template of a behaviour and its tokenizer."""
    behaviour, loaded = BEHAVIOURS[name], tokenizer(name)
    stops = [loaded.convert_tokens_to_ids(stop) for stop in behaviour.stops]
    return Renderer(loaded, thinking=behaviour.tags, date=DATE, stop_ids=stops, **keys)


def tool_row(*calls: dict[str, Any]) -> dict[str, Any]:
    """A question answered with one tool loop, then another one."""
    return {
        "messages": [
            {"role": "system", "content": "Count."},
            {"role": "user", "content": "How many coins has Ana?"},
            {"role": "assistant", "content": "", "reasoning_content": "I must ask.", "tool_calls": list(calls)},
            {"role": "tool", "content": "7"},
            {"role": "assistant", "content": "Ana has 7 coins.", "reasoning_content": "It says 7."},
            {"role": "user", "content": "And Ben?"},
            {"role": "assistant", "content": "Ben has none.", "reasoning_content": "Nothing was said of Ben."},
        ]
    }


ROWS = {
    "thinking": conversation_row(3),
    "no thinking": conversation_row(2, thinking=False),
    "tools": tool_row(call("count", who="Ana")),
}


def parsed(row: dict[str, Any]) -> Conversation:
    return parse_row(row, "row 1")


def fed(loaded: Any, conversation: Conversation, index: int, **arguments: Any) -> list[int]:
    """What inference is fed before a message: the rendered prompt, encoded whole."""
    history = [dict(message.data) for message in conversation.messages[:index]]
    text = loaded.apply_chat_template(
        history, tools=conversation.tools, add_generation_prompt=True, tokenize=False, **arguments
    )
    ids: list[int] = loaded(text, add_special_tokens=False)["input_ids"]
    return ids


# --- every template, against what it is told to do --------------------------------------------------------------------


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
    """Prompt and completion of each turn: the first rendered here, one by one, the second as the template is told."""
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


def check_turns(made: Renderer, conversation: Conversation, turns: list[Turn]) -> None:
    """Prompts as inference is fed them; completions with thinking, response and calls in this order, then a stop."""
    for turn in turns:
        assert turn.trained, turn.reason
        message = conversation.messages[turn.message_index]
        assert list(turn.prompt_ids) == fed(made.tokenizer, conversation, turn.message_index, **made.template.arguments)
        text = made.tokenizer.decode(list(turn.completion_ids))
        at = 0
        for part in (message.thinking or "", message.content, *[c["function"]["name"] for c in message.tool_calls]):
            assert part in text[at:], f"{part!r} is not where it belongs in {text!r}"
            at = text.index(part, at) + len(part)
        assert turn.completion_ids[-1] == made.tokenizer.eos_token_id, text
        assert len([i for i in turn.completion_ids if i in made.tokenizer.all_special_ids]) == 1, text


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
    """Were it put together wrongly, or rendered in a spelling that is not read, the turn would be refused."""
    conversation = parsed(ROWS["thinking"])
    broken: list[tuple[str, Callable[..., Any]]] = [
        ("built", lambda rest, *_: rest),
        ("built", lambda rest, thinking, *_: f"{thinking[1:]}\n</think>\n\n{rest}"),
        ("built", lambda rest, thinking, *_: f"{thinking}\n\n{rest}"),
        ("rendered", lambda *_: iter(["Ana has 2 coins now."])),
    ]
    for function, wrong in broken:
        with monkeypatch.context() as patched:
            patched.setattr(f"mtr.chat.rendering.{function}", wrong)
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
    assert Renderer(twice).findings.bos == "twice"


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


# --- refusals ---------------------------------------------------------------------------------------------------------


def reasons(chat_template: str, row: dict[str, Any], **keys: Any) -> list[str | None]:
    return [turn.reason for turn in renderer(chat_template, **keys).render(parsed(row))]


def test_closed_thinking_is_refused_by_its_switch() -> None:
    text = BEHAVIOURS["a switch closes it"].text
    switch = {"enable_thinking": False}
    refused = reasons(text, ROWS["thinking"], template=switch)
    assert all(reason and "template: {enable_thinking: true}" in reason for reason in refused)
    made, conversation = renderer(text, template=switch), parsed(ROWS["no thinking"])
    turns = made.render(conversation)
    check_turns(made, conversation, turns)
    assert made.tokenizer.decode(list(turns[0].prompt_ids)).endswith("</think>\n\n")
    assert "think>" not in made.tokenizer.decode(list(turns[0].completion_ids))
    assert reasons(text, ROWS["thinking"], template={"enable_thinking": True}) == [None] * 3


def test_the_switch_that_opens_is_found_by_trial() -> None:
    """Whatever it is called and takes; and if nothing opens it, that is said."""
    text = BEHAVIOURS["closed, and a switch opens it"].text
    assert all(
        reason and 'open it with template: {deliberate: "yes"}' in reason for reason in reasons(text, ROWS["thinking"])
    )
    assert reasons(text, ROWS["thinking"], template={"deliberate": "yes"}) == [None] * 3
    text = BEHAVIOURS["closed for good"].text
    assert all(
        reason and "no argument of the template opens it" in reason for reason in reasons(text, ROWS["thinking"])
    )


def test_dropped_parallel_call_is_refused() -> None:
    first_call = CALLS.replace("message.tool_calls or []", "(message.tool_calls or [])[:1]")
    first_only = template(LAST + CONTENT + first_call)
    two = tool_row(call("count", who="Ana"), call("look", who="Ben"))
    same = tool_row(call("count", who="Ana"), call("count", who="Ben"))
    for row in (two, same):
        made = renderer(first_only)
        turns = made.render(parsed(row))
        assert [turn.reason for turn in turns] == ["the template drops a parallel tool call", None, None]
        assert turns[1].notes == ("the template leaves out earlier parallel tool calls",)
        assert reasons(BEHAVIOURS["history thinking is stripped"].text, row) == [None] * 3
    assert reasons(first_only, ROWS["tools"]) == [None] * 3


def test_dropped_argument_is_refused() -> None:
    names_only = template(CONTENT + "{%- for c in message.tool_calls or [] -%}{{- c.function.name -}}{%- endfor -%}")
    assert "argument" in (reasons(names_only, ROWS["tools"])[0] or "")


def test_answer_cut_at_a_literal_tag_is_refused() -> None:
    row = conversation_row(1)
    row["messages"][1]["content"] = "The tag </think> ends it."
    (reason,) = reasons(BEHAVIOURS["an answer is cut at its closing tag"].text, row)
    assert reason is not None
    assert "response" in reason
    assert "</think>" in reason
    assert reasons(BEHAVIOURS["history thinking is stripped"].text, row) == [None]


def test_thinking_that_holds_its_own_closing_tag_is_refused() -> None:
    """Inference would end it there, and read the rest of it as the response."""
    row = conversation_row(1)
    row["messages"][1]["reasoning_content"] = "First </think> and then more."
    for name in ("history thinking is stripped", "never rendered, the prompt opens it"):
        assert "inference would end it there" in (reasons(BEHAVIOURS[name].text, row)[0] or "")


def test_thinking_in_two_places_is_refused_unless_it_is_the_same() -> None:
    row = conversation_row(1)
    answer = row["messages"][1]
    said, thought = answer["content"], answer["reasoning_content"]
    text = BEHAVIOURS["history thinking is stripped"].text
    answer["content"] = f"<think>\nAnother.\n</think>\n\n{said}"
    assert "two thinkings" in (reasons(text, row)[0] or "")
    answer["content"] = f"<think>\n{thought}\n</think>\n\n{said}"
    same, plain = (renderer(text).render(parsed(r)) for r in (row, conversation_row(1)))
    assert same[0].completion_ids == plain[0].completion_ids


def test_stop_token_in_the_answer_is_refused() -> None:
    """Inference would stop there."""
    row = conversation_row(1)
    row["messages"][1]["content"] = "It ends with <|im_end|>, always."
    assert "inference stops at <|im_end|>" in (reasons(BEHAVIOURS["history thinking is stripped"].text, row)[0] or "")


def test_thinking_without_any_tags_is_refused() -> None:
    loaded = transformers.AutoTokenizer.from_pretrained(str(QUICKSTART / "base"))
    loaded.chat_template = BEHAVIOURS["the tags are named in the recipe"].text.replace("[/why]", "@")
    made = Renderer(loaded)
    made = replace_findings(made, tags=None, answers_read=(), calls_read=())
    (turn,) = made.render(parsed(conversation_row(1)))
    assert "no think tags were found" in (turn.reason or "")


def replace_findings(made: Renderer, **changed: Any) -> Renderer:
    made.findings = replace(made.findings, **changed)
    return made


def test_template_that_refuses_is_quoted() -> None:
    strict = template("{{- raise_exception('tools are not for Ana') if message.tool_calls else message.content -}}")
    found = reasons(strict, ROWS["tools"])
    assert all(reason and "tools are not for Ana" in reason for reason in found[:2])


def test_no_chat_template_is_an_error() -> None:
    with pytest.raises(UserError, match="no chat template"):
        renderer("")


def test_broken_chat_template_is_an_error() -> None:
    with pytest.raises(UserError, match="chat template fails"):
        renderer("{%- for message in messages -%}")


# --- what is left out is said -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assistant", "other", "notes"),
    [
        (CONTENT + CALLS, "{%- if message.role != 'system' -%}" + CONTENT + "{%- endif -%}", "system messages"),
        (CONTENT + CALLS, "{%- if message.role != 'tool' -%}" + CONTENT + "{%- endif -%}", "tool messages"),
        (CONTENT, CONTENT, "earlier tool calls"),
    ],
)
def test_left_out_of_the_history_is_noted(assistant: str, other: str, notes: str) -> None:
    made = renderer(template(assistant, other=other))
    assert made.render(parsed(ROWS["tools"]))[-1].notes == (f"the template leaves out {notes}",)
    assert renderer(template(CONTENT + CALLS)).render(parsed(ROWS["tools"]))[-1].notes == ()


def test_text_beside_a_call_is_noted() -> None:
    row = tool_row(call("count", who="Ana"))
    row["messages"][2]["content"] = "I shall ask."
    drops = template(LAST + "{%- if not message.tool_calls -%}" + CONTENT + "{%- endif -%}" + CALLS)
    assert renderer(drops).render(parsed(row))[0].notes == ("the template drops the text beside its tool calls",)
    assert behaving("history thinking is stripped").render(parsed(row))[0].notes == ()


def test_text_beside_a_call_as_thinking_is_noted() -> None:
    row = tool_row(call("count", who="Ana"))
    row["messages"][2] |= {"content": "I shall ask.", "reasoning_content": None}
    first, *_ = behaving("channels, with another end in history").render(parsed(row))
    assert first.trained
    assert first.notes == ("the template writes the text beside its tool calls as thinking",)


def test_schemas_left_out_are_noted() -> None:
    schema = {"type": "function", "function": {"name": "count", "parameters": {}}}
    name = "no generation prompt, and the system message only before the last user message"
    row = {"messages": ROWS["tools"]["messages"][1:], "tools": [schema]}
    assert all("tool schemas" in turn.notes[0] for turn in behaving(name).render(parsed(row)))


# --- details ----------------------------------------------------------------------------------------------------------


def test_string_arguments_equal_objects() -> None:
    objects = [call("count", who="Ana", where={"box": [1, 2.5, None, "ü"]})]
    strings = json.loads(json.dumps(objects))
    strings[0]["function"]["arguments"] = json.dumps(strings[0]["function"]["arguments"])
    assert isinstance(strings[0]["function"]["arguments"], str)
    for name in ("history thinking is kept", "tool arguments must be text"):
        made = behaving(name)
        turns = made.render(parsed(tool_row(*strings)))
        assert turns == made.render(parsed(tool_row(*objects)))
        assert all(turn.trained for turn in turns)


def test_white_space_around_a_response_is_no_reason_to_refuse() -> None:
    row = conversation_row(1)
    row["messages"][1]["content"] = "\n  Ana has 2 coins now. \n"
    for name in BEHAVIOURS:
        if BEHAVIOURS[name].thinks:
            (turn,) = behaving(name).render(parsed(row))
            assert turn.trained, (name, turn.reason)


def test_stop_token_is_the_generation_configs() -> None:
    """Where the template writes none: the one that history holds there, else what inference stops at first."""
    text = BEHAVIOURS["no end of turn after the last answer"].text
    for stop_ids, stop in (([0, 2], 2), ([0], 0)):
        made = renderer(text, stop_ids=stop_ids)
        assert [turn.completion_ids[-1] for turn in made.render(parsed(ROWS["thinking"]))] == [stop] * 3
    made = renderer(BEHAVIOURS["history thinking is stripped"].text, stop_ids=[0, 2])
    assert [turn.completion_ids[-1] for turn in made.render(parsed(ROWS["thinking"]))] == [2, 2, 2]


@pytest.mark.parametrize("call_of", ["strftime_now('{}')", 'strftime_now("{}")', "strftime_now(  form )"])
def test_date_is_held_fixed(call_of: str) -> None:
    """However the template asks for it."""
    text = "{%- set form = '%d %b %Y' -%}{{- " + call_of.format("%d %b %Y") + " + '\\n' -}}"
    dated = template(CONTENT, head=text)
    for date, printed in (("2024-02-03", "03 Feb 2024"), (None, Date.today().strftime("%d %b %Y"))):
        made = renderer(dated, date=date)
        (turn,) = made.render(parsed(conversation_row(1, thinking=False)))
        assert made.tokenizer.decode(list(turn.prompt_ids)).startswith(printed + "\n")
        assert made.prompt([{"role": "user", "content": "Ana gets 2 more."}]) == list(turn.prompt_ids)


def test_a_date_that_cannot_be_fixed_is_refused() -> None:
    with pytest.raises(UserError, match="does not write out"):
        renderer(template(CONTENT, head="{{- strftime_now('%d' ~ ' %b') -}}"))


def test_white_space_before_the_template_survives_the_fixed_date() -> None:
    made = renderer("  \n" + template(CONTENT, head="{{- strftime_now('%Y') -}}"))
    plain = renderer("  \n" + template(CONTENT, head=f"{{{{- '{Date.today().year}' -}}}}"))
    assert made.render(parsed(ROWS["no thinking"])) == plain.render(parsed(ROWS["no thinking"]))


# --- the encoder ------------------------------------------------------------------------------------------------------


class Counting:
    """A tokenizer that counts the texts it encodes."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self.added_tokens_decoder = plain.added_tokens_decoder
        self.encoded = 0

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.encoded += len(texts)
        return self.plain(texts, **options)


SHARED_TOKENIZERS = ("gpt-oss", "qwen3", "r1-distill-qwen")
TOKENIZERS = [
    pytest.param(str(QUICKSTART / "base"), id="quickstart"),
    *[pytest.param(str(SHARED / "tokenizers" / name), id=name, marks=needs_shared) for name in SHARED_TOKENIZERS],
]
load = functools.cache(lambda folder: transformers.AutoTokenizer.from_pretrained(folder))


def warm(counting: Counting) -> Encoder:
    """An encoder past its first texts, which it encodes twice."""
    encoder = Encoder(counting)
    encoder([f"text {i}" for i in range(40)])
    return encoder


@pytest.mark.parametrize("folder", TOKENIZERS)
def test_encoder_equals_the_tokenizer(folder: str) -> None:
    plain = load(folder)
    counting = Counting(plain)
    encoder = warm(counting)
    added = sorted(str(token) for token in plain.added_tokens_decoder.values())
    pieces = st.one_of(
        st.text(max_size=12), st.sampled_from(added), st.sampled_from([" ", "\n", "\n\n", "<think", "|>", "wörd", "12"])
    )

    @given(st.lists(st.lists(pieces, max_size=8).map("".join), min_size=1, max_size=3))
    @settings(max_examples=150, deadline=None)
    def check(texts: list[str]) -> None:
        assert encoder(texts) == plain(texts, add_special_tokens=False)["input_ids"]

    check()
    text = f"one{added[0]}two"
    encoder([text])
    before = counting.encoded
    encoder([text, text])
    assert counting.encoded == before, "known pieces are encoded again"


def test_encoder_of_an_odd_tokenizer() -> None:
    """Added tokens that eat white space make pieces depend on each other: texts are encoded whole."""
    plain = transformers.AutoTokenizer.from_pretrained(str(QUICKSTART / "base"))
    plain.add_tokens([transformers.AddedToken("<eats>", lstrip=True, rstrip=True)])
    encoder = warm(Counting(plain))
    for texts in itertools.permutations(["a <eats> b", "a<eats>b", "a"], 2):
        assert encoder(list(texts)) == plain(list(texts), add_special_tokens=False)["input_ids"]


def test_encoder_of_nothing() -> None:
    encoder = Encoder(load(str(QUICKSTART / "base")))
    assert encoder([]) == []
    assert encoder([""]) == [[]]


# --- real templates and conversations ---------------------------------------------------------------------------------

DATA = sorted(SHARED.glob("data/*.jsonl"))


def shared_rows(name: str, count: int) -> list[Conversation]:
    with (SHARED / "data" / name).open() as file:
        return [
            parse_row(json.loads(line), f"{name}, line {i}") for i, line in enumerate(itertools.islice(file, count))
        ]


@functools.cache
def shared_renderer(name: str) -> Renderer:
    return Renderer(load(str(SHARED / "tokenizers" / name)), date=DATE)


def holds_thinking(made: Renderer, conversation: Conversation, turn: Turn) -> bool:
    own = (conversation.messages[turn.message_index].thinking or "").strip()
    return own in made.tokenizer.decode(list(turn.completion_ids))


def ends_harmony(made: Renderer, conversation: Conversation, turn: Turn) -> bool:
    last = made.tokenizer.decode([turn.completion_ids[-1]])
    calls = bool(conversation.messages[turn.message_index].tool_calls)
    return bool(last == ("<|call|>" if calls else "<|return|>"))


def ends_in_eos(made: Renderer, conversation: Conversation, turn: Turn) -> bool:
    return bool(turn.completion_ids[-1] == made.tokenizer.eos_token_id)


CHECKS: dict[str, list[Callable[[Renderer, Conversation, Turn], bool]]] = {
    "gpt-oss": [ends_harmony, holds_thinking],
    "qwen3": [ends_in_eos, holds_thinking],
    "r1-distill-qwen": [ends_in_eos, holds_thinking],
}


@needs_shared
@pytest.mark.parametrize("data", [path.name for path in DATA])
@pytest.mark.parametrize("name", SHARED_TOKENIZERS)
def test_shared_conversations(name: str, data: str) -> None:
    made = shared_renderer(name)
    trained = 0
    for conversation in shared_rows(data, 10):
        for turn in made.render(conversation):
            message = conversation.messages[turn.message_index]
            assert turn.trained or turn.reason
            if not turn.trained:
                continue
            trained += 1
            for check in CHECKS[name]:
                assert check(made, conversation, turn), f"{conversation.where}, turn {turn.turn}: {check.__name__}"
            text = made.tokenizer.decode(list(turn.completion_ids))
            assert message.tool_calls or message.content.strip() in text
    assert trained >= 10


@functools.cache
def undated(name: str) -> Any:
    plain = transformers.AutoTokenizer.from_pretrained(str(SHARED / "tokenizers" / name))
    plain.chat_template = plain.chat_template.replace("strftime_now('%Y-%m-%d')", f"'{DATE}'")
    return plain


@needs_shared
@pytest.mark.parametrize("data", [path.name for path in DATA])
@pytest.mark.parametrize("name", SHARED_TOKENIZERS)
def test_shared_prompts_are_what_inference_is_fed(name: str, data: str) -> None:
    made = shared_renderer(name)
    plain = undated(name)
    for conversation in shared_rows(data, 2):
        for turn in made.render(conversation):
            if turn.trained:
                assert list(turn.prompt_ids) == fed(plain, conversation, turn.message_index), turn.turn


@needs_shared
@pytest.mark.parametrize("name", SHARED_TOKENIZERS)
def test_shared_string_arguments_equal_objects(name: str) -> None:
    made, changed = shared_renderer(name), 0
    for strings in shared_rows("tau2_retail_string_arguments.jsonl", 3):
        row = json.loads(json.dumps(strings.row))
        for function in (c["function"] for m in row["messages"] for c in m.get("tool_calls") or []):
            changed += isinstance(function["arguments"], str)
            function["arguments"] = json.loads(function["arguments"])
        assert made.render(parsed(row)) == made.render(strings)
    assert changed > 10
