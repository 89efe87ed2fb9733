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
import json
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
from mtr.backend import choose_backends, pad_to_multiple_of
from mtr.conversation import Conversation
from mtr.data import Mixture, Stream, describe_data, open_data, open_training_data
from mtr.device import keep_freed_memory, peak_memory
from mtr.display import RunDisplay
from mtr.errors import UserError
from mtr.generate import Played, exact_match, play
from mtr.memory import checkpoint_activations
from mtr.metrics import MetricsFile, environment, throughput, write_json
from mtr.model import (
    TreeModel,
    adapted_modules,
    compute_dtype,
    load_config,
    load_model,
    load_renderer,
    load_tokenizer,
    text_config,
    use_tree_attention,
)
from mtr.optim import advance, build_optimizer, build_schedule
from mtr.recipe import Recipe, differing_keys
from mtr.rejects import RejectsFile
from mtr.steps import Builder, Counts, IndexedSteps, Step, StreamedSteps, iterate_steps


@dataclass
class Summary:
    """What a run did, the part before a resume included."""

    output_dir: Path
    steps: int = 0
    epoch: float = 0.0
    empty_steps: int = 0
    """Steps in which no turn was left to train; they made no update."""
    nonfinite_steps: int = 0
    """Steps whose loss or gradient was not finite; they made no update."""
    nonfinite_in_a_row: int = 0
    counts: Counts = field(default_factory=Counts)
    seconds: float = 0.0
    """Spent in steps."""
    loss: float | None = None
    """Of the last step."""
    eval_loss: float | None = None
    evaluated_at: int = -1
    """Step of the last evaluation."""
    exact_match: list[float] = field(default_factory=list)
    """Share of held-out turns answered exactly, before and after training."""
    stopped_by: int | None = None
    """The signal that ended the run early."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON."""
        return {**vars(self), "output_dir": str(self.output_dir), "counts": vars(self.counts)}

    def restore(self, state: dict[str, Any]) -> None:
        kept = {key: value for key, value in state.items() if key in vars(self) and key != "output_dir"}
        counts: dict[str, Any] = {k: Counter(v) if isinstance(v, dict) else v for k, v in kept.pop("counts").items()}
        vars(self).update(kept, counts=Counts(**counts), stopped_by=None)


def train(recipe: Recipe, resume: bool = False, overwrite: bool = False) -> Summary:
    """Train as the recipe says.

    Raises:
        UserError: something in the recipe, the data or the model has to be mended. Nothing is written before the
            first batch is built; a bad row met later leaves a checkpoint behind.
    """
    run = _Run(recipe, resume, overwrite)
    training = run.recipe.training
    with _stop_signals() as stopped, run.display:
        try:
            if run.start == 0:
                run.generate()
            for step in run.stream:
                run.update(step)
                if _due(run.summary.steps, training.eval_steps):
                    run.evaluate()
                if _due(run.summary.steps, training.save_steps):
                    run.save()
                if signalled := _agree_to_stop(stopped, run.accelerator):
                    run.save()
                    run.summary.stopped_by = signalled
                    break
            else:
                run.finish()
        except UserError:
            if run.summary.steps > run.start:
                run.save()
            raise
    run.export()
    return run.summary


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class _Run:
    """All that a run holds, set up in the order in which things can be wrong: recipe, template, data, model."""

    def __init__(self, recipe: Recipe, resume: bool, overwrite: bool) -> None:
        keep_freed_memory()
        self.process = PartialState(cpu=not torch.cuda.is_available())
        self.output_dir = Path(recipe.training.output_dir)
        recipe, resume_from = _check_output_dir(recipe, self.output_dir, resume, overwrite)
        self.start = checkpoint.step_of(resume_from) if resume_from else 0
        self.tokenizer = load_tokenizer(recipe)
        self.renderer = load_renderer(recipe, self.tokenizer)
        self.recipe = recipe = recipe.model_copy(update={"date": self.renderer.day.isoformat()})
        config = load_config(recipe)
        backends = choose_backends(
            recipe.model.attention, text_config(config), self.process.device, compute_dtype(recipe, config)
        )
        rank, processes = self.process.process_index, self.process.num_processes
        self.builder = Builder(recipe, self.renderer, rank, processes, pad_to_multiple_of(backends))
        data, held_back = open_training_data(recipe.data, recipe.training.seed)
        self.eval_data, self.held_out = _open_eval(recipe, held_back)
        steps = _open_steps(self.builder, data, self.start)
        self.num_steps = _count_steps(recipe, steps)
        numbers = range(self.start, self.num_steps)
        self.stream = _with_work_ahead(iterate_steps(steps, numbers, _num_workers(recipe)))

        self.model = load_model(recipe, self.process.device)
        use_tree_attention(self.model)
        checkpoint_activations(self.model, recipe.training.checkpointing)
        self.model.train()
        self.accelerator = _accelerator(self.model)
        optimizer = build_optimizer(self.model, recipe.training)
        self.schedule = build_schedule(optimizer, recipe.training, self.num_steps)
        self.summary = Summary(self.output_dir)
        if resume_from:
            self.summary.restore(checkpoint.load_checkpoint(resume_from, self.model, optimizer, self.schedule))
        self.raw_optimizer = optimizer
        self.tree_model, self.optimizer = self.accelerator.prepare(TreeModel(self.model, *backends), optimizer)

        self.process.wait_for_everyone()
        main = self.process.is_main_process
        self.display = RunDisplay(recipe, self.num_steps, self.start, enabled=main)
        self.metrics = _begin_files(recipe, self.process, self.summary, overwrite) if main else None
        if resume and not resume_from:
            self.display.say(f"note       no checkpoint in {self.output_dir}: starting from the beginning")
        self.rejects = RejectsFile(self.output_dir / "rejects.jsonl") if main else None
        rows = data.num_rows if isinstance(data, Mixture) else None
        self.display.begin(self.model, adapted_modules(self.model), " or ".join(backends), self.process, rows)
        for note in describe_data(data) if main else []:
            self.display.say(f"note       {note}")
        self.began = time.perf_counter()

    def update(self, step: Step) -> None:
        """One step: update, count, log."""
        summary, training = self.summary, self.recipe.training
        torch.manual_seed(hash((training.seed, summary.steps, self.process.process_index)) % 2**63)
        rate = self.schedule.get_last_lr()[0]
        loss, grad_norm = train_step(self.tree_model, step, self.accelerator, self.optimizer, training.max_grad_norm)
        advance(self.schedule)
        seconds = time.perf_counter() - self.began
        summary.steps += 1
        summary.epoch = step.epoch
        summary.seconds += seconds
        summary.counts.add(step.counts)
        if self.rejects:
            self.rejects.write(step.rejects)
        line = {"step": summary.steps, "epoch": step.epoch, "loss": loss, "learning_rate": rate, "grad_norm": grad_norm}
        line |= throughput(step.counts, seconds) | {"position": step.position, **self._memory()}
        if summary.steps % training.logging_steps == 0 or summary.steps == self.num_steps:
            self._write(line)
            self.display.stepped(line)
        if loss is None or grad_norm is None:
            summary.empty_steps += 1
        else:
            self._check_finite(loss, grad_norm)
        self.began = time.perf_counter()

    def _check_finite(self, loss: float, grad_norm: float) -> None:
        summary, most = self.summary, self.recipe.training.max_nonfinite_steps
        summary.loss = loss
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        summary.nonfinite_steps += not finite
        summary.nonfinite_in_a_row = 0 if finite else summary.nonfinite_in_a_row + 1
        if summary.nonfinite_in_a_row >= most or (not finite and summary.steps == self.num_steps):
            raise UserError(
                f"the loss or gradient was not finite in {summary.nonfinite_in_a_row} steps in a row, the last one "
                f"step {summary.steps}; lower training.learning_rate, or look at the rows of these steps"
            )

    def evaluate(self) -> None:
        """The loss on `data.eval`, if there is any."""
        if self.eval_data is None:
            return
        began = time.perf_counter()
        loss, counts = evaluate_loss(self.tree_model, self.builder, self.eval_data, self.accelerator)
        self.summary.eval_loss, self.summary.evaluated_at = loss, self.summary.steps
        line = {"step": self.summary.steps, "epoch": self.summary.epoch, "eval_loss": loss}
        line |= throughput(counts, time.perf_counter() - began) | self._memory()
        self._write(line)
        self.display.evaluated(line)
        for reason, number in counts.skipped_rows.items():
            self.display.say(f"skipped    {number:,} rows of the evaluation: {reason}")
        self.began = time.perf_counter()

    def generate(self) -> None:
        """Play the held-out conversations, on the main process; the others wait at the next step."""
        if self.held_out and self.process.is_main_process:
            played = play(self.model, self.renderer, self.held_out, self.recipe.generation.max_new_tokens)
            self.summary.exact_match.append(exact_match(played))
            _write_played(self.output_dir, self.summary.steps, played)
            self.display.played(self.summary.steps, played)
        self.began = time.perf_counter()

    def save(self) -> None:
        if self.process.is_main_process:
            checkpoint.save_checkpoint(
                self.output_dir,
                self.summary.steps,
                self.model,
                self.tokenizer,
                self.raw_optimizer,
                self.schedule,
                self.summary.state(),
                self.recipe.training.save_total_limit,
            )
        self.process.wait_for_everyone()
        self.began = time.perf_counter()

    def finish(self) -> None:
        """What comes after the last step."""
        if self.summary.evaluated_at < self.summary.steps:
            self.evaluate()
        self.generate()

    def export(self) -> None:
        if self.process.is_main_process:
            checkpoint.save_model(self.model, self.tokenizer, self.output_dir)
        self.display.end(self.summary)
        self.process.wait_for_everyone()

    def _write(self, line: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.write(line)

    def _memory(self) -> dict[str, int]:
        return {"peak_memory_bytes": peak_memory(self.process.device)}


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


def _open_eval(recipe: Recipe, held_back: Mixture | None) -> tuple[Mixture | None, list[Conversation]]:
    """The evaluation data, and the conversations of it that are played."""
    data: Mixture | Stream | None = held_back
    if recipe.data.eval:
        data = open_data(recipe.data, recipe.data.eval)
    if isinstance(data, Stream):
        raise UserError("data.eval: a Hub stream has no end; set data.streaming to false to evaluate on it")
    return (None, []) if data is None else (data, list(data.first(recipe.generation.conversations)))


def _num_workers(recipe: Recipe) -> int:
    asked = recipe.data.num_workers
    return asked if asked is not None else 2 * torch.cuda.is_available()


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
    turns = [f"{n} turns: {reason}" for reason, n in counts.untrained_turns.most_common(3)]
    rows = [f"{n} rows: {reason}" for reason, n in counts.skipped_rows.most_common(3)]
    return "; ".join(turns + rows) or "no turns"


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


def _begin_files(recipe: Recipe, process: PartialState, summary: Summary, overwrite: bool) -> MetricsFile:
    output_dir = Path(recipe.training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if overwrite:
        checkpoint.remove_run(output_dir)
    (output_dir / "recipe.yaml").write_text(recipe.dump())
    described = environment(recipe.training.seed, process.device, process.num_processes, str(recipe.date))
    write_json(output_dir / "environment.json", described)
    return MetricsFile(output_dir / "metrics.jsonl", summary.steps, summary.evaluated_at)


def _write_played(output_dir: Path, step: int, played: list[Played]) -> None:
    """Add to generations.jsonl; what an earlier try wrote from this step on is replaced."""
    path = output_dir / "generations.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    new = [write_json(None, {"step": step, **turn.as_row()}) for turn in played]
    path.write_text("".join(f"{line}\n" for line in [*kept, *new]), encoding="utf-8")


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
