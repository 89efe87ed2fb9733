"""What one pass and N passes are compared on: the first conversations of a recipe, with dropout off."""

from __future__ import annotations

from collections.abc import Callable

from mtr.chat.turn import Turn
from mtr.data.conversation import Conversation
from mtr.data.opening import open_data
from mtr.errors import UserError
from mtr.prepare.views import weigh
from mtr.recipe.sections import Recipe
from mtr.tree.layout import View


def first_views(recipe: Recipe, turns_of: Callable[[Conversation], list[Turn]], conversations: int) -> list[list[View]]:
    """The views of the first `conversations` conversations of `data.train`; those without a trained turn are skipped.

    Args:
        turns_of: renders a conversation, as `Builder.turns` does.

    Raises:
        UserError: none of them has a turn to train.
    """
    data = open_data(recipe.data, recipe.data.train)
    rendered = [turns_of(conversation) for conversation in data.first(conversations)]
    views = [found for turns in rendered if (found := weigh(turns, recipe.loss.weighting))]
    if not views:
        reasons = "; ".join(sorted({turn.reason for turns in rendered for turn in turns if turn.reason}))
        raise UserError(f"data.train: no turn to train in the first {conversations} conversations: {reasons}")
    return views


def without_dropout(recipe: Recipe) -> Recipe:
    """The recipe with LoRA dropout 0: a shared trunk shares its dropout mask, so only then are both sides equal."""
    return recipe if recipe.lora is None else recipe.replace(lora={"dropout": 0.0})
