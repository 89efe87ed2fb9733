"""`mtr merge`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mtr.cli.options import DTYPES, check_choice
from mtr.cli.session import errors, quiet_libraries, writing

EXAMPLES = """Examples:
  mtr merge runs/chats  # writes runs/chats/merged
  mtr merge runs/chats/checkpoint-200 --output merged-200
  mtr merge runs/chats --dtype bfloat16 --push-to-hub me/my-model
"""


def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="output_dir of a run, or one of its checkpoints.")],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the merged model; default: RUN/merged.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16; default: that of the base model."),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the merged model to the Hub; a new repository is private."),
    ] = None,
) -> None:
    """Merge a run's adapter into its base model, and check that the merged model gives the same logits.

    Needs the base model's weights and 4 bytes of memory per parameter, no GPU. The result is a folder that transformers
    and inference servers load as they load the base model.
    """
    with errors():
        from mtr.recipe.existence import check_run

        check_run(run)
        if dtype is not None:
            check_choice("--dtype", dtype, DTYPES)
        quiet_libraries()
        from mtr.cli.views.merge import show_merge
        from mtr.console import console
        from mtr.training.hub import check_push
        from mtr.training.hub import push_to_hub as push
        from mtr.training.merge import merge as merge_run

        check_push(push_to_hub, "--push-to-hub")
        out = console(sys.stdout)
        folder = output or run / "merged"
        with writing("--output", folder):
            show_merge(merge_run(run, folder, dtype), out)
        if push_to_hub:
            out.print(push(folder, push_to_hub), markup=False)
