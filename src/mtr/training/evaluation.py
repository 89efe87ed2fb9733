"""The loss on held-out data, exact and by source.

eval_loss = sum(weight * nll) / sum(weight) over all of it, in the strategy of the recipe
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from mtr.errors import UserError
from mtr.model.device import peak_memory
from mtr.prepare.counts import Counts
from mtr.prepare.steps import IndexedSteps
from mtr.recipe.sections import TrainingSection
from mtr.training.averaging import averaged_weights
from mtr.training.learner import Learner
from mtr.training.log import RunLog
from mtr.training.metrics import throughput
from mtr.training.processes import is_sharded, total
from mtr.training.state import Goal, RunState, is_due
from mtr.training.stopping import Stopping
from mtr.tree.batch import Batch


@dataclass
class EvalResult:
    loss: float
    """In nats."""
    by_source: dict[str, float] = field(default_factory=dict)
    """Where there are several; a source without a trained turn is left out."""
    counts: Counts = field(default_factory=Counts)


def evaluate(
    model: nn.Module,
    sources: Mapping[str, IndexedSteps],
    idle: Batch,
    accelerator: Accelerator,
    stop: Callable[[], bool],
) -> EvalResult | None:
    """The weighted mean over all evaluation data.

    Args:
        sources: by name; each one's first epoch is evaluated.
        idle: what a process runs that has fewer packs than another one, where the model is sharded.
        stop: asked after each step, with the same answer on all processes; the evaluation is then given up.

    Raises:
        UserError: no turn of it is trained.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, tuple[float, float]] = {}
    counts = Counts()
    for name, steps in sources.items():
        loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        weight_sum = 0.0
        for step in steps.first_epoch():
            batches = list(step.pinned(accelerator.device).batches)
            if is_sharded(model):
                batches += [idle] * (step.rounds - len(batches))
            with torch.no_grad():
                for batch in batches:
                    loss_sum += model(batch.to(accelerator.device)).detach()
            weight_sum += step.weight_sum
            counts.add(step.counts)
            if stop():
                model.train(was_training)
                return None
        sums[name] = (total(accelerator, loss_sum), weight_sum)
    model.train(was_training)
    whole = sum(weight for _, weight in sums.values())
    if whole == 0:
        raise UserError(f"data.eval: no turn is left to evaluate ({counts.reasons()})")
    by_source = {name: loss / weight for name, (loss, weight) in sums.items() if weight}
    loss = sum(loss for loss, _ in sums.values()) / whole
    return EvalResult(loss, by_source if len(sums) > 1 else {}, counts)


class Evaluation:
    """Evaluates every `eval_steps` steps and at the end, and keeps the best loss in the run's state."""

    def __init__(
        self,
        training: TrainingSection,
        sources: Mapping[str, IndexedSteps],
        idle: Batch,
        learner: Learner,
        state: RunState,
        goal: Goal,
        stopping: Stopping,
        log: RunLog,
    ) -> None:
        self._every = training.eval_steps
        self._sources = sources
        self._idle = idle
        self._learner = learner
        self._state = state
        self._goal = goal
        self._stopping = stopping
        self._log = log

    def is_due(self) -> bool:
        due = is_due(self._state.steps, self._every) or self._goal.is_reached(self._state)
        return bool(self._sources) and due and self._state.evaluated_at < self._state.steps

    def evaluate(self) -> None:
        """The loss on `data.eval`; given up when a signal comes, and done when the run is resumed."""
        began = time.perf_counter()
        accelerator = self._learner.accelerator
        with averaged_weights(self._learner.raw_optimizer):
            result = evaluate(self._learner.tree_model, self._sources, self._idle, accelerator, self._stopping.agree)
        if result is None:
            return
        self._keep(result)
        state = self._state
        line: dict[str, Any] = {"step": state.steps, "epoch": state.epoch, "eval_loss": result.loss}
        line |= {"eval_loss_by_source": result.by_source} if result.by_source else {}
        line |= throughput(result.counts, time.perf_counter() - began)
        line |= {"peak_memory_bytes": peak_memory(accelerator.device)}
        self._log.write("eval", line)
        self._log.display.evaluated(line)
        for reason, number in result.counts.skipped_rows.items():
            self._log.note("skipped", f"{number:,} rows of the evaluation data: {reason}")
        if self._goal.is_out_of_patience(state):
            self._log.note(
                "stopping",
                f"eval loss has not improved in {state.evaluations_without_gain} evaluations; the lowest was "
                f"{state.best_eval_loss:.4f} at step {state.best_step}",
            )

    def _keep(self, result: EvalResult) -> None:
        state = self._state
        state.eval_loss, state.eval_loss_by_source = result.loss, result.by_source
        state.evaluated_at = state.steps
        if state.best_eval_loss is None or result.loss < state.best_eval_loss:
            state.best_eval_loss, state.best_step, state.evaluations_without_gain = result.loss, state.steps, 0
        else:
            state.evaluations_without_gain += 1
