"""The `mtr` command and `python -m mtr`: the subcommands of `mtr.cli`, assembled.

Heavy imports stay inside the subcommands, so that `mtr --help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mtr import __version__
from mtr.cli.audit import audit
from mtr.cli.bench import bench
from mtr.cli.inspect import inspect
from mtr.cli.merge import merge
from mtr.cli.train import train
from mtr.cli.verify import verify
from mtr.console import is_plain, printable

app = typer.Typer(
    name="mtr",
    help="Fine-tune reasoning models on multi-turn chats: every turn in its inference context, in one pass.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None if is_plain() else "rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train, merge, verify, bench, inspect, audit):
    app.command()(command)


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
    """Run the command line in `sys.argv` and exit with its code; a wrong option is one line, like every error."""
    try:
        code = app(with_json_target(sys.argv[1:]), prog_name="mtr", standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        message = printable(" ".join(message.split()))[:1000]
        print(f"error: {message} (see mtr --help)" if message else "", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def with_json_target(arguments: list[str]) -> list[str]:
    """The arguments with `--json` of verify and bench followed by `-` (standard output) where no FILE follows it."""
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


if __name__ == "__main__":
    main()
