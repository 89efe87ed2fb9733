"""Conversations of a given shape, to measure on: words are tokens, so lengths are exact.

    user 60, thinking 150, response 60, 8 turns  ->  rows in the chat format, random words, thinking in every turn

The chat template drops the thinking of earlier turns, as those of reasoning models do. The conversations go through
the same rendering as a user's; only the tokenizer is made up, so no other one has to be there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from mtr.chat.rendering import Renderer
from mtr.data.parsing import parse_row
from mtr.prepare.views import weigh
from mtr.tree.layout import View

TEMPLATE = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{{- '<|im_start|> ' + m.role + ' ' -}}
{%- if m.reasoning_content and loop.index0 > ns.last -%}
{{- '<think> ' + m.reasoning_content + ' </think> ' -}}
{%- endif -%}
{{- m.content + ' <|im_end|> ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|> assistant ' -}}{%- endif -%}
"""
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
_ROLES = ("user", "assistant")
_THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class Shape:
    """All conversations of a shape have these sizes; the template adds 3 tokens a message and 2 around a thinking."""

    turns: int
    user: int
    """Words of a user message."""
    thinking: int
    """0: no thinking at all, and nothing that forks."""
    response: int

    @property
    def longest(self) -> int:
        """Tokens of the last turn's view."""
        return self.turns * (self.user + self.response + 6) + (self.thinking + 2 if self.thinking else 0)


def make_words(vocabulary: int) -> list[str]:
    """As many words as fit a vocabulary beside what the template writes, at most 4,096 entries in all."""
    return [f"w{i}" for i in range(min(vocabulary, 4096) - len(SPECIAL) - len(_ROLES) - len(_THINK))]


def make_tokenizer(words: list[str]) -> Any:
    """One token a word, with the template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = [*SPECIAL, *_THINK, *_ROLES, *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(list(_THINK))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    fast.chat_template = TEMPLATE
    return fast


def make_rows(words: list[str], shape: Shape, conversations: int) -> list[dict[str, Any]]:
    """Rows in the chat format, the same ones each time."""
    rng = random.Random(0)

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    rows: list[dict[str, Any]] = []
    for _ in range(conversations):
        messages: list[dict[str, str]] = []
        for _ in range(shape.turns):
            messages.append({"role": "user", "content": text(shape.user)})
            answer = {"role": "assistant", "content": text(shape.response)}
            messages.append(answer | ({"reasoning_content": text(shape.thinking)} if shape.thinking else {}))
        rows.append({"messages": messages})
    return rows


def make_views(shape: Shape, conversations: int, vocabulary: int) -> list[list[View]]:
    """The turn views of each conversation, every completion token of weight 1."""
    words = make_words(vocabulary)
    renderer = Renderer(make_tokenizer(words), {})
    views = []
    for number, row in enumerate(make_rows(words, shape, conversations)):
        turns = renderer.render(parse_row(row, f"synthetic row {number}"))
        assert all(turn.trained for turn in turns), [turn.reason for turn in turns]
        views.append(weigh(turns, "token"))
    return views
