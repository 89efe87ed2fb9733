"""Liger's kernels for norms, rotary embeddings and MLPs, where installed: the alternative to compiled layers."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from mtr.attention.model_parts import base_model
from mtr.errors import UserError


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
