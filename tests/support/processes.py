"""Processes forked from one that has imported torch and done nothing else: a start takes a tenth of a second, not five
seconds. Several are a group, as torch's launcher makes one; the launcher itself is in `training/test_processes.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

FORKED = multiprocessing.get_context("forkserver")
"""Starts processes from one server for each process that runs tests."""
FORKED.set_forkserver_preload(["typer", "mtr.training.loop", "transformers.models.auto.modeling_auto", "peft"])
_GRACE = 20.0
"""Seconds in which the others may end by themselves when one has failed."""


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str
    """Of all processes."""
    memory: int
    """Most KiB that one of them, or a process that it started, had at a time; 0 if none came to its end."""


def in_processes(
    count: int,
    *arguments: object,
    module: str = "mtr",
    prepare: Callable[[], None] | None = None,
    timeout: float = 180.0,
) -> Ended:
    """`python -m MODULE ARGUMENTS` in `count` processes of a group; when one fails, the others are ended.

    Args:
        prepare: a function of a module, called in each process before.

    Raises:
        TimeoutError: after `timeout` seconds.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    shared, store = {**os.environ, "OMP_NUM_THREADS": "1"}, None
    if count > 1:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    command = [module, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as name:
        running: list[Any] = []
        try:
            for rank in range(count):
                environment = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if store else {})
                running.append(FORKED.Process(target=_run, args=(command, environment, Path(name), prepare)))
                running[-1].start()
            code = _wait(running, time.monotonic() + timeout)
        finally:
            for process in running:
                process.kill()
                process.join()
        texts = {path.name: path.read_text() for path in Path(name).iterdir()}
    if code is None:
        raise TimeoutError(f"{command}: no end after {timeout} s\n{texts.get('stderr', '')}")
    memory = max(map(int, texts.get("memory", "0").split()))
    return Ended(code, texts.get("stdout", ""), texts.get("stderr", ""), memory)


def _wait(running: list[Any], until: float) -> int | None:
    """The exit code of the first process that failed, or 0; None if time is up."""
    code, grace = 0, until
    while waiting := [process for process in running if process.exitcode is None]:
        if not connection.wait([process.sentinel for process in waiting], max(0.0, grace - time.monotonic())):
            return code or None
        if not code and (failed := [process.exitcode for process in running if process.exitcode]):
            code, grace = int(failed[0]), min(until, time.monotonic() + _GRACE)
            for process in waiting:
                process.terminate()
    return code or next((int(process.exitcode) for process in running if process.exitcode), 0)


def _run(
    command: list[str], environment: dict[str, str], folder: Path, prepare: Callable[[], None] | None = None
) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    torch.set_num_threads(1)
    sys.argv = command.copy()
    try:
        if prepare is not None:
            prepare()
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        used = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        with (folder / "memory").open("a") as written:
            print(max(used), file=written)
