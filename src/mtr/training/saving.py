"""When checkpoints are written, what happens if one cannot be, and how the best one is loaded back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from accelerate.utils import broadcast_object_list

from mtr.errors import SaveError, UserError
from mtr.recipe.sections import TrainingSection
from mtr.store.checkpoints import newest, remove_partial
from mtr.store.manifest import find_damage
from mtr.store.problems import is_write_error, save_problem
from mtr.training import checkpoint
from mtr.training.averaging import averaged_weights
from mtr.training.environment import Identity
from mtr.training.learner import Learner
from mtr.training.log import RunLog
from mtr.training.state import RunState, is_due
from mtr.training.stopping import Stopping


class Saving:
    """Saves every `save_steps` steps, when it is asked to, the best evaluation where it is exported, and when a run
    ends early."""

    def __init__(
        self,
        training: TrainingSection,
        identity: Identity,
        learner: Learner,
        state: RunState,
        stopping: Stopping,
        log: RunLog,
    ) -> None:
        self._output_dir = state.output_dir
        self._training = training
        self._identity = identity
        self._learner = learner
        self._state = state
        self._stopping = stopping
        self._log = log
        self._saved_at = state.steps
        self._is_best_loaded = False

    def is_due(self) -> bool:
        steps, training = self._state.steps, self._training
        is_best = training.load_best_at_end and self._state.best_step == steps
        asked = self._stopping.is_save_agreed
        return self._saved_at < steps and (is_due(steps, training.save_steps) or is_best or asked)

    def save(self) -> None:
        """Write a checkpoint, or report why there is none.

        Raises:
            SaveError: it could not be written and `on_save_error` is stop.
        """
        accelerator = self._learner.accelerator
        main = accelerator.is_main_process
        content = self.gather()
        problem = self._try_to_save(content) if main else None
        if accelerator.num_processes > 1:
            (problem,) = broadcast_object_list([problem])
        self._saved_at = self._state.steps
        asked = self._stopping.saved()
        if asked and not problem:
            self._log.note("checkpoint", f"checkpoint-{self._state.steps}, as asked for")
        if problem:
            self._state.failed_saves += 1
            last = newest(self._output_dir, self._identity.run) if main else None
            kept = f"{last.name} is the last good one" if last else "there is none yet"
            text = f"checkpoint-{self._state.steps} could not be written ({problem}); {kept}"
            if self._training.on_save_error == "stop":
                raise SaveError(f"{text}. Free disk space, then continue with --resume")
            self._log.note("warning", f"{text}; continuing, as training.on_save_error says")
        accelerator.wait_for_everyone()

    def gather(self) -> checkpoint.Content:
        """What a checkpoint holds. All processes call it together; only the main one keeps the tensors."""
        learner = self._learner
        keep = learner.accelerator.is_main_process
        averages = not self._is_best_loaded
        return checkpoint.gather(learner.model, learner.raw_optimizer, learner.schedule, keep, averages)

    @contextlib.contextmanager
    def result(self) -> Iterator[None]:
        """Within it, the model has the weights that would be exported."""
        with contextlib.nullcontext() if self._is_best_loaded else averaged_weights(self._learner.raw_optimizer):
            yield

    def _try_to_save(self, content: checkpoint.Content) -> str | None:
        best = self._state.best_step if self._training.load_best_at_end else None
        scaler = self._learner.accelerator.scaler
        self._state.scaler = scaler.state_dict() if scaler else None
        try:
            self._log.sync()
            self._state.metrics_lines = self._log.lines
            checkpoint.save_checkpoint(
                self._output_dir,
                self._state.steps,
                self._learner.model,
                self._learner.tokenizer,
                content,
                self._state.to_json(),
                self._identity,
                self._training.save_total_limit,
                best,
            )
        except Exception as error:
            remove_partial(self._output_dir)
            if not is_write_error(error) and not isinstance(error, SaveError):
                raise
            return save_problem(error, self._output_dir)
        return None

    def save_before_stopping(self, signal: int | None) -> None:
        """After the step in which a signal came."""
        self._state.stopped_by = signal
        if self._saved_at < self._state.steps:
            self.save()
        self._log.display.end(self._state)

    def save_after(self, error: UserError) -> None:
        """Keep what was done before an error; not where only one process has it, or the disk is the error."""
        alone = error.local and self._learner.accelerator.num_processes > 1
        done = self._is_best_loaded or self._saved_at >= self._state.steps
        if not (alone or done or isinstance(error, SaveError)):
            self.save()

    def load_best(self) -> None:
        """The weights of the best evaluation into the model, where the recipe asks for them and others are in it."""
        state = self._state
        is_in = self._is_best_loaded or state.best_step in (None, state.steps)
        if not self._training.load_best_at_end or is_in:
            return
        folder = self._output_dir / f"checkpoint-{state.best_step}"
        if damage := find_damage(folder, state.best_step or 0, self._identity.run):
            self._log.note("warning", f"{folder.name} was the best and cannot be read ({damage}); keeping the last")
            return
        checkpoint.load_result(folder, self._learner.model)
        self._is_best_loaded = True
        self._log.note("best", f"{folder.name}, eval loss {state.best_eval_loss:.4f}")
