"""The training loop.

    for step in steps:                     conversations_per_step conversations, packed
        for batch in step.batches:         this process's packs
            backward(model(batch) * processes / step.weight_sum)
        clip, update, schedule; log, evaluate, save

The gradient of a step depends on its conversations alone: not on packs, processes or strategy. Randomness is seeded
per step and process, so there is no random state to carry from one step to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mtr.errors import UserError
from mtr.prepare.step import Step
from mtr.recipe.sections import Recipe
from mtr.training.faults import PackSplitter, is_out_of_memory
from mtr.training.processes import clip_gradients, gradients_meet, is_sharded, total
from mtr.training.setup import Run
from mtr.training.signals import StopSignals
from mtr.training.state import Summary
from mtr.tree.batch import Batch

__all__ = ["Summary", "train", "train_step"]


def train(recipe: Recipe, resume: bool = False, overwrite: bool = False) -> Summary:
    """Train as the recipe says.

    What is due next is read off the run's summary, which every checkpoint holds: a run that was killed, wherever it
    was, goes on with what it had not done yet.

    Raises:
        UserError: something in the recipe, the data or the model has to be mended, or one of the faults in
            `mtr.errors`. Nothing is written before the first batch is built; a bad row met later leaves a checkpoint.
    """
    with StopSignals(recipe.training.preempt_signal) as signals:
        run = Run(recipe, signals, resume, overwrite)
        with run.display:
            try:
                while not run.told_to_stop():
                    if run.is_due_to_evaluate():
                        run.evaluate()
                    elif run.is_due_to_save():
                        run.save()
                    elif run.is_due_to_play():
                        run.play()
                    elif run.is_done():
                        run.export()
                        break
                    elif (step := run.next_step()) is not None:
                        model, optimizer = run.tree_model, run.optimizer
                        most = recipe.training.max_grad_norm
                        run.count(step, *train_step(model, step, run.accelerator, optimizer, most, run.splitter))
                else:
                    run.save_before_stopping()
            except UserError as error:
                run.save_after(error)
                raise
            except RuntimeError as error:  # of a collective call, when another process is gone
                raise run.explain(error) from None
    run.close()
    return run.summary


def train_step(
    model: nn.Module,
    step: Step,
    accelerator: Accelerator,
    optimizer: Any,
    max_grad_norm: float,
    splitter: PackSplitter,
) -> tuple[float | None, float | None]:
    """One update from the packs of all processes.

    Returns:
        The step's loss in nats and the gradient norm before clipping; None where there was nothing to train. A loss
        or gradient that is not finite makes no update.
    """
    if step.weight_sum == 0:
        return None, None
    loss_sum = accumulate(model, step, accelerator, splitter)
    grad_norm = clip_gradients(accelerator, model, max_grad_norm)
    mean = total(accelerator, loss_sum) / step.weight_sum
    if math.isfinite(mean) and math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad()
    return mean, grad_norm


def accumulate(model: nn.Module, step: Step, accelerator: Accelerator, splitter: PackSplitter) -> Tensor:
    """Gradients of the step, averaged over processes; returns this process's sum(weight * nll).

    A pack that does not fit the memory costs the process's own packs of this step: their gradients are dropped and
    taken again with smaller packs. Where that may happen, gradients meet in an empty backward after the packs, so that
    no other process waits inside a pack.
    """
    several, sharded = accelerator.num_processes > 1, is_sharded(model)
    meet_after = several and splitter.splits_packs
    scale = accelerator.num_processes / step.weight_sum
    while True:
        batches: list[Batch | None] = [*splitter.fit(step.batches)]
        if sharded:
            batches += [splitter.idle] * (step.rounds - len(batches))
        elif not batches and not meet_after:
            batches = [None]
        loss_sum, too_large = _backward(
            model, batches, scale, accelerator, meet=several and not (sharded or meet_after)
        )
        if too_large is None:
            break
        for parameter in model.parameters():
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        splitter.lower(too_large)
    if meet_after:
        accelerator.backward(model(None) * scale)
    return loss_sum


def _backward(
    model: nn.Module, batches: Sequence[Batch | None], scale: float, accelerator: Accelerator, meet: bool
) -> tuple[Tensor, Batch | None]:
    """Forward and backward of each batch.

    Args:
        meet: the last backward averages gradients over processes, those of parameters that took no part included.

    Returns:
        sum(weight * nll), and the batch that did not fit the memory, if there is one.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for i, batch in enumerate(batches):
        last = meet and i == len(batches) - 1
        try:
            with gradients_meet(accelerator, model, last):
                loss: Tensor = model(batch and batch.to(accelerator.device), touch=last)
                accelerator.backward(loss * scale)
        except RuntimeError as error:
            if batch is None or not is_out_of_memory(error):
                raise
            return loss_sum, batch  # the traceback, which holds the graph, ends here
        loss_sum += loss.detach()
    return loss_sum, None
