"""A training run, set up in the order in which things can be wrong; nothing is written before all of it is right.

    recipe -> output_dir -> chat template -> data -> first step -> model -> processes -> memory -> checkpoint -> files

What the run is made from is compared with what its checkpoint was made from as soon as it is known.

`set_up` returns a `Run`: what never changes, the parts that act beside a step, and the state that they change.
Decisions that all processes have to take alike are taken from what all of them know.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn

from mtr.attention.choice import choose_backends, fastest, pad_to_multiple_of
from mtr.attention.model_parts import text_config
from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.chat.rendering import Renderer
from mtr.data.conversation import Conversation
from mtr.data.mixture import Mixture
from mtr.data.notes import describe_data
from mtr.data.opening import open_eval_data, open_training_data
from mtr.data.stream import Stream
from mtr.errors import UserError
from mtr.model.config import check_reach, vocabulary_size
from mtr.model.device import keep_freed_memory
from mtr.model.flops import FlopCounter, cost_of, device_matrix_rate
from mtr.model.kernels import speed_up_layers
from mtr.model.loading import compute_dtype, load_config, load_model
from mtr.model.lora import adapted_modules
from mtr.model.strategy import Decision, decide, decided
from mtr.model.tree_model import TreeModel, lay_out, pack_model
from mtr.prepare.builder import Builder
from mtr.prepare.step import Step
from mtr.prepare.steps import IndexedSteps, StreamedSteps
from mtr.prepare.workers import iterate_steps
from mtr.recipe.sections import Backend, Recipe
from mtr.recurrence.kinds import kernels_of
from mtr.store.lock import RunLock
from mtr.training.checkpoint import load_checkpoint
from mtr.training.environment import Identity, environment
from mtr.training.evaluation import Evaluation
from mtr.training.export import Export
from mtr.training.faults import PackSplitter
from mtr.training.feed import Feed, with_trained_turns
from mtr.training.fitting import fit_memory
from mtr.training.folder import Folder, Start, begin_files, check_before_locking, check_output_dir
from mtr.training.generation import Generation
from mtr.training.hub import check_push
from mtr.training.learner import Learner
from mtr.training.log import RunLog
from mtr.training.optim import build_optimizer, build_schedule, check_optimizer, describe_optimizer
from mtr.training.parallel import build_accelerator, distribute, start_processes
from mtr.training.processes import on_main_process
from mtr.training.progress import RunDisplay
from mtr.training.provenance import Provenance
from mtr.training.rejects import RejectsFile
from mtr.training.saving import Saving
from mtr.training.sharding import placement
from mtr.training.signals import StopSignals
from mtr.training.state import Goal, RunState
from mtr.training.step_log import Meter, StepLog
from mtr.training.stopping import Stopping
from mtr.training.tracking import check_trackers, start_tracking


@dataclass(frozen=True)
class Run:
    """All that the loop needs. Nothing in it is replaced once it is set up; what changes is in `state`."""

    learner: Learner
    splitter: PackSplitter
    max_grad_norm: float
    state: RunState
    goal: Goal
    log: RunLog
    stopping: Stopping
    feed: Feed
    step_log: StepLog
    evaluation: Evaluation
    saving: Saving
    generation: Generation
    export: Export


@dataclass(frozen=True)
class Compute:
    """What the model is, and how it computes on this device, known from its config."""

    config: Any
    dtype: torch.dtype
    backends: list[Backend]
    """Of attention; of several the first pack shows the fastest."""
    decision: Decision
    """How its turns are laid out."""
    notes: tuple[str, ...]
    """What the tokenizer and sequence.max_length ask of the model beyond what it was made for."""


@dataclass(frozen=True)
class Data:
    """Everything to train and to evaluate on, and what makes steps of it."""

    builder: Builder
    train: Mixture | Stream
    evaluation: dict[str, Mixture]
    """The sources of data.eval by name."""
    start: int
    """Steps that are done already."""

    @property
    def recipe(self) -> Recipe:
        return self.builder.recipe

    def held_out(self) -> list[Conversation]:
        """The conversations of data.eval that are generated turn by turn."""
        wanted = self.recipe.generation.conversations
        conversations = itertools.chain.from_iterable(data.first(wanted) for data in self.evaluation.values())
        return list(itertools.islice(conversations, wanted))

    def steps(self) -> IndexedSteps | StreamedSteps:
        shuffle, training = self.recipe.data.shuffle, self.recipe.training
        if isinstance(self.train, Mixture):
            return IndexedSteps(self.builder.step, self.train, training, shuffle)
        return StreamedSteps(self.builder.step, self.train, training, shuffle, self.start)

    def eval_steps(self) -> dict[str, IndexedSteps]:
        training = self.recipe.training
        return {
            name: IndexedSteps(self.builder.step, data, training, shuffle=False)
            for name, data in self.evaluation.items()
        }


def set_up(recipe: Recipe, how: Start, signals: StopSignals, lock: RunLock) -> Run:
    """Everything before the first step; the lock of output_dir is taken first.

    Raises:
        UserError: something in the recipe, the data or the model has to be fixed.
    """
    check_trackers(recipe.training.report_to)
    process = start_processes()
    on_main_process(process, lambda: check_push(recipe.training.push_to_hub, "training.push_to_hub"))
    folder, provenance = _claim(recipe, how, process, lock)
    tokenizer = load_tokenizer(folder.recipe)
    renderer = load_renderer(folder.recipe, tokenizer)
    recipe = folder.recipe.model_copy(update={"date": renderer.day.isoformat()})
    recipe, compute = _choose_compute(recipe, process, tokenizer)
    data = _open_data(recipe, renderer, process, compute, folder.start)
    provenance.check_inputs(renderer, data.train, data.evaluation)
    held_out = data.held_out()
    order = data.steps()
    goal = Goal(_count_steps(recipe, order), recipe.training.early_stopping_patience)
    steps = _prepare_steps(recipe, order, range(folder.start, goal.num_steps))

    tree_model, accelerator = _load_model(recipe, process, compute, folder.resume_from)
    provenance.check_weights(recipe)
    meter = _speed_up(recipe, tree_model.model, accelerator, compute)
    distributed = distribute(tree_model, accelerator, recipe.training.parallel)
    asked, (recipe, fitted) = recipe, _fit_memory(recipe, tree_model, distributed, accelerator, compute)
    if recipe is not asked:
        data = replace(data, builder=replace(data.builder, recipe=recipe))
        steps = _prepare_steps(recipe, data.steps(), range(folder.start, goal.num_steps))
    eval_steps = data.eval_steps()
    learner = _build_learner(recipe, tree_model.model, distributed, accelerator, tokenizer, goal)
    state = _restore(folder, learner)
    learner = replace(learner, optimizer=accelerator.prepare_optimizer(learner.raw_optimizer))

    process.wait_for_everyone()
    identity = Identity(folder.marker.run, _environment(recipe, accelerator, provenance, compute))
    log = _begin(recipe, folder, identity, learner, state, goal)
    _report(log, folder, (*folder.notes, *provenance.notes, *compute.notes), data, learner, compute, fitted)
    stopping = Stopping(signals, accelerator, folder.output_dir)
    rejects = RejectsFile(folder.output_dir / "rejects.jsonl") if accelerator.is_main_process else None
    splitter = _splitter(recipe, data, accelerator)
    feed = Feed(steps, recipe.training.seed, accelerator, stopping, state)
    saving = Saving(recipe.training, identity, learner, state, stopping, log)
    run = Run(
        learner=learner,
        splitter=splitter,
        max_grad_norm=recipe.training.max_grad_norm,
        state=state,
        goal=goal,
        log=log,
        stopping=stopping,
        feed=feed,
        step_log=StepLog(recipe.training, learner, feed, splitter, meter, state, goal, log, rejects),
        evaluation=Evaluation(recipe.training, eval_steps, splitter.idle, learner, state, goal, stopping, log),
        saving=saving,
        generation=Generation(recipe, held_out, renderer, learner, state, goal, saving, stopping, log),
        export=Export(recipe, renderer, learner, state, saving, log),
    )
    signals.can_save = True
    return run


def _claim(recipe: Recipe, how: Start, process: PartialState, lock: RunLock) -> tuple[Folder, Provenance]:
    """The folder, locked for this run, and what the run in it was made from."""
    check_before_locking(recipe, how)
    on_main_process(process, lock.take)
    folder = check_output_dir(recipe, how)
    return folder, Provenance(folder.resume_from, how.accept_changes)


# --- data -------------------------------------------------------------------------------------------------------------


def _choose_compute(recipe: Recipe, process: PartialState, tokenizer: Any) -> tuple[Recipe, Compute]:
    """The recipe with its strategy decided, and how it is computed."""
    check_optimizer(recipe.training.optim)
    config = load_config(recipe)
    dtype = compute_dtype(recipe, config)
    notes = check_reach(config, tokenizer, recipe.sequence.max_length)
    decision = decide(recipe, config)
    backends: list[Backend] = ["sdpa"]
    if not decision.unpacked:
        backends = choose_backends(recipe.model.attention, text_config(config), process.device, dtype)
    return decided(recipe, decision), Compute(config, dtype, backends, decision, (*notes, *decision.notes))


def _open_data(recipe: Recipe, renderer: Renderer, process: PartialState, compute: Compute, start: int) -> Data:
    cost = cost_of(text_config(compute.config), trained_whole=recipe.lora is None)
    multiple = pad_to_multiple_of(compute.backends)
    vocabulary = vocabulary_size(compute.config)
    builder = Builder(recipe, renderer, process.process_index, process.num_processes, multiple, cost, vocabulary)
    train, held_back = open_training_data(recipe.data, recipe.training.seed)
    return Data(builder, train, open_eval_data(recipe.data, held_back), start)


def _count_steps(recipe: Recipe, order: IndexedSteps | StreamedSteps) -> int:
    training = recipe.training
    if training.max_steps is not None:
        return training.max_steps
    if isinstance(order, StreamedSteps):
        raise UserError("training.max_steps is missing: a stream's length is not known, so epochs cannot be counted")
    return max(1, math.ceil(training.num_train_epochs * order.steps_per_epoch))


def _prepare_steps(recipe: Recipe, order: IndexedSteps | StreamedSteps, numbers: range) -> Iterator[Step]:
    """The steps that are left to do; the first ones are prepared here, so that bad data is noticed early."""
    asked = recipe.data.num_workers
    num_workers = asked if asked is not None else 2 * torch.cuda.is_available()
    return with_trained_turns(iterate_steps(order, numbers, num_workers))


# --- model ------------------------------------------------------------------------------------------------------------


def _load_model(
    recipe: Recipe, process: PartialState, compute: Compute, checkpoint: Path | None
) -> tuple[TreeModel, Accelerator]:
    where = placement(process, recipe.training.parallel)
    model = load_model(recipe, process.device, quantise=True, placement=where, checkpoint=checkpoint)
    lay_out(model, recipe)
    model.train()
    training = recipe.training
    accelerator = build_accelerator(model, training.parallel, training.report_to, training.output_dir)
    return pack_model(model, recipe, compute.backends, fastest), accelerator


def _fit_memory(
    recipe: Recipe, tree_model: TreeModel, distributed: nn.Module, accelerator: Accelerator, compute: Compute
) -> tuple[Recipe, tuple[str, ...]]:
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return fit_memory(recipe, compute.config, compute.dtype, tree_model, distributed, accelerator)


def _speed_up(recipe: Recipe, model: Any, accelerator: Accelerator, compute: Compute) -> Meter:
    """The kernels that the recipe asks for, and what measures how fast they are."""
    speed_up_layers(model, recipe, accelerator.device)
    return Meter(FlopCounter(model), device_matrix_rate(accelerator.device, compute.dtype)["flops_per_second"])


def _build_learner(
    recipe: Recipe, model: Any, distributed: nn.Module, accelerator: Accelerator, tokenizer: Any, goal: Goal
) -> Learner:
    """The optimizer is not wrapped yet, so that a checkpoint can be loaded into it."""
    training = recipe.training
    optimizer = build_optimizer(model, training)
    schedule = build_schedule(optimizer, training, goal.num_steps)
    return Learner(model, distributed, optimizer, optimizer, schedule, accelerator, tokenizer)


def _splitter(recipe: Recipe, data: Data, accelerator: Accelerator) -> PackSplitter:
    who = f"process {accelerator.process_index}: " if accelerator.num_processes > 1 else ""
    return PackSplitter(recipe.sequence.on_oom, data.builder.batch, who, recipe.sequence.unpacked)


def _restore(folder: Folder, learner: Learner) -> RunState:
    """The state of the run that is continued, its weights and optimizer loaded; or that of a new one."""
    state = RunState(folder.output_dir)
    if folder.resume_from:
        state.restore(load_checkpoint(folder.resume_from, learner.model, learner.raw_optimizer, learner.schedule))
    if state.scaler and learner.accelerator.scaler:
        learner.accelerator.scaler.load_state_dict(state.scaler)
    return state


# --- files --------------------------------------------------------------------------------------------------


def _environment(recipe: Recipe, accelerator: Accelerator, provenance: Provenance, compute: Compute) -> dict[str, Any]:
    known = environment(recipe.training.seed, accelerator.device, accelerator.num_processes, str(recipe.date))
    known["strategy"] = {"taken": compute.decision.strategy, "reason": compute.decision.reason}
    provenance.note_versions(known)
    return known | {"made_from": provenance.made_from, "accepted_changes": provenance.accepted}


def _begin(recipe: Recipe, folder: Folder, identity: Identity, learner: Learner, state: RunState, goal: Goal) -> RunLog:
    """The first files of the run, its trackers and its display."""
    accelerator = learner.accelerator
    is_main = accelerator.is_main_process
    display = RunDisplay(recipe, goal.num_steps, folder.start, enabled=is_main)
    metrics = begin_files(folder, recipe, identity, state) if is_main else None
    start_tracking(accelerator, recipe, folder.start)
    log = RunLog(display, metrics, accelerator, recipe.training.on_save_error)
    if is_main and log.lines < state.metrics_lines:
        lost = f"{state.metrics_lines - log.lines} of {state.metrics_lines} lines"
        log.note("warning", f"metrics.jsonl has lost {lost} that were written up to step {state.steps}")
    return log


def _report(
    log: RunLog,
    folder: Folder,
    notes: Sequence[str],
    data: Data,
    learner: Learner,
    compute: Compute,
    fitted: Sequence[str],
) -> None:
    """What there is to know before the first step."""
    for note in notes:
        log.note("note", note)
    for kernels in kernels_of(learner.model, learner.accelerator.device):
        log.note("recurrence", kernels)
    if folder.resume_from:
        log.note("resumed", folder.resume_from.name)
    rows = data.train.num_rows if isinstance(data.train, Mixture) else None
    log.display.begin(learner.model, adapted_modules(learner.model), compute.backends, learner.accelerator, rows)
    for note in describe_optimizer(learner.raw_optimizer, data.recipe.training):
        log.note("optimizer", note)
    for note in fitted:
        log.note("memory", note)
    for note in describe_data(data.train) if learner.accelerator.is_main_process else ():
        log.note("note", note)
