"""What `mtr init` finds out before it writes a recipe: what the template does with these rows, and how long they are.

model, data  ->  template arguments under which most turns are trained  ->  lengths, and what is lost all the same
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.chat.turn import INLINE_HISTORY
from mtr.checks.audit_rows import audit_rows, sample_rows
from mtr.checks.data_report import DataReport
from mtr.data.conversation import Conversation
from mtr.errors import UserError
from mtr.model.strategy import decide
from mtr.prepare.builder import Builder
from mtr.recipe.model_config import read_config
from mtr.recipe.sections import Recipe
from mtr.start.facts import Survey, positions_of

_MOST_ROWS = 1000
"""Rows that are looked at, evenly spaced."""
_FEW = 8
"""Rows whose beginnings are compared."""
_LONGEST = 2**20
"""Tokens of a turn up to which they are counted."""


def survey(recipe: Recipe) -> Survey:
    """
    Args:
        recipe: with model and data.

    Raises:
        UserError: the model has no tokenizer or chat template or cannot be trained, or the data cannot be read.
    """
    config, strategy = _strategy(recipe)
    positions = positions_of(config)
    longest = min(_LONGEST, positions or _LONGEST)  # the recipe will not train longer ones
    recipe = recipe.replace(sequence={"max_length": longest, "max_tokens": longest})
    tokenizer = load_tokenizer(recipe)
    found = recipe, *_audit(recipe, tokenizer)
    tried: list[dict[str, Any]] = [{}]
    for arguments in found[2] if found[1].refused else ():
        if arguments not in tried:
            tried.append(arguments)
            changed = recipe.model_copy(update={"template": arguments})
            report, openers = _audit(changed, tokenizer)
            if report.trained > found[1].trained:
                found = changed, report, openers
    best, report, _ = found
    if INLINE_HISTORY in report.notes:
        respelled = best.replace(thinking={"history": "respell"})
        again, _ = _audit(respelled, tokenizer)
        if again.trained >= report.trained:
            best, report = respelled, again
    return Survey(best, report, config, strategy, _shared_prefix(best, tokenizer))


def _shared_prefix(recipe: Recipe, tokenizer: Any) -> int:
    """Tokens with which the first turns of some conversations all begin, such as a long system prompt."""
    builder = Builder(recipe, load_renderer(recipe, tokenizer))
    rows, _ = sample_rows(recipe, _FEW)
    turns = (next(iter(builder.rendered(row)), None) for row in rows if isinstance(row, Conversation))
    prompts = [turn.prompt_ids for turn in turns if turn is not None and turn.prompt_ids]
    alike = takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))
    return sum(1 for _ in alike) if len(prompts) > 1 else 0


def _audit(recipe: Recipe, tokenizer: Any) -> tuple[DataReport, list[dict[str, Any]]]:
    """What becomes of the rows, and template arguments that may change what becomes of their thinking."""
    renderer = load_renderer(recipe, tokenizer)
    rows, of_rows = sample_rows(recipe, _MOST_ROWS)
    report = audit_rows(Builder(recipe, renderer), rows, of_rows)
    return report, [{switch.argument: switch.value} for switch in renderer.findings.switches]


def _strategy(recipe: Recipe) -> tuple[Any | None, str]:
    """The model's config, and how its turns will be laid out."""
    try:
        config = read_config(recipe.model)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        return None, "one pass, if that is exact for the model; there is no config.json here that tells"
    decision = decide(recipe.replace(sequence={"max_length": 4096}), config)
    return config, "one pass is exact" if decision.reason is None else f"trained per turn: {decision.reason}"
