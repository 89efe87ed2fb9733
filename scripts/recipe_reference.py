"""Makes docs/recipe.md from the sections of a recipe: `python scripts/recipe_reference.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtr.recipe.descriptions import Key, every_key
from mtr.recipe.sections import Source

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipe.md"
_HEAD = """# Recipe

A recipe is a YAML file. Only `model.name_or_path`, `data.train` and `training.output_dir` have to be given. An unknown
key is an error that names file, line, column and the nearest known key. On the command line, any key can be overridden:
`mtr train my.yaml training.max_steps=20 data.train.0.weight=2`.

The recipe decides the mathematics of a run, the hardware only its speed: how conversations are packed (`max_tokens`),
how many processes share them, checkpointing and the strategy do not change the gradient. The run saves its recipe with
every default as `recipe.yaml` in `output_dir`.

*Made by `scripts/recipe_reference.py` from the sections in `src/mtr/recipe`.*
"""

_ABOUT = {
    "lora": "`lora: null` trains all weights; without the section, LoRA is on.",
    "data.train.0": "An entry of `data.train` or `data.eval`, where they are lists; a path alone is short for it.",
}


def page() -> str:
    """The text of docs/recipe.md."""
    sections: dict[str, list[Key]] = {}
    for key in every_key():
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
        if key.name == "data.train":
            sections["data.train.0"] = list(every_key(Source, "data.train.0."))
    model, top = sections.pop("model"), sections.pop("")
    return "\n".join(_section(name, keys) for name, keys in {"head": [], "model": model, "": top, **sections}.items())


def _section(name: str, keys: list[Key]) -> str:
    if not keys:
        return _HEAD
    rows = "\n".join(_row(key) for key in keys)
    about = f"\n{_ABOUT[name]}\n" if name in _ABOUT else ""
    title = f"`{name}`" if name else "Above the sections"
    return f"## {title}\n{about}\n| key | default | |\n|---|---|---|\n{rows}\n"


def _row(key: Key) -> str:
    return f"| `{key.name}` | {_default(key)} | {_meaning(key)} |"


def _default(key: Key) -> str:
    if key.field.is_required():
        return "required"
    value: Any = key.field.get_default(call_default_factory=True)
    if value is None:
        return "`null`"
    if isinstance(value, float) and 0 < value < 1e-2:
        return f"`{value:.0e}`".replace("e-0", "e-")
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _meaning(key: Key) -> str:
    choices = [choice for choice in key.choices if choice not in ("true", "false", "null")]
    values = ", ".join(f"`{choice}`" for choice in choices)
    text = key.text.replace("|", "\\|")
    return f"{values}. {text}".removesuffix(". ") if values else text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
