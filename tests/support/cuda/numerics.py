"""The numbers of flex attention's CUDA kernels, as Inductor emits them: forward and backward in Triton's interpreter.

    mtr::tree_attention on CUDA tensors in host memory  ->  graphs, Inductor, Triton  ->  interpreted kernels
        against dense attention in float64: output and every gradient, relative to the largest element

A process of its own, because the interpreter has to be chosen before Triton is imported; the cases are in
`support.cuda.attention_numbers`. The last ones are controls: something is wrong on purpose, and that has to show.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass


@dataclass
class Result:
    name: str
    differences: dict[str, float]
    """Of the output, its log-sum-exp and each gradient."""
    tolerance: float
    seconds: float
    control: bool = False
    """Something was changed, so the difference has to be larger than the tolerance."""
    kernels: int = 2
    """Of flex attention that ran, of which there are a forward and a backward."""

    @property
    def ok(self) -> bool:
        worst = max(self.differences.values())
        return self.kernels >= 2 and (worst > 100 * self.tolerance if self.control else worst <= self.tolerance)


def run(quick: bool) -> list[Result]:
    """
    Raises:
        RuntimeError: the process ended otherwise; with what it said.
    """
    command = [sys.executable, "-m", "support.cuda.numerics", *(["--quick"] if quick else [])]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-1500:])
    return [Result(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    from support.cuda import stub

    stub.load()
    stub.pretend(90, generate=True)
    from support.cuda import host_memory, interpreter

    host_memory.activate()
    interpreter.activate()
    from support.cuda import attention_numbers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for result in attention_numbers.compare("--quick" in sys.argv):
        print(json.dumps(dataclasses.asdict(result)), flush=True)


if __name__ == "__main__":
    main()
