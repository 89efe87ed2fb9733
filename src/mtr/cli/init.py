"""`mtr init`."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtr.cli.options import check_choice, check_spared, check_target, files_of
from mtr.cli.session import errors, quiet_libraries, writing
from mtr.console import printable
from mtr.errors import UserError
from mtr.files import replace_file

if TYPE_CHECKING:
    from mtr.recipe.sections import Recipe

METHODS = ("auto", "lora", "qlora", "full")
EXAMPLES = """Examples:

  mtr init                 # asks, in a terminal

  mtr init --model Qwen/Qwen3-8B --data chats.jsonl --gpu H100

  mtr init --model ./my-model --data chats/ --gpu cpu --output my.yaml
"""


def init(
    model: Annotated[
        str | None, typer.Option(metavar="ID|DIR", help="Hub id or folder of the model.", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Conversations: a file, folder, pattern or Hub id.", show_default=False),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="GPU to train on, such as H100, or cpu; else this machine's."),
    ] = None,
    output: Annotated[str, typer.Option(metavar="FILE", help="The recipe; - prints it.")] = "recipe.yaml",
    method: Annotated[
        str, typer.Option(help="lora, qlora (4 bits), full (all weights), or auto: lora, else qlora.")
    ] = "auto",
    data_format: Annotated[str, typer.Option("--format", help="Shape of the rows; auto finds it out.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a recipe that works for this model, data and GPU, with the reason beside each key.

    Looks at up to 1,000 rows with the model's own chat template: how long turns are, which are trained, and which
    template arguments lose least. Needs the tokenizer and the config, no weights. Asks for what is missing if there
    is a terminal.
    """
    with errors():
        check_choice("--method", method, METHODS)
        check_target("--output", None if output == "-" else output)
        if output != "-" and os.path.lexists(output) and not force:
            raise UserError(f"--output: {output} exists; name another file, or replace it with --force")
        model, data, gpu = _answers(model, data, gpu, data_format)
        recipe = _named(model, data, data_format)
        check_spared({"--output": output}, files_of(Path(data), recipe))
        from mtr.recipe.schema import modeline
        from mtr.start.facts import Asked
        from mtr.start.init import new_recipe
        from mtr.start.survey import survey

        quiet_libraries()
        print("looking at the rows with the model's chat template ...", file=sys.stderr)
        asked = Asked(_spelled(model, output), _spelled(data, output), output, data_format)
        text = new_recipe(asked, survey(recipe), gpu, method, modeline(None if output == "-" else Path(output)))
        if output == "-":
            print(text, end="")
            return
        with writing("--output", output):
            Path(output).absolute().parent.mkdir(parents=True, exist_ok=True)
            replace_file(Path(output).resolve(), text)
        _say_what_next(output)


def _say_what_next(output: str) -> None:
    name = printable(shlex.quote(output))
    print(f"wrote {printable(output)}. Read it, then:", file=sys.stderr)
    for command, what in (
        ("inspect", "which tokens are trained"),
        ("plan", "tokens, steps, memory, time and money"),
        ("train", "train"),
    ):
        print(f"  mtr {f'{command} {name}':<28} # {what}", file=sys.stderr)


def _spelled(name: str, output: str) -> str:
    """A path or pattern for the recipe: as it was given, if the recipe is in the working folder, else absolute."""
    from mtr.recipe.paths import exists

    beside = output == "-" or Path(output).absolute().parent == Path.cwd()
    path = Path(name).expanduser().absolute()
    return name if beside or not exists(Path.cwd(), str(path)) else str(path)


def _answers(model: str | None, data: str | None, gpu: str | None, data_format: str) -> tuple[str, str, str | None]:
    """Model, data and GPU; None is the GPU of this machine.

    Raises:
        UserError: something is wrong, or missing and there is nobody to ask.
    """
    from mtr.cli.views.asking import ask, can_ask
    from mtr.plan.gpus import find_gpu

    def known(name: str) -> str | None:
        return None if not name else "cpu" if name.strip().lower() == "cpu" else find_gpu(name).name

    device = known(gpu or "")
    missing = [option for option, given in (("--model", model), ("--data", data)) if given is None]
    if missing and not can_ask():
        raise UserError(f"{' and '.join(missing)} must be given where there is no terminal to ask in")
    if missing:
        if model is not None:  # before a question whose answer cannot mend it
            _named(model, None, data_format)
        model = model or ask("Model (Hub id or folder)", None, lambda name: _named(name, None, data_format))
        question = "Conversations (file, folder, pattern or Hub id)"
        data = data or ask(question, _data_here(), lambda path: _named(str(model), path, data_format))
        device = device or known(ask("GPU, such as H100, or cpu (empty: this machine's)", "", known))
    return str(model), str(data), device


def _named(model: str, data: str | None, data_format: str) -> Recipe:
    """A recipe with a model and data that are there; without data, with the model.

    Raises:
        UserError: there is no such model, or no such data.
    """
    from mtr.recipe.existence import check_existence, check_model
    from mtr.recipe.hub import find, named_data, named_model
    from mtr.recipe.loading import recipe_of_tokenizer
    from mtr.recipe.paths import resolve_paths

    overrides = [f"data.train={json.dumps(data or 'none')}", f"data.format={json.dumps(data_format)}"]
    recipe = resolve_paths(recipe_of_tokenizer(model, overrides), Path.cwd())
    if data is None:
        check_model(recipe.model, "tokenizer")
    else:
        check_existence(recipe)
    find([named_model(recipe), *(named_data(recipe) if data is not None else ())])
    return recipe


def _data_here() -> str | None:
    """The one data file of the working folder, if there is one."""
    from mtr.recipe.data_files import data_suffix

    found = [path.name for path in sorted(Path().iterdir()) if path.is_file() and data_suffix(path)]
    return found[0] if len(found) == 1 else None
