"""The training loop.

    for step in steps:                     conversations_per_step conversations, packed
        for batch in step.batches:         this process's packs
            backward(model(batch) * processes / step.weight_sum)
        clip, update, schedule; log, evaluate, save

The gradient of a step depends on its conversations alone: not on packs, processes or strategy. Each step seeds its own
random numbers, so there is no random state to carry from one step to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mtr.errors import UserError
from mtr.prepare.step import Step
from mtr.recipe.sections import Recipe
from mtr.store.lock import RunLock
from mtr.training.collective_errors import explained
from mtr.training.faults import PackSplitter, is_out_of_memory
from mtr.training.folder import Start
from mtr.training.learner import Learner
from mtr.training.processes import clip_gradients, gradient_sync, is_sharded, leave, total
from mtr.training.setup import Run, set_up
from mtr.training.signals import StopSignals
from mtr.training.state import RunState
from mtr.tree.batch import Batch


def train(recipe: Recipe, resume: bool = False, overwrite: bool = False, accept_changes: bool = False) -> RunState:
    """Train as the recipe says.

    Args:
        resume: continue from the newest checkpoint in output_dir, if there is one.
        overwrite: replace the run in output_dir.
        accept_changes: resume even if data, template or weights have changed since.

    What is due next is read from the run's state, which every checkpoint holds: a run that was killed, wherever it was,
    continues with what it had not done yet.

    Raises:
        UserError: something in the recipe, the data or the model has to be fixed, or one of the faults in
            `mtr.errors`. Nothing is written before the first batch is built; a bad row met later leaves a checkpoint.
    """
    how = Start(resume, accept_changes, overwrite)
    output_dir = Path(recipe.training.output_dir)
    with explained(), _signals(recipe) as signals, RunLock(output_dir) as lock:
        run = set_up(recipe, how, signals, lock)
        with run.log.display:
            try:
                _loop(run)
            except UserError as error:
                run.saving.save_after(error)
                raise
    leave(run.learner.accelerator, run.learner.tree_model)
    run.export.upload()
    return run.state


def _signals(recipe: Recipe) -> StopSignals:
    return StopSignals(recipe.training.preempt_signal, recipe.training.checkpoint_signal)


def _loop(run: Run) -> None:
    """One thing after the other until the run is done or asked to stop."""
    while not run.stopping.is_agreed:
        if run.evaluation.is_due():
            run.evaluation.evaluate()
        elif run.saving.is_due():
            run.saving.save()
        elif run.generation.is_due():
            run.generation.generate()
        elif run.goal.is_reached(run.state):
            run.export.export()
            return
        elif (step := run.feed.next()) is not None:
            loss, grad_norm = train_step(run.learner, step, run.max_grad_norm, run.splitter)
            run.step_log.count(step, loss, grad_norm)
    run.saving.save_before_stopping(run.stopping.signal)


def train_step(
    learner: Learner, step: Step, max_grad_norm: float, splitter: PackSplitter
) -> tuple[float | None, float | None]:
    """One update from the packs of all processes.

    Returns:
        The step's loss in nats and the gradient norm before clipping; None where there was nothing to train. A loss
        or gradient that is not finite makes no update.
    """
    if step.weight_sum == 0:
        return None, None
    model, accelerator = learner.tree_model, learner.accelerator
    loss_sum = accumulate(model, step, accelerator, splitter)
    grad_norm = clip_gradients(accelerator, model, max_grad_norm)
    mean = total(accelerator, loss_sum) / step.weight_sum
    if math.isfinite(mean) and math.isfinite(grad_norm):
        learner.optimizer.step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()  # float16: after an overflow the next loss is scaled by less
    learner.optimizer.zero_grad()
    return mean, grad_norm


def accumulate(model: nn.Module, step: Step, accelerator: Accelerator, splitter: PackSplitter) -> Tensor:
    """Gradients of the step, averaged over processes; returns this process's sum(weight * nll).

    When a pack runs out of memory, the process discards the gradients of its packs of this step and computes them again
    with smaller packs. Where that may happen, gradients are synchronized in an empty backward after the packs, so that
    no other process waits inside a pack.
    """
    several, sharded = accelerator.num_processes > 1, is_sharded(model)
    sync_after = several and splitter.splits_packs
    scale = accelerator.num_processes / step.weight_sum
    while True:
        batches: list[Batch | None] = [*splitter.fit(step.batches)]
        if sharded:
            batches += [splitter.idle] * (step.rounds - len(batches))
        elif not batches and not sync_after:
            batches = [None]
        loss_sum, too_large = _backward(
            model, batches, scale, accelerator, sync=several and not (sharded or sync_after)
        )
        if too_large is None:
            break
        for parameter in model.parameters():
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        splitter.lower(too_large)
    if sync_after:
        accelerator.backward(model(None) * scale)
    return loss_sum


def _backward(
    model: nn.Module, batches: Sequence[Batch | None], scale: float, accelerator: Accelerator, sync: bool
) -> tuple[Tensor, Batch | None]:
    """Forward and backward of each batch.

    Args:
        sync: the last backward averages gradients over processes, of parameters that took no part, too.

    Returns:
        sum(weight * nll), and the batch that did not fit in memory, if there is one.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for i, batch in enumerate(batches):
        last = sync and i == len(batches) - 1
        try:
            with gradient_sync(accelerator, model, enabled=last):
                loss: Tensor = model(batch and batch.to(accelerator.device), touch=last)
                accelerator.backward(loss * scale)
        except RuntimeError as error:
            if batch is None or not is_out_of_memory(error):
                raise
            return loss_sum, batch  # the traceback, which holds the graph, ends here
        loss_sum += loss.detach()
    return loss_sum, None
