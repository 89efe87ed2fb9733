"""All attempts by name."""

from __future__ import annotations

from support.hostile import Attempt, named

from hostile import (
    adapters,
    commands,
    files,
    folders,
    machine,
    merging,
    overrides,
    recipes,
    results,
    resumes,
    rows,
    templates,
    tokenizers,
    weights,
)

KINDS = {
    "recipes": recipes.ATTEMPTS,
    "overrides": overrides.ATTEMPTS,
    "rows": rows.ATTEMPTS,
    "files": files.ATTEMPTS,
    "templates": templates.ATTEMPTS,
    "tokenizers": tokenizers.ATTEMPTS,
    "weights": weights.ATTEMPTS,
    "adapters": adapters.ATTEMPTS,
    "folders": folders.ATTEMPTS,
    "resumes": resumes.ATTEMPTS,
    "merging": merging.ATTEMPTS,
    "machine": machine.ATTEMPTS,
    "commands": commands.ATTEMPTS,
    "results": results.ATTEMPTS,
}
TABLE: dict[str, Attempt] = {}
for _kind, _attempts in KINDS.items():
    TABLE |= named(_attempts, _kind)
