"""What every command does around its work: load the recipe, quiet the libraries, turn an error into its exit code.

Standard output carries what was asked for; logs, progress and errors go to standard error. An error that the user can
fix is one line, with exit code 2 unless the error has its own.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mtr.console import printable
from mtr.errors import UserError

if TYPE_CHECKING:
    from mtr.recipe.existence import Needed
    from mtr.recipe.sections import Recipe


@contextmanager
def errors() -> Iterator[None]:
    """Print a UserError as one line and exit with its code.

    Of several processes only the first on each machine prints an error, unless it is local to its process.
    """
    try:
        yield
    except UserError as error:
        if error.local or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {printable(str(error)).replace(chr(10), ' ')}", file=sys.stderr, flush=True)
        raise typer.Exit(error.exit_code) from None


@contextmanager
def writing(option: str, path: object) -> Iterator[None]:
    """An OSError becomes a UserError that names the option."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written: {error}") from None


def load(path: Path, overrides: list[str] | None, needed: Needed = "tokenizer", tokenizer: bool = True) -> Recipe:
    """The recipe, and what it names found, before any heavy import.

    Args:
        needed: what of the model the command reads.
        tokenizer: whether it reads its tokenizer, too.

    Raises:
        UserError: the file, a key, a value or an override is wrong, or what a key names is neither here nor on the Hub.
    """
    from mtr.recipe.existence import check_existence
    from mtr.recipe.hub import find, named_data, named_model
    from mtr.recipe.loading import load_recipe
    from mtr.recipe.places import located

    recipe = load_recipe(path, overrides)
    with located(path, overrides):
        check_existence(recipe, needed, tokenizer)
        quiet_libraries()
        find([named_model(recipe), *named_data(recipe)])
    return recipe


def load_for_tokenizer(name: str, overrides: list[str] | None) -> Recipe:
    """A recipe that holds a tokenizer's folder or Hub id and no data.

    Raises:
        UserError: an override is wrong, or there is no such folder or repository.
    """
    from mtr.recipe.existence import check_model
    from mtr.recipe.hub import find, named_model
    from mtr.recipe.loading import recipe_of_tokenizer

    recipe = recipe_of_tokenizer(name, overrides)
    check_model(recipe.model, "tokenizer")
    quiet_libraries()
    find([named_model(recipe)])
    return recipe


def quiet_libraries() -> None:
    """Show mtr's own log and no chatter of the libraries; their errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # mtr reports a missing repository itself
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    for kind in (FutureWarning, RuntimeWarning):
        warnings.filterwarnings("ignore", category=kind, module=r"(torch|transformers|peft|accelerate)\..*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|peft|accelerate)\..*")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("mtr").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
