"""What a run leaves when it is done: weights, tokenizer and model card in output_dir, and on the Hub if asked for."""

from __future__ import annotations

from mtr.errors import SaveError
from mtr.recipe.sections import Recipe
from mtr.training import checkpoint
from mtr.training.faults import is_write_error, save_problem
from mtr.training.hub import push_to_hub
from mtr.training.learner import Learner
from mtr.training.log import RunLog
from mtr.training.model_card import write_model_card
from mtr.training.saving import Saving
from mtr.training.state import RunState


class Export:
    """The last act of a run."""

    def __init__(self, recipe: Recipe, learner: Learner, state: RunState, saving: Saving, log: RunLog) -> None:
        self._output_dir = state.output_dir
        self._recipe = recipe
        self._learner = learner
        self._state = state
        self._saving = saving
        self._log = log

    def export(self) -> None:
        """The best or the last weights go to output_dir.

        Raises:
            SaveError: they cannot be written.
        """
        self._saving.load_best()
        content = self._saving.gather()
        is_main = self._learner.accelerator.is_main_process
        if is_main:
            self._write(content)
            self._log.flush()
        self._log.display.end(self._state)
        if self._recipe.training.push_to_hub and is_main:
            self._log.note("Hub", push_to_hub(self._output_dir, self._recipe.training.push_to_hub))
        self._learner.accelerator.wait_for_everyone()

    def _write(self, content: checkpoint.Content) -> None:
        try:
            checkpoint.save_model(self._learner.model, self._learner.tokenizer, self._output_dir, content.weights)
            write_model_card(self._output_dir, self._recipe, self._state)
        except Exception as error:
            if not is_write_error(error):
                raise
            problem = save_problem(error, self._output_dir)
            raise SaveError(f"the result could not be written to {self._output_dir} ({problem})") from None
