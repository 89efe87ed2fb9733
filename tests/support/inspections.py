"""Rows as `mtr inspect` lays them out with the quickstart's tokenizer, without the command line."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.checks.inspect import inspect_conversation
from mtr.checks.inspection import Inspection
from mtr.checks.roles import TokenRoles, token_roles
from mtr.data.parsing import parse_row
from mtr.prepare.builder import Builder
from mtr.recipe.loading import recipe_of_tokenizer
from support.paths import QUICKSTART
from support.rows import USER, chat, conversation_row

Inspected = tuple[Inspection, list[TokenRoles]]


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer(recipe_of_tokenizer(str(QUICKSTART / "base")))


@functools.cache
def builder(*overrides: str) -> Builder:
    """Of the quickstart's tokenizer."""
    sizes = ("sequence.max_length=40000", "sequence.max_tokens=40000")
    recipe = recipe_of_tokenizer(str(QUICKSTART / "base"), [*sizes, *overrides])
    return Builder(recipe, load_renderer(recipe, tokenizer()))


def inspected(rows: Sequence[dict[str, Any]], *overrides: str) -> list[Inspected]:
    """Rows with the roles of their tokens; `overrides` are of the recipe."""
    made = builder(*overrides)
    found = []
    for number, row in enumerate(rows):
        inspection = inspect_conversation(made, parse_row(row, f"/data/rows.jsonl, line {number + 1}"), number)
        found.append((inspection, token_roles(inspection, made)))
    return found


@functools.cache
def long_conversation() -> Inspected:
    """Eight turns and more than 20,000 tokens in a single pass."""
    row = conversation_row(8)
    for message in row["messages"]:
        if "reasoning_content" in message:
            message["reasoning_content"] = "\n".join(["Before: 23. 23 + 6 = 29."] * 240)
    found = inspected([row])[0]
    assert 20_000 < found[0].num_tokens["single_pass"] < 30_000
    return found


def part_trained() -> dict[str, Any]:
    """A conversation one turn of which is context only."""
    skipped = {"role": "assistant", "content": "Ana has 4 coins now.", "reasoning_content": "Start: 4.", "train": False}
    return chat(USER, skipped, *conversation_row(2)["messages"])
