"""CUDA tensors with values, on a machine without CUDA: their memory is the host's, and operators compute there.

    x = torch.randn(8, device="cuda")   CUDA for autograd, torch.compile, Inductor and the device checks of this module
    x.data_ptr()                        host memory, which an interpreted kernel can read

Each operator that reaches the CUDA backend is given CPU tensors that share its arguments' memory, and its results are
CUDA tensors again: views of the arguments where they are views. Streams, events and asynchrony do not exist.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from support.cuda import stub

CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten
_MIXES = {
    _aten.copy_,
    _aten._foreach_copy_,
    _aten.index,
    _aten.index_put,
    _aten.index_put_,
    _aten._index_put_impl_,
}
"""Operators that CUDA runs with tensors of both devices."""

_libraries: list[torch.library.Library] = []


def activate() -> None:
    """Once a process, after `stub.load` and `stub.pretend`."""
    stub.load_library("host_memory.cpp")
    library: Any = torch.library.Library
    everything, aten = library("_", "IMPL"), library("aten", "IMPL")
    _libraries.extend((everything, aten))
    everything.fallback(_on_host, "CUDA")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and _computes_on_any_device(name):
            op = _operator(name)
            if not any(one.alias_info is not None and not one.alias_info.is_write for one in op._schema.returns):
                aten.m.impl(name.removeprefix("aten::"), "CUDA", functools.partial(_on_host, op), False)
    torch.Tensor.pin_memory = lambda x, *_: x  # type: ignore[method-assign]  # the memory is the host's
    torch._C._dynamo.guards._empty_strided_cuda = _empty_strided  # type: ignore[attr-defined]


def _empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=CUDA)


def _computes_on_any_device(name: str) -> bool:
    """Written for all devices, it would look for a CUDA kernel further down; views have none to look for."""
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
    return found


def _operator(name: str) -> Any:
    packet, _, overload = name.removeprefix("aten::").partition(".")
    return getattr(getattr(_aten, packet), overload or "default")


def _on_host(op: Any, *args: Any, **kwargs: Any) -> Any:
    """
    Raises:
        RuntimeError: tensors of both devices, where CUDA would refuse them.
        NotImplementedError: the operator gives an argument another shape.
    """
    memory = torch.ops.mtr_host_memory
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_device = {id(x): x for x in given if x.device.type == "cuda"}
    if op.overloadpacket not in _MIXES and on_device and any(id(x) not in on_device and x.dim() for x in given):
        raise RuntimeError(f"Expected all tensors to be on the same device: {op}")
    lowered = {key: memory.as_cpu(x) for key, x in on_device.items()}
    raised = {id(lowered[key]): x for key, x in on_device.items()}
    owner = {x.untyped_storage().data_ptr(): raised[id(x)] for x in lowered.values() if x.untyped_storage().nbytes()}
    stays = {id(x) for x in given if id(x) not in on_device}
    to_host = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"

    def lower(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return lowered.get(id(x), x) if isinstance(x, Tensor) else x

    def lift(x: Any) -> Any:
        if not isinstance(x, Tensor) or id(x) in stays or to_host:
            return x
        if id(x) in raised:
            if (raised[id(x)].shape, raised[id(x)].stride()) != (x.shape, x.stride()):
                raise NotImplementedError(f"{op} gives its argument another shape")
            return raised[id(x)]
        base = owner.get(x.untyped_storage().data_ptr())
        return memory.as_cuda(x) if base is None else memory.view_of(base, x)

    host_args, host_kwargs = tree_map(lower, (args, kwargs))
    return tree_map(lift, op(*host_args, **host_kwargs))
