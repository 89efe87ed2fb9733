"""What `auto` means on this machine: the least checkpointing that fits, and the largest packs.

    gradient_checkpointing: auto   estimated, without a forward pass on the device
    max_tokens: auto               measured, with the model as a step calls it: sharded, compiled, in its autocast

All processes build packs alike, so what the one with the least memory can take goes for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from mtr.attention.choice import pad_to_multiple_of
from mtr.attention.model_parts import freeze_idle
from mtr.errors import UserError, one_line
from mtr.model.auto_class import auto_class
from mtr.model.checkpointing import MODES, can_offload, checkpoint_activations
from mtr.model.estimate import Estimator
from mtr.model.lora import add_lora
from mtr.model.memory import Probe, hungriest
from mtr.model.tree_model import TreeModel, lay_out
from mtr.recipe.sections import Backend, Checkpointing, Recipe
from mtr.training.processes import gradient_sync, highest, is_sharded


def fit_memory(
    recipe: Recipe, config: Any, dtype: torch.dtype, tree_model: TreeModel, call: nn.Module, accelerator: Accelerator
) -> tuple[Recipe, tuple[str, ...]]:
    """Switch checkpointing on, and fill in `sequence.max_tokens`.

    Args:
        config: of the model.
        dtype: of its weights as they were loaded.
        call: the model as it is distributed over processes.

    Returns:
        The recipe with a number for `sequence.max_tokens`, and what to report.

    Raises:
        UserError: not even one turn fits, or there is no device to offload from.
    """
    probe = Probe(
        tree_model,
        call,
        accelerator.device,
        recipe.training.optim,
        pad_to_multiple_of(tree_model.backends),
        lambda: gradient_sync(accelerator, call, enabled=False),
    )
    mode, notes = recipe.training.checkpointing, []
    if mode == "offload" and probe.device.type == "cpu":
        raise UserError(
            "training.gradient_checkpointing: offload moves layer inputs from a GPU to host memory, and this is a CPU; "
            "use full"
        )
    if mode == "auto":
        estimator = estimator_of(recipe, config, dtype, tree_model.backends, probe.device)
        gathered = estimator.gathered() if is_sharded(call) else 0
        free = -highest(accelerator, gathered - probe.free())
        choice = least_checkpointing(estimator, recipe.sequence.budget, free, modes_on(probe.device, tree_model.model))
        mode = choice.mode
        notes.append(f"checkpointing {choice.reason}")
    checkpoint_activations(tree_model.model, mode)
    if recipe.sequence.max_tokens != "auto" or recipe.sequence.unpacked:
        return recipe, tuple(notes)
    tokens, memory = probe.fit_pack(recipe.sequence.max_length)
    tokens = -highest(accelerator, -tokens)
    notes.append(
        f"packs of {tokens:,} tokens: {memory.bytes(tokens) / 2**30:.1f} of {memory.free / 2**30:.1f} GiB estimated, "
        f"{memory.per_token / 2**20:.2f} MiB per token, checkpointing {mode}"
    )
    return recipe.replace(sequence={"max_tokens": tokens}), tuple(notes)


def modes_on(device: torch.device, model: Any) -> tuple[Checkpointing, ...]:
    """From most memory to least; offload only where activations are not in host memory anyway."""
    offload = device.type != "cpu" and can_offload(model)
    return MODES if offload else MODES[: MODES.index("offload")]


@dataclass(frozen=True)
class Choice:
    mode: Checkpointing
    reason: str
    """With the estimate of every mode that was looked at."""


def least_checkpointing(estimator: Estimator, tokens: int, free: int, modes: Sequence[Checkpointing]) -> Choice:
    """The first of several modes, from most memory to least, whose activations fit; the last one where none does.

    Args:
        tokens: of the largest pack.
        free: bytes that activations may take; a share of it is left to fragmentation.
    """
    seen = []
    for mode in modes:
        try:
            taken = estimator.activations(mode, tokens)
        except Exception as error:  # code of a model from the Hub may do anything, and full always works
            reason = f"{type(error).__name__}: {one_line(error)}"
            return Choice("full", f"full, as the memory cannot be estimated ({reason})")
        seen.append(f"{mode} {taken / 2**30:.1f}")
        if taken <= estimator.share * free:
            break
    fits = "" if taken <= estimator.share * free else ", so none fits"
    estimates = f"{', '.join(seen)} of {free / 2**30:.1f} GiB estimated for {tokens:,} tokens"
    return Choice(mode, f"{mode} ({estimates}{fits})")


def estimator_of(
    recipe: Recipe, config: Any, dtype: torch.dtype, backends: Sequence[Backend], device: torch.device
) -> Estimator:
    """What estimates the memory of this recipe's steps.

    Args:
        config: of the model.
        dtype: of its weights as they are loaded.
        backends: of attention.
        device: that would train; it is not touched.
    """

    def build(small: Any) -> Any:
        model = auto_class(small).from_config(small, trust_remote_code=recipe.model.trust_remote_code, dtype=dtype)
        freeze_idle(model)
        if recipe.lora is not None:
            model = add_lora(model, recipe.lora.model_copy(update={"init_from": None, "init_lora_weights": True}), 0)
        lay_out(model, recipe)
        return model

    half = dtype if dtype == torch.float16 else torch.bfloat16
    backend = hungriest(backends)
    in_four_bits, optim = recipe.model.load_in_4bit, recipe.training.optim
    multiple = pad_to_multiple_of([backend])
    on_cuda, unpacked = device.type == "cuda", recipe.sequence.unpacked
    return Estimator(config, build, half, in_four_bits, optim, backend, multiple, on_cuda, unpacked=unpacked)
