"""The collective calls of a run: gradients, sums and decisions over all processes.

Every process takes part in every collective call, whatever work it has: with ddp a process without a pack runs one
empty backward, with fsdp2 it runs as many packs as the process with the most, empty ones where it has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mtr.errors import UserError


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


@contextlib.contextmanager
def gradient_sync(accelerator: Accelerator, model: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether a backward inside averages gradients over processes; with fsdp2 every one does."""
    with contextlib.nullcontext() if enabled else accelerator.no_sync(model):
        yield


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float) -> float:
    """Returns the norm over all processes, before clipping."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    norm: Any = accelerator.clip_grad_norm_(trainable, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def total(accelerator: Accelerator, value: Tensor) -> float:
    """The sum over all processes."""
    return float(accelerator.reduce(value, reduction="sum"))


def highest(accelerator: Accelerator, value: int) -> int:
    """The highest value that any process has; the same on all of them."""
    if accelerator.num_processes == 1:
        return value
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).max())


def on_main_process(process: PartialState, act: Callable[[], None]) -> None:
    """Do something on the main process only.

    Raises:
        UserError: on every process, if it was raised on the main one.
    """
    problem: UserError | None = None
    if process.is_main_process:
        try:
            act()
        except UserError as error:
            problem = error
    if process.num_processes > 1:
        (problem,) = broadcast_object_list([problem])
    if problem is not None:
        raise problem


def gather_values(accelerator: Accelerator, value: Any) -> list[Any]:
    """The value of each process, in the order of their ranks."""
    return [value] if accelerator.num_processes == 1 else list(gather_object([value]))


def leave(accelerator: Accelerator, model: nn.Module) -> None:
    """Close the trackers and the process group.

    DDP's reducer goes first. Were it the last to hold the group, it would take it down while holding the interpreter's
    lock, and wait for a thread of gloo that needs the lock to drop its last tensor.
    """
    if isinstance(model, DistributedDataParallel):
        del model.reducer, model.logger
    accelerator.end_training()
