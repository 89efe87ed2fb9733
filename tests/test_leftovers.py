"""The guard that conftest.py puts around every test notices what it is for."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from support.leftovers import leftovers, process_state

Patch = pytest.MonkeyPatch


def a_device(patch: Patch, _: Path) -> None:
    patch.setitem(PartialState._shared_state, "device", torch.device("meta"))


def a_folder(patch: Patch, folder: Path) -> None:
    patch.chdir(folder)


def a_variable(patch: Patch, _: Path) -> None:
    patch.setitem(os.environ, "RANK", "1")


@pytest.mark.parametrize(
    ("leave", "name"), [(a_device, "accelerate's device"), (a_folder, "the working directory"), (a_variable, "$RANK")]
)
def test_what_is_left_is_noticed(
    leave: Callable[[Patch, Path], None], name: str, monkeypatch: Patch, tmp_path: Path
) -> None:
    before = process_state()
    with monkeypatch.context() as patch:
        leave(patch, tmp_path)
        (line,) = leftovers(before, process_state())
    assert line.startswith(f"{name}: ")
    assert not leftovers(before, process_state())


def test_a_handler_of_signals_is_noticed() -> None:
    before = process_state()
    handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        (line,) = leftovers(before, process_state())
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert line.startswith("SIGUSR1: ")
