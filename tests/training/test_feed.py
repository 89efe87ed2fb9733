"""Claims: batches on their way to CUDA are in pinned memory, and copied without waiting; on a CPU nothing is copied."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtr.prepare.counts import Counts
from mtr.prepare.step import Step
from mtr.training.feed import Feed
from mtr.training.signals import StopSignals
from mtr.training.stopping import Stopping
from mtr.tree.batch import build_batch
from mtr.tree.layout import View, merge
from mtr.tree.packing import Pack


def step() -> Step:
    pack = Pack((merge([View(np.arange(3), np.arange(2), np.ones(2))]),))
    return Step((build_batch(pack), build_batch(pack, 8)), 4.0, Counts(), 1, 1.0)


def fed(given: Step, device: str) -> Step:
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=1, process_index=0)
    stopping = Stopping(StopSignals(), accelerator)
    feed = Feed(iter([given]), 0, accelerator, stopping, SimpleNamespace(steps=0))  # type: ignore[arg-type]
    found = feed.next()
    assert found is not None
    return found


def test_batches_for_cuda_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    given = step()
    assert fed(given, "cpu") is given
    assert not pinned
    found = fed(given, "cuda")
    for before, after in zip(given.batches, found.batches, strict=True):
        for name, value in vars(before).items():
            if isinstance(value, Tensor):
                assert any(vars(after)[name] is tensor for tensor in pinned), name
                assert torch.equal(vars(after)[name], value)
            else:
                assert vars(after)[name] is value, name
    assert len(pinned) == 12


def test_a_batch_is_copied_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Any] = []

    def to(tensor: Tensor, *place: Any, **how: Any) -> Tensor:
        copies.append((*place, how))
        return tensor

    monkeypatch.setattr(Tensor, "to", to)
    device = torch.device("cuda", 1)
    step().batches[0].to(device)
    assert copies == [(device, {"non_blocking": True})] * 6
