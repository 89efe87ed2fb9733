"""What a run was made from: data, chat template, tokenizer and weights by their content, and versions.

Checkpoints and environment.json keep it under `made_from`. A run continues with what it began with, or is told what
changed and says that it means it (`--accept-changes`), which is recorded.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mtr.chat.rendering import Renderer
from mtr.data.fingerprint import differences as data_differences
from mtr.data.fingerprint import fingerprint as fingerprint_data
from mtr.data.mixture import Mixture
from mtr.data.stream import Stream
from mtr.errors import UserError
from mtr.model.fingerprint import differing_weights, fingerprint_weights
from mtr.model.weights import weight_files
from mtr.recipe.sections import Recipe

_TEXTS = {
    "template": "the chat template",
    "tokenizer": "the tokenizer",
    "stop_ids": "what generation stops at",
}
_VERSIONS = ("mtr", "torch", "transformers", "peft", "tokenizers")
"""Those that can change what a step computes."""

_SAMPLE = (
    'Wherever 3 turns met 1,204.5 others, they\'d said: "na\u00efve caf\u00e9s"\u2026  '
    "\u4f60\u597d\uff0c\u4e16\u754c \u041c\u0438\u0440 \U0001f642"
    "\n\tdef f(x): return {'a': [x**2, None]}  # 100%\r\n    <b>internationalization</b>"
)


class Provenance:
    """What this run is made from, compared part by part with what the run that it continues was made from."""

    def __init__(self, checkpoint: Path | None, accept: bool) -> None:
        """
        Args:
            checkpoint: that the run continues from.
            accept: go on although something changed.
        """
        self.made_from: dict[str, Any] = {}
        self.accepted: list[dict[str, Any]] = []
        """Every resume that went on with something changed: date, checkpoint and changes."""
        self.notes: list[str] = []
        self._checkpoint = checkpoint
        self._accept = accept
        self._saved = _read(checkpoint) if checkpoint else {}
        self.accepted += self._saved.get("accepted_changes") or []
        if checkpoint and not self._saved.get("made_from"):
            self.notes.append(f"{checkpoint.name} does not say what it was made from, so changes cannot be noticed")

    def check_inputs(self, renderer: Renderer, data: Mixture | Stream, evaluation: dict[str, Mixture]) -> None:
        """
        Raises:
            UserError: data, template or tokenizer changed, and that is not accepted.
        """
        held_out = {name: fingerprint_data(opened) for name, opened in evaluation.items()}
        parts = {**_of_template(renderer), "data": fingerprint_data(data), "evaluation": held_out}
        saved = self._compare(parts)
        changes = [
            f"{text} is another one" for key, text in _TEXTS.items() if key in saved and saved[key] != parts[key]
        ]
        changes += [f"data.train: {text}" for text in _changes(saved, "data", parts["data"])]
        self._settle(changes)
        self.notes += [
            f"data.eval: {text}; losses before and after cannot be compared"
            for name, found in held_out.items()
            for text in _changes(saved.get("evaluation") or {}, name, found)
        ]

    def check_weights(self, recipe: Recipe) -> None:
        """Once the weights are loaded, so that those of a Hub id are on this machine.

        Raises:
            UserError: they changed, and that is not accepted.
        """
        files = weight_files(recipe.model.name_or_path, recipe.model.revision)
        parts = {"weights": fingerprint_weights(files)}
        saved = self._compare(parts)
        found = differing_weights(saved["weights"], parts["weights"]) if "weights" in saved else []
        self._settle([f"the weights of {recipe.model.name_or_path}: {text}" for text in found])

    def note_versions(self, now: dict[str, Any]) -> None:
        """And the strategy, which follows from the recipe, the model and the version of transformers.

        Args:
            now: as `mtr.training.environment.environment` gives them, and `strategy`.
        """
        if not self._saved:
            return
        before, taken = self._saved.get("strategy"), now["strategy"]["taken"]
        if isinstance(before, dict) and before.get("taken") != taken:
            self.notes.append(
                f"turns are laid out by {taken} (was {before.get('taken')}); results may differ in rounding"
            )
        was, have = ({"mtr": e.get("mtr"), **(e.get("packages") or {})} for e in (self._saved, now))
        changed = [f"{name} {have[name]} (was {was.get(name)})" for name in _VERSIONS if have[name] != was.get(name)]
        if changed:
            self.notes.append(f"other versions than before: {', '.join(changed)}; results may differ in rounding")

    def _compare(self, parts: dict[str, Any]) -> dict[str, Any]:
        """Take these parts in, and give what is saved of them."""
        self.made_from |= parts
        saved = self._saved.get("made_from")
        return saved if isinstance(saved, dict) else {}

    def _settle(self, changes: list[str]) -> None:
        if not changes or self._checkpoint is None:
            return
        if not self._accept:
            raise UserError(
                f"{self._checkpoint} was made from something else: {'; '.join(changes)}. Restore it, start over with "
                "--overwrite, or continue on purpose with --resume --accept-changes"
            )
        date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self.accepted.append({"date": date, "checkpoint": self._checkpoint.name, "changes": changes})
        self.notes += [f"changed since {self._checkpoint.name}, accepted: {change}" for change in changes]


def check_base(run: Path, name: str, revision: str | None) -> None:
    """Whether the weights that an adapter is to be merged into are those that it was trained on, as far as is known.

    Args:
        run: output_dir of the run, or one of its checkpoints.

    Raises:
        UserError: they are others.
    """
    saved = _read(run).get("made_from")
    if isinstance(saved, dict) and "weights" in saved:
        found = differing_weights(saved["weights"], fingerprint_weights(weight_files(name, revision)))
        if found:
            raise UserError(
                f"{run}: the adapter was trained on other weights than {name} has now: {'; '.join(found)}; restore them"
            )


def _changes(saved: dict[str, Any], key: str, now: dict[str, Any]) -> list[str]:
    return data_differences(saved[key], now) if key in saved else []


def _of_template(renderer: Renderer) -> dict[str, Any]:
    """A tokenizer is known by its vocabulary and by what it makes of a text: its files may be written in many ways."""
    tokenizer = renderer.tokenizer
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    encoded = json.dumps(tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"])
    return {
        "template": _sum([renderer.template.text]),
        "tokenizer": _sum([vocabulary, encoded]),
        "stop_ids": list(renderer.stop_ids),
    }


def _sum(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def _read(checkpoint: Path) -> dict[str, Any]:
    """environment.json of a run or a checkpoint; empty if it has none."""
    try:
        found = json.loads((checkpoint / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
