"""Autocast around computations that keep the type they are given."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_autocast(like: Tensor) -> bool:
    """Whether an autocast of a tensor's device is on; there is none for the meta device."""
    kind = like.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    return torch.autocast(like.device.type, enabled=False) if is_autocast(like) else nullcontext()
