"""Renderers with the templates of support/templates.py or with any other, and rows to render."""

from __future__ import annotations

import functools
from typing import Any

import transformers

from mtr.chat.loading import make_renderer
from mtr.chat.rendering import Renderer
from mtr.chat.turn import Turn
from mtr.data.conversation import Conversation
from mtr.data.parsing import parse_row
from support.paths import QUICKSTART
from support.rows import conversation_row
from support.templates import BEHAVIOURS, call, tokenizer

DATE = "2025-01-02"


@functools.cache
def made_of(chat_template: str) -> Any:
    loaded = transformers.AutoTokenizer.from_pretrained(str(QUICKSTART / "base"))
    loaded.chat_template = chat_template
    return loaded


def renderer(chat_template: str, **keys: Any) -> Renderer:
    """With the quickstart's tokenizer."""
    return make_renderer(made_of(chat_template), **keys)


def behaving(name: str, **keys: Any) -> Renderer:
    """With the template of a behaviour and its tokenizer."""
    behaviour, loaded = BEHAVIOURS[name], tokenizer(name)
    stops = [loaded.convert_tokens_to_ids(stop) for stop in behaviour.stops]
    return make_renderer(loaded, thinking=behaviour.tags, date=DATE, stop_ids=stops, **keys)


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


SHARED_TOKENIZERS = ("gpt-oss", "qwen3", "r1-distill-qwen")


load = functools.cache(lambda folder: transformers.AutoTokenizer.from_pretrained(folder))
