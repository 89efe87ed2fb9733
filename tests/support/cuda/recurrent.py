"""The numbers of recurrent layers on CUDA: the packages' own Triton kernels, forward and backward, interpreted.

    a pack's tree and inputs as CUDA tensors in host memory  ->  the project's plans  ->  fla's and mamba-ssm's kernels
    a model with LoRA on such tensors                        ->  the same way

A process of its own, as in `numerics`; the cases are in `recurrent_numbers` and `recurrent_models`.
"""

from __future__ import annotations

import sys
from itertools import chain

from support.cuda import numerics
from support.cuda.numerics import Result
from support.cuda.stub import BUILD

FOLDER = BUILD / "packages"
"""Where `scripts/cuda_check` puts flash-linear-attention: installed, transformers would call it, on a CPU too."""


def run(quick: bool) -> list[Result]:
    """
    Raises:
        RuntimeError: the process ended otherwise; with what it said.
    """
    return numerics.run_interpreted("support.cuda.recurrent", quick, [FOLDER])


def main() -> None:
    numerics.interpret()
    from support.cuda import packages

    packages.load()
    from support.cuda import recurrent_models, recurrent_numbers

    quick = "--quick" in sys.argv
    numerics.say(chain(recurrent_numbers.compare(quick), () if quick else recurrent_models.compare()))


if __name__ == "__main__":
    main()
