"""What a plan comes to, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from mtr.plan.result import Plan

_LITTLE = 1.1
"""A limit below which one pass saves next to nothing."""
_MUCH_UNTRAINED = 0.02


def verdict(plan: Plan) -> tuple[str, ...]:
    """Sentences, the most important first."""
    if not plan.turns:
        reason = next(iter(plan.untrained), None) or next(iter(plan.report.unreadable), None) or "no row has a turn"
        return (f"No turn would be trained: {reason}.",)
    return (*_stops(plan), *_speed(plan), *_untrained(plan))


def _stops(plan: Plan) -> Iterator[str]:
    for setting, where in plan.stops.items():
        yield f"The run would stop: {setting} ({where})."


def _speed(plan: Plan) -> Iterator[str]:
    limit = plan.limit
    assert limit is not None, "there is a trained turn"
    what = "FLOPs" if plan.by_flops else "tokens"
    if not plan.is_single_pass:
        yield from _per_turn(plan, limit, what)
    elif plan.history == "single":
        yield "No conversation has two trained turns: there is no history to share, and one pass is ordinary training."
        if limit >= _LITTLE:
            yield f"Rows share prefixes, though: merged, they need {limit:.1f} times fewer {what}."
    elif plan.history == "kept":
        yield (
            "History keeps each turn as it was generated, so the turns of a conversation are one path: one pass saves "
            "nothing over ordinary training on whole conversations."
        )
        yield f"It needs {limit:.1f} times fewer {what} than one pass per turn, but no trainer has to do that here."
    elif limit < _LITTLE:
        yield (
            f"One pass needs only {limit:.2f} times fewer {what} than one pass per turn: most tokens are generated in "
            "their own turn and seen by no other, so nothing can share them."
        )
        yield _exact(plan)
    else:
        yield (
            f"One pass needs {limit:.1f} times fewer {what} than one pass per turn"
            f"{f'; expect it to be {plan.expected:.1f} times faster' if plan.expected else ''}."
        )
        yield _exact(plan)


def _exact(plan: Plan) -> str:
    yes, no = plan.continued
    return (
        f"Ordinary training on whole conversations would not be exact: {no:,} of {yes + no:,} later turns see an "
        "earlier one otherwise than it was generated."
    )


def _per_turn(plan: Plan, limit: float, what: str) -> Iterator[str]:
    if plan.model.reason:
        yield f"This model is trained one turn at a time: {plan.model.reason}."
    else:
        yield f"The recipe trains one turn at a time (sequence.strategy: {plan.recipe.sequence.strategy})."
    exact = "if it were exact for this model" if plan.model.reason else "if the recipe let it (strategy: auto)"
    yield f"One pass would need {limit:.1f} times fewer {what}, {exact}."


def _untrained(plan: Plan) -> Iterator[str]:
    refused = sum(plan.report.refused.values())
    if refused > _MUCH_UNTRAINED * plan.report.turns:
        reason = next(iter(plan.report.refused))
        share = refused / plan.report.turns
        yield f"{refused:,} of {plan.report.turns:,} turns ({share:.0%}) would not be trained, most often: {reason}."
