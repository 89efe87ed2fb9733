"""Loads what is talked to: the model in eval mode, its tokenizer, and the renderer of its chat template.

Template arguments, think tags, the date and the way with earlier thinking are those of the run's recipe, so a prompt
here is the prompt that was trained. Weights are safetensors and have to fit exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtr.attention.model_parts import text_config
from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.chat.rendering import Renderer
from mtr.errors import UserError
from mtr.model.adapted import load_adapter, load_weights
from mtr.model.completions import GREEDY, Sampling
from mtr.model.config import positions
from mtr.model.loading import DTYPES
from mtr.model.quantization import four_bits
from mtr.recipe.hub import Named
from mtr.recipe.loading import recipe_of_tokenizer
from mtr.recipe.sections import Recipe
from mtr.talk.finding import Base, Found
from mtr.training.provenance import check_base


@dataclass(frozen=True)
class Voice:
    """One model that answers."""

    name: str
    model: Any
    without_adapter: bool = False

    @contextmanager
    def speaking(self) -> Iterator[Any]:
        """The model, its adapter switched off where the base is asked."""
        with self.model.disable_adapter() if self.without_adapter else nullcontext():
            yield self.model


@dataclass(frozen=True)
class Speakers:
    """Who answers, and how they are asked."""

    voices: tuple[Voice, ...]
    """The one that was trained is the last."""
    renderer: Renderer
    sampling: Sampling
    """What the model's generation_config.json says; servers start from it too."""
    positions: int | None
    """How long a context the model was made for, in tokens; None if its config does not say."""

    @property
    def model(self) -> Any:
        return self.voices[-1].model


def load_speakers(found: Found, device: torch.device, compare: bool = False) -> Speakers:
    """
    Args:
        compare: with the base model, which answers first.

    Raises:
        UserError: something cannot be loaded, or there is no base to compare with.
    """
    if compare and found.base is None:
        raise UserError(f"--compare: nothing says what {found.name} was trained from; give its run, or an adapter")
    source = _source(found)
    renderer = load_renderer(source, load_tokenizer(_tokenizer_source(found, source)))
    placed = {} if device.type == "cpu" else {"device_map": {"": device}}
    if found.adapter is not None:
        voices = _adapter_voices(found, found.adapter, device, placed, compare)
    else:
        voices = _whole_voices(found, placed, compare)
    model = voices[-1].model
    return Speakers(voices, renderer, _sampling(model), positions(text_config(model.config)))


def _adapter_voices(
    found: Found, config: dict[str, Any], device: torch.device, placed: dict[str, Any], compare: bool
) -> tuple[Voice, ...]:
    """One model: without its adapter it is the base."""
    assert found.base is not None
    section = found.recipe.model if found.recipe else None
    quantised = {}
    if section and section.load_in_4bit:
        if device.type != "cuda":
            raise UserError(
                f"{found.name}: model.load_in_4bit of its recipe needs a CUDA device, and this machine has none; merge "
                f"the adapter into the weights as they are (mtr merge {found.name}) and talk to the result"
            )
        quantised = four_bits(device)
    problem = f"{found.name}: the base model cannot be loaded"
    base, _ = load_weights(
        Named(problem, found.base.name, found.base.revision),
        f"{problem} from",
        section,
        config.get("modules_to_save") or [],
        dtype=DTYPES.get(section.dtype, "auto") if section else "auto",
        **placed,
        **quantised,
    )
    check_base(Path(found.where), found.base.name, found.base.revision)
    adapted = load_adapter(Path(found.where), base)
    tuned = Voice("tuned", adapted)
    return (Voice("base", adapted, without_adapter=True), tuned) if compare else (tuned,)


def _whole_voices(found: Found, placed: dict[str, Any], compare: bool) -> tuple[Voice, ...]:
    """Two models, where the base is asked too."""
    section = found.recipe.model if found.recipe else None

    def load(base: Base) -> Any:
        named = Named(found.name, base.name, base.revision)
        problem = f"{found.name}: the model cannot be loaded from"
        return load_weights(named, problem, section, dtype="auto", **placed)[0].eval()

    tuned = Voice("tuned" if found.base else "model", load(Base(found.where)))
    return (Voice("base", load(found.base)), tuned) if compare and found.base else (tuned,)


def _source(found: Found) -> Recipe:
    """A recipe that names the model whose generation config and template arguments are used."""
    if found.recipe is None:
        return recipe_of_tokenizer(found.base.name if found.base else found.where).replace(
            model={"revision": found.base.revision if found.base else None}
        )
    if found.adapter is None:
        return found.recipe.replace(model={"name_or_path": found.where, "revision": None})
    return found.recipe


def _tokenizer_source(found: Found, source: Recipe) -> Recipe:
    """The tokenizer beside an adapter, if it has one; else that of its base."""
    if found.adapter is not None and not (Path(found.where) / "tokenizer_config.json").exists():
        return source
    return source.replace(model={"name_or_path": found.where, "revision": None})


def _sampling(model: Any) -> Sampling:
    config = model.generation_config
    if not config.do_sample:
        return GREEDY
    given = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    used = {key: value for key, value in given.items() if value is not None}
    allowed = {"temperature": (0, 100), "top_p": (0, 1), "top_k": (0, 2**31)}
    for key, value in used.items():
        low, high = allowed[key]
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise UserError(f"generation_config.json: {key} is {value!r}, not between {low} and {high:,}; mend it")
    return Sampling(float(used.get("temperature", 1.0)), float(used.get("top_p", 1.0)), int(used.get("top_k", 0)))
