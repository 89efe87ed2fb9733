"""environment.json: versions, hardware and seed of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from mtr import __version__
from mtr.model.device import device_name

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")


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
