"""Claims: a signal or a file asks a run under a real launcher for a checkpoint, as it does a single process: every
process takes part, the run goes on, and the file is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.runs import damage_of

from mtr.store.trigger import NAME

Recipes = Callable[..., Path]
_MOST = 150.0
"""Seconds to wait for anything."""
_MODULE = ["-m", "mtr"]
LAUNCHERS = {
    "alone": [sys.executable, *_MODULE],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *_MODULE],
    "accelerate": [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *_MODULE,
    ],
}


def steps_of(run: Path) -> list[int]:
    """Of the metrics that are there already; the last line may be half written."""
    found = []
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line)["step"])
    return found


def checkpoints_of(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))


class Started:
    """A run that never ends by itself."""

    def __init__(self, process: subprocess.Popen[str], run: Path) -> None:
        self.process, self.run = process, run

    def wait_until(self, what: str, is_so: Callable[[], bool]) -> None:
        until = time.monotonic() + _MOST
        while not is_so():
            assert self.process.poll() is None, f"{what}: it ended\n{self.end()}"
            assert time.monotonic() < until, f"{what}: not after {_MOST} s\n{self.end()}"
            time.sleep(0.05)

    def wait_for_steps(self, more: int) -> None:
        begun = max(steps_of(self.run), default=0)
        self.wait_until("a step", lambda: max(steps_of(self.run), default=0) >= begun + more)

    def wait_for_checkpoint(self) -> int:
        """Its step; it is whole, and the run has gone on."""
        before = checkpoints_of(self.run)
        self.wait_until("a checkpoint", lambda: checkpoints_of(self.run) != before)
        (step,) = set(checkpoints_of(self.run)) - set(before)
        assert damage_of(self.run / f"checkpoint-{step}") is None
        self.wait_for_steps(2)
        return step

    def processes(self) -> list[int]:
        """Of the run, not the launcher's own."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children if "train" in Path(f"/proc/{child}/cmdline").read_text().split("\0")]

    def end(self) -> str:
        """What it said."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.communicate(timeout=60)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.communicate()[1]


@contextlib.contextmanager
def started(recipe: Path, *command: str) -> Iterator[Started]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(list(command), stderr=subprocess.PIPE, text=True, env=environment)
    running = Started(process, recipe.parent / "run")
    try:
        yield running
    finally:
        running.end()


def endless(write_recipe: Recipes, **training: Any) -> Path:
    keys = {
        "max_steps": 100_000,
        "conversations_per_step": 2,
        "gradient_checkpointing": False,
        "save_total_limit": None,
    }
    return write_recipe(training={**keys, **training})


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["alone", "torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_a_file_and_a_signal_to_one_process_ask_for_checkpoints(launcher: str, write_recipe: Recipes) -> None:
    """With shares of the weights, a process that does not take part would let the others wait for ever."""
    recipe = endless(write_recipe, checkpoint_signal="USR2", **({} if launcher == "alone" else {"parallel": "fsdp2"}))
    with started(recipe, *LAUNCHERS[launcher], "train", str(recipe)) as running:
        running.wait_for_steps(1)
        (running.run / NAME).touch()
        by_file = running.wait_for_checkpoint()
        assert not (running.run / NAME).exists()
        last = running.process.pid if launcher == "alone" else max(running.processes())
        os.kill(last, signal.SIGUSR2)
        by_signal = running.wait_for_checkpoint()
        assert checkpoints_of(running.run) == [by_file, by_signal], "asked for twice"
        said = running.end()
    for step in (by_file, by_signal):
        assert said.count(f"checkpoint-{step}, as asked for") == 1, said
    assert "stopped by SIGTERM after step" in said


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["SIGHUP", pytest.param("SIGUSR2", marks=pytest.mark.slow)])
def test_the_launcher_of_mtr_asks_all_and_goes_on(name: str, write_recipe: Recipes) -> None:
    """SIGHUP, which torch's launcher would take for the end, included."""
    recipe = endless(write_recipe, checkpoint_signal=name)
    with started(recipe, sys.executable, *_MODULE, "train", str(recipe), "--num-processes", "2") as running:
        running.wait_for_steps(1)
        steps = []
        for _ in range(2):
            running.process.send_signal(signal.Signals[name])
            steps.append(running.wait_for_checkpoint())
            assert not (running.run / NAME).exists()
        said = running.end()
    assert [said.count(f"checkpoint-{step}, as asked for") for step in steps] == [1, 1], said
    assert running.process.returncode == 128 + signal.SIGTERM, said
