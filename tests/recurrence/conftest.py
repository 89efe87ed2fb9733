"""Transformers before and after it is switched, and torch.compile from the start."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def unswitched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers as it is imported, for this test."""
    for module in [m for name, m in sys.modules.items() if name.startswith("transformers.models.")]:
        for name, value in list(vars(module).items()):
            if isinstance(value, type) and hasattr(vars(value).get("forward"), "mtr_original"):
                monkeypatch.setattr(value, "forward", value.forward.mtr_original)  # type: ignore[attr-defined]
            elif hasattr(value, "mtr_original"):
                monkeypatch.setattr(module, name, value.mtr_original.__wrapped__)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with dynamo.patch(), functorch.patch():  # what the options were
        yield
