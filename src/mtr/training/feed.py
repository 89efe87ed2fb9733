"""The next step for every process, or the reason why there is none, agreed by all of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator

from mtr.errors import UserError, WorkerError
from mtr.prepare.counts import Counts
from mtr.prepare.step import Step
from mtr.training.processes import gather_values, highest
from mtr.training.state import RunState
from mtr.training.stopping import Stopping

_FAILED = 1 << 16
"""Above every signal number: a process could not get its next step."""


class Feed:
    """Hands out prepared steps. Each step seeds the random numbers of its process, so no random state is saved."""

    def __init__(
        self, steps: Iterator[Step], seed: int, accelerator: Accelerator, stopping: Stopping, state: RunState
    ) -> None:
        self._steps = steps
        self._seed = seed
        self._accelerator = accelerator
        self._stopping = stopping
        self._state = state
        self.asked = 0.0
        """When the current step was asked for, by `time.perf_counter`."""
        self.wait = 0.0
        """Seconds that the current step was waited for."""

    def next(self) -> Step | None:
        """The next step; None where a signal came, on this process or another one.

        Raises:
            UserError: a row is bad, or a data worker died, on this process or another one.
        """
        step: Step | None = None
        problem: UserError | None = None
        self.asked = time.perf_counter()
        if not self._stopping.is_asked_here:
            try:
                step = next(self._steps).pinned(self._accelerator.device)
            except UserError as error:
                problem = error
        self.wait = time.perf_counter() - self.asked
        code = highest(self._accelerator, _FAILED if problem else self._stopping.code)
        if code == _FAILED:
            problems = gather_values(self._accelerator, problem and (type(problem).__name__, str(problem)))
            raise problem or WorkerError(next(text for found in problems if found for text in found[1:]))
        self._stopping.agree_on(code)
        if self._stopping.is_agreed:
            return None
        torch.manual_seed(step_seed(self._seed, self._state.steps, self._accelerator.process_index))
        return step


def step_seed(seed: int, step: int, process: int) -> int:
    """Of one step on one process: independent of all others, and the same on every machine."""
    return int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def with_trained_turns(steps: Iterator[Step]) -> Iterator[Step]:
    """The same steps, looked ahead to the first one that has something to train, before anything is loaded or written.

    Raises:
        UserError: no turn of an epoch is left to train.
    """
    empty: list[Step] = []
    counts = Counts()
    for step in steps:
        if step.weight_sum:
            return itertools.chain(empty, [step], steps)
        empty.append(step)
        counts.add(step.counts)
        if step.epoch >= 1:
            break
    if not empty:
        return iter(())
    raise UserError(f"data.train: no turn is left to train ({counts.reasons()})")
