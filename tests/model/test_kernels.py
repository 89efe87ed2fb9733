"""Claims: what Liger cannot do is refused with the way out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.models import load

from mtr.errors import UserError
from mtr.model.kernels import use_liger_kernel

Models = Callable[..., Path]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_liger_is_refused_where_it_cannot_be(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(models("qwen3"))
    with pytest.raises(UserError, match="need CUDA and this is cpu"):
        use_liger_kernel(model, CPU)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        use_liger_kernel(model, CUDA)
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no kernels for qwen3"):
        use_liger_kernel(model, CUDA)
