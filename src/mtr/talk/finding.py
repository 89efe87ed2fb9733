"""What to talk to: a run, a checkpoint of it, its merged model, a full fine-tune, or any adapter or model.

    runs/chats                 adapter_config.json        the adapter on the base model that it names
    runs/chats/checkpoint-20   adapter_config.json        the same, of that step
    runs/chats/merged          config.json, weights       the model, with the run's template arguments
    org/model                                             a model or an adapter on the Hub

Told by the names of files and their JSON, before anything heavy is imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtr.console import shorten
from mtr.errors import UserError, described
from mtr.model.adapted import read_adapter_config
from mtr.recipe.hub import Named, find
from mtr.recipe.loading import load_saved_recipe
from mtr.recipe.sections import Recipe

_RUN_FILES = ("mtr-run.json", "recipe.yaml")
_WITHOUT_PICKLE = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "recipe.yaml"]
"""Files of an adapter on the Hub that are downloaded."""


@dataclass(frozen=True)
class Base:
    """The model that was trained on."""

    name: str
    """A folder or a Hub id."""
    revision: str | None = None


@dataclass(frozen=True)
class Found:
    """What is talked to."""

    name: str
    """As it was given."""
    where: str
    """The folder, or the Hub id, of adapter or weights."""
    adapter: dict[str, Any] | None
    """Its adapter_config.json; None for whole weights."""
    base: Base | None
    """None where nothing says what whole weights were trained from."""
    recipe: Recipe | None
    """Of its run."""

    @property
    def kind(self) -> str:
        return "model" if self.adapter is None else "LoRA adapter"


def find_voice(name: str) -> Found:
    """
    Args:
        name: a folder or a Hub id.

    Raises:
        UserError: there is nothing there to talk to; says what to give instead.
    """
    folder = Path(os.path.expanduser(name))  # an unknown ~user stays as it is
    if os.path.isdir(folder):
        return _in_folder(name, folder)
    if os.path.exists(folder):  # not of a name that is too long
        raise UserError(f"{name}: a file; give the folder of a run (output_dir), of an adapter or of a model")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        name = shorten(name, 300)
        raise UserError(f"{name}: no such folder; give the output_dir of a run, or an adapter or a model on the Hub")
    return _on_hub(name)


def _in_folder(name: str, folder: Path) -> Found:
    recipe = _recipe(folder)
    if (folder / "adapter_config.json").exists():
        config = read_adapter_config(folder / "adapter_config.json")
        revision = recipe.model.revision if recipe else config.get("revision")
        return Found(name, str(folder), config, Base(config["base_model_name_or_path"], revision), recipe)
    if (folder / "config.json").exists():
        if not [path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_")]:
            raise UserError(f"{name}: there is a config.json and no .safetensors file, so there are no weights to load")
        base = Base(recipe.model.name_or_path, recipe.model.revision) if recipe else None
        return Found(name, str(folder), None, base, recipe)
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    if checkpoints:
        newest = max(checkpoints, key=lambda path: int(path.name[11:]))
        raise UserError(f"{name}: the run has not finished; talk to its newest checkpoint: mtr chat {newest}")
    raise UserError(
        f"{name}: neither an adapter (adapter_config.json) nor a model (config.json) is in it; give the output_dir of "
        "a finished run, or a checkpoint"
    )


def _on_hub(name: str) -> Found:
    find([Named(name, name)])
    from huggingface_hub import snapshot_download
    from transformers.utils import cached_file

    try:
        if cached_file(name, "adapter_config.json", _raise_exceptions_for_missing_entries=False) is None:
            return Found(name, name, None, None, None)
        folder = Path(snapshot_download(name, allow_patterns=_WITHOUT_PICKLE))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be loaded from the Hub: {described(error)}") from None
    config = read_adapter_config(folder / "adapter_config.json")
    return Found(name, str(folder), config, Base(config["base_model_name_or_path"], config.get("revision")), None)


def _recipe(folder: Path) -> Recipe | None:
    """The recipe of the run that a folder is, or is in. Another's recipe.yaml, which may lie anywhere, is not read."""
    for run in (folder, folder.absolute().parent):
        if all((run / file).exists() for file in _RUN_FILES):
            return load_saved_recipe(run / "recipe.yaml")
    return None
