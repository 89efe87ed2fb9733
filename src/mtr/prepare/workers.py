"""Steps prepared in background processes.

DataLoader workers build steps ahead of the device. Three things differ from a plain DataLoader: a bad row ends the run
where its step is asked for and not where it was prepared; a worker that dies is reported with the row that it was
preparing; signals that a scheduler sends to all processes of a job are left to the main process.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mtr.errors import UserError, WorkerError, one_line
from mtr.prepare.step import Step
from mtr.prepare.steps import IndexedSteps, StreamedSteps

_DYING = 2.0
"""Seconds to wait until a worker whose pipe broke can be seen to be dead."""
_PREEMPTION = ("SIGUSR1", "SIGUSR2", "SIGHUP")
"""Besides SIGTERM and SIGINT, what a scheduler may send to every process of a job."""


def iterate_steps(steps: IndexedSteps | StreamedSteps, numbers: range, num_workers: int) -> Iterator[Step]:
    """The steps in order, prepared in background workers if there are any.

    Raises:
        UserError: a row is bad; the steps before it have been yielded.
    """
    indexed = isinstance(steps, IndexedSteps)
    leaving = torch.zeros(1, dtype=torch.int64)
    if num_workers:
        leaving.share_memory_()  # type: ignore[no-untyped-call]
        atexit.register(leaving.fill_, 1)
    if isinstance(steps, IndexedSteps) and num_workers:
        steps.at_work = torch.full((num_workers, 3), -1).share_memory_()  # type: ignore[no-untyped-call]
    loader: DataLoader[Step | UserError] = DataLoader(
        steps,
        batch_size=None,
        sampler=numbers if indexed else None,
        num_workers=num_workers if indexed else min(num_workers, 1),
        collate_fn=_same,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=partial(_start_worker, leaving),
    )
    prepared = _start_workers(loader)
    try:
        for number in numbers:
            try:
                step = next(prepared)
            except (RuntimeError, OSError, EOFError) as error:
                raise _explain_worker(error, steps, number) from error
            if isinstance(step, UserError):
                raise step
            yield step
    finally:
        if num_workers:
            leaving.fill_(1)


def _start_workers(loader: DataLoader[Step | UserError]) -> Iterator[Step | UserError]:
    """Without DataLoader's SIGCHLD handler, which would raise wherever the main process happens to be."""
    before = signal.getsignal(signal.SIGCHLD)
    prepared = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)
    return prepared


def _explain_worker(error: Exception, steps: IndexedSteps | StreamedSteps, number: int) -> Exception:
    """The death of a worker (killed, out of memory) as a WorkerError; any other exception in a worker is a bug."""
    broken = isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker (pid" in str(error)
    at = _lost_row(steps, patience=_DYING if broken else 0.0)
    if not (at or broken) or "Caught " in str(error):
        return error
    return WorkerError(
        f"a data worker died at {at or f'step {number + 1}'} "
        f"({one_line(error, 200)}); look for an out-of-memory kill, or lower data.num_workers"
    )


def _lost_row(steps: IndexedSteps | StreamedSteps, patience: float) -> str:
    """What a dead worker was preparing, waiting `patience` seconds for its death to become visible."""
    if not isinstance(steps, IndexedSteps):
        return ""
    until = time.monotonic() + patience
    while True:
        at = steps.died({child.pid for child in multiprocessing.active_children()})
        if at or time.monotonic() >= until:
            return at
        time.sleep(0.02)


def _same(step: Any) -> Any:
    return step


def _start_worker(leaving: Tensor, _: int) -> None:
    """Worker start-up: ignore a scheduler's signals; SIGTERM ends the worker once the main process is leaving."""
    torch.set_num_threads(1)

    def terminate(number: int, _: Any) -> None:
        if leaving.item():
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, terminate)
    for number in (signal.SIGINT, *(getattr(signal, n) for n in _PREEMPTION if hasattr(signal, n))):
        signal.signal(number, signal.SIG_IGN)
