"""Mamba's fused kernels are handed a projection's weight and not the projection, so that they pass an adapter by.

    mixer.forward  ->  fused kernel(..., outproj_weight=self.out_proj.weight)     LoRA on it has no effect, no gradient
                   ->  convolution, scan, self.out_proj(...)                      where the fused kernel returns None

transformers calls them on CUDA in training, where `mamba_ssm` is installed; nothing raises an error.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

_FUSED = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")
"""Functions of modelling modules; where they return None, a mixer goes on part by part."""
_SWITCH = "is_fast_path_available"
"""Of modelling modules of other releases of transformers, which then do without any of these kernels."""


def keep_adapters_in_use(model: nn.Module) -> list[str]:
    """Let mixers of Mamba layers call their projections where a child of one has an adapter. For the whole process.

    Returns:
        Names of the modelling modules that this holds for.
    """
    modules = {sys.modules[type(part).__module__] for part in model.modules() if any(map(_is_adapted, part.children()))}
    return sorted(module.__name__ for module in modules if _do_without(module))


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A")


def _do_without(module: ModuleType) -> bool:
    """Whether there was something that has to be done without."""
    found = [name for name in _FUSED if callable(getattr(module, name, None))]
    for name in found:
        setattr(module, name, _in_parts(getattr(module, name)))
    if isinstance(getattr(module, _SWITCH, None), bool):
        setattr(module, _SWITCH, False)
        found.append(_SWITCH)
    return bool(found)


def _in_parts(fused: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fused)
    def call(*arguments: Any, **options: Any) -> None:
        return None

    return call
