"""The commands. Heavy imports stay inside them, so that `mtr --help` is there at once.

Standard output carries what was asked for; logs, progress and errors go to standard error. An error that the user can
mend is one line and exit code 2.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtr import __version__
from mtr.errors import UserError

if TYPE_CHECKING:
    from mtr.recipe.sections import Recipe

app = typer.Typer(
    name="mtr",
    help="Fine-tune reasoning models on multi-turn chats: every turn in its inference context, in one pass.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. training.max_steps=20.", show_default=False),
]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="[FILE]", help="Write the result as JSON; to standard output without a FILE."),
]


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in output_dir.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in output_dir.")] = False,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="Start so many processes here, one a GPU; else this is the only one.")
    ] = None,
) -> None:
    """Train as the recipe says; the adapter, the metrics and the resolved recipe go to training.output_dir."""
    with _errors():
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        if num_processes is not None:
            from mtr.training.launch import launch

            raise typer.Exit(launch(num_processes, recipe, overrides or [], resume, overwrite))
        loaded = _load(recipe, overrides)
        from mtr.training.loop import train as run

        summary = run(loaded, resume=resume, overwrite=overwrite)
    if summary.stopped_by:
        raise typer.Exit(128 + summary.stopped_by)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="output_dir of a run, or a checkpoint of it.")],
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to; RUN/merged by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else the base model's.")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the merged model, private if it is new.")
    ] = None,
) -> None:
    """Merge a run's adapter into its base model; checks that the merged model says what the adapter says."""
    with _errors():
        _quiet_libraries()
        from mtr.cli.views import show_merge
        from mtr.console import console
        from mtr.training.hub import push_to_hub as push
        from mtr.training.merge import merge as merge_run

        out = console(sys.stdout)
        folder = output or run / "merged"
        with _writing("--output", folder):
            show_merge(merge_run(run, folder, dtype), out)
        if push_to_hub:
            out.print(push(folder, push_to_hub), markup=False)


@app.command()
def verify(
    recipe: RecipeFile,
    overrides: Overrides = None,
    conversations: Annotated[int, typer.Option(min=1, help="How many, from the start of data.train.")] = 4,
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float64",
    attention: Annotated[str | None, typer.Option(help="Test this backend in place of the recipe's.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Prove on your model and data that one pass gives the loss and gradients of one pass per turn. Exit 1 if not."""
    with _errors():
        loaded = _load(recipe, overrides)
        from mtr.checks.verify import TOLERANCE
        from mtr.checks.verify import verify as run
        from mtr.cli.views import show_verification
        from mtr.console import console

        if dtype not in TOLERANCE:
            raise UserError(f"--dtype: {dtype!r} is not one of {', '.join(TOLERANCE)}")
        if attention is not None:
            loaded = _replace_attention(loaded, attention)
        result = run(loaded, conversations, dtype)
        if json_file != "-":
            show_verification(result, console(sys.stdout))
        _emit(result, json_file)
    if not result["passed"]:
        raise typer.Exit(1)


@app.command()
def bench(
    recipe: RecipeFile,
    overrides: Overrides = None,
    conversations: Annotated[
        int | None,
        typer.Option(min=1, help="From the start of data.train; default 8, with --sweep 1.", show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats of each case, after a warm-up.")] = 5,
    attention: Annotated[
        list[str] | None, typer.Option(help="Backend in place of the recipe's; again for further cases.")
    ] = None,
    all_backends: Annotated[bool, typer.Option("--all-backends", help="Every backend that trains here.")] = False,
    no_padded: Annotated[
        bool, typer.Option("--no-padded", help="Leave the padded baseline out: the slow one where turns are many.")
    ] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="model.name_or_path needs a config only.")
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Synthetic conversations of several shapes in place of data.train.")
    ] = False,
    turns: Annotated[str, typer.Option(help="Of the sweep, comma-separated.")] = "2,4,8,16,32,64",
    thinking: Annotated[str, typer.Option(help="Words of thinking a turn in the sweep, comma-separated.")] = "150",
    words: Annotated[
        tuple[int, int], typer.Option(metavar="USER RESPONSE", help="Words of each message in the sweep.")
    ] = (60, 60),
    versus: Annotated[
        str | None, typer.Option("--vs", metavar="trl", help="Another trainer on the same turns, where installed.")
    ] = None,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the result and the limit.")] = None,
) -> None:
    """Time single pass against per turn, packed and padded, forward and backward, on your model and data."""
    with _errors():
        loaded = _load(recipe, overrides)
        if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
            raise UserError(f"--plot: {plot} must end in .png, .svg or .pdf")
        if versus not in (None, "trl"):
            raise UserError(f"--vs: {versus!r} is not known; it can be trl")
        grid = (_numbers("--turns", turns, least=1), _numbers("--thinking", thinking, least=0), *words)
        if min(words) < 1:
            raise UserError("--words: a message has at least one word")
        for name in attention or []:
            _replace_attention(loaded, name)
        from mtr.bench.cases import Options, shapes_of
        from mtr.bench.cases import bench as run
        from mtr.bench.cases import sweep as run_sweep
        from mtr.bench.plot import plot as draw
        from mtr.cli.views import show_bench, show_sweep
        from mtr.console import console

        options = Options(tuple(attention or ()), all_backends, random_weights, not no_padded, versus == "trl")
        if sweep:
            result = run_sweep(loaded, shapes_of(*grid), conversations or 1, repeats, options)
        else:
            result = run(loaded, conversations or 8, repeats, options)
        if json_file != "-":
            (show_sweep if sweep else show_bench)(result, console(sys.stdout))
        _emit(result, json_file)
        if plot is not None:
            with _writing("--plot", plot):
                draw(result, plot)


def _numbers(option: str, text: str, least: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UserError(f"{option}: {text!r} is no list of whole numbers from {least} up, such as 2,4,8")
    return [int(part) for part in parts]


@app.command()
def inspect(
    recipe: RecipeFile,
    overrides: Overrides = None,
    index: Annotated[int, typer.Option(min=0, help="Row of data.train, counted from 0 in file order.")] = 0,
    every: Annotated[bool, typer.Option("--all", help="Every row, one JSON object a line.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    prove: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Prove that the tree's paths are the turns and that no turn depends on data.rendering; exit 1 if not.",
        ),
    ] = False,
) -> None:
    """Show how a conversation is laid out: turns, tree, what each token sees, what is supervised. Needs no weights."""
    failed = False
    with _errors():
        loaded = _load(recipe, overrides)
        from mtr.chat.loading import load_renderer, load_tokenizer
        from mtr.checks.inspect import check, describe, inspect_conversation
        from mtr.cli.views import show_inspection
        from mtr.console import console
        from mtr.data.conversation import SkippedRow
        from mtr.files import write_json
        from mtr.prepare.builder import Builder

        tokenizer = load_tokenizer(loaded)
        builder = Builder(loaded, load_renderer(loaded, tokenizer))
        out = console(sys.stdout)
        for number, conversation in _conversations(loaded, None if every else index, notes=not (every or as_json)):
            if isinstance(conversation, SkippedRow):
                skipped = conversation.problem or conversation.reason
                print(write_json(None, {"index": number, "where": conversation.where, "skipped": skipped}))
                continue
            inspection = inspect_conversation(builder, conversation, number)
            if as_json or every:
                print(write_json(None, describe(inspection)))
            else:
                show_inspection(inspection, tokenizer, out)
            if prove:
                problems = check(inspection, loaded.loss.weighting)
                for turn in builder.renderer.differing(conversation):
                    problems.append(f"turn {turn}: rendered whole it is another text; set data.rendering: whole")
                failed = failed or bool(problems)
                verdict = "; ".join(problems) or "every path of the tree is its turn, and every target is there"
                print(f"row {number}: {'FAILED: ' if problems else ''}{verdict}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@app.command()
def audit(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE|TOKENIZER", help="YAML recipe, or a tokenizer's folder or Hub id.")
    ],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Most rows of data.train to go over, evenly spaced.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what the chat template does and what training with it would lose. Exit 1 if anything. Needs no weights."""
    with _errors():
        with_data = source.endswith((".yaml", ".yml")) or Path(source).is_file()
        loaded = _load(Path(source), overrides) if with_data else _load_tokenizer_only(source, overrides)
        from mtr.chat.loading import load_renderer, load_tokenizer
        from mtr.checks.audit import audit as run
        from mtr.checks.audit import audit_rows
        from mtr.cli.views import show_audit
        from mtr.console import console
        from mtr.files import write_json

        renderer = load_renderer(loaded, load_tokenizer(loaded))
        data = audit_rows(renderer, *_sample(loaded, rows)) if with_data and rows else None
        report = run(renderer, loaded.model.name_or_path, data)
        if as_json:
            print(write_json(None, report.as_json()))
        else:
            show_audit(report, console(sys.stdout))
    if report.losses:
        raise typer.Exit(1)


def _load_tokenizer_only(name: str, overrides: list[str] | None) -> Recipe:
    from mtr.recipe.loading import recipe_of_tokenizer

    recipe = recipe_of_tokenizer(name, overrides)
    _quiet_libraries()
    return recipe


def _sample(recipe: Recipe, most: int) -> tuple[Iterator[Any], int | None]:
    """Rows of data.train, evenly spaced, the bad ones told; and how many there are, None for a stream."""
    from mtr.data.mixture import Mixture
    from mtr.data.opening import open_data

    recipe = recipe.replace(data={"on_bad_row": "skip"})
    data = open_data(recipe.data, recipe.data.train)
    if not isinstance(data, Mixture):
        return islice(data.rows(0, 0, shuffle=False), most), None
    number = min(most, len(data))
    return (data.take(index * len(data) // number) for index in range(number)), len(data)


def _conversations(recipe: Recipe, index: int | None, notes: bool) -> Iterator[tuple[int, Any]]:
    """One row of data.train, or all of them; among all, those that training passes over say so."""
    from mtr.data.mixture import Mixture
    from mtr.data.notes import describe_data
    from mtr.data.opening import open_data

    data = open_data(recipe.data, recipe.data.train)
    for note in describe_data(data) if notes else ():
        print(f"note: {note}", file=sys.stderr)
    if isinstance(data, Mixture):
        if index is not None:
            yield index, data.conversation(index)
        else:
            yield from ((number, data.take(number)) for number in range(len(data)))
        return
    for number, row in enumerate(data.rows(0, 0, shuffle=False)):
        if index is None or number == index:
            yield number, row
        if number == index:
            return


def _replace_attention(recipe: Recipe, attention: str) -> Recipe:
    from mtr.attention.masks import BACKENDS

    if attention not in BACKENDS:
        raise UserError(f"--attention: {attention!r} is not one of {', '.join(BACKENDS)}")
    return recipe.replace(model={"attention": attention})


def _load(path: Path, overrides: list[str] | None) -> Recipe:
    from mtr.recipe.loading import load_recipe

    recipe = load_recipe(path, overrides)
    _quiet_libraries()
    return recipe


def _emit(result: dict[str, Any], json_file: str | None) -> None:
    from mtr.files import write_json

    if json_file == "-":
        print(write_json(None, result))
    elif json_file is not None:
        with _writing("--json", json_file):
            write_json(Path(json_file), result)


@contextmanager
def _writing(option: str, path: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written: {error}") from None


@contextmanager
def _errors() -> Iterator[None]:
    """A UserError is one line on standard error and its exit code; of several processes one on each machine says it."""
    try:
        yield
    except UserError as error:
        if error.local or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise typer.Exit(error.exit_code) from None


def _quiet_libraries() -> None:
    """Our own words only; real errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    for kind in (FutureWarning, RuntimeWarning):
        warnings.filterwarnings("ignore", category=kind, module=r"(torch|transformers|peft|accelerate)\..*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|peft|accelerate)\..*")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a name that is not there is told once, by us
    logging.getLogger("mtr").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        print(f"mtr {__version__}")
        raise typer.Exit
    del context


def main() -> None:
    """The console script."""
    try:
        code = app(_with_json_target(sys.argv[1:]), prog_name="mtr", standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()  # a wrong option: one line, like every error
        print(f"error: {' '.join(message.split())} (mtr --help)" if message else "", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _with_json_target(arguments: list[str]) -> list[str]:
    """`--json` of verify and bench may stand without its file: it then means standard output."""
    if not arguments or arguments[0] not in ("verify", "bench"):
        return arguments
    spelled = []
    for i, argument in enumerate(arguments):
        spelled.append(argument)
        following = arguments[i + 1] if i + 1 < len(arguments) else "-x"
        no_file = following.startswith("-") or following.endswith((".yaml", ".yml")) or "=" in following
        if argument == "--json" and no_file and following != "-":
            spelled.append("-")
    return spelled
