"""The numbers of the CUDA kernels that Inductor emits, forward and backward, in Triton's interpreter.

    mtr::tree_attention on CUDA tensors in host memory  ->  graphs, Inductor, Triton  ->  interpreted kernels
        against dense attention in float64: output and every gradient, relative to the largest element
    a model with LoRA and compiled layers on such tensors  ->  the same way
        against the model in float64 on the CPU: loss and every gradient

A process of its own, because the interpreter has to be chosen before Triton is imported; the cases are in
`attention_numbers` and `layer_numbers`. Controls have something wrong on purpose, and that has to show.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path


@dataclass
class Result:
    name: str
    differences: dict[str, float]
    """Of the output, its log-sum-exp and each gradient; of a model, the loss and each gradient."""
    tolerance: float
    seconds: float
    control: bool = False
    """Something was changed, so the difference has to be larger than the tolerance."""
    kernels: int = 2
    """Of flex attention, compiled for it: a forward and a backward. Of a recurrent layer: calls with a shared path."""

    @property
    def ok(self) -> bool:
        worst = max(self.differences.values())
        return self.kernels == 2 and (worst > 100 * self.tolerance if self.control else worst <= self.tolerance)


def run(quick: bool) -> list[Result]:
    """
    Raises:
        RuntimeError: the process ended otherwise; with what it said.
    """
    return run_interpreted("support.cuda.numerics", quick)


def run_interpreted(module: str, quick: bool, folders: Sequence[Path] = ()) -> list[Result]:
    """What a module prints, with Triton's interpreter chosen.

    Args:
        folders: where packages are found, too
    """
    command = [sys.executable, "-m", module, *(["--quick"] if quick else [])]
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-1500:])
    return [Result(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def interpret() -> None:
    """Before torch is imported: tensors on a device are in host memory, and kernels are interpreted."""
    # by the environment, which the thread of a backward reads too: a kernel from a cache may have other block sizes
    os.environ |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    from support.cuda import stub

    stub.load()
    stub.pretend(90, generate=True)
    from support.cuda import host_memory, interpreter

    host_memory.activate()
    interpreter.activate()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def say(results: Iterable[Result]) -> None:
    """Each as soon as it is known."""
    for result in results:
        print(json.dumps(dataclasses.asdict(result)), flush=True)


def main() -> None:
    interpret()
    from support.cuda import attention_numbers, layer_numbers

    quick = "--quick" in sys.argv
    say(chain(attention_numbers.compare(quick), () if quick else layer_numbers.compare()))


if __name__ == "__main__":
    main()
