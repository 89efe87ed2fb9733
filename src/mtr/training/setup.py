"""All that a training run holds, set up in the order in which things can be wrong, and what it does beside its steps.

    recipe -> output_dir -> template -> data -> first step -> model -> checkpoint -> processes -> files

`mtr.training.loop` has the loop. Every decision that processes have to take together is taken here, from what all of
them know.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from mtr.attention.choice import choose_backends, fastest, pad_to_multiple_of
from mtr.attention.interface import use_tree_attention
from mtr.attention.model_parts import text_config
from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.data.mixture import Mixture
from mtr.data.notes import describe_data
from mtr.data.opening import open_training_data
from mtr.data.stream import Stream
from mtr.errors import LostProcessError, NonFiniteError, SaveError, UserError, WorkerError
from mtr.model.device import keep_freed_memory, peak_memory
from mtr.model.flops import FlopCounter, device_matrix_rate
from mtr.model.kernels import compile_layers, use_liger_kernel
from mtr.model.loading import compute_dtype, load_config, load_model
from mtr.model.lora import adapted_modules
from mtr.model.memory import checkpoint_activations, choose_checkpointing, fit_pack
from mtr.model.tree_model import TreeModel
from mtr.prepare.builder import Builder
from mtr.prepare.step import Counts, Step
from mtr.prepare.steps import IndexedSteps, StreamedSteps
from mtr.prepare.workers import iterate_steps
from mtr.recipe.sections import Recipe
from mtr.training import checkpoint
from mtr.training.evaluation import evaluate, open_eval
from mtr.training.export import write_model_card
from mtr.training.faults import PackSplitter, is_write_error, save_problem
from mtr.training.folder import begin_files, check_output_dir, write_played
from mtr.training.hub import push_to_hub
from mtr.training.metrics import throughput
from mtr.training.optim import advance, build_optimizer, build_schedule
from mtr.training.playing import exact_match, play
from mtr.training.processes import build_accelerator, cost_of, everyones, highest, is_sharded, spread, start_processes
from mtr.training.progress import RunDisplay
from mtr.training.rejects import RejectsFile
from mtr.training.signals import StopSignals
from mtr.training.state import Summary
from mtr.training.tracking import check_trackers, start_tracking, track

_LOST = re.compile(r"Connection (closed|reset) by peer|gloo/transport|NCCL|Broken pipe")
_FAILED = 1 << 16
"""Above every signal: a process could not get its next step."""


class Run:
    """See the module."""

    def __init__(self, recipe: Recipe, signals: StopSignals, resume: bool, overwrite: bool) -> None:
        keep_freed_memory()
        self.signals = signals
        self.stop_signal: int | None = None
        check_trackers(recipe.training.report_to)
        self.process = start_processes()
        main = self.process.is_main_process
        self.output_dir = Path(recipe.training.output_dir)
        recipe, resume_from, notes = check_output_dir(recipe, self.output_dir, resume, overwrite)
        self.start = checkpoint.step_of(resume_from) if resume_from else 0
        self.tokenizer = load_tokenizer(recipe)
        self.renderer = load_renderer(recipe, self.tokenizer)
        self.recipe = recipe = recipe.model_copy(update={"date": self.renderer.day.isoformat()})
        config = load_config(recipe)
        dtype = compute_dtype(recipe, config)
        backends = choose_backends(recipe.model.attention, text_config(config), self.process.device, dtype)
        rank, processes = self.process.process_index, self.process.num_processes
        cost = cost_of(text_config(config), trained_whole=recipe.lora is None)
        self.builder = Builder(recipe, self.renderer, rank, processes, pad_to_multiple_of(backends), cost)
        data, held_back = open_training_data(recipe.data, recipe.training.seed)
        self.eval_data = open_eval(recipe, held_back)
        self.held_out = _held_out(recipe, self.eval_data)
        steps = _open_steps(self.builder, data, self.start)
        self.num_steps = _count_steps(recipe, steps)
        numbers = range(self.start, self.num_steps)
        self.stream = _with_work_ahead(iterate_steps(steps, numbers, _num_workers(recipe)))

        self.model = load_model(recipe, self.process.device, quantise=True)
        use_tree_attention(self.model)
        self.model.train()
        training = recipe.training
        self.accelerator = build_accelerator(self.model, training.parallel, training.report_to, training.output_dir)
        tree_model = TreeModel(self.model, *backends, choose=fastest)
        self.fitted = self._fit_memory(tree_model)
        if self.fitted:
            self.builder = replace(self.builder, recipe=self.recipe)
            self.steps = steps = _open_steps(self.builder, data, self.start)
            self.stream = _with_work_ahead(iterate_steps(steps, numbers, _num_workers(recipe)))
        if training.use_liger_kernel:
            use_liger_kernel(self.model, self.process.device)
        if training.torch_compile:
            compile_layers(self.model)
        self.flops = FlopCounter(self.model)
        self.matrix_rate = device_matrix_rate(self.process.device, dtype)["flops_per_second"]
        self.tree_model = spread(tree_model, self.accelerator, training.parallel)
        self.raw_optimizer = build_optimizer(self.model, training)
        self.schedule = build_schedule(self.raw_optimizer, training, self.num_steps)
        self.summary = Summary(self.output_dir)
        if resume_from:
            state = checkpoint.load_checkpoint(resume_from, self.model, self.raw_optimizer, self.schedule)
            self.summary.restore(state)
        self.optimizer = self.accelerator.prepare_optimizer(self.raw_optimizer)
        who = f"process {rank}: " if processes > 1 else ""
        self.splitter = PackSplitter(recipe.sequence.on_oom, self.builder.batch, who)

        self.process.wait_for_everyone()
        self.saved_at = self.start
        self.played_at: int | None = None
        self.is_best_loaded = False
        self.display = RunDisplay(recipe, self.num_steps, self.start, enabled=main)
        self.metrics = begin_files(recipe, self.process, self.summary, overwrite) if main else None
        start_tracking(self.accelerator, recipe, self.start)
        if resume and not resume_from:
            notes = [f"no checkpoint in {self.output_dir}: starting from the beginning"]
        for note in notes:
            self.display.say(f"note       {note}")
        if resume_from:
            self.display.say(f"resumed    {resume_from.name}")
        self.rejects = RejectsFile(self.output_dir / "rejects.jsonl") if main else None
        rows = data.num_rows if isinstance(data, Mixture) else None
        self.display.begin(self.model, adapted_modules(self.model), " or ".join(backends), self.process, rows)
        if self.fitted:
            self.display.say(f"memory     {self.fitted}")
        for note in describe_data(data) if main else ():
            self.display.say(f"note       {note}")
        self.signals.can_save = True
        self.wait = 0.0
        self.began = time.perf_counter()

    def _fit_memory(self, tree_model: TreeModel) -> str | None:
        """What `auto` stands for, by a probe, and what to say of it; None where max_tokens is a number.

        Processes may keep different things for the backward, but packs are built alike on all of them.
        """
        recipe, device = self.recipe, self.process.device
        mode = recipe.training.checkpointing
        if mode == "auto":
            mode = choose_checkpointing(tree_model, device, recipe.sequence.budget)
        else:
            checkpoint_activations(self.model, mode)
        if recipe.sequence.max_tokens != "auto":
            return None
        tokens, memory = fit_pack(tree_model, device, recipe.sequence.max_length)
        tokens = -highest(self.accelerator, -tokens)
        self.recipe = recipe.replace(sequence={"max_tokens": tokens})
        reckoned, free = memory.bytes(tokens) / 2**30, memory.free / 2**30
        return (
            f"packs of {tokens:,} tokens: {reckoned:.1f} of {free:.1f} GiB reckoned, "
            f"{memory.per_token / 2**20:.2f} MiB a token, checkpointing {mode}"
        )

    # --- what is due ---

    def told_to_stop(self) -> bool:
        return self.stop_signal is not None

    def is_done(self) -> bool:
        patience = self.recipe.training.early_stopping_patience
        return self.summary.steps >= self.num_steps or self._is_out_of(patience)

    def _is_out_of(self, patience: int | None) -> bool:
        return patience is not None and self.summary.evaluations_without_gain >= patience

    def is_due_to_evaluate(self) -> bool:
        steps = self.summary.steps
        due = _due(steps, self.recipe.training.eval_steps) or self.is_done()
        return bool(self.eval_data) and due and self.summary.evaluated_at < steps

    def is_due_to_save(self) -> bool:
        steps, training = self.summary.steps, self.recipe.training
        is_best = training.load_best_at_end and self.summary.best_step == steps
        return self.saved_at < steps and (_due(steps, training.save_steps) or is_best)

    def is_due_to_play(self) -> bool:
        steps = self.summary.steps
        return bool(self.held_out) and (steps == 0 or self.is_done()) and self.played_at != steps

    # --- a step ---

    def next_step(self) -> Step | None:
        """The next step; None where a signal came, on this process or another one.

        Raises:
            UserError: a row is bad, or a process that prepares data died, on this process or another one.
        """
        step: Step | None = None
        problem: UserError | None = None
        waited = time.perf_counter()
        if self.signals.received is None:
            try:
                step = next(self.stream)
            except UserError as error:
                problem = error
        self.wait = time.perf_counter() - waited
        code = highest(self.accelerator, _FAILED if problem else self.signals.received or 0)
        if code == _FAILED:
            problems = everyones(self.accelerator, problem and (type(problem).__name__, str(problem)))
            raise problem or WorkerError(next(text for found in problems if found for text in found[1:]))
        self.stop_signal = code or None
        if self.stop_signal is None:
            seed, rank = self.recipe.training.seed, self.process.process_index
            torch.manual_seed(step_seed(seed, self.summary.steps, rank))
        return step if self.stop_signal is None else None

    def count(self, step: Step, loss: float | None, grad_norm: float | None) -> None:
        """The step is done: count and log it.

        Raises:
            NonFiniteError: too many steps in a row were not finite.
        """
        summary, training = self.summary, self.recipe.training
        rate = self.schedule.get_last_lr()[0]
        advance(self.schedule)
        seconds = time.perf_counter() - self.began
        summary.steps += 1
        summary.epoch = step.epoch
        summary.seconds += seconds
        summary.data_wait_seconds += self.wait
        summary.imbalance += step.imbalance
        summary.pack_splits = self.splitter.splits
        summary.counts.add(step.counts)
        if self.rejects:
            self.rejects.write(step.rejects)
        line = {"step": summary.steps, "epoch": step.epoch, "loss": loss, "learning_rate": rate, "grad_norm": grad_norm}
        line |= throughput(step.counts, seconds) | {"position": step.position, "data_wait_seconds": self.wait}
        flops = self.flops.of_batches(step.batches)
        summary.flops += flops
        summary.mfu = summary.flops / summary.seconds / self.matrix_rate
        summary.peak_memory_bytes = max(summary.peak_memory_bytes, peak_memory(self.process.device))
        line |= {"flops_per_second": flops / seconds, "mfu": flops / seconds / self.matrix_rate}
        line |= {"imbalance": step.imbalance, **self._memory()}
        skipped = self._why_skipped(loss, grad_norm)
        if skipped:
            line |= {"skipped": skipped, "rows": list(step.rows)}
        if skipped or summary.steps % training.logging_steps == 0 or summary.steps == self.num_steps:
            self._write("train", line)
            self.display.stepped(line)
        self._check_finite(step, skipped)
        self.began = time.perf_counter()

    def _why_skipped(self, loss: float | None, grad_norm: float | None) -> str | None:
        if loss is None or grad_norm is None:
            self.summary.empty_steps += 1
            return "no turn to train"
        self.summary.loss = loss
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.summary.nonfinite_in_a_row = 0
            return None
        return "not finite"

    def _check_finite(self, step: Step, skipped: str | None) -> None:
        summary, most = self.summary, self.recipe.training.max_nonfinite_steps
        if skipped != "not finite":
            return
        summary.nonfinite_steps += 1
        summary.nonfinite_in_a_row += 1
        summary.nonfinite_rows = [*summary.nonfinite_rows, *step.rows][:100]
        if summary.nonfinite_in_a_row >= most or summary.steps == self.num_steps:
            shown = "; ".join(step.rows[:4]) + (f"; and {len(step.rows) - 4} more" if len(step.rows) > 4 else "")
            raise NonFiniteError(
                f"the loss or gradient was not finite in {summary.nonfinite_in_a_row} steps in a row, the last one "
                f"step {summary.steps}; lower training.learning_rate, or look at the rows of these steps, in "
                f"metrics.jsonl (of the last one: {shown})"
            )

    # --- beside the steps ---

    def evaluate(self) -> None:
        """The loss on `data.eval`; given up when a signal comes, and done when the run is resumed."""
        began = time.perf_counter()
        result = evaluate(self.tree_model, self.builder, self.eval_data, self.accelerator, self._agree_to_stop)
        if result is None:
            return
        summary = self.summary
        summary.eval_loss, summary.eval_loss_by_source = result.loss, result.by_source
        summary.evaluated_at = summary.steps
        if summary.best_eval_loss is None or result.loss < summary.best_eval_loss:
            summary.best_eval_loss, summary.best_step, summary.evaluations_without_gain = result.loss, summary.steps, 0
        else:
            summary.evaluations_without_gain += 1
        line: dict[str, Any] = {"step": summary.steps, "epoch": summary.epoch, "eval_loss": result.loss}
        line |= {"eval_loss_by_source": result.by_source} if result.by_source else {}
        line |= throughput(result.counts, time.perf_counter() - began) | self._memory()
        self._write("eval", line)
        self.display.evaluated(line)
        for reason, number in result.counts.skipped_rows.items():
            self.display.say(f"skipped    {number:,} rows of the evaluation: {reason}")
        if self._is_out_of(self.recipe.training.early_stopping_patience):
            self.display.say(
                f"stopping   no lower eval loss in {summary.evaluations_without_gain} evaluations; the lowest was "
                f"{summary.best_eval_loss:.4f} at step {summary.best_step}"
            )
        self.began = time.perf_counter()

    def _agree_to_stop(self) -> bool:
        self.stop_signal = highest(self.accelerator, self.signals.received or 0) or None
        return self.stop_signal is not None

    def play(self) -> None:
        """Play the held-out conversations, before the first step and after the last one, each process its share."""
        if self.is_done():
            self._use_best()
        most = self.recipe.generation.max_new_tokens
        if is_sharded(self.model):  # every process takes part in every forward, so all play all
            play_all = partial(play, self.model, self.renderer, self.held_out, most, self._agree_to_stop)
            shares = [self.tree_model(None, run=play_all)]
        else:
            own = self.held_out[self.process.process_index :: self.process.num_processes]
            mine = play(self.model, self.renderer, own, most, lambda: self.signals.received is not None)
            shares = everyones(self.accelerator, mine)
        if self._agree_to_stop():
            return
        order = {conversation.where: i for i, conversation in enumerate(self.held_out)}
        played = sorted((turn for share in shares for turn in share), key=lambda turn: order[turn.conversation])
        self.summary.exact_match.append(exact_match(played))
        if self.process.is_main_process:
            write_played(self.output_dir, self.summary.steps, played)
        self.display.played(self.summary.steps, played)
        self.played_at = self.summary.steps
        self.began = time.perf_counter()

    def save(self) -> None:
        """Write a checkpoint, or say why there is none.

        Raises:
            SaveError: it could not be written and `on_save_error` is stop.
        """
        summary, training = self.summary, self.recipe.training
        main = self.process.is_main_process
        content = checkpoint.gather(self.model, self.raw_optimizer, self.schedule, keep=main)
        problem = self._try_to_save(content) if main else None
        if self.process.num_processes > 1:
            (problem,) = broadcast_object_list([problem])
        self.saved_at = summary.steps
        if problem:
            summary.failed_saves += 1
            last, _ = checkpoint.find_checkpoint(self.output_dir) if main else (None, [])
            kept = f"{last.name} is the last good one" if last else "there is none yet"
            text = f"checkpoint-{summary.steps} could not be written ({problem}); {kept}"
            if training.on_save_error == "stop":
                raise SaveError(f"{text}. Make room, then go on with --resume")
            self.display.say(f"warning    {text}; going on, as training.on_save_error says")
        self.process.wait_for_everyone()
        self.began = time.perf_counter()

    def _try_to_save(self, content: checkpoint.Content) -> str | None:
        summary, training = self.summary, self.recipe.training
        best = summary.best_step if training.load_best_at_end else None
        try:
            if self.metrics:
                self.metrics.sync()
            checkpoint.save_checkpoint(
                self.output_dir,
                summary.steps,
                self.model,
                self.tokenizer,
                content,
                summary.state(),
                training.save_total_limit,
                best,
            )
        except Exception as error:
            checkpoint.remove_partial(self.output_dir)
            if not is_write_error(error) and not isinstance(error, SaveError):
                raise
            return save_problem(error, self.output_dir)
        return None

    def save_before_stopping(self) -> None:
        self.summary.stopped_by = self.stop_signal
        if self.saved_at < self.summary.steps:
            self.save()
        self.display.end(self.summary)

    def save_after(self, error: UserError) -> None:
        """Keep what was done before an error; not where only one process has it, or the disk is the error."""
        alone = error.local and self.process.num_processes > 1
        if alone or isinstance(error, SaveError) or self.is_best_loaded or self.saved_at >= self.summary.steps:
            return
        self.save()

    def export(self) -> None:
        """The run is done: the best or the last weights go to output_dir."""
        self._use_best()
        content = checkpoint.gather(self.model, self.raw_optimizer, self.schedule, keep=self.process.is_main_process)
        if self.process.is_main_process:
            try:
                checkpoint.save_model(self.model, self.tokenizer, self.output_dir, content.weights)
                write_model_card(self.output_dir, self.recipe, self.summary)
            except Exception as error:
                if not is_write_error(error):
                    raise
                problem = save_problem(error, self.output_dir)
                raise SaveError(f"the result could not be written to {self.output_dir} ({problem})") from None
            if self.metrics:
                self.metrics.flush()
        self.display.end(self.summary)
        if self.recipe.training.push_to_hub and self.process.is_main_process:
            self.display.say(push_to_hub(self.output_dir, self.recipe.training.push_to_hub))
        self.process.wait_for_everyone()

    def explain(self, error: RuntimeError) -> Exception:
        """What a RuntimeError means; the error itself where that is not known."""
        if self.process.num_processes > 1 and _LOST.search(str(error)):
            return LostProcessError(f"process {self.process.process_index}: another process of the run ended")
        return error

    def close(self) -> None:
        self.accelerator.end_training()

    def _use_best(self) -> None:
        summary = self.summary
        if (
            not self.recipe.training.load_best_at_end
            or self.is_best_loaded
            or summary.best_step in (None, summary.steps)
        ):
            return
        folder = self.output_dir / f"checkpoint-{summary.best_step}"
        damage = checkpoint.find_damage(folder)
        if damage:
            self.display.say(f"warning    {folder.name} was the best and cannot be read ({damage}); keeping the last")
            return
        checkpoint.load_weights(folder, self.model)
        self.is_best_loaded = True
        self.display.say(f"best       {folder.name}, eval loss {summary.best_eval_loss:.4f}")

    def _write(self, kind: str, line: dict[str, Any]) -> None:
        if self.metrics:
            try:
                self.metrics.write(line)
            except SaveError as error:
                if self.recipe.training.on_save_error == "stop":
                    raise
                self.display.say(f"warning    {error}; the line waits until there is room")
        track(self.accelerator, kind, line)

    def _memory(self) -> dict[str, int]:
        return {"peak_memory_bytes": peak_memory(self.process.device)}


def step_seed(seed: int, step: int, process: int) -> int:
    """Of one step on one process: independent of all others, and the same on every machine."""
    return int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0


def _open_steps(builder: Builder, data: Mixture | Stream, start: int) -> IndexedSteps | StreamedSteps:
    shuffle = builder.recipe.data.shuffle
    if isinstance(data, Mixture):
        return IndexedSteps(builder, data, shuffle)
    return StreamedSteps(builder, data, shuffle, start)


def _held_out(recipe: Recipe, sources: dict[str, Mixture]) -> list[Any]:
    """The conversations of `data.eval` that are played."""
    wanted = recipe.generation.conversations
    conversations = itertools.chain.from_iterable(data.first(wanted) for data in sources.values())
    return list(itertools.islice(conversations, wanted))


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
    raise UserError(f"data.train: no turn is left to train ({counts.reasons()})")
