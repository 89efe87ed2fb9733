"""What a step asks of the host, operator by operator, on meta or fake cuda tensors.

A value that Python reads from the device makes the host wait until the device has done all that was asked before, and
so does a copy between the two that is not `non_blocking`. `watched` notes each one and gives a made-up number back, so
that the step goes on and all of them are found. What has no shape without its values (`nonzero`) ends the step.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

import mtr.attention.op  # noqa: F401  registers the operators
from support.cuda.waits import GROUPED

_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense, _aten.equal, _aten.is_nonzero}
_SHAPES = {
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.unique_consecutive,
    _aten.unique_dim,
    _aten.repeat_interleave,
    _aten.bincount,
}
_COPIES = {_aten._to_copy, _aten.copy_, _aten.copy}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
Run = Callable[[Any, Any], Any]
"""Runs the operator at hand with these positional and keyword arguments."""
_TORCH = str(Path(torch.__file__).parent)


class Watch:
    """Host synchronizations by what makes them and where: `{("aten.item", "mtr.training.processes.total"): 1}`."""

    def __init__(self) -> None:
        self.synchronizations: Counter[tuple[str, str]] = Counter()
        self.mixes: Counter[tuple[str, str]] = Counter()
        """Operators given tensors of several devices; fake tensors refuse them before."""
        self.operators = 0

    def call(self, func: Any, args: Any, kwargs: Any, run: Run) -> Any:
        self.operators += 1
        if what := synchronization(func, args, kwargs):
            self.synchronizations[what, _site()] += 1
        if _mixes(func, args):
            self.mixes[str(func), _site()] += 1
        if getattr(func, "overloadpacket", None) is _aten._pin_memory:  # without a device there is no pinned memory
            return args[0].clone()
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if _is_grouped_in_float32(func, args):
            product: Tensor = run([x.bfloat16() for x in args[:2]] + list(args[2:]), kwargs)
            return product.to(args[0].dtype)
        if getattr(func, "overloadpacket", None) is not _aten._local_scalar_dense:
            return run(args, kwargs)
        number = args[0]
        made_up = True if number.dtype == torch.bool else 1.0 if number.dtype.is_floating_point else 1
        if _is_device(number.device):
            return made_up
        try:
            return run(args, kwargs)
        except DataDependentOutputException:  # a number on the host that the step has changed, such as Adam's count
            return made_up


def synchronization(func: Any, args: Any, kwargs: Any) -> str | None:
    """How this operator makes the host wait for the device; None if it does not."""
    packet, tensors = getattr(func, "overloadpacket", None), [x for x in args if isinstance(x, Tensor)]
    on_device = bool(tensors) and any(_is_device(x.device) for x in tensors)
    if packet in _READS and on_device:
        return "item"
    if packet in _SHAPES and on_device and not isinstance(kwargs.get("output_size"), int):
        return str(packet.__name__)
    if _is_grouped_in_float32(func, args) and on_device:
        return GROUPED
    if packet in _COPIES and tensors:
        source = tensors[-1].device
        target = kwargs.get("device") or tensors[0].device
        waits = not (kwargs.get("non_blocking") or (packet is not _aten._to_copy and args[2:3] == (True,)))
        if waits and _is_device(source) != _is_device(torch.device(target)):
            return f"copy {source.type} to {torch.device(target).type}"
    if packet in _INDEXED and on_device:
        indices = [x for x in args[1] if isinstance(x, Tensor)]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            return "index by a mask"
        if any(x.dim() and not _is_device(x.device) for x in indices):
            return "index from the host"
    return None


def _is_grouped_in_float32(func: Any, args: Any) -> bool:
    """Torch has a CUDA kernel for bfloat16; otherwise the host reads the groups' sizes and multiplies one by one. Its
    fake kernel knows of bfloat16 only."""
    return getattr(func, "overloadpacket", None) is _aten._grouped_mm and args[0].dtype != torch.bfloat16


def _mixes(func: Any, args: Any) -> bool:
    """A tensor on the host beside one on the device; a number there (no dimensions) may be."""
    if getattr(func, "overloadpacket", None) in _COPIES | _INDEXED:
        return False
    tensors = [x for x in pytree.arg_tree_leaves(*args) if isinstance(x, Tensor)]
    return any(_is_device(x.device) for x in tensors) and any(x.dim() and not _is_device(x.device) for x in tensors)


def _is_device(device: torch.device) -> bool:
    return device.type != "cpu"


def _site() -> str:
    """The function that asked: the innermost one outside torch and this module."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith((__file__, _TORCH, "<")):
            return f"{frame.f_globals.get('__name__', code.co_filename)}.{code.co_qualname}"
        frame = frame.f_back
    return "torch"


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.watch.call(func, args, kwargs, lambda a, k: _run_on_meta(func, a, k))


def _run_on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """A copy to the host has no values to copy."""
    packet = getattr(func, "overloadpacket", None)
    if packet is _aten._to_copy and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
        return torch.empty_like(args[0], device="cpu", dtype=kwargs.get("dtype"))
    if packet is _aten.copy_ and args[1].is_meta and not args[0].is_meta:
        return args[0]
    return func(*args, **kwargs)


def apart(run: Callable[[], Any], within: AbstractContextManager[Any] | None = None) -> Any:
    """In a thread of its own, without gradients: within an operator's dispatch torch passes by vmap."""

    def compute() -> Any:
        with torch.no_grad(), within or contextlib.nullcontext():
            return run()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compute).result()


@contextlib.contextmanager
def watched(fake: Any = None, watch: Watch | None = None) -> Iterator[Watch]:
    """Watch all operators inside. With fake tensors, the code of tree attention's operators runs, too.

    Args:
        fake: the FakeTensorMode to run in; without one, operators run as they are (on meta tensors).
        watch: is told of each operator.
    """
    watch = watch or Watch()

    def synchronize(_: Any = None) -> None:
        watch.synchronizations["synchronize", _site()] += 1

    with (
        mock.patch.object(torch.cuda, "synchronize", synchronize),
        _Mode(watch) if fake is None else _faked(fake, watch),
    ):
        yield watch


@contextlib.contextmanager
def _faked(fake: Any, watch: Watch) -> Iterator[None]:
    plain = fake.dispatch
    attention = (torch.ops.mtr.tree_attention.default, torch.ops.mtr.tree_attention_backward.default)

    def dispatch(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in attention:
            return apart(lambda: func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs), fake)
        return watch.call(func, args, kwargs, lambda a, k: plain(func, types, a, k))

    fake.dispatch = dispatch
    try:
        with fake:
            yield
    finally:
        del fake.dispatch
