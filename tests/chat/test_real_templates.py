"""Claims: with real templates and conversations, prompts are what inference is fed, and completions have their
thinking, their response and the stop token of their kind.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from support.paths import SHARED, needs_shared
from support.rendering import (
    DATE,
    SHARED_TOKENIZERS,
    fed,
    load,
    parsed,
)

from mtr.chat.loading import make_renderer
from mtr.chat.rendering import Renderer
from mtr.chat.turn import Turn
from mtr.data.conversation import Conversation
from mtr.data.parsing import parse_row

DATA = sorted(SHARED.glob("data/*.jsonl"))


def shared_rows(name: str, count: int) -> list[Conversation]:
    with (SHARED / "data" / name).open() as file:
        return [
            parse_row(json.loads(line), f"{name}, line {i}") for i, line in enumerate(itertools.islice(file, count))
        ]


@functools.cache
def shared_renderer(name: str) -> Renderer:
    return make_renderer(load(str(SHARED / "tokenizers" / name)), date=DATE)


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
