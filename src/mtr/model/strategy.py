"""How the turns of a model are laid out: in one pass where that is exact, else per turn, and what is exact per turn.

    single_pass          the turns of a conversation as one tree
    per_turn             each turn a path of its own; several share a row, kept apart by the mask
    per_turn_unpacked    each turn a row of its own, with the model's own attention: what transformers trains

All give the gradient of one pass per turn, where they are exact for a model. `mtr.model.probe` finds out whether.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtr.errors import UserError
from mtr.model.probe import judge
from mtr.recipe.sections import Recipe
from mtr.tree.packing import Strategy


@dataclass(frozen=True)
class Decision:
    """What a recipe's `sequence.strategy` means for its model."""

    strategy: Strategy
    reason: str | None
    """Why it is not one pass; None where it is, or where the recipe says so."""

    @property
    def unpacked(self) -> bool:
        return self.strategy == "per_turn_unpacked"

    @property
    def notes(self) -> tuple[str, ...]:
        """For the log."""
        if self.reason is None:
            return ()
        alone = "each in a row of its own, with the model's own attention, uncompiled"
        rows = alone if self.unpacked else "several in a row"
        return (f"turns are trained one by one, {rows} ({self.strategy}): {self.reason}",)


def decide(recipe: Recipe, config: Any) -> Decision:
    """
    Raises:
        UserError: the recipe asks for one pass, and that is not exact; no turn of the model can be trained; or it has
            layers that its code does not know.
    """
    asked, name = recipe.sequence.strategy, f"{recipe.model.name_or_path} ({config.model_type})"
    try:
        verdict = judge(config, recipe.sequence.max_length, recipe.model.trust_remote_code)
    except UserError as error:
        raise UserError(f"model.name_or_path: {name} cannot be computed: {error}") from None
    if verdict.alone is not None:
        raise UserError(
            f"model.name_or_path: {name} is no causal language model: {verdict.alone}, so it would see what it predicts"
        )
    if asked == "per_turn_unpacked" or (asked == "per_turn" and verdict.packed is None):
        return Decision(asked, None)
    if asked in ("auto", "single_pass") and verdict.tree is None:
        return Decision("single_pass", None)
    if asked == "single_pass":
        raise UserError(
            f"sequence.strategy: {name} cannot be trained exactly in one pass: {verdict.tree}. With auto, such a model "
            "is trained per turn"
        )
    return Decision(
        "per_turn" if verdict.packed is None else "per_turn_unpacked",
        verdict.packed if asked == "per_turn" else verdict.tree,
    )


def decided(recipe: Recipe, decision: Decision) -> Recipe:
    """The recipe with the strategy in place of `auto`."""
    return recipe.replace(sequence={"strategy": decision.strategy})
