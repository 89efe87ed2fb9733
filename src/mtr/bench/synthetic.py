"""Synthetic conversations of a given shape, to measure on: every word is one token, so lengths are exact.

    user 60, thinking 150, response 60, 8 turns  ->  rows in the chat format, random words, thinking in every turn

The conversations are rendered like a user's; only the tokenizer is synthetic too, so that no real one is needed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtr.bench.tokenizer import make_tokenizer, make_words
from mtr.chat.loading import make_renderer
from mtr.data.parsing import parse_row
from mtr.prepare.views import weigh
from mtr.tree.layout import View


@dataclass(frozen=True)
class Shape:
    """Sizes of a conversation, in words. The template adds 3 tokens per message, and 2 around thinking."""

    turns: int
    user: int
    """Words per user message."""
    thinking: int
    """Words per turn; 0: no thinking at all, so that nothing forks."""
    response: int
    """Words per response."""

    @property
    def in_words(self) -> str:
        return (
            f"turns {self.turns}, words per turn: user {self.user}, thinking {self.thinking}, response {self.response}"
        )

    @property
    def longest(self) -> int:
        """Tokens of the last turn, its prompt included."""
        return self.turns * (self.user + self.response + 6) + (self.thinking + 2 if self.thinking else 0)


def shapes_of(turns: Sequence[int], thinking: Sequence[int], user: int, response: int) -> list[Shape]:
    """Every number of turns with every length of thinking."""
    return [Shape(n, user, length, response) for length, n in itertools.product(thinking, turns)]


def make_rows(words: list[str], shape: Shape, conversations: int) -> list[dict[str, Any]]:
    """Rows in the chat format; every call returns the same ones."""
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
    """The turns of each conversation, every completion token with weight 1."""
    words = make_words(vocabulary)
    renderer = make_renderer(make_tokenizer(words), {})
    views = []
    for number, row in enumerate(make_rows(words, shape, conversations)):
        turns = renderer.render(parse_row(row, f"synthetic row {number}"))
        assert all(turn.trained for turn in turns), [turn.reason for turn in turns]
        views.append(weigh(turns, "token"))
    return views
