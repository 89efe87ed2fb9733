"""The command line with a fault in one process: `python -m support.patched KIND=NUMBER train recipe.yaml ...`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

import mtr.model.loading
import mtr.model.tree_model
import mtr.training.loop
from mtr.__main__ import main

RANK = int(os.environ.get("RANK", "0"))


def out_of_memory(most: int) -> None:
    """Packs beyond so many tokens do not fit on process 1."""
    forward = mtr.model.tree_model.TreeModel.forward

    def limited(self: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        if RANK == 1 and batch is not None and torch.is_grad_enabled() and batch.num_tokens > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, *arguments, **options)

    mtr.model.tree_model.TreeModel.forward = limited  # type: ignore[method-assign]


def signalled(step: int) -> None:
    """Process 1 gets SIGTERM in a step."""
    _send(signal.SIGTERM, step)


def asked(step: int) -> None:
    """Process 1 gets SIGUSR2 in a step, and SIGTERM in the one after the next."""
    _send(signal.SIGUSR2, step)
    _send(signal.SIGTERM, step + 2)


def killed(step: int) -> None:
    """Process 1 dies in a step, without a word."""
    _send(signal.SIGKILL, step)


def _send(number: signal.Signals, step: int) -> None:
    accumulate, calls = mtr.training.loop.accumulate, iter(range(1, 1000))

    def struck(*arguments: Any) -> Any:
        if next(calls) == step and RANK == 1:
            os.kill(os.getpid(), number)
        return accumulate(*arguments)

    mtr.training.loop.accumulate = struck  # type: ignore[assignment]


if __name__ == "__main__":
    kind, number = sys.argv.pop(1).split("=")
    {"out_of_memory": out_of_memory, "asked": asked, "signalled": signalled, "killed": killed}[kind](int(number))
    sys.argv[0] = "mtr"
    main()
