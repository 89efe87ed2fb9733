"""What environment.json says: versions, hardware and seed of a run or a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any

import torch

from mtr import __version__
from mtr.model.device import device_name

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")


@dataclass(frozen=True)
class Identity:
    """Which run something belongs to, and what environment.json says of it."""

    run: str
    """The id in the marker of its folder."""
    environment: dict[str, Any]


def environment(seed: int, device: torch.device, num_processes: int, date: str) -> dict[str, Any]:
    """What another person needs to know to repeat a run or a measurement."""
    cuda = device.type == "cuda"
    return {
        "mtr": __version__,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": device_name(device),
        "cuda": torch.version.cuda if cuda else None,
        "cpus": os.cpu_count(),
        "num_processes": num_processes,
        "seed": seed,
        "date": date,
    }
