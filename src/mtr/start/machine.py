"""What this machine has: processors, memory, disk, GPUs and the way to the Hub."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from mtr.errors import UserError
from mtr.model.device import available_memory, device_name, pick_device
from mtr.model.flops import device_matrix_rate
from mtr.recipe.hub import LOGIN, HubUnreachableError, ask
from mtr.start.finding import Finding, home, shareable

_LITTLE_DISK = 20
"""GiB below which a model of some billion parameters does not fit."""
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "PYTORCH_CUDA_ALLOC_CONF",
    "NO_COLOR",
)
"""Environment variables that change what mtr does, none of them secret."""


def check_machine() -> Iterator[Finding]:
    yield Finding("machine", "system", "ok", f"{platform.platform()}, Python {platform.python_version()}")
    cpu = torch.device("cpu")
    free = available_memory(cpu) / 2**30
    text = f"{device_name(cpu)}, torch threads: {torch.get_num_threads()}, {free:.1f} GiB of memory free"
    yield Finding("machine", "CPU", "ok", text, free)
    yield _disk("disk here", Path())
    yield _disk("disk of the Hub's cache", _cache())
    for name in _VARIABLES:
        if name in os.environ:
            yield Finding("machine", name, "ok", shareable(os.environ[name]))


def check_devices() -> Iterator[Finding]:
    """The GPUs that torch sees, or why it sees none; and how fast matmuls are where training would run."""
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            text = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
            half = "" if torch.cuda.is_bf16_supported(including_emulation=False) else ", no bfloat16: use float16"
            yield Finding("device", f"cuda:{number}", "ok", text + half, found.name)
        yield Finding("device", "CUDA", "ok", f"{torch.version.cuda} (of torch)", torch.version.cuda)
    else:
        yield Finding("device", "CUDA", "none", _why_no_cuda())
    device = pick_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = device_matrix_rate(device, dtype)
    text = f"{rate['flops_per_second'] / 1e12:,.3g} TFLOP/s ({rate['dtype']} matmuls of {rate['size']}, measured)"
    yield Finding("device", f"speed of {device.type}", "ok", text, rate)


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
        if shutil.which("nvidia-smi"):
            return f"{reason}, and this machine has an NVIDIA driver: install torch for CUDA, https://pytorch.org"
        return f"{reason}; training runs on the CPU"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    if not shutil.which("nvidia-smi"):
        return f"torch is built for CUDA {torch.version.cuda}, and there is no NVIDIA driver (no nvidia-smi)"
    return f"torch is built for CUDA {torch.version.cuda} and finds no GPU: is the driver new enough? See nvidia-smi"


def check_hub() -> Finding:
    """Whether the Hugging Face Hub answers, and whether there is a token; never the token."""
    from huggingface_hub import constants, get_token, model_info

    endpoint = shareable(constants.ENDPOINT)
    token = "a token is set" if get_token() else f"no token is set: for private and gated models, {LOGIN}"
    try:
        ask("looking for the Hub", lambda: model_info("Qwen/Qwen3-8B", timeout=8))
    except HubUnreachableError as error:
        text = f"{shareable(str(error))}; local folders and copies in the cache work without it"
        return Finding("Hub", "access", "none", text)
    except (UserError, OSError, ValueError) as error:
        return Finding("Hub", "access", "none", f"{endpoint} answers with {type(error).__name__}; {token}")
    return Finding("Hub", "access", "ok", f"{endpoint} answers; {token}")


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _disk(name: str, folder: Path) -> Finding:
    """The folder is named only where that tells nothing of its owner."""
    try:
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free / 2**30
    except (OSError, StopIteration) as error:
        return Finding(
            "machine", name, "none", f"cannot be looked at: {getattr(error, 'strerror', None) or 'no folder'}"
        )
    own = home()
    place = f" in ~/{folder.relative_to(own)}" if own is not None and own in folder.parents else ""
    little = ": little, if models are to be stored there" if free < _LITTLE_DISK else ""
    return Finding("machine", name, "none" if little else "ok", f"{free:,.0f} GiB free{place}{little}", free)
