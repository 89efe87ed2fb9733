"""Triton's interpreter, made to run what Inductor emits for CUDA on tensors in host memory.

Inductor itself launches kernels through the interpreter where TRITON_INTERPRET=1; what it needs beyond that:

    bfloat16     rounded to nearest even, multiplied in float32 (the interpreter truncates, loses carries and multiplies
                 the bits as integers)
    libdevice    tanh and its like, by numpy
    arguments    read and written in place, where the interpreter copies each to the host and back
    speed        the language is patched once, not at every call of a device function

What an interpreter cannot show: races, barriers, TMA, pipelining, the rounding of tensor cores and of fast mathematics.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

Array = NDArray[Any]

FUNCTIONS: dict[str, Callable[..., Array]] = {
    "tanh": np.tanh,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log2": np.log2,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "pow": np.power,
    "fabs": np.abs,
    "fmod": np.fmod,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "sin": np.sin,
    "cos": np.cos,
    "isnan": np.isnan,
    "isinf": np.isinf,
}
"""Of libdevice, without `__nv_` and the `f` of float32."""


def activate() -> None:
    """Once a process, before a kernel is loaded.

    Raises:
        RuntimeError: Triton was imported without TRITON_INTERPRET=1, and its own functions are compiled.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or not isinstance(tl.cdiv, interpreter.InterpretedFunction):
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported")
    from torch._inductor.runtime import triton_helpers

    triton_helpers.set_driver_to_gpu = lambda: None
    np.seterr(all="ignore")  # exp2(-inf - -inf) and its like are part of the kernels
    interpreter.interpreter_builder.__class__ = _Builder
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.GridExecutor._init_args_hst = lambda _, args, kwargs: (list(args), kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    interpreter._patch_lang = _PatchedOnce(interpreter._patch_lang)
    plain = interpreter.ReduceOps.check_tensor

    def check(self: Any, given: Any) -> Any:
        _refuse_bfloat16(given)
        return plain(self, given)

    interpreter.ReduceOps.check_tensor = check
    for name in dir(tl.extra.cuda.libdevice):
        member = getattr(tl.extra.cuda.libdevice, name)
        if tl.core.is_builtin(member) and hasattr(tl.extra.libdevice, name):
            setattr(tl.extra.libdevice, name, _with_semantic(member))


def _with_semantic(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **{**kwargs, "_semantic": interpreter.interpreter_semantic})


def _refuse_bfloat16(given: Any) -> None:
    if any(x.dtype.scalar == tl.bfloat16 for x in given):
        raise NotImplementedError("a reduction in bfloat16")


class _PatchedOnce:
    """The functions of a module see the language through the module's globals."""

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self.patch = patch
        self.kept: dict[int, Any] = {}

    def __call__(self, function: Any) -> _PatchedOnce:
        if id(function.__globals__) not in self.kept:
            self.kept[id(function.__globals__)] = function, self.patch(function)
        return self

    def restore(self) -> None:
        pass


def to_float32(bits: Array) -> Array:
    """Of bfloat16 numbers, which are kept as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: Array) -> Array:
    """To the nearest, to even between two."""
    bits = np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _values(handle: Any) -> Array:
    data: Array = handle.data
    return to_float32(np.ascontiguousarray(data)) if handle.dtype.scalar == tl.bfloat16 else data


def _handle(values: Array, dtype: Any) -> Any:
    """Of a type's scalar; a truth value whatever the operands were."""
    if values.dtype == np.bool_:
        return interpreter.TensorHandle(values, tl.int1)
    data = to_bfloat16(values) if dtype == tl.bfloat16 else values.astype(interpreter._get_np_dtype(dtype), copy=False)
    return interpreter.TensorHandle(data, dtype)


class _Builder(interpreter.InterpreterBuilder):  # type: ignore[misc]
    def cast_impl(self, source: Any, to: Any) -> Any:
        if to.scalar == tl.int1:
            return interpreter.TensorHandle(_values(source).astype(np.bool_), tl.int1)
        values = _values(source)
        return _handle(values.astype(np.int8) if values.dtype == np.bool_ else values, to.scalar)

    def create_fp_to_fp(self, source: Any, to: Any, rounding: Any) -> Any:
        if 8 in (source.dtype.scalar.primitive_bitwidth, to.scalar.primitive_bitwidth):
            raise NotImplementedError("float8")
        return self.cast_impl(source, to)

    def binary_op(self, left: Any, right: Any, op: Callable[..., Array]) -> Any:
        return _handle(op(_values(left), _values(right)), left.dtype.scalar)

    def unary_op(self, given: Any, op: Callable[..., Array]) -> Any:
        return _handle(op(_values(given)), given.dtype.scalar)

    def ternary_op(self, first: Any, second: Any, third: Any, op: Callable[..., Array]) -> Any:
        return _handle(op(_values(first), _values(second), _values(third)), third.dtype.scalar)

    def get_bf16(self, value: float) -> Any:
        return interpreter.TensorHandle(to_bfloat16(np.array([value])), tl.bfloat16)

    def create_rsqrt(self, given: Any) -> Any:
        return self.unary_op(given, lambda x: 1 / np.sqrt(x))

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        return _handle(_values(x) * _values(y) + _values(z), z.dtype.scalar)

    def create_dot(self, left: Any, right: Any, sum_: Any, precision: Any, _: Any) -> Any:
        product = np.matmul(_values(left), _values(right), dtype=sum_.data.dtype)
        return interpreter.TensorHandle(product + sum_.data, sum_.dtype.scalar)

    def create_extern_elementwise(
        self, library: str, path: str, symbol: str, given: list[Any], result: Any, pure: bool
    ) -> Any:
        name = symbol.removeprefix("__nv_")
        function = FUNCTIONS.get(name) or FUNCTIONS.get(name.removesuffix("f"))
        if function is None:
            raise NotImplementedError(f"{symbol} of libdevice")
        return _handle(function(*(_values(x) for x in given)), result.scalar)
