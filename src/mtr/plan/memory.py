"""Memory of a recipe's training on a GPU that is not here, and the settings with which it fits.

    weights + gradients + optimizer   what every step keeps        } sizes of fake tensors: `mtr.model.estimate`
    + activations of one pack         by checkpointing mode        }
    + context                         CUDA, cuBLAS and kernels, before any tensor

`Needs` holds the sizes of a recipe once for any number of GPUs. Only the model's config is read.

    fit = fits(recipe, find_gpu("L4"))              this recipe as it is
    settings = settings_for(recipe, find_gpu("L4")) the recipe with dtype, checkpointing, packs and bits that fit
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mtr.attention.choice import choose_backends
from mtr.attention.model_parts import output_embeddings, text_config
from mtr.errors import UserError, one_line
from mtr.model.auto_class import auto_class
from mtr.model.checkpointing import MODES
from mtr.model.loading import compute_dtype
from mtr.plan.fit import Fit
from mtr.plan.fit import Settings as Settings
from mtr.plan.gpus import Gpu
from mtr.recipe.model_config import read_config
from mtr.recipe.sections import Backend, Checkpointing, Recipe
from mtr.training.fitting import estimator_of

_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: a scale of 8 bits for 64 of them, one of 32 for 256 scales (QLoRA, arXiv 2305.14314)."""
_CUDA = torch.device("cuda")


class Needs:
    """Sizes of a recipe's training, for any GPU."""

    def __init__(self, recipe: Recipe, config: Any) -> None:
        """
        Args:
            recipe: with its strategy decided.
            config: of its model.

        Raises:
            UserError: the recipe's attention or dtype cannot be used.
        """
        self.recipe = recipe
        self.config = config
        self.dtype = compute_dtype(recipe, config)
        backends: Sequence[Backend] = ["sdpa"]
        if not recipe.sequence.unpacked:
            asked = "auto" if recipe.model.attention == "segment" else recipe.model.attention
            backends = choose_backends(asked, text_config(config), _CUDA, self.dtype)
        self._estimator = estimator_of(recipe, config, self.dtype, backends, _CUDA)

    @functools.cached_property
    def weights(self) -> int:
        whole = self._estimator.weights()
        return whole - self._saved_by_4_bits if self.recipe.model.load_in_4bit else whole

    @functools.cached_property
    def _saved_by_4_bits(self) -> int:
        """bitsandbytes quantizes linear layers, but for the output head."""
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = auto_class(self.config).from_config(
                self.config, trust_remote_code=self.recipe.model.trust_remote_code
            )
        head = output_embeddings(model)
        linear = [part for part in model.modules() if isinstance(part, nn.Linear) and part is not head]
        return int(sum(part.weight.numel() for part in linear) * (self.dtype.itemsize - _NF4))

    def on(self, gpu: Gpu, num_gpus: int = 1, tokens: int | None = None) -> Fit:
        """What the recipe takes of this GPU; of `gradient_checkpointing: auto` the least mode that fits.

        Args:
            tokens: of the largest pack, in place of `sequence.max_tokens`.

        Raises:
            UserError: the model cannot be built from its config.
        """
        asked = self.recipe.training.checkpointing
        modes = MODES if asked == "auto" else (asked,)
        found = (self.with_mode(mode, gpu, num_gpus, tokens) for mode in modes)
        fit = next(found)
        while not fit.fits and (more := next(found, None)) is not None:
            fit = more
        return fit

    def with_mode(self, mode: Checkpointing, gpu: Gpu, num_gpus: int = 1, tokens: int | None = None) -> Fit:
        """As `on`, with this checkpointing."""
        size = tokens or self.recipe.sequence.budget
        try:
            state = self._estimator.training_state()
            kept, weights = state.kept, self.weights
            if num_gpus > 1 and self.recipe.training.parallel == "fsdp2":
                kept, weights = kept // num_gpus, weights // num_gpus + self._estimator.gathered()
            activations = self._estimator.activations(mode, size)
        except UserError:
            raise
        except Exception as error:  # code of a model from the Hub may do anything
            raise UserError(f"the memory of the model cannot be estimated: {one_line(error)}") from None
        return Fit(gpu, size, mode, weights, kept, max(activations, state.update), self._estimator.share)

    def largest(self, gpu: Gpu, num_gpus: int = 1) -> Fit | None:
        """The largest packs that fit, with the least checkpointing; None where not even the longest turn does."""
        sizes = _packs(self.recipe)
        if not self.with_mode("offload", gpu, num_gpus, sizes[-1]).fits:
            return None
        found = (self.with_mode(mode, gpu, num_gpus, tokens) for tokens in sizes for mode in MODES)
        return next((fit for fit in found if fit.fits), None)


def fits(recipe: Recipe, gpu: Gpu, num_gpus: int = 1, tokens: int | None = None) -> Fit:
    """What a recipe takes of a GPU; with FSDP2, of each of several.

    Args:
        tokens: of the largest pack, in place of `sequence.max_tokens`.

    Raises:
        UserError: the model has no config, or one that cannot be used.
    """
    return Needs(recipe, _config(recipe)).on(gpu, num_gpus, tokens)


def settings_for(recipe: Recipe, gpu: Gpu, num_gpus: int = 1) -> Settings | None:
    """The recipe with the settings that fit a GPU and slow training down least: its dtype, checkpointing,
    `sequence.max_tokens`, sharding where there are several GPUs, and last 4-bit weights, if it has LoRA.

    Returns:
        None where nothing fits.

    Raises:
        UserError: the model has no config, or one that cannot be used.
    """
    return Finder(recipe, _config(recipe)).settings_for(gpu, num_gpus)


class Finder:
    """`settings_for` for any number of GPUs."""

    def __init__(self, recipe: Recipe, config: Any) -> None:
        self._recipe = recipe
        self._config = config
        self._known: dict[str, Needs] = {}

    def settings_for(self, gpu: Gpu, num_gpus: int = 1) -> Settings | None:
        """As the function of this name."""
        for changes in _candidates(self._recipe, gpu, num_gpus):
            needs = self._needs(changes)
            if (fit := needs.largest(gpu, num_gpus)) is not None:
                chosen = {**changes, "training.gradient_checkpointing": fit.checkpointing}
                if fit.tokens != needs.recipe.sequence.max_tokens:
                    chosen["sequence.max_tokens"] = fit.tokens
                return Settings(_with(self._recipe, chosen), fit, chosen)
        return None

    def _needs(self, changes: Mapping[str, Any]) -> Needs:
        key = repr(sorted(changes.items()))
        if key not in self._known:
            self._known[key] = Needs(_with(self._recipe, changes), self._config)
        return self._known[key]


def _candidates(recipe: Recipe, gpu: Gpu, num_gpus: int) -> Iterator[dict[str, Any]]:
    """From the fastest; each is tried with all packs and modes of checkpointing."""
    base: dict[str, Any] = {"model.dtype": "bfloat16" if gpu.bf16 else "float16"}
    yield base
    if num_gpus > 1:
        yield {**base, "training.parallel": "fsdp2"}
    if recipe.lora is not None and not recipe.model.load_in_4bit and gpu.bf16:  # they are multiplied in bfloat16
        yield {**base, "model.load_in_4bit": True}


def tried(recipe: Recipe, gpu: Gpu, num_gpus: int = 1) -> list[str]:
    """What `settings_for` tries, in words."""
    keys = {key for changes in _candidates(recipe, gpu, num_gpus) for key in changes}
    words = {"training.parallel": "FSDP2", "model.load_in_4bit": "4 bits"}
    return [*(text for key, text in words.items() if key in keys), "smaller packs", "more checkpointing"]


def _packs(recipe: Recipe) -> list[int]:
    """From the recipe's down to its longest turn, by halves."""
    sizes = [recipe.sequence.budget]
    while sizes[-1] > recipe.sequence.max_length:
        sizes.append(max(sizes[-1] // 2, recipe.sequence.max_length))
    return sizes


def _with(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return recipe.replace(**sections)


def _config(recipe: Recipe) -> Any:
    try:
        return read_config(recipe.model)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        name = recipe.model.name_or_path
        raise UserError(f"model.name_or_path: {name} has no config that says how large it is") from None
