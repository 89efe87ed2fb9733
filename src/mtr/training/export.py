"""What a run leaves when it is done: weights, tokenizer and model card in output_dir, and on the Hub if asked for."""

from __future__ import annotations

from pathlib import Path

from mtr.chat.rendering import Renderer
from mtr.errors import SaveError
from mtr.recipe.processor import copy_processor
from mtr.recipe.sections import Recipe
from mtr.store.problems import is_write_error, save_problem
from mtr.store.publishing import publish
from mtr.training import checkpoint
from mtr.training.hub import push_to_hub
from mtr.training.learner import Learner
from mtr.training.log import RunLog
from mtr.training.model_card import write_model_card
from mtr.training.saving import Saving
from mtr.training.serving import serving_section
from mtr.training.state import RunState


class Export:
    """The last act of a run."""

    def __init__(
        self, recipe: Recipe, renderer: Renderer, learner: Learner, state: RunState, saving: Saving, log: RunLog
    ) -> None:
        self._output_dir = state.output_dir
        self._recipe = recipe
        self._renderer = renderer
        self._learner = learner
        self._state = state
        self._saving = saving
        self._log = log
        self._is_written = False
        """By this process, the main one."""

    def export(self) -> None:
        """The best or the last weights go to output_dir.

        Raises:
            SaveError: they cannot be written.
        """
        self._saving.load_best()
        content = self._saving.gather()
        if self._learner.accelerator.is_main_process:
            self._write(content)
            self._log.flush()
            self._is_written = True
        self._log.display.end(self._state)
        self._learner.accelerator.wait_for_everyone()

    def upload(self) -> None:
        """The result goes to the Hub, where the recipe asks for it: after everything else, since it may fail.

        Raises:
            UploadError: it did; everything is in output_dir.
        """
        repository = self._recipe.training.push_to_hub
        if repository and self._is_written:
            self._log.note("Hub", push_to_hub(self._output_dir, repository))

    def _write(self, content: checkpoint.Content) -> None:
        def write(folder: Path) -> None:
            checkpoint.save_model(self._learner.model, self._learner.tokenizer, folder, content)
            if self._recipe.lora is None:
                copy_processor(self._recipe.model.name_or_path, self._recipe.model.revision, folder)
            name, model = self._output_dir.absolute().name, self._learner.model
            serving = serving_section(folder, name, self._recipe, self._renderer, model)
            write_model_card(folder, name, self._recipe, self._state, serving)

        try:
            kept = publish(self._output_dir, write)
        except Exception as error:
            if not is_write_error(error):
                raise
            problem = save_problem(error, self._output_dir)
            raise SaveError(f"the result could not be written to {self._output_dir} ({problem})") from None
        for note in kept:
            self._log.note("warning", note)
