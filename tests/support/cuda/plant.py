"""Faults planted into a step, to see that the check finds them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "a branch on a value": lambda x: "some" if x.any() else "none",
    "a copy to the host": lambda x: x.cpu(),
    "a copy that blocks": lambda x: torch.ones(3).to(x.device),
    "a mask as an index": lambda x: x[x > 0],
    "synchronize": lambda x: torch.cuda.synchronize(),
    "nonzero": lambda x: x.nonzero(),
    "a tensor on the host": lambda x: x + torch.ones(x.shape[-1]),
}
"""What is done with the embedded tokens; the last one mixes devices, the others make the host wait."""


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    def hook(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, nn.Embedding):
            FAULTS[fault](output)

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
