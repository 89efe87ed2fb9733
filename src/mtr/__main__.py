"""The `mtr` command and `python -m mtr`: the subcommands of `mtr.cli`, assembled.

Heavy imports stay inside the subcommands, so that `mtr --help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Annotated, NoReturn

import typer

from mtr import __version__
from mtr.cli.audit import audit
from mtr.cli.bench import bench
from mtr.cli.chat import chat
from mtr.cli.doctor import doctor
from mtr.cli.help import Command, Commands
from mtr.cli.init import init
from mtr.cli.inspect import inspect
from mtr.cli.merge import merge
from mtr.cli.plan import plan
from mtr.cli.report import report
from mtr.cli.schema import schema
from mtr.cli.train import train
from mtr.cli.verify import verify
from mtr.console import is_plain, printable

EXAMPLES = """Examples:
  mtr init                 # write a recipe for a model and data
  mtr inspect recipe.yaml  # which tokens are trained, in which context
  mtr plan recipe.yaml     # what it takes, and what one pass saves
  mtr train recipe.yaml    # an adapter in training.output_dir
  mtr train --help         # each command has examples
"""

app = typer.Typer(
    name="mtr",
    help="Fine-tune reasoning models on multi-turn chats: every turn in its inference context, in one pass.",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None if is_plain() else "rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (init, audit, inspect, plan, verify, bench, train, report, chat, merge, schema, doctor):
    app.command(cls=Command)(command)


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
    _prepare_streams()
    try:
        code = app(with_json_target(sys.argv[1:]), prog_name="mtr", standalone_mode=False)
        sys.stdout.flush()
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in _OUTPUT_FAILED:
            _give_up_output(error)
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        message = printable(" ".join(message.split()))[:1000]
        print(f"error: {message} (see mtr --help)" if message else "", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _prepare_streams() -> None:
    """Let no stream be closed, and none refuse a character that its encoding lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  until the end
    if isinstance(sys.stdout, io.TextIOWrapper) and "utf" not in sys.stdout.encoding.lower():
        sys.stdout.reconfigure(errors="backslashreplace")


_OUTPUT_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE)


def _give_up_output(error: OSError) -> NoReturn:
    """Standard output takes no more: its disk is full, or nobody reads on."""
    if error.errno != errno.EPIPE:
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left is not written at the end either
    sys.exit(1 if error.errno == errno.EPIPE else 3)


def with_json_target(arguments: list[str]) -> list[str]:
    """The arguments with `--json` followed by `-` (standard output) where the command takes a FILE and none follows."""
    if "--json" not in arguments[1:] or not _takes_json_file(arguments[0]):
        return arguments
    spelled = []
    for i, argument in enumerate(arguments):
        spelled.append(argument)
        following = arguments[i + 1] if i + 1 < len(arguments) else "-x"
        no_file = following.startswith("-") or following.endswith((".yaml", ".yml")) or "=" in following
        if argument == "--json" and no_file and following != "-":
            spelled.append("-")
    return spelled


def _takes_json_file(name: str) -> bool:
    command = getattr(typer.main.get_command(app), "commands", {}).get(name)
    options = command.params if command else []
    return any("--json" in option.opts and not getattr(option, "is_flag", True) for option in options)


if __name__ == "__main__":
    main()
