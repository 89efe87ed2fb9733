"""Claims: an error of a collective call is told as what it is, and as a lost process only where one is gone.

The messages are those of torch and NCCL, as reported in their issues.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mtr.training.loop
from mtr.errors import DeviceMemoryError, LostProcessError, UserError
from mtr.recipe.loading import load_recipe
from mtr.training.collective_errors import explain
from mtr.training.loop import train

_NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, {}, NCCL version 2.27.3\n{}\nLast error:\n{}"
)
_CUDA = "ncclUnhandledCudaError: Call to CUDA function failed."
_SYSTEM = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error."
_USAGE = "ncclInvalidUsage: This usually reflects invalid usage of NCCL library."
_REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
_INTERNAL = "ncclInternalError: Internal check failed."
_TIMEOUT = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=466119168, "
    "NumelOut=466119168, Timeout(ms)=600000) ran for 600004 milliseconds before timing out."
)
_GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] "


def nccl(kind: str, name: str, last: str) -> str:
    return _NCCL.format(kind, name, last)


LOST = {
    "gloo, closed": _GLOO + "Connection closed by peer [127.0.0.1]:24532",
    "gloo, reset": _GLOO + "Read error [127.0.0.1]:24532: Connection reset by peer",
    "gloo, late": _GLOO + "Timed out waiting 7200000ms for recv operation to complete",
    "remote": nccl(
        "remote process exited or there was a network error",
        _REMOTE,
        "socketProgressOpt: Call to recv from 172.16.0.4<33759> failed : Connection reset by peer",
    ),
    "remote as internal": nccl("internal error", _INTERNAL, "Net : Connection closed by remote peer node2<50260>"),
    "remote as system": nccl(
        "unhandled system error (run with NCCL_DEBUG=INFO for details)",
        _SYSTEM,
        "Net : Call to recv from 10.200.84.247<58355> failed : Broken pipe",
    ),
    "gone": nccl(
        "remote process exited or there was a network error",
        _REMOTE,
        "socketPollConnect: connect to 10.0.0.2<40001> returned Connection refused, exceeded error retry count (35)",
    ),
    "timeout": _TIMEOUT,
    "aborted": f"NCCL communicator was aborted on rank 0.  Original reason for failure was: {_TIMEOUT}",
    "store": "failed to recv, got 0 bytes",
    "late store": "wait timeout after 7200000ms, keys: /default_pg/0//cuda//0",
}
MEMORY = {
    "buffers": nccl(
        "unhandled cuda error (run with NCCL_DEBUG=INFO for details)", _CUDA, "Cuda failure 2 'out of memory'"
    ),
    "calloc": nccl("unhandled cuda error", _CUDA, "Failed to CUDA calloc 6291456 bytes: Cuda failure 'out of memory'"),
}
MENDED = {
    "--num-processes": nccl(
        "invalid usage (run with NCCL_DEBUG=WARN for details)",
        _USAGE,
        "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 10",
    ),
    "--shm-size": nccl(
        "unhandled system error",
        _SYSTEM,
        "Error while creating shared memory segment /dev/shm/nccl-NzwJ7O (size 9637888)",
    ),
    "update the driver": nccl(
        "unhandled cuda error", _CUDA, "Cuda failure 35 'CUDA driver version is insufficient for CUDA runtime version'"
    ),
    "same version of torch": nccl(
        "invalid usage", _USAGE, "Mismatched NCCL version detected : rank 0 version 22703 rank 1 version 22304"
    ),
}
OWN = {
    "cuda": nccl("unhandled cuda error", _CUDA, "Cuda failure 999 'unknown error'"),
    "argument": nccl(
        "invalid argument", "ncclInvalidArgument: Invalid value for an argument.", "Invalid config blocking"
    ),
    "usage": nccl("invalid usage", _USAGE, "ncclGroupEnd: not in a group call"),
    "internal": nccl(
        "internal error - please report this issue to the NCCL developers", _INTERNAL, "Bootstrap : no socket"
    ),
    "not NCCL's": "The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0",
}


@pytest.fixture(autouse=True)
def of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


@pytest.mark.parametrize("text", LOST.values(), ids=LOST)
def test_a_process_that_is_gone_is_told(text: str) -> None:
    error = explain(RuntimeError(text))
    assert isinstance(error, LostProcessError)
    assert str(error) == "process 1: another process of the run ended"


@pytest.mark.parametrize("text", MEMORY.values(), ids=MEMORY)
def test_memory_that_NCCL_lacks_is_told(text: str) -> None:  # noqa: N802
    error = explain(RuntimeError(text))
    assert isinstance(error, DeviceMemoryError)
    assert "process 1: out of memory in NCCL" in str(error)


@pytest.mark.parametrize("mend", MENDED)
def test_what_can_be_mended_on_this_machine_is_told(mend: str) -> None:
    error = explain(
        RuntimeError(f"{MENDED[mend]}\nException raised from create at NCCLUtils.hpp:275 (most recent call)")
    )
    assert isinstance(error, UserError)
    assert not isinstance(error, LostProcessError)
    assert error.exit_code == 2
    assert error.local, "every process tells its own"
    assert mend in str(error)
    assert str(error).endswith(f"({MENDED[mend].splitlines()[-1]})")


@pytest.mark.parametrize("text", OWN.values(), ids=OWN)
def test_any_other_error_stays_what_it_is(text: str) -> None:
    error = RuntimeError(text)
    assert explain(error) is error


def test_a_single_process_has_nobody_to_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    error = RuntimeError(LOST["remote"])
    assert explain(error) is error


@pytest.mark.parametrize("text", [LOST["timeout"], MENDED["--num-processes"]])
def test_it_is_told_from_the_first_collective_call_on(
    write_recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    """The call that a run begins with is where NCCL finds out."""

    def fail(*_: Any) -> None:
        raise torch.distributed.DistBackendError(text)

    monkeypatch.setattr(mtr.training.loop, "set_up", fail)
    with pytest.raises(UserError, match="process 1: "):
        train(load_recipe(write_recipe()))
