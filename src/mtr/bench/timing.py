"""Seconds and memory of cases that take turns, so that a device that slows down slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mtr.model.device import peak_memory, reset_peak_memory


@dataclass(frozen=True)
class Case:
    """One way to do the same work."""

    strategy: str
    """single_pass, per_turn_packed or per_turn_padded."""
    attention: str
    num_tokens: int
    """Positions that the device computes, padding included."""
    flops: float
    """FLOPs that are needed: without padding and recomputation."""
    attend: Callable[[Any], None]
    """Switches the model to the attention that the case needs."""
    run: Callable[[], float]
    """Forward and backward of everything; returns sum(weight * nll)."""


@dataclass
class Timing:
    """What was measured of a case."""

    seconds: list[float]
    """Of each repeat; forward and backward."""
    memory: int = 0
    """Peak bytes on the device, in the warm-up."""
    loss: float = 0.0
    error: str | None = None
    """Set if the case ran out of memory."""


def take_turns(model: Any, device: torch.device, cases: Sequence[Case], repeats: int) -> list[Timing]:
    """Run every case `repeats` times, in turn, after a warm-up of each that is not timed."""
    timings = [Timing([]) for _ in cases]
    for repeat in range(repeats + 1):
        for case, timing in zip(cases, timings, strict=True):
            if not timing.error:
                _run(case, timing, model, device, warm_up=repeat == 0)
        if any(timing.error for timing in timings):
            torch.cuda.empty_cache()
    return timings


def _run(case: Case, timing: Timing, model: Any, device: torch.device, warm_up: bool) -> None:
    case.attend(model)
    model.zero_grad(set_to_none=True)
    if warm_up:
        reset_peak_memory(device)
    wait(device)
    began = time.perf_counter()
    try:
        timing.loss = case.run()
        wait(device)
    except torch.cuda.OutOfMemoryError as error:
        timing.error = f"out of memory: {str(error).splitlines()[0]}"
        return
    if warm_up:
        timing.memory = peak_memory(device)
    else:
        timing.seconds.append(time.perf_counter() - began)


def wait(device: torch.device) -> None:
    """Return once the device has finished all work that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}
