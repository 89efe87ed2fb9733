"""What an error of a collective call means: another process is gone, or something is wrong with this machine.

NCCL puts the cause after "Last error:", and names itself and sockets in every message, so only the cause tells.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from mtr.errors import DeviceMemoryError, LostProcessError, UserError, one_line

_LOST = re.compile(
    r"Connection (closed|reset) by|returned Connection refused|Broken pipe|remote process exited|ncclRemoteError"
    r"|Watchdog caught collective operation timeout|gloo/transport|Socket Timeout|wait timeout after"
    r"|failed to recv, got 0 bytes|communicator was aborted"
)
_NCCL = re.compile(r"\bNCCL\b|nccl[A-Z]\w+")
_MENDS = {
    r"Duplicate GPU": "two processes use one GPU; start no more of them than there are GPUs (--num-processes), or show "
    "more GPUs to them (CUDA_VISIBLE_DEVICES)",
    r"shared memory segment|/dev/shm": "there is too little shared memory for NCCL; give the container more, with "
    "--shm-size=8g or --ipc=host of docker run",
    r"driver version is insufficient|forward compatibility was attempted|unsupported toolchain": "the NVIDIA driver is "
    "too old for this build of torch; update the driver, or install a build for an older CUDA",
    r"[Mm]ismatched NCCL version": "the machines have different versions of NCCL; install the same version of torch on "
    "all of them",
}
"""Causes, and what to say of them. Everything else is told in NCCL's own words."""


@contextmanager
def explained() -> Iterator[None]:
    """Raise what an error of a collective call inside means in its place."""
    try:
        yield
    except RuntimeError as error:
        raise explain(error) from None


def explain(error: RuntimeError) -> Exception:
    """What an error means that was raised in one of several processes; the error itself where that is not known."""
    text = str(error)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return error
    who = f"process {os.environ.get('RANK', '0')}"
    if _NCCL.search(text):
        if "out of memory" in text:
            return DeviceMemoryError(
                f"{who}: out of memory in NCCL, which needs some outside of torch's; lower sequence.max_tokens"
            )
        for cause, mend in _MENDS.items():
            if re.search(cause, text):
                return _of_one_process(f"{who}: {mend} ({_last_error(text)})")
    if _LOST.search(text):
        return LostProcessError(f"{who}: another process of the run ended")
    return error


def _of_one_process(text: str) -> UserError:
    error = UserError(text)
    error.local = True
    return error


def _last_error(text: str) -> str:
    """NCCL's own words, without torch's stack."""
    return one_line(ValueError(text.rpartition("Last error:")[2].split("Exception raised from")[0]), most=200)
