"""Counts the work of rendering and encoding, and rows that would cause much of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from mtr.chat.encoding import Encoder
from mtr.chat.template import Template


def count_work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Messages that templates are given, and characters that are encoded, from now on."""
    done = {"messages": 0, "characters": 0}
    plain, each, in_full = Template.render, Encoder._each, Encoder._in_full

    def render(self: Template, messages: Sequence[Mapping[str, Any]], *rest: Any, **keys: Any) -> str:
        done["messages"] += len(messages)
        return plain(self, messages, *rest, **keys)

    def encode_each(self: Encoder, pieces: list[str]) -> list[list[int]]:
        done["characters"] += sum(map(len, pieces))
        return each(self, pieces)

    def encode_in_full(self: Encoder, texts: list[str]) -> list[list[int]]:
        done["characters"] += sum(map(len, texts))
        return in_full(self, texts)

    monkeypatch.setattr(Template, "render", render)
    monkeypatch.setattr(Encoder, "_each", encode_each)
    monkeypatch.setattr(Encoder, "_in_full", encode_in_full)
    return done


def short_messages(turns: int) -> dict[str, Any]:
    """A row with so many short questions and answers."""
    messages = []
    for number in range(turns):
        messages.append({"role": "user", "content": f"How many coins has Ana after {number}?"})
        messages.append({"role": "assistant", "content": f"{number}.", "reasoning_content": f"One more is {number}."})
    return {"messages": messages}
