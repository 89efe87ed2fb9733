"""Activation memory: what is kept for the backward, bytes per token, and the largest pack that fits.

    none       everything is kept: fastest, most memory
    selective  attention and matmuls that do not widen are kept, the rest is recomputed
    full       only a layer's input is kept and the layer recomputed: a third more work
    offload    full, with the layer inputs in host memory

The memory of a pack is a line, `fixed + per_token * tokens`: attention keeps no T x T matrix and the loss a chunk of
logits at a time. Two short packs, forward and backward, measure it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mtr.attention.choice import pad_to_multiple_of
from mtr.attention.model_parts import base_model, text_config
from mtr.errors import UserError
from mtr.model.device import available_memory, peak_memory, reset_peak_memory
from mtr.model.tree_model import TreeModel
from mtr.recipe.sections import Checkpointing
from mtr.tree.batch import build_batch
from mtr.tree.layout import View, merge
from mtr.tree.packing import Pack

_ATTENTION = ("_flash_attention_forward", "flash_attention_for_cpu", "efficient_attention", "flex_attention")
"""Parts of the names of attention kernels, whose outputs are small for the work they take."""
_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}
"""Matmuls, and which argument is the left factor."""
_SHARE = 0.92
"""Of the free memory; the rest is left to fragmentation."""
_MOST_TOKENS = 2**17
_MOMENTS = 8
"""Bytes of optimizer state per trainable parameter: two moments in float32."""


def checkpoint_activations(model: Any, mode: Checkpointing) -> None:
    """Switch on activation checkpointing of this mode.

    Raises:
        UserError: the model has no checkpointing, or this version of transformers cannot offload.
    """
    if mode == "none":
        return
    arguments: dict[str, Any] = {"use_reentrant": False}
    options: dict[str, Any] = {}
    if mode == "selective":
        arguments["context_fn"] = _keep_selected
    base = base_model(model)
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    if mode == "offload":
        if "offload" not in inspect.signature(enable).parameters:
            raise UserError("training.gradient_checkpointing: offload needs transformers 5.20 or newer; use full")
        options["offload"] = True
    try:
        enable(arguments, **options)
    except ValueError as error:
        raise UserError(f"training.gradient_checkpointing: {error}; set it to none") from None


def choose_checkpointing(model: TreeModel, device: torch.device, tokens: int) -> Checkpointing:
    """The first of none, selective and full with which a pack of so many tokens fits; it is left switched on."""
    base = base_model(model.model)
    mode: Checkpointing
    for mode in ("none", "selective"):
        checkpoint_activations(base, mode)
        try:
            if measure(model, device, min(tokens, 2048)).most_tokens >= tokens:
                return mode
        except UserError:  # not even a short pack fits
            pass
        base.gradient_checkpointing_disable()
    checkpoint_activations(base, "full")
    return "full"


def _keep_selected() -> Any:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, operator: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
        keep = _is_worth_keeping(operator, arguments)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]


def _is_worth_keeping(operator: Any, arguments: Sequence[Any]) -> bool:
    """Attention, and matmuls that do not widen: much work per element of their output."""
    if operator in _PRODUCTS:
        left, right = arguments[_PRODUCTS[operator] :][:2]
        return bool(left.shape[1] >= right.shape[1])
    name = str(operator)
    return "backward" not in name and any(kernel in name for kernel in _ATTENTION)


@dataclass(frozen=True)
class PackMemory:
    """Bytes of a pack's forward and backward: fixed + per_token * tokens."""

    fixed: float
    per_token: float
    free: int
    """Bytes that a pack may take: what is free, minus the optimizer state that is still to be allocated."""

    def bytes(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens

    @property
    def most_tokens(self) -> int:
        """The largest pack that fits, a multiple of 128."""
        tokens = int((_SHARE * self.free - self.fixed) / self.per_token)
        return max(0, min(tokens, _MOST_TOKENS) // 128 * 128)


def measure(model: TreeModel, device: torch.device, tokens: int) -> PackMemory:
    """Memory of packs on this device, measured with two of them: `tokens`, and half as many.

    Each is one sequence in which every token is predicted, so a real pack of this size takes no more, except for the
    keys that varlen gathers.

    Raises:
        UserError: not even the shorter one fits.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    half = max(tokens // 2, 128)
    try:
        _peak(model, 64, device)  # allocates gradients and workspaces
        small, large = _peak(model, half, device), _peak(model, 2 * half, device)
    except torch.OutOfMemoryError:
        raise UserError(
            f"sequence.max_tokens: a pack of {2 * half} tokens does not fit on {device}; lower sequence.max_length, "
            "set training.gradient_checkpointing to full, or use a smaller model"
        ) from None
    finally:
        model.zero_grad(set_to_none=True)
    per_token = max((large - small) / half, 1.0)
    free = available_memory(device) - _MOMENTS * trained
    return PackMemory(max(small - per_token * half, 0.0), per_token, free)


def _peak(model: TreeModel, tokens: int, device: torch.device) -> int:
    """Peak bytes of one pack's forward and backward, above what was allocated before."""
    vocabulary = text_config(base_model(model.model).config).vocab_size
    ids = np.random.default_rng(tokens).integers(0, vocabulary, tokens)
    layout = merge([View(ids[:1], ids[1:], np.ones(tokens - 1))])
    batch = build_batch(Pack((layout,)), pad_to_multiple_of(model.backends)).to(device)
    reset_peak_memory(device)
    before = peak_memory(device)
    torch.autograd.backward(model(batch))
    return peak_memory(device) - before


def fit_pack(model: TreeModel, device: torch.device, max_length: int) -> tuple[int, PackMemory]:
    """The largest `sequence.max_tokens` that fits, and the measurement it was estimated from.

    Raises:
        UserError: a turn of max_length would not fit.
    """
    memory = measure(model, device, min(max_length, 4096))
    if memory.most_tokens < max_length:
        raise UserError(
            f"sequence.max_length: a turn of {max_length} tokens takes {memory.bytes(max_length) / 2**30:.1f} GiB and "
            f"{memory.free / 2**30:.1f} GiB are free; lower it, or set training.gradient_checkpointing to full"
        )
    return memory.most_tokens, memory
