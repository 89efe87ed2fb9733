"""Activation checkpointing: what is kept for the backward.

    none       everything is kept: fastest, most memory
    products   attention and matmuls are kept, so only what is cheap is recomputed
    selective  attention and matmuls that do not widen are kept, the rest is recomputed
    full       only a layer's input is kept and the layer recomputed: a third more work
    offload    full, with the layer inputs in host memory

`MODES` has them from most memory to least. What each takes is estimated in `mtr.model.estimate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from mtr.attention.model_parts import base_model
from mtr.errors import UserError
from mtr.model.compiled import checkpoint_inside
from mtr.recipe.sections import Checkpointing

MODES: tuple[Checkpointing, ...] = ("none", "products", "selective", "full", "offload")

_ATTENTION = ("mtr.tree_attention.", "_flash_attention_forward", "efficient_attention", "flash_attention_for_cpu")
"""Parts of the names of attention operators, whose outputs are small for the work they take."""
_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}
"""Matmuls, and which argument is the left factor. Not those of experts: biases are added to their outputs in place."""


def checkpoint_activations(model: Any, mode: Checkpointing) -> None:
    """Switch to activation checkpointing of this mode.

    Raises:
        UserError: the model has no checkpointing, or this version of transformers cannot offload.
    """
    base = base_model(model)
    keep = {"products": _keep_products, "selective": _keep_narrow}.get(mode)
    inside = checkpoint_inside(base, keep)
    if mode == "none" or (keep and inside):
        if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
            getattr(base, "activation_checkpointing_disable", base.gradient_checkpointing_disable)()
        return
    arguments: dict[str, Any] = {"use_reentrant": False}
    options: dict[str, Any] = {}
    if keep:
        arguments["context_fn"] = keep
    enable = _switch(base)
    if mode == "offload":
        if not can_offload(model):
            raise UserError("training.gradient_checkpointing: offload needs transformers 5.20 or newer; use full")
        options["offload"] = True
    try:
        enable(arguments, **options)
    except ValueError as error:
        raise UserError(f"training.gradient_checkpointing: {error}; set it to none") from None


def can_offload(model: Any) -> bool:
    """Whether this version of transformers keeps layer inputs in host memory."""
    return "offload" in inspect.signature(_switch(base_model(model))).parameters


def _switch(base: Any) -> Any:
    return getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable


def _keep_products() -> Any:
    """An MLP's matmuls widen 3 to 6 times; those of LoRA from its rank to the layer's width, hundreds of times."""
    return _contexts(widens_by=8)


def _keep_narrow() -> Any:
    return _contexts(widens_by=1)


def _contexts(widens_by: int) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, operator: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
        keep = _is_worth_keeping(operator, arguments, widens_by)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]


def _is_worth_keeping(operator: Any, arguments: Sequence[Any], widens_by: int) -> bool:
    """Attention, and matmuls whose output is at most so many times wider than their input: much work per element."""
    if operator in _PRODUCTS:
        left, right = arguments[_PRODUCTS[operator] :][:2]
        return bool(right.shape[-1] <= widens_by * left.shape[-1])
    name = str(operator)
    return "backward" not in name and any(kernel in name for kernel in _ATTENTION)
