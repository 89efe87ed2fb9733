"""The model card: README.md of a result, without a path of the machine it was made on."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mtr import __version__
from mtr.recipe.sections import Recipe
from mtr.training.state import RunState

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")


def write_model_card(folder: Path, name: str, recipe: Recipe, state: RunState, serving: Sequence[str] = ()) -> None:
    """README.md: what it was made from, with what, and how well it went. No path of the machine is in it.

    Args:
        name: of the run, its title.
        serving: lines on how to serve it.
    """
    each = "conversation" if recipe.sequence.strategy == "single_pass" else "turn"
    base, what = without_folders(recipe.model.name_or_path), "LoRA adapter" if recipe.lora else "model"
    rows = [("conversations", f"{state.counts.conversations:,}"), ("turns", f"{state.counts.turns:,}")]
    rows += [("supervised tokens", f"{state.counts.supervised_tokens:,}"), ("steps", f"{state.steps:,}")]
    rows += [("training loss, last step", f"{state.loss:.4f}")] if state.loss is not None else []
    best = recipe.training.load_best_at_end and state.best_eval_loss is not None
    if state.eval_loss is not None:
        rows.append(("evaluation loss", f"{state.best_eval_loss if best else state.eval_loss:.4f}"))
    if best:
        rows.append(("taken from step", f"{state.best_step:,}"))
    else:
        rows += [(f"evaluation loss, {name}", f"{loss:.4f}") for name, loss in state.eval_loss_by_source.items()]
    if len(state.exact_match) == 2:
        rows.append(("held-out turns answered exactly", "{:.1%} before, {:.1%} after".format(*state.exact_match)))
    sources = ", ".join(f"`{without_folders(source.path)}`" for source in recipe.data.train)
    held_out = ", ".join(f"`{without_folders(source.path)}`" for source in recipe.data.eval) or "none"
    card = [
        *front_matter(recipe.model.name_or_path, "peft" if recipe.lora else "transformers"),
        f"# {name}",
        "",
        f"A {what} of `{base}`, trained by mtr {__version__}: every turn in the context that inference gives it, in "
        f"one pass per {each}.",
        "",
        f"- base model: `{base}`" + (f", revision `{recipe.model.revision}`" if recipe.model.revision else ""),
        f"- data: {sources}",
        f"- evaluation data: {held_out}",
        f"- versions: {', '.join(f'{name} {importlib.metadata.version(name)}' for name in _PACKAGES)}",
        "",
        "| result | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        *serving,
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(_without_paths(recipe.model_dump()), sort_keys=False, allow_unicode=True).strip(),
        "```",
        "",
    ]
    (folder / "README.md").write_text("\n".join(card), encoding="utf-8")


def front_matter(base: str, library: str) -> list[str]:
    known = [] if Path(base).is_absolute() else [f"base_model: {base}"]
    return ["---", *known, f"library_name: {library}", "pipeline_tag: text-generation", "tags: [mtr]", "---", ""]


def without_folders(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return without_folders(value) if isinstance(value, str) and Path(value).is_absolute() else value
