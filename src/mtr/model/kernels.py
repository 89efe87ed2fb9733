"""Optional faster kernels for everything in a layer but attention: torch.compile, and Liger's where installed."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from mtr.attention.model_parts import base_model, decoder
from mtr.errors import UserError


def compile_layers(model: Any, backend: str = "inductor") -> int:
    """Compile each decoder layer in place; returns how many.

    Layers share their code, so there is one compilation for the first length and one more, dynamic, for all others.
    Attention is not traced: its plan differs from pack to pack.

    Args:
        backend: of torch.compile.

    Raises:
        UserError: the model's layers are not found.
    """
    layers = next((found for m in decoder(model).children() if isinstance(found := m, nn.ModuleList) and len(m)), None)
    if layers is None:
        raise UserError("training.torch_compile: no list of decoder layers in this model; set it to false")
    for layer in layers:
        layer.compile(backend=backend)
    return len(layers)


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
