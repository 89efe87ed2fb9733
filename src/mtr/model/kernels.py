"""Faster layers than as they are written, attention aside: compiled, or with Liger's kernels where installed."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from mtr.attention.model_parts import base_model
from mtr.errors import UserError
from mtr.model.compiled import compile_layers, wants_compiling
from mtr.recipe.sections import Recipe


def speed_up_layers(model: Any, recipe: Recipe, device: torch.device) -> None:
    """What the recipe asks for.

    Raises:
        UserError: it cannot be had here.
    """
    training = recipe.training
    if training.use_liger_kernel:
        use_liger_kernel(model, device)
    if recipe.sequence.unpacked:
        if training.torch_compile is True:
            raise UserError(
                "training.torch_compile: layers are compiled for packs of a tree, and each turn has a row of its own "
                "here (sequence.strategy); set it to auto or false"
            )
    elif wants_compiling(training.torch_compile, device, training.use_liger_kernel):
        compile_layers(model, may_fall_back=training.torch_compile == "auto")


def use_liger_kernel(model: Any, device: torch.device) -> None:
    """Replace norms, rotary embeddings and MLPs by Liger's Triton kernels. The loss stays ours: it is for predictors.

    Raises:
        UserError: no GPU, no package, or none for this architecture.
    """
    if device.type != "cuda":
        raise UserError(
            f"training.use_liger_kernel: Triton kernels need CUDA and this is {device.type}; set it to false"
        )
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        raise UserError("training.use_liger_kernel: install it with: pip install liger-kernel") from None
    base = base_model(model)
    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"training.use_liger_kernel: it has no kernels for {base.config.model_type}; set it to false")
    from transformers.integrations.liger import apply_liger_kernel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_liger_kernel(base, {"cross_entropy": False, "fused_linear_cross_entropy": False})
