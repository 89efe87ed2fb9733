"""Rendered turns become weighted views: too long ones cut or dropped, loss weights normalised as the recipe asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mtr.chat.turn import Turn, fills, too_long
from mtr.errors import UserError
from mtr.recipe.sections import SequenceSection
from mtr.tree.layout import View


def fit_turns(turns: Sequence[Turn], sequence: SequenceSection, where: str) -> list[Turn]:
    """Apply `overlong` to the turns that are longer than max_length.

    Args:
        turns: rendered with the same `sequence`, or without.

    Raises:
        UserError: a turn is too long and overlong is error.
    """
    limit = sequence.max_length
    fitted = []
    for turn in turns:
        longer = turn.num_tokens > limit if turn.trained else turn.reason == too_long(limit)
        if longer and sequence.overlong == "error":
            size = f"has {turn.num_tokens} tokens, more than" if turn.trained else "is longer than"
            raise UserError(
                f"{where}, message {turn.message_index}: the turn {size} sequence.max_length ({limit}); raise it, or "
                "set sequence.overlong to drop or truncate"
            )
        if not turn.trained or not longer:
            fitted.append(turn)
        elif sequence.overlong == "drop":
            fitted.append(replace(turn, reason=too_long(limit)))
        elif len(turn.prompt_ids) >= limit:
            fitted.append(replace(turn, reason=fills(limit)))
        else:
            kept = turn.completion_ids[: limit - len(turn.prompt_ids)]
            note = f"truncated to sequence.max_length ({limit})"
            fitted.append(replace(turn, completion_ids=kept, notes=(*turn.notes, note)))
    return fitted


def check_ids(turns: Sequence[Turn], vocabulary: int, where: str) -> None:
    """
    Raises:
        UserError: a trained turn has a token id that the model has no embedding for.
    """
    for turn in turns:
        largest = max((*turn.prompt_ids, *turn.completion_ids), default=0) if turn.trained else 0
        if largest >= vocabulary:
            raise UserError(
                f"{where}, message {turn.message_index}: token id {largest}, and the model has embeddings for "
                f"{vocabulary} ids only; leave this token out of the row"
            )


def weigh(turns: Sequence[Turn], weighting: str, where: str = "") -> list[View]:
    """Views of the trained turns, each completion token with its weight in the loss.

    With m the weight of a message: `token` gives each token m; `turn` gives m / tokens of the turn; `conversation`
    gives m / sum over the trained turns of (m * tokens).
    """
    trained = [turn for turn in turns if turn.trained]
    whole = sum(turn.weight * len(turn.completion_ids) for turn in trained)
    views = []
    for turn in trained:
        tokens = len(turn.completion_ids)
        norm = {"token": 1.0, "turn": float(tokens), "conversation": whole}[weighting]
        views.append(
            View(
                np.array(turn.prompt_ids, np.int64),
                np.array(turn.completion_ids, np.int64),
                np.full(tokens, turn.weight / norm),
                turn.turn,
                where,
            )
        )
    return views
