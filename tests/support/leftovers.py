"""What a test may leave for the next one: nothing that belongs to the whole process.

Which tests share a process, and in which order, is chance when tests run in several; so a test that leaves something
fails itself, whoever comes next.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SET_FOR_GOOD = (
    "PYTEST_",
    "ACCELERATE_",
    "FSDP_",
    "TRITON_",
    "TORCHINDUCTOR_",
    "KINETO_",
    "HF_",
    "TOKENIZERS_PARALLELISM",
    "CUDA_MODULE_",
)
"""Variables that pytest, libraries and `mtr` itself set once, when they start."""


def process_state() -> dict[str, Any]:
    """By name, what a test can change for all others."""
    state: dict[str, Any] = {
        "the working directory": Path.cwd(),
        "the type of new tensors": torch.get_default_dtype(),
        "the device of new tensors": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        **{number.name: signal.getsignal(number) for number in SIGNALS},
        **{f"${name}": value for name, value in os.environ.items() if not name.startswith(SET_FOR_GOOD)},
    }
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, PartialState

        for shared in (PartialState._shared_state, AcceleratorState._shared_state):
            if str(shared.get("device", "cpu")) != "cpu":
                state["accelerate's device"] = shared["device"]
        if AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
            state["accelerate's precision"] = AcceleratorState._shared_state["_mixed_precision"]
    return state


def leftovers(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line for each difference."""
    names = dict.fromkeys([*before, *after])
    return [
        f"{name}: {before.get(name)!r} before, {after.get(name)!r} after"
        for name in names
        if before.get(name) != after.get(name)
    ]
