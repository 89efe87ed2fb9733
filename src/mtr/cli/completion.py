"""What the Tab key offers after a recipe: its keys as overrides, and the values of those that have few."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from rich.markup import escape

from mtr.console import shorten

_WIDTH = 60
Offer = tuple[str, str]
"""A text, and what it means."""


def complete_override(context: typer.Context, incomplete: str) -> list[Offer]:
    """`training.le` is completed to `training.learning_rate=`, with what that means; then its values."""
    return list(offers(incomplete, context.params.get("overrides") or []))


def offers(incomplete: str, before: Sequence[str] = ()) -> Iterator[Offer]:
    """
    Args:
        before: overrides before it. bash makes three of `training.optim=mu`: the key, the sign, and what is incomplete.
    """
    if not incomplete and before and "=" not in before[-1]:  # the sign is what is incomplete, and Typer drops it
        yield from _values(before[-1], "", "")
    elif before and before[-1] == "=":
        yield from _values("".join(before[-2:-1]), incomplete, "")
    elif "=" in incomplete:
        name, _, value = incomplete.partition("=")
        yield from _values(name, value, f"{name}=")
    else:
        from mtr.recipe.descriptions import every_key

        keys = [key for key in every_key() if key.name.startswith(incomplete)]
        for key in keys:
            yield f"{key.name}=", escape(shorten(key.text, _WIDTH))
        if (
            len(keys) == 1 and not keys[0].field.is_required()
        ):  # of a second offer, no shell puts a space after the sign
            yield f"{keys[0].name}={_written(keys[0].field.default)}", "the default"


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _values(name: str, incomplete: str, prefix: str) -> Iterator[Offer]:
    from mtr.recipe.descriptions import every_key

    for key in every_key():
        if key.name == name:
            yield from ((f"{prefix}{choice}", "") for choice in key.choices if choice.startswith(incomplete))
