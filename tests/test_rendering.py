"""Claims: whatever the chat template does to thinking, a turn's prompt is what inference is fed and its completion is
what the model must then say, stop token included; a turn of which that cannot be had is refused with the reason.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date as Date
from typing import Any

import pytest
import transformers
from conftest import QUICKSTART, SHARED, conversation_row, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from mtr.conversation import Conversation, parse_row
from mtr.encoding import Encoder
from mtr.errors import UserError
from mtr.rendering import Renderer, Turn

PROMPT = "{{- '<|im_start|>assistant\\n' -}}"
OPEN_PROMPT = "{{- '<|im_start|>assistant\\n<think>\\n' -}}"
SWITCHED_PROMPT = PROMPT + "{%- if enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
END = "{{- '<|im_end|>\\n' -}}"
CALLS = (
    "{%- for call in message.tool_calls or [] -%}{{- '<call>' + (call.function | tojson) + '</call>' -}}{%- endfor -%}"
)
CONTENT = "{{- message.content or '' -}}"


def thinking(key: str = "reasoning_content", when: str = "true") -> str:
    """Thinking in its tags, on some condition."""
    return (
        f"{{%- if message.{key} and ({when}) -%}}"
        f"{{{{- '<think>\\n' + message.{key} + '\\n</think>\\n\\n' -}}}}{{%- endif -%}}"
    )


def template(assistant: str, prompt: str = PROMPT, end: str = END, head: str = "") -> str:
    return (
        "{%- set at = namespace(user=-1, answer=-1) -%}"
        "{%- for m in messages -%}"
        "{%- if m.role == 'user' -%}{%- set at.user = loop.index0 -%}{%- endif -%}"
        "{%- if m.role == 'assistant' and not m.tool_calls -%}{%- set at.answer = loop.index0 -%}{%- endif -%}"
        "{%- endfor -%}"
        + head
        + "{%- for message in messages -%}"
        + "{{- '<|im_start|>' + message.role + '\\n' -}}"
        + f"{{%- if message.role == 'assistant' -%}}{assistant}{{%- else -%}}{CONTENT}{{%- endif -%}}"
        + end
        + "{%- endfor -%}"
        + f"{{%- if add_generation_prompt -%}}{prompt}{{%- endif -%}}"
    )


INLINE = (
    "{%- if loop.last -%}{{- message.content or '' -}}"
    "{%- else -%}{{- (message.content or '').split('</think>')[-1].lstrip('\\n') -}}{%- endif -%}"
)
NO_END = "{%- if message.role != 'assistant' or not loop.last -%}" + END + "{%- endif -%}"
FIRST_CALL = (
    "{%- if message.tool_calls -%}{{- '<call>' + (message.tool_calls[0].function | tojson) + '</call>' -}}{%- endif -%}"
)

TEMPLATES = {
    "strips history": template(thinking(when="loop.last") + CONTENT + CALLS),
    "keeps all": template(thinking() + CONTENT + CALLS),
    "keeps in the tool loop": template(thinking(when="loop.index0 > at.user") + CONTENT + CALLS),
    "keeps until answered": template(
        thinking(when="at.answer < loop.index0 or at.answer == loop.index0 and loop.last") + CONTENT + CALLS
    ),
    "never renders its own": template(CONTENT + CALLS),
    "never renders its own, opens in the prompt": template(CONTENT + CALLS, OPEN_PROMPT),
    "strips history, opens in the prompt": template(thinking(when="loop.last") + CONTENT + CALLS, OPEN_PROMPT),
    "switch": template(thinking(when="loop.last") + CONTENT + CALLS, SWITCHED_PROMPT),
    "reads inline": template(INLINE + CALLS),
    "reads thinking": template(thinking("thinking", "loop.last") + CONTENT + CALLS),
    "reads reasoning": template(thinking("reasoning", "loop.last") + CONTENT + CALLS),
    "no end after the last": template(thinking(when="loop.last") + CONTENT + CALLS, end=NO_END),
}
OPENED = {name for name in TEMPLATES if "opens in the prompt" in name}


@functools.cache
def tokenizer(chat_template: str) -> Any:
    loaded = transformers.AutoTokenizer.from_pretrained(str(QUICKSTART / "base"))
    loaded.chat_template = chat_template
    return loaded


def renderer(chat_template: str, **keys: Any) -> Renderer:
    return Renderer(tokenizer(chat_template), **keys)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


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


def check_turns(made: Renderer, conversation: Conversation, turns: list[Turn], stops: set[int] | None = None) -> None:
    """Prompts as inference is fed them; completions with thinking, response and calls in this order, then a stop."""
    for turn in turns:
        assert turn.trained, turn.reason
        message = conversation.messages[turn.message_index]
        expected = fed(made.tokenizer, conversation, turn.message_index, **made.template.arguments)
        assert list(turn.prompt_ids) == expected, f"turn {turn.turn} is not fed what inference is"
        text = made.tokenizer.decode(list(turn.completion_ids))
        at = 0
        for part in (message.thinking or "", message.content, *[c["function"]["name"] for c in message.tool_calls]):
            assert part in text[at:], f"{part!r} is not where it belongs in {text!r}"
            at = text.index(part, at) + len(part)
        assert turn.completion_ids[-1] in (stops or {made.tokenizer.eos_token_id}), text
        specials = [i for i in turn.completion_ids if i in made.tokenizer.all_special_ids]
        assert len(specials) == 1, f"more than one stop in {text!r}"


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_are_what_inference_sees(name: str, row: str) -> None:
    made, conversation = renderer(TEMPLATES[name]), parsed(ROWS[row])
    turns = made.render(conversation)
    assert [turn.message_index for turn in turns] == conversation.turns
    check_turns(made, conversation, turns)


@pytest.mark.parametrize("name", TEMPLATES)
def test_completion_to_the_letter(name: str) -> None:
    made = renderer(TEMPLATES[name])
    texts = [made.tokenizer.decode(list(turn.completion_ids)) for turn in made.render(parsed(conversation_row(2)))]
    opened = "" if name in OPENED else "<think>\n"
    assert texts == [
        f"{opened}Before: 0. 0 + 2 = 2.\n</think>\n\nAna has 2 coins now.<|im_end|>",
        f"{opened}Before: 1. 1 + 2 = 3.\n</think>\n\nAna has 5 coins now.<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("strips history", [False, False, False]),
        ("keeps all", [False, True, True]),
        ("keeps in the tool loop", [False, True, False]),
        ("keeps until answered", [False, True, False]),
        ("never renders its own", [False, False, False]),
    ],
)
def test_history_is_what_the_template_leaves(name: str, kept: list[bool]) -> None:
    """Guards the templates above: they differ in what later turns see of the first thinking."""
    made = renderer(TEMPLATES[name])
    prompts = [made.tokenizer.decode(list(turn.prompt_ids)) for turn in made.render(parsed(ROWS["tools"]))]
    assert ["I must ask." in prompt for prompt in prompts] == kept


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "inline"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_spelling_of_the_data_does_not_matter(name: str, key: str) -> None:
    """Completions are the same, whichever field holds the thinking."""
    made, row = renderer(TEMPLATES[name]), conversation_row(1)
    expected = made.render(parsed(row))
    answer = dict(row["messages"][1])
    own = answer.pop("reasoning_content")
    if key == "inline":
        answer["content"] = f"<think>\n{own}\n</think>\n\n{answer['content']}"
    else:
        answer[key] = own
    respelled = made.render(parsed({"messages": [row["messages"][0], answer]}))
    assert [turn.completion_ids for turn in respelled] == [turn.completion_ids for turn in expected]
    assert [turn.reason for turn in respelled] == [None]


def test_broken_turns_are_seen() -> None:
    """The check above is no formality."""
    made, conversation = renderer(TEMPLATES["strips history"]), parsed(ROWS["thinking"])
    turns = made.render(conversation)
    check_turns(made, conversation, turns)
    kept = renderer(TEMPLATES["keeps all"]).render(conversation)
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


# --- refusals ---------------------------------------------------------------------------------------------------------


def reasons(chat_template: str, row: dict[str, Any], **keys: Any) -> list[str | None]:
    return [turn.reason for turn in renderer(chat_template, **keys).render(parsed(row))]


def test_closed_thinking_is_refused_by_its_switch() -> None:
    switch = {"enable_thinking": False}
    refused = reasons(TEMPLATES["switch"], ROWS["thinking"], template=switch)
    assert all(reason and "enable_thinking: true" in reason for reason in refused)
    made, conversation = renderer(TEMPLATES["switch"], template=switch), parsed(ROWS["no thinking"])
    turns = made.render(conversation)
    check_turns(made, conversation, turns)
    assert made.tokenizer.decode(list(turns[0].prompt_ids)).endswith("</think>\n\n")
    assert "think>" not in made.tokenizer.decode(list(turns[0].completion_ids))
    assert reasons(TEMPLATES["switch"], ROWS["thinking"], template={"enable_thinking": True}) == [None] * 3


def test_open_prompt_closes_the_thinking_of_a_turn_without() -> None:
    """Inference has opened the thinking, so the model must close it before it answers."""
    made = renderer(TEMPLATES["strips history, opens in the prompt"])
    turn = made.render(parsed(ROWS["no thinking"]))[0]
    text = made.tokenizer.decode(list(turn.completion_ids))
    assert text.startswith("\n</think>") or not turn.trained


def test_dropped_parallel_call_is_refused() -> None:
    first_only = template(thinking(when="loop.last") + CONTENT + FIRST_CALL)
    two = tool_row(call("count", who="Ana"), call("look", who="Ben"))
    same = tool_row(call("count", who="Ana"), call("count", who="Ben"))
    for row in (two, same):
        reason, *others = reasons(first_only, row)
        assert reason is not None
        assert "parallel tool call" in reason
        assert others == [None, None]
        assert reasons(TEMPLATES["strips history"], row) == [None] * 3
    assert reasons(first_only, ROWS["tools"]) == [None] * 3


def test_answer_cut_at_a_literal_tag_is_refused() -> None:
    cuts = template(thinking(when="loop.last") + "{{- (message.content or '').split('</think>')[-1] -}}")
    row = conversation_row(1)
    row["messages"][1]["content"] = "The tag </think> ends it."
    (reason,) = reasons(cuts, row)
    assert reason is not None
    assert "response" in reason
    assert reasons(TEMPLATES["strips history"], row) == [None]


def test_template_that_refuses_is_quoted() -> None:
    strict = template("{{- raise_exception('tools are not for Ana') if message.tool_calls else message.content -}}")
    found = reasons(strict, ROWS["tools"])
    assert all(reason and "tools are not for Ana" in reason for reason in found[:2])


def test_greeting_is_not_trained() -> None:
    greeting = {"role": "assistant", "content": "Hello."}
    row = {"messages": [greeting, *conversation_row(1)["messages"]]}
    first, second = renderer(TEMPLATES["strips history"]).render(parsed(row))
    assert first.reason is not None
    assert "inference never generates it" in first.reason
    assert first.completion_ids == ()
    assert second.trained


def test_weight_zero_is_context() -> None:
    row = conversation_row(2)
    row["messages"][1]["weight"] = 0
    row["messages"][3]["weight"] = 0.25
    context, trained = renderer(TEMPLATES["strips history"]).render(parsed(row))
    assert context.reason is not None
    assert "weight 0" in context.reason
    assert trained.trained
    assert (context.weight, trained.weight) == (0, 0.25)
    assert trained.prompt_ids == renderer(TEMPLATES["strips history"]).render(parsed(conversation_row(2)))[1].prompt_ids


def test_no_chat_template_is_an_error() -> None:
    with pytest.raises(UserError, match="no chat template"):
        renderer("")


def test_broken_chat_template_is_an_error() -> None:
    with pytest.raises(UserError, match="chat template fails"):
        renderer("{%- for message in messages -%}")


# --- details ----------------------------------------------------------------------------------------------------------


def test_string_arguments_equal_objects() -> None:
    objects = [call("count", who="Ana", where={"box": [1, 2.5, None, "ü"]})]
    strings = json.loads(json.dumps(objects))
    strings[0]["function"]["arguments"] = json.dumps(strings[0]["function"]["arguments"])
    assert isinstance(strings[0]["function"]["arguments"], str)
    made = renderer(TEMPLATES["keeps all"])
    assert made.render(parsed(tool_row(*strings))) == made.render(parsed(tool_row(*objects)))


def test_stop_token_is_the_generation_configs() -> None:
    """Where the template writes none: the one that history holds there, else what inference stops at first."""
    made = renderer(TEMPLATES["no end after the last"], stop_ids=[0, 2])
    assert [turn.completion_ids[-1] for turn in made.render(parsed(ROWS["thinking"]))] == [2, 2, 2]
    made = renderer(TEMPLATES["no end after the last"], stop_ids=[0])
    assert [turn.completion_ids[-1] for turn in made.render(parsed(ROWS["thinking"]))] == [0, 0, 0]
    made = renderer(TEMPLATES["strips history"], stop_ids=[0, 2])
    assert [turn.completion_ids[-1] for turn in made.render(parsed(ROWS["thinking"]))] == [2, 2, 2]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_date_is_held_fixed(quote: str) -> None:
    dated = template(CONTENT, head=f"{{{{- strftime_now({quote}%d %b %Y{quote}) + '\\n' -}}}}")
    for date, text in (("2024-02-03", "03 Feb 2024"), (None, Date.today().strftime("%d %b %Y"))):
        made = renderer(dated, date=date)
        (turn,) = made.render(parsed(conversation_row(1, thinking=False)))
        assert made.tokenizer.decode(list(turn.prompt_ids)).startswith(text + "\n")
        assert made.prompt([{"role": "user", "content": "Ana gets 2 more."}]) == list(turn.prompt_ids)


def test_tags_of_the_recipe_are_used() -> None:
    made = renderer(TEMPLATES["never renders its own"], thinking=("[[", "]]"))
    (turn,) = made.render(parsed(conversation_row(1)))
    text = made.tokenizer.decode(list(turn.completion_ids))
    assert text == "[[\nBefore: 0. 0 + 2 = 2.\n]]\n\nAna has 2 coins now.<|im_end|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_split_is_the_inverse(name: str) -> None:
    made = renderer(TEMPLATES[name])
    for row in ("thinking", "no thinking"):
        conversation = parsed(ROWS[row])
        for turn in made.render(conversation):
            message = conversation.messages[turn.message_index]
            assert made.split(list(turn.completion_ids[:-1])) == (message.thinking or "", message.content)


def test_split_leaves_special_tokens_out() -> None:
    made = renderer(TEMPLATES["strips history"])
    (turn,) = made.render(parsed(conversation_row(1)))
    assert made.split(list(turn.completion_ids)) == ("Before: 0. 0 + 2 = 2.", "Ana has 2 coins now.")


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

DATE = "2025-01-02"
DATA = sorted(SHARED.glob("data/*.jsonl"))


def shared_rows(name: str, count: int) -> list[Conversation]:
    with (SHARED / "data" / name).open() as file:
        return [
            parse_row(json.loads(line), f"{name}, line {i}") for i, line in enumerate(itertools.islice(file, count))
        ]


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


@needs_shared
@pytest.mark.parametrize("data", [path.name for path in DATA])
@pytest.mark.parametrize("name", SHARED_TOKENIZERS)
def test_shared_prompts_are_what_inference_is_fed(name: str, data: str) -> None:
    made = shared_renderer(name)
    folder = str(SHARED / "tokenizers" / name)
    plain = transformers.AutoTokenizer.from_pretrained(folder)
    plain.chat_template = plain.chat_template.replace("strftime_now('%Y-%m-%d')", f"'{DATE}'")
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
