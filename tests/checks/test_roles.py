"""Claims: every token of a tree has the role and the message that its text comes from, on real conversations with real
templates; its weight is what the turns give it; what cannot be told is prompt.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.paths import QUICKSTART, SHARED, needs_shared
from support.rendering import DATE, ROWS, SHARED_TOKENIZERS, behaving, load, parsed, renderer
from support.rows import conversation_row
from support.templates import BEHAVIOURS, CONTENT

from mtr.chat.loading import make_renderer
from mtr.chat.rendering import Renderer
from mtr.checks.inspect import inspect_conversation
from mtr.checks.inspection import Inspection
from mtr.checks.roles import COPY, PROMPT, RESPONSE, ROLES, SYSTEM, THINKING, TOOL, TokenRoles, token_roles
from mtr.data.conversation import Conversation
from mtr.prepare.builder import Builder
from mtr.recipe.loading import recipe_of_tokenizer
from mtr.tree.layout import path_to

Roles = list[TokenRoles]
ROLES_OF = {"system": {SYSTEM}, "user": {PROMPT}, "tool": {TOOL}, "assistant": {COPY, THINKING, RESPONSE, PROMPT}}
MOST_AROUND = 200
"""Characters that the templates here write around the text of a user message or a tool result."""


@functools.cache
def builder(folder: str) -> Builder:
    recipe = recipe_of_tokenizer(folder, ["sequence.max_length=40000", "sequence.max_tokens=60000"])
    return Builder(recipe, make_renderer(load(folder), date=DATE))


def behaving_builder(name: str, **keys: Any) -> Builder:
    recipe = recipe_of_tokenizer(str(QUICKSTART / "base"), None)
    return Builder(recipe, behaving(name, template=BEHAVIOURS[name].arguments, **keys))


def inspected(of: Builder, conversation: Conversation) -> tuple[Inspection, Roles]:
    inspection = inspect_conversation(of, conversation, 0)
    return inspection, token_roles(inspection, of)


def spellings(text: str) -> Iterator[str]:
    """A text as templates write it: as it is, or in JSON."""
    yield text.strip()
    for plain in (True, False):
        yield json.dumps(text, ensure_ascii=plain)[1:-1].strip()


def problems(made: Renderer, inspection: Inspection, roles: Roles) -> list[str]:
    """What is wrong with the roles along the path of each turn, by the texts of the messages."""
    found: list[str] = []
    messages = inspection.conversation.messages
    decode = functools.partial(made.tokenizer.decode, clean_up_tokenization_spaces=False)
    for layout, of in zip(inspection.layouts, roles, strict=True):
        for leaf, view in layout.leaves:
            path = path_to(layout, leaf)
            role, number = of.role[path], of.message[path]
            own = inspection.turns[view.turn].message_index
            completion = np.arange(len(path)) >= len(view.prompt_ids)
            generated = decode(layout.input_ids[path[completion & (role == THINKING)]].tolist())
            for tag in made.tags or ():
                generated = generated.replace(tag, "")
            if generated.strip() != made.expected(messages[own]).thinking:
                found.append(f"turn {view.turn}: thinking is {generated!r}")
            if not set(role[completion].tolist()) <= {THINKING, RESPONSE} or set(number[completion].tolist()) != {own}:
                found.append(f"turn {view.turn}: its completion has other roles")
            for index, message in enumerate(messages[:own]):
                mine = number == index
                text = decode(layout.input_ids[path[mine]].tolist())
                content = made.expected(message).response
                if not set(role[mine].tolist()) <= ROLES_OF[message.role]:
                    found.append(f"message {index}: {[ROLES[r] for r in set(role[mine].tolist())]}")
                written = next((way for way in spellings(content) if way in text), None)
                if written is None and not message.tool_calls:
                    found.append(f"message {index}: {content[:60]!r} is not in {text[:200]!r}")
                elif message.role in ("user", "tool") and len(text) - len(written or "") > MOST_AROUND:
                    found.append(f"message {index}: more than its text: {text[:300]!r}")
            if not completion.all() and (role[~completion] < 0).any():
                found.append(f"turn {view.turn}: a token has no role")
    return found


def shared_rows(name: str, numbers: Sequence[int]) -> list[Conversation]:
    lines = (SHARED / "data" / f"{name}.jsonl").read_text().splitlines()
    return [parsed(json.loads(lines[number])) for number in numbers]


REAL: dict[str, Sequence[int]] = {
    "mathchat_followup": range(4),
    "multichallenge_no_thinking": range(2),
    "reason_tool_use": range(0, 50, 7),
    "tau2_retail": (0, 3),
    "tau2_retail_string_arguments": (1,),
}
"""Some rows of each file."""


@needs_shared
@pytest.mark.parametrize("tokenizer", SHARED_TOKENIZERS)
def test_roles_are_what_the_texts_say(tokenizer: str) -> None:
    of = builder(str(SHARED / "tokenizers" / tokenizer))
    for file, numbers in REAL.items():
        trained = 0
        for conversation in shared_rows(file, numbers):
            inspection, roles = inspected(of, conversation)
            trained += sum(turn.trained for turn in inspection.turns)
            assert problems(of.renderer, inspection, roles) == [], file
            for found in roles:
                assert not ((found.role == PROMPT) & (found.message < 0)).any(), "not known"
        assert trained > 0


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", BEHAVIOURS)
def test_roles_with_every_behaviour_of_templates(name: str, row: str) -> None:
    of = behaving_builder(name)
    inspection, roles = inspected(of, parsed(ROWS[row]))
    dropped = "message 0: 'Count.' is not in ''"  # a system message that the template leaves out
    assert [text for text in problems(of.renderer, inspection, roles) if text != dropped] == []


@pytest.mark.parametrize("history", ["as_data", "respell"])
def test_thinking_inline_in_history(history: str) -> None:
    row = conversation_row(3)
    for message in row["messages"][1::2]:
        message["content"] = f"<think>\n{message.pop('reasoning_content')}\n</think>\n\n{message['content']}"
    base = str(QUICKSTART / "base")
    recipe = recipe_of_tokenizer(base, [f"thinking.history={history}"])
    of = Builder(recipe, make_renderer(load(base), history=history))
    inspection, roles = inspected(of, parsed(row))
    assert len(inspection.layouts) == 1
    assert problems(of.renderer, inspection, roles) == []
    assert (roles[0].role == COPY).any()


@pytest.fixture(scope="module")
def quickstart() -> tuple[Builder, Inspection, Roles]:
    of = builder(str(QUICKSTART / "base"))
    return of, *inspected(of, parsed(conversation_row(3)))


def test_each_role_of_a_small_tree(quickstart: tuple[Builder, Inspection, Roles]) -> None:
    """Role by role the text of all its tokens, in the order of the tree: trunk first, the last turn's branch first."""
    of, inspection, (roles,) = quickstart
    (layout,) = inspection.layouts
    assert problems(of.renderer, inspection, [roles]) == []
    texts = [of.renderer.tokenizer.decode(layout.input_ids[roles.role == i].tolist()) for i in range(len(ROLES))]
    user, header = "<|im_start|>user\nAna gets {} more.<|im_end|>\n", "<|im_start|>assistant\n"
    said, thought = "Ana has {} coins now.<|im_end|>", "<think>\nBefore: {}. {} + {} = {}.\n</think>\n\n"
    assert dict(zip(ROLES, texts, strict=True)) == {
        "system": "",
        "prompt": "".join(user.format(n) + header for n in (2, 3, 4)),
        "tool": "",
        "thinking": "".join(thought.format(*numbers) for numbers in ((2, 2, 2, 4), (1, 1, 2, 3), (0, 0, 2, 2))),
        "response": "".join(said.format(n) for n in (8, 5, 2)),
        "copy": "".join(said.format(n) + "\n" for n in (2, 5)),
    }
    trained = np.isin(roles.role, (THINKING, RESPONSE))
    assert ((roles.weight > 0) == trained).all(), "here the template keeps no thinking, so nothing trained is context"


@pytest.mark.parametrize("change", ["the next token's", "no tool", "other message", "thinking as response"])
def test_wrong_roles_are_noticed(quickstart: tuple[Builder, Inspection, Roles], change: str) -> None:
    of, inspection, (roles,) = quickstart
    role, message = roles.role.copy(), roles.message.copy()
    if change == "the next token's":
        role, message = np.roll(role, -1), np.roll(message, -1)
    elif change == "no tool":
        role[role == COPY] = TOOL
    elif change == "other message":
        message[message == 2] = 0
    else:
        role[role == THINKING] = RESPONSE
    assert problems(of.renderer, inspection, [replace(roles, role=role, message=message)]) != []


@pytest.mark.parametrize("weighting", ["token", "turn", "conversation"])
@pytest.mark.parametrize("name", ["history thinking is kept", "quickstart"])
def test_weights_are_those_of_the_turns(name: str, weighting: str) -> None:
    row = conversation_row(3)
    row["messages"][1]["weight"] = 0.5
    recipe = [f"loss.weighting={weighting}"]
    base = str(QUICKSTART / "base")
    made = make_renderer(load(base)) if name == "quickstart" else behaving(name)
    of = Builder(recipe_of_tokenizer(base, recipe), made)
    inspection, (roles,) = inspected(of, parsed(row))
    (layout,) = inspection.layouts
    wanted = np.zeros(layout.num_tokens)
    for leaf, view in layout.leaves:
        wanted[path_to(layout, leaf)[len(view.prompt_ids) :]] += view.weights
    np.testing.assert_allclose(roles.weight, wanted)
    if name != "quickstart":
        assert (layout.parent == np.arange(-1, layout.num_tokens - 1)).all(), "one path"
        context = of.renderer.tokenizer.decode(layout.input_ids[roles.role == COPY].tolist())
        assert context.strip() == "", "answers that stay in history are trained, not copies"


def test_a_template_that_looks_at_marked_texts_leaves_prompts_untold() -> None:
    """It renders the length of each text, so the marks would show; the roles of completions are known all the same."""
    plain = BEHAVIOURS["history thinking is stripped"].text
    counting = plain.replace(CONTENT, "{{- message.content ~ (message.content | length) -}}")
    assert counting != plain
    of = Builder(recipe_of_tokenizer(str(QUICKSTART / "base"), None), renderer(counting))
    inspection, (roles,) = inspected(of, parsed(conversation_row(2)))
    (layout,) = inspection.layouts
    completion = np.isin(roles.role, (THINKING, RESPONSE))
    assert completion.sum() == sum(len(turn.completion_ids) for turn in inspection.turns if turn.trained)
    assert set(roles.role[~completion].tolist()) == {PROMPT}
    assert set(roles.message[~completion].tolist()) == {-1}
    assert layout.num_tokens > completion.sum()
