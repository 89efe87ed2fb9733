"""Whether what a recipe names is there, told by names of files alone, in milliseconds.

What the files hold is seen where they are read. A name that may be one on the Hub passes: see `mtr.recipe.hub`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from mtr.errors import UserError
from mtr.recipe.data_files import check_source
from mtr.recipe.paths import check_model_folder
from mtr.recipe.sections import ModelSection, Recipe

Needed = Literal["tokenizer", "config", "weights"]
"""What of a model's folder a command reads; each includes those before it."""
_NO_TOKENIZER = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".md", ".py", ".yaml")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def check_existence(recipe: Recipe, needed: Needed = "tokenizer", tokenizer: bool = True) -> None:
    """
    Args:
        needed: of the model.
        tokenizer: whether its tokenizer is read, too.

    Raises:
        UserError: a file or folder that a key names is missing, or cannot be what the key is for.
    """
    check_model(recipe.model, needed, tokenizer)
    with _looking_at("lora.init_from"):
        if recipe.lora and recipe.lora.init_from and needed == "weights":
            _check_adapter(Path(recipe.lora.init_from))
    for key, sources in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        for number, source in enumerate(sources):
            with _looking_at("data", f"{key}.{number}.path"):
                check_source(source.path)


@contextmanager
def _looking_at(key: str, source: str = "") -> Iterator[None]:
    """A name that is too long and a folder that may not be listed are UserErrors that name the key.

    Args:
        source: the key in full, for errors of data.
    """
    try:
        yield
    except OSError as error:
        problem = UserError(f"{key}: {error.filename} cannot be used: {error.strerror or error}")
        problem.key = source
        raise problem from None
    except UserError as error:
        error.key = source
        raise


def check_model(model: ModelSection, needed: Needed, tokenizer: bool = True) -> None:
    """
    Raises:
        UserError: the model is a folder that does not exist, or lacks a file that is needed.
    """
    with _looking_at("model.name_or_path"):
        _check_model(model, needed, tokenizer)


def _check_model(model: ModelSection, needed: Needed, tokenizer: bool) -> None:
    folder = Path(check_model_folder(model.name_or_path))
    if not folder.is_dir() or model.trust_remote_code:
        return
    names = {path.name for path in folder.iterdir()}
    others = {name for name in names if not name.endswith((*_NO_TOKENIZER, "config.json", "index.json"))}
    if tokenizer and not others and "tokenizer_config.json" not in names:
        raise UserError(f"model.name_or_path: no tokenizer can be loaded from {folder}: it has no tokenizer.json")
    if needed != "tokenizer" and "config.json" not in names:
        raise UserError(f"model.name_or_path: no model config at {folder}: it has no config.json")
    if needed == "weights" and not any(name.endswith(_WEIGHTS) for name in names):
        raise UserError(f"model.name_or_path: no weights can be loaded from {folder}: it has no .safetensors file")


def _check_adapter(folder: Path) -> None:
    problem = f"lora.init_from: {folder} holds no adapter that can be read"
    if not folder.is_dir():
        raise UserError(f"{problem}: no such folder")
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"{problem}: it has no adapter_config.json")


def check_run(run: Path) -> None:
    """Whether a folder can be that of a run with an adapter.

    Raises:
        UserError: it cannot.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder")
    if not (run / "adapter_config.json").exists():
        if any(run.glob("model*.safetensors")):
            raise UserError(f"{run}: it holds full weights, so there is nothing to merge; load it as it is")
        raise UserError(f"{run}: no adapter_config.json; give the output_dir of a finished run, or a checkpoint")
