"""Packages of Triton kernels for recurrent layers, made to run in the interpreter.

Each kernel runs with the first of the configurations that it would try on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import triton.language as tl
from triton.runtime import autotuner, interpreter

from mtr.recurrence import kernels
from support.cuda.interpreter import to_bfloat16, to_float32


def load() -> None:
    """
    Raises:
        RuntimeError: flash-linear-attention cannot be used. mamba-ssm need not be there.
    """
    plain = autotuner.Autotuner.__init__

    def first_only(self: Any, function: Any, names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, function, names, configs[:1], *args, **kwargs)

    autotuner.Autotuner.__init__ = first_only
    interpreter.ReduceOps.apply = _with_bfloat16(interpreter.ReduceOps.apply)
    for kernel in (kernels.GATED_DELTA_RULE, kernels.KIMI, kernels.SIMPLE):
        found = kernels.find(kernel)
        if isinstance(found, str):
            raise RuntimeError(f"{found}: scripts/cuda_check installs it")
    kernels.find(kernels.MAMBA)
    for name, module in list(sys.modules.items()):
        if name.startswith(("fla.", "mamba_ssm.")):
            vars(module)["range"] = _range


class _Index(int):
    """Of a loop: a number in the interpreter, where the language has a tensor."""

    def to(self, *_: Any) -> _Index:
        return self


def _range(*borders: Any) -> Iterator[_Index]:
    return map(_Index, range(*borders))


def _with_bfloat16(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A sum of bfloat16 numbers is taken in float32 and rounded once, which is better than on a GPU."""

    def apply(self: Any, given: Any) -> Any:
        if isinstance(given, tuple) or given.dtype.scalar != tl.bfloat16 or self.combine_fn != tl.standard._sum_combine:
            return plain(self, given)
        wide = interpreter.TensorHandle(to_float32(given.handle.data), tl.float32)
        total = plain(self, tl.core.tensor(wide, tl.block_type(tl.float32, list(given.shape))))
        narrow = interpreter.TensorHandle(to_bfloat16(total.handle.data), tl.bfloat16)
        shape = [int(size) for size in total.shape]
        return tl.core.tensor(narrow, tl.block_type(tl.bfloat16, shape) if shape else tl.bfloat16)

    return apply
