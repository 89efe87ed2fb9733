"""The training loop.

    for step in steps:                     conversations_per_step conversations, packed
        for batch in step.batches:         this process's packs
            backward(model(batch) * processes / step.weight_sum)
        clip, update, schedule; log, evaluate, save

The gradient of a step depends on its conversations alone: not on packs, processes or strategy. Randomness is seeded
per step and process, so there is no random state to carry from one step to the next.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from torch import Tensor, nn

from mtr import checkpoint
from mtr.attention import PAD_TO, choose_backend
from mtr.data import Mixture, Stream, open_data
from mtr.device import keep_freed_memory, peak_memory
from mtr.display import RunDisplay
from mtr.errors import UserError
from mtr.generate import Played, exact_match, play
from mtr.metrics import MetricsFile, environment, throughput, write_json
from mtr.model import (
    TreeModel,
    adapted_modules,
    load_config,
    load_model,
    load_renderer,
    load_tokenizer,
    text_config,
    use_tree_attention,
)
from mtr.optim import advance, build_optimizer, build_schedule
from mtr.recipe import Recipe, differing_keys
from mtr.steps import Builder, Counts, IndexedSteps, Step, StreamedSteps, iterate_steps


@dataclass
class Summary:
    """What a run did."""

    output_dir: Path
    steps: int = 0
    """Done in all, those before a resume included."""
    empty_steps: int = 0
    """Steps in which no turn was left to train; they made no update."""
    nonfinite_steps: int = 0
    """Steps whose loss or gradient was not finite; they made no update."""
    counts: Counts = field(default_factory=Counts)
    seconds: float = 0.0
    """Spent in steps."""
    loss: float | None = None
    """Of the last step."""
    eval_loss: float | None = None
    exact_match: list[float] = field(default_factory=list)
    """Share of held-out turns answered exactly, before and after training."""
    stopped_by: int | None = None
    """The signal that ended the run early."""


def train(recipe: Recipe, resume: bool = False, overwrite: bool = False) -> Summary:
    """Train as the recipe says.

    Raises:
        UserError: something in the recipe, the data or the model has to be mended. Nothing is written before the
            first batch is built; a bad row met later leaves a checkpoint behind.
    """
    keep_freed_memory()
    state = PartialState(cpu=not torch.cuda.is_available())
    output_dir = Path(recipe.training.output_dir)
    recipe, resume_from = _check_output_dir(recipe, output_dir, resume, overwrite)
    tokenizer = load_tokenizer(recipe)
    renderer = load_renderer(recipe, tokenizer)
    recipe = recipe.model_copy(update={"date": renderer.day.isoformat()})
    training = recipe.training
    backend = choose_backend(recipe.model.attention, text_config(load_config(recipe)), state.device)
    builder = Builder(recipe, renderer, state.process_index, state.num_processes, PAD_TO.get(backend, 1))
    data = open_data(recipe.data, recipe.data.train)
    eval_data = open_data(recipe.data, recipe.data.eval) if recipe.data.eval else None
    if isinstance(eval_data, Stream):
        raise UserError("data.eval: a Hub stream has no end; set data.streaming to false to evaluate on it")
    held_out = [eval_data.conversation(i) for i in range(_num_played(recipe, eval_data))] if eval_data else []
    start = int(resume_from.name.split("-")[1]) if resume_from else 0
    steps = _open_steps(builder, data, start)
    num_steps = _count_steps(recipe, steps)
    workers = recipe.data.num_workers if recipe.data.num_workers is not None else 2 * torch.cuda.is_available()
    stream = _with_work_ahead(iterate_steps(steps, range(start, num_steps), workers))

    model = load_model(recipe, state.device)
    use_tree_attention(model)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    accelerator = _accelerator(model)
    optimizer = build_optimizer(model, training)
    schedule = build_schedule(optimizer, training, num_steps)
    summary = Summary(output_dir, steps=start)
    if resume_from:
        saved = checkpoint.load_checkpoint(resume_from, model, optimizer, schedule)
        summary.empty_steps, summary.nonfinite_steps = saved["empty_steps"], saved["nonfinite_steps"]
    tree_model, prepared = accelerator.prepare(TreeModel(model, backend), optimizer)

    state.wait_for_everyone()
    display = RunDisplay(recipe, num_steps, start, enabled=state.is_main_process)
    metrics = _begin_files(recipe, state, start, overwrite) if state.is_main_process else None
    if resume and not resume_from:
        display.say(f"note       no checkpoint in {output_dir}: starting from the beginning")
    display.begin(model, adapted_modules(model), backend, state, len(data) if isinstance(data, Mixture) else None)

    def evaluate(epoch: float) -> None:
        if eval_data is None:
            return
        began = time.perf_counter()
        loss, counts = evaluate_loss(tree_model, builder, eval_data, accelerator)
        summary.eval_loss = loss
        line = {"step": summary.steps, "epoch": epoch, "eval_loss": loss}
        line |= throughput(counts, time.perf_counter() - began) | {"peak_memory_bytes": peak_memory(state.device)}
        if metrics:
            metrics.write(line)
        display.evaluated(line)

    def generate() -> None:
        if held_out and state.is_main_process:
            played = play(model, renderer, held_out, recipe.generation.max_new_tokens)
            summary.exact_match.append(exact_match(played))
            _write_played(output_dir, summary.steps, played)
            display.played(summary.steps, played)

    def save() -> None:
        if state.is_main_process:
            counters = {"empty_steps": summary.empty_steps, "nonfinite_steps": summary.nonfinite_steps}
            checkpoint.save_checkpoint(
                output_dir,
                summary.steps,
                model,
                tokenizer,
                optimizer,
                schedule,
                counters,
                training.save_total_limit,
            )
        state.wait_for_everyone()

    generate()
    model.train()
    in_a_row, evaluated_at, epoch = 0, -1, 0.0
    with _stop_signals() as stopped, display:
        began = time.perf_counter()
        try:
            for step in stream:
                torch.manual_seed(hash((training.seed, summary.steps, state.process_index)) % 2**63)
                rate = schedule.get_last_lr()[0]
                loss, grad_norm = train_step(tree_model, step, accelerator, prepared, training.max_grad_norm)
                advance(schedule)
                seconds, began = time.perf_counter() - began, time.perf_counter()
                summary.steps, epoch = summary.steps + 1, step.epoch
                summary.seconds += seconds
                summary.counts.add(step.counts)
                summary.empty_steps += loss is None
                if loss is not None:
                    summary.loss = loss
                    in_a_row = 0 if math.isfinite(loss) and math.isfinite(grad_norm or 0.0) else in_a_row + 1
                    summary.nonfinite_steps += in_a_row > 0
                line = {"step": summary.steps, "epoch": epoch, "loss": loss, "learning_rate": rate}
                line |= {"grad_norm": grad_norm, **throughput(step.counts, seconds)}
                line |= {"position": step.position, "peak_memory_bytes": peak_memory(state.device)}
                if summary.steps % training.logging_steps == 0 or summary.steps == num_steps:
                    if metrics:
                        metrics.write(line)
                    display.stepped(line)
                if in_a_row >= training.max_nonfinite_steps:
                    raise UserError(
                        f"the loss or gradient was not finite in {in_a_row} steps in a row, the last one step "
                        f"{summary.steps}; lower training.learning_rate, or look at the rows of these steps"
                    )
                if training.eval_steps and summary.steps % training.eval_steps == 0:
                    evaluate(epoch)
                    evaluated_at = summary.steps
                if training.save_steps and summary.steps % training.save_steps == 0:
                    save()
                summary.stopped_by = _agree_to_stop(stopped, accelerator)
                if summary.stopped_by:
                    save()
                    break
                began = time.perf_counter()
            if summary.nonfinite_steps and summary.loss is not None and not math.isfinite(summary.loss):
                raise UserError(f"the run ends in steps whose loss is not finite ({summary.loss}); see metrics.jsonl")
            if not summary.stopped_by:
                if evaluated_at < summary.steps:
                    evaluate(epoch)
                generate()
        except UserError:
            if summary.steps > start:
                save()
            raise
    if state.is_main_process:
        checkpoint.save_model(model, tokenizer, output_dir)
    display.end(summary)
    state.wait_for_everyone()
    return summary


def train_step(
    model: nn.Module, step: Step, accelerator: Accelerator, optimizer: Any, max_grad_norm: float
) -> tuple[float | None, float | None]:
    """One update from the packs of all processes.

    Returns:
        The step's loss in nats and the gradient norm before clipping; None where there was nothing to train. A loss
        or gradient that is not finite makes no update.
    """
    if step.weight_sum == 0:
        return None, None
    several = accelerator.num_processes > 1
    batches = step.batches or (None,)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss: Tensor = model(batch and batch.to(accelerator.device), touch=several and last)
            accelerator.backward(loss * (accelerator.num_processes / step.weight_sum))
        loss_sum += loss.detach()
    trainable = [p for p in model.parameters() if p.requires_grad]
    grad_norm = float(accelerator.clip_grad_norm_(trainable, max_grad_norm))
    mean = float(accelerator.reduce(loss_sum, reduction="sum")) / step.weight_sum
    if math.isfinite(mean) and math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad()
    return mean, grad_norm


@torch.no_grad()
def evaluate_loss(model: nn.Module, builder: Builder, data: Mixture, accelerator: Accelerator) -> tuple[float, Counts]:
    """The weighted mean over all evaluation data, in nats."""
    was_training = model.training
    model.eval()
    steps = IndexedSteps(builder, data, shuffle=False)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    weight_sum, counts = 0.0, Counts()
    for step in iterate_steps(steps, range(steps.steps_per_epoch), num_workers=0):
        for batch in step.batches:
            loss_sum += model(batch.to(accelerator.device))
        weight_sum += step.weight_sum
        counts.add(step.counts)
    model.train(was_training)
    if weight_sum == 0:
        raise UserError(f"data.eval: no turn is left to evaluate ({_reasons(counts)})")
    return float(accelerator.reduce(loss_sum, reduction="sum")) / weight_sum, counts


def _open_steps(builder: Builder, data: Mixture | Stream, start: int) -> IndexedSteps | StreamedSteps:
    shuffle = builder.recipe.data.shuffle
    if isinstance(data, Mixture):
        return IndexedSteps(builder, data, shuffle)
    return StreamedSteps(builder, data, shuffle, start)


def _num_played(recipe: Recipe, eval_data: Mixture) -> int:
    return min(recipe.generation.conversations, len(eval_data))


def _count_steps(recipe: Recipe, steps: IndexedSteps | StreamedSteps) -> int:
    training = recipe.training
    if training.max_steps is not None:
        return training.max_steps
    if isinstance(steps, StreamedSteps):
        raise UserError("training.max_steps is missing: a stream's length is not known, so epochs cannot be counted")
    return max(1, math.ceil(training.num_train_epochs * steps.steps_per_epoch))


def _with_work_ahead(stream: Iterator[Step]) -> Iterator[Step]:
    """Look ahead to the first step that has something to train, before anything is loaded or written."""
    empty: list[Step] = []
    counts = Counts()
    for step in stream:
        if step.weight_sum:
            return itertools.chain(empty, [step], stream)
        empty.append(step)
        counts.add(step.counts)
        if step.epoch >= 1:
            break
    if not empty:
        return iter(())
    raise UserError(f"data.train: no turn is left to train ({_reasons(counts)})")


def _reasons(counts: Counts) -> str:
    reasons = Counter(counts.untrained_turns)
    return "; ".join(f"{n} turns: {reason}" for reason, n in reasons.most_common(3)) or "no turns"


def _accelerator(model: Any) -> Accelerator:
    """Mixed precision where 16-bit weights are trained: their updates are kept in float32."""
    mixed = "no"
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            mixed = "bf16" if parameter.dtype == torch.bfloat16 else "fp16"
            parameter.data = parameter.data.float()
    if model.dtype == torch.float16 and torch.cuda.is_available():
        mixed = "fp16"
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=mixed,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def _check_output_dir(recipe: Recipe, output_dir: Path, resume: bool, overwrite: bool) -> tuple[Recipe, Path | None]:
    """The checkpoint to go on from, and the recipe with the date of the run that is resumed."""
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"training.output_dir: {existing} is a file, so {output_dir} cannot be a folder")
    filled = output_dir.is_dir() and any(output_dir.iterdir())
    if filled and not resume and not overwrite:
        raise UserError(
            f"training.output_dir: {output_dir} is not empty; go on with --resume, replace the run with --overwrite, "
            "or name another folder"
        )
    newest = checkpoint.newest_checkpoint(output_dir) if resume and filled else None
    saved_file = output_dir / "recipe.yaml"
    if newest is None or not saved_file.exists():
        return recipe, None
    saved = Recipe.model_validate(yaml.safe_load(saved_file.read_text()))
    recipe = recipe.model_copy(update={"date": recipe.date or saved.date})
    if different := differing_keys(saved, recipe):
        raise UserError(
            f"{newest} was made with another recipe; these keys differ: {', '.join(different)}. "
            "Restore them, or start anew with --overwrite"
        )
    return recipe, newest


def _begin_files(recipe: Recipe, state: PartialState, start: int, overwrite: bool) -> MetricsFile:
    output_dir = Path(recipe.training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if overwrite:
        checkpoint.remove_run(output_dir)
    (output_dir / "recipe.yaml").write_text(recipe.dump())
    described = environment(recipe.training.seed, state.device, state.num_processes, str(recipe.date))
    write_json(output_dir / "environment.json", described)
    return MetricsFile(output_dir / "metrics.jsonl", last_step=start)


def _write_played(output_dir: Path, step: int, played: list[Played]) -> None:
    mode = "w" if step == 0 else "a"
    with (output_dir / "generations.jsonl").open(mode) as file:
        file.writelines(write_json(None, {"step": step, **turn.as_row()}) + "\n" for turn in played)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Signals received so far: the first one asks the loop to stop after its step, the second one kills."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in (int(signal.SIGTERM), int(signal.SIGINT)):
        before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agree_to_stop(received: list[int], accelerator: Accelerator) -> int | None:
    """A signal that any process got stops all of them after the same step."""
    mine = received[0] if received else 0
    if accelerator.num_processes > 1:
        mine = int(accelerator.gather(torch.tensor([mine], device=accelerator.device)).max())
    return mine or None
