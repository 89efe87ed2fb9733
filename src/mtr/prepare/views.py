"""Rendered turns become weighted views: too long ones cut or dropped, loss weights normalised as the recipe asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mtr.chat.turn import Turn
from mtr.errors import UserError
from mtr.recipe.sections import SequenceSection
from mtr.tree.layout import View


def fit_turns(turns: Sequence[Turn], sequence: SequenceSection, where: str) -> list[Turn]:
    """Apply `overlong` to the turns that are longer than max_length.

    Raises:
        UserError: a turn is too long and overlong is error.
    """
    limit = sequence.max_length
    fitted = []
    for turn in turns:
        if not turn.trained or turn.num_tokens <= limit:
            fitted.append(turn)
        elif sequence.overlong == "error":
            raise UserError(
                f"{where}, message {turn.message_index}: the turn has {turn.num_tokens} tokens, more than "
                f"sequence.max_length ({limit}); raise it, or set sequence.overlong to drop or truncate"
            )
        elif sequence.overlong == "drop":
            fitted.append(replace(turn, reason=f"longer than sequence.max_length ({limit})"))
        elif len(turn.prompt_ids) >= limit:
            fitted.append(replace(turn, reason=f"its prompt alone fills sequence.max_length ({limit})"))
        else:
            kept = turn.completion_ids[: limit - len(turn.prompt_ids)]
            note = f"truncated to sequence.max_length ({limit})"
            fitted.append(replace(turn, completion_ids=kept, notes=(*turn.notes, note)))
    return fitted


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
