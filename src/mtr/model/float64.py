"""Computing in float64 throughout, also where a model's code asks for float32: for comparisons.

Norms, softmaxes, rotary embeddings and recurrences of transformers' models cast to float32 and back, whatever the dtype
of the weights. Two exact ways to compute the same then differ by 1e-7, or by 1e-4 behind a recurrence or a router, and
a small fault hides below that. Without these casts they differ by 1e-13.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]


class keep_float64:  # noqa: N801
    """Within it, a cast to float32 is one to float64, and what is made in float32 is made in float64.

    For models whose weights are float64; nothing else may run beside them. With gradient checkpointing a backward runs
    layers again, and autograd puts such a mode aside: they are run within it all the same.
    """

    def __init__(self) -> None:
        self._mode = _Float64()
        self._hook: Any = None
        self._checkpointed: dict[nn.Module, Function] = {}

    def __enter__(self) -> None:
        self._hook = register_module_forward_pre_hook(self._before)
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)  # type: ignore[no-untyped-call]
        self._hook.remove()
        for module, checkpoint in self._checkpointed.items():
            module._gradient_checkpointing_func = checkpoint  # type: ignore[assignment]

    def _before(self, module: nn.Module, _: Any) -> None:
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and module not in self._checkpointed:
            self._checkpointed[module] = checkpoint
            module._gradient_checkpointing_func = functools.partial(self._checkpoint, checkpoint)  # type: ignore[assignment]

    def _checkpoint(self, checkpoint: Function, forward: Function, *arguments: Any) -> Any:
        def run(*again: Any) -> Any:
            if torch._C._len_torch_function_stack():
                return forward(*again)
            with self._mode:
                return forward(*again)

        return checkpoint(run, *arguments)


class _Float64(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.float:
            function = Tensor.double
        if any(x is torch.float32 for x in args) or kwargs.get("dtype") is torch.float32:
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in kwargs.items()}
        return function(*args, **kwargs)
