"""What is counted and reported of a step once it is done, and the end of a run whose loss is not finite."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from mtr.console import first_few
from mtr.errors import NonFiniteError
from mtr.model.device import peak_memory
from mtr.model.flops import FlopCounter
from mtr.prepare.step import Step
from mtr.recipe.sections import TrainingSection
from mtr.training.faults import PackSplitter
from mtr.training.feed import Feed
from mtr.training.learner import Learner
from mtr.training.log import RunLog
from mtr.training.metrics import throughput, totals
from mtr.training.optim import advance
from mtr.training.rejects import RejectsFile
from mtr.training.state import Goal, RunState

_NOT_FINITE = "not finite"
_OVERFLOW = "float16 overflow"


@dataclass(frozen=True)
class Meter:
    """Counts the work of a step, and knows what the device could do."""

    flops: FlopCounter
    matrix_rate: float
    """FLOP a second that matmuls reach on this device: what the MFU is a share of."""


class StepLog:
    """Counts each step in the run's state and reports it."""

    def __init__(
        self,
        training: TrainingSection,
        learner: Learner,
        feed: Feed,
        splitter: PackSplitter,
        meter: Meter,
        state: RunState,
        goal: Goal,
        log: RunLog,
        rejects: RejectsFile | None,
    ) -> None:
        """
        Args:
            rejects: of the main process.
        """
        self._training = training
        self._learner = learner
        self._device = learner.accelerator.device
        self._feed = feed
        self._splitter = splitter
        self._state = state
        self._goal = goal
        self._log = log
        self._rejects = rejects
        self._meter = meter

    def count(self, step: Step, loss: float | None, grad_norm: float | None) -> None:
        """
        Args:
            loss: in nats; None where there was nothing to train, as is the gradient norm.

        Raises:
            NonFiniteError: too many steps in a row were not finite.
        """
        state = self._state
        rate = self._learner.schedule.get_last_lr()[0]
        advance(self._learner.schedule)
        seconds = time.perf_counter() - self._feed.asked
        flops = self._meter.flops.of_batches(step.batches)
        self._add(step, seconds, flops)
        if self._rejects:
            self._rejects.write(step.rejects)
        line = {"step": state.steps, "epoch": step.epoch, "loss": loss, "learning_rate": rate, "grad_norm": grad_norm}
        line |= throughput(step.counts, seconds) | {"position": step.position, "data_wait_seconds": self._feed.wait}
        line |= {"flops_per_second": flops / seconds, "mfu": flops / seconds / self._meter.matrix_rate}
        line |= {"imbalance": step.imbalance, "peak_memory_bytes": peak_memory(self._device)}
        line |= {"total_seconds": state.seconds, "total_data_wait_seconds": state.data_wait_seconds}
        skipped = self._why_skipped(loss, grad_norm)
        if skipped:
            line |= {"skipped": skipped, "rows": list(step.rows)}
        if skipped == _OVERFLOW:
            line["loss_scale"] = self._learner.accelerator.scaler.get_scale()
            state.overflow_steps += 1
        if skipped or state.steps % self._training.logging_steps == 0 or state.steps == self._goal.num_steps:
            self._report(line)
        if skipped == _NOT_FINITE:
            self._count_nonfinite(step)

    def _add(self, step: Step, seconds: float, flops: float) -> None:
        state = self._state
        state.steps += 1
        state.epoch = step.epoch
        state.seconds += seconds
        state.data_wait_seconds += self._feed.wait
        state.imbalance += step.imbalance
        state.pack_splits = self._splitter.splits
        state.counts.add(step.counts)
        state.flops += flops
        state.mfu = state.flops / state.seconds / self._meter.matrix_rate
        state.peak_memory_bytes = max(state.peak_memory_bytes, peak_memory(self._device))

    def _report(self, line: dict[str, Any]) -> None:
        line["totals"] = totals(self._state.counts)
        self._log.write("train", line)
        self._log.display.stepped(line)

    def _why_skipped(self, loss: float | None, grad_norm: float | None) -> str | None:
        """Why a step made no update; None if it made one."""
        if loss is None or grad_norm is None:
            self._state.empty_steps += 1
            return "no turn to train"
        self._state.loss = loss
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._state.nonfinite_in_a_row = 0
            return None
        return _OVERFLOW if self._can_scale_down(loss) else _NOT_FINITE

    def _can_scale_down(self, loss: float) -> bool:
        """Whether scaling the loss by less may bring the gradient of this loss back into the range of float16."""
        scaler = self._learner.accelerator.scaler
        return scaler is not None and math.isfinite(loss) and scaler.get_scale() >= 1

    def _count_nonfinite(self, step: Step) -> None:
        state = self._state
        state.nonfinite_steps += 1
        state.nonfinite_in_a_row += 1
        state.nonfinite_rows = [*state.nonfinite_rows, *step.rows][:100]
        if state.nonfinite_in_a_row >= self._training.max_nonfinite_steps or state.steps == self._goal.num_steps:
            raise NonFiniteError(
                f"the loss or gradient was not finite in {state.nonfinite_in_a_row} steps in a row, the last one "
                f"step {state.steps}; lower training.learning_rate, or look at the rows of these steps in "
                f"metrics.jsonl (of the last one: {first_few(step.rows)})"
            )
