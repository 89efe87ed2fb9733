"""The parts of `scripts/cuda_check`, and the processes they are run in.

A process says before torch is imported what it pretends to have: nothing, a device for fake tensors, or one that code
is generated for.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from support.cuda import stub

FOLDER = Path(__file__).parents[2]


class Job(NamedTuple):
    part: str
    name: str
    """For people: what of the part."""
    module: str
    arguments: tuple[Any, ...] = ()
    """Of the module's `run`, before `quick`."""
    arch: int | None = None
    """The device to pretend."""
    generates: bool = False
    """Code for it is generated: needs triton."""


JOBS = (
    Job("kernels", "sm_90", "kernels", (90,), 90, generates=True),
    Job("kernels", "sm_100", "kernels", (100,), 100, generates=True),
    Job("step", "fake cuda", "step", ("fake cuda",), 90),
    Job("step", "meta", "step", ("meta",)),
    Job("recompiles", "", "recompiles"),
    Job("numerics", "", "numerics"),
    Job("recurrent", "", "recurrent"),
    Job("varlen", "", "varlen", (), 90),
)
PARTS = tuple(dict.fromkeys(job.part for job in JOBS))


class Finished(NamedTuple):
    job: Job
    results: list[dict[str, Any]]
    """Each with `ok`, in the fields of the module's result."""
    seconds: float
    problem: str | None
    """Why there are none."""

    @property
    def ok(self) -> bool:
        return self.problem is None and bool(self.results) and all(result["ok"] for result in self.results)


def run_apart(job: Job, quick: bool) -> Finished:
    """Run a job in a process of its own."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        paths = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "support.cuda.parts", str(JOBS.index(job)), str(int(quick)), str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode == 0 and file.exists():
            return Finished(job, json.loads(file.read_text()), seconds, None)
    said = (done.stderr or done.stdout).strip()
    return Finished(job, [], seconds, said[-1500:] or f"it ended with code {done.returncode}")


def _run_here(job: Job, quick: bool) -> list[dict[str, Any]]:
    if job.arch is not None:
        stub.load()
        stub.pretend(job.arch, generate=job.generates)
    found = importlib.import_module(f"support.cuda.{job.module}").run(*job.arguments, quick)
    return [_as_json(result) for result in found]


def _as_json(value: Any) -> Any:
    """Fields and properties of a record, and of what is in it; `{(a, b): 1}` becomes `[[a, b, 1]]`."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        names += [name for name, found in vars(type(value)).items() if isinstance(found, property)]
        return {name: _as_json(getattr(value, name)) for name in names}
    if hasattr(value, "_asdict"):
        return {key: _as_json(part) for key, part in value._asdict().items()}
    if isinstance(value, dict) and any(isinstance(key, tuple) for key in value):
        return [[*key, count] for key, count in value.items()]
    return value if isinstance(value, str | int | float | list | dict | None) else str(value)


if __name__ == "__main__":
    number, quick, path = sys.argv[1:]
    try:
        results = _run_here(JOBS[int(number)], bool(int(quick)))
    except stub.MissingError as missing:
        sys.exit(f"missing: {missing}")
    Path(path).write_text(json.dumps(results))
