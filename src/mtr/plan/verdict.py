"""What a plan comes to, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from mtr.plan.result import LITTLE, Plan

_MUCH = 0.02
"""A share of rows or turns that is worth a sentence if it is lost."""
_CUT = 0.1
"""Of the conversations, trees more than there are of them that explain why little is shared."""


def verdict(plan: Plan) -> tuple[str, ...]:
    """Sentences, the most important first."""
    if not plan.turns:
        return ("No turn would be trained.", *_stops(plan), *_skipped(plan, least=0.0), *_untrained(plan, least=0.0))
    return (*_stops(plan), *_speed(plan), *_skipped(plan), *_untrained(plan))


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
        yield from _merged(plan)
    elif plan.history == "kept":
        yield (
            "History keeps each turn as it was generated, so the turns of a conversation are one path: one pass saves "
            "nothing over ordinary training on whole conversations."
        )
        yield f"It needs {limit:.1f} times fewer {what} than one pass per turn, but no trainer has to do that here."
        yield from _merged(plan)
    elif limit < LITTLE:
        yield f"One pass needs only {limit:.2f} times fewer {what} than one pass per turn: {_why_little(plan)}."
        yield _exact(plan)
    else:
        yield (
            f"One pass needs {limit:.1f} times fewer {what} than one pass per turn"
            f"{f'; expect it to be {plan.expected:.1f} times faster' if plan.expected else ''}."
        )
        yield _exact(plan)


def _merged(plan: Plan) -> Iterator[str]:
    """What conversations share with each other, where their turns are one path."""
    if plan.merged >= LITTLE:
        yield f"Conversations share prefixes, though: merged, they have {plan.merged:.1f} times fewer tokens."


def _why_little(plan: Plan) -> str:
    cut = plan.single_pass.way.trees - plan.conversations
    if cut > _CUT * plan.conversations:
        return (
            f"{plan.conversations:,} conversations are cut into {plan.single_pass.way.trees:,} trees to fit "
            f"sequence.max_tokens ({plan.recipe.sequence.budget:,}), and each repeats its prompt; raise it"
        )
    return "little of what a turn computes is needed by another one, too"


def _exact(plan: Plan) -> str:
    yes, no = plan.continued
    return (
        f"Ordinary training on whole conversations would not be exact: {no:,} of {yes + no:,} later turns see an "
        "earlier one otherwise than it was generated."
    )


def _per_turn(plan: Plan, limit: float, what: str) -> Iterator[str]:
    model = plan.model
    if model.reason:
        yield f"This model is trained one turn at a time: {model.reason}."
    else:
        yield f"The recipe trains one turn at a time (sequence.strategy: {plan.recipe.sequence.strategy})."
    if limit < LITTLE:
        yield f"One pass would save little or nothing: it would need {limit:.2f} times fewer {what}."
        return
    exact = "if the recipe let it (strategy: auto)"
    if model.reason or model.inexact:
        exact = f"if it were exact for this model{'' if model.reason else f', but: {model.inexact}'}"
    yield f"One pass would need {limit:.1f} times fewer {what}, {exact}."


def _skipped(plan: Plan, least: float = _MUCH) -> Iterator[str]:
    """Rows that are lost; those that are left out on purpose, too, where nothing is trained."""
    rows, report = plan.rows.counted, plan.report
    if (number := sum(report.unreadable.values())) > least * rows:
        first = next(iter(report.unreadable))
        yield f"{number:,} of {rows:,} rows ({number / rows:.0%}) cannot be read, one of them: {first}."
    if (number := sum(report.filtered.values())) and not plan.turns:
        yield f"{number:,} of {rows:,} rows are left out by data.filter, most often: {next(iter(report.filtered))}."


def _untrained(plan: Plan, least: float = _MUCH) -> Iterator[str]:
    """Turns that are lost; those that are left out on purpose, too, where nothing is trained."""
    report = plan.report
    found = report.refused if plan.turns else plan.untrained
    number = sum(found.values())
    if number > least * report.turns:
        share, reason = number / report.turns, next(iter(found))
        yield f"{number:,} of {report.turns:,} turns ({share:.0%}) would not be trained, most often: {reason}."
