"""Where a transformers model comes to call what follows the tree: at functions that its modelling module looks up.

    mixer's own forward  ->  causal_conv1d_fn(..., tree=TreeHandle)  ->  convolution over the tree
                             the same without a tree                 ->  the function that was there

The decoder hands `tree` on to its mixers as it does to attention, and they hand it on to these functions. Without a
tree, in generation and where each turn has a row of its own, nothing changes.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from mtr.attention.masks import TreeAttention, TreeHandle
from mtr.errors import UserError

Function = Callable[..., Any]
Arguments = dict[str, Any]
"""Of one call by their names, defaults included."""


class Seam(NamedTuple):
    """A function of a modelling module, and what is computed in its place over a tree."""

    name: str
    over_tree: Callable[[Function, Arguments, TreeAttention], Any]
    """(the function that was there, its arguments, the pack) -> what the function returns"""
    needs: tuple[str, ...] = ()
    """Parameters without which it is another function of the same name."""


class Kind(NamedTuple):
    """A kind of recurrent mixer."""

    name: str
    mixers: tuple[str, ...]
    """How names of its classes end."""
    seams: tuple[Seam, ...]
    """Functions of the module that the class is in."""
    forward: Callable[[Function, Arguments, TreeAttention], Any] | None = None
    """In place of the mixer's forward, where its recurrence is no function of its own."""


def follow_tree(model: nn.Module, kinds: Iterable[Kind]) -> None:
    """Let the recurrent layers of a model follow the tree that the decoder is handed. Once or more than once.

    Raises:
        UserError: this release of transformers has moved what a mixer calls.
    """
    kinds = tuple(kinds)
    for mixer in {type(module) for module in model.modules()}:
        known = [kind for kind in kinds if mixer.__name__.endswith(kind.mixers)]
        module = sys.modules.get(mixer.__module__)
        if not known or module is None:
            continue
        missing = {kind.name: _missing(kind, mixer, module) for kind in known}
        if all(missing.values()):
            raise UserError(_moved(mixer, missing))
        for kind in known:
            if not missing[kind.name]:
                _install(kind, mixer, module)


def _missing(kind: Kind, mixer: type, module: ModuleType) -> list[str]:
    """What a kind needs and a mixer does not have."""
    return [
        f"{seam.name}({', '.join(seam.needs)})" if hasattr(module, seam.name) else seam.name
        for seam in kind.seams
        if not set(seam.needs) <= set(_parameters(getattr(module, seam.name, None))) or not hasattr(module, seam.name)
    ]


def _parameters(function: Function | None) -> Iterable[str]:
    return inspect.signature(inspect.unwrap(function)).parameters if callable(function) else ()


def _moved(mixer: type, missing: dict[str, list[str]]) -> str:
    import transformers

    needed = " or ".join(f"{', '.join(names)} ({kind})" for kind, names in missing.items())
    return (
        f"{mixer.__name__} of transformers {transformers.__version__} does not call {needed} of {mixer.__module__}, "
        "where its state would be taken along the tree; use another version of transformers, or set "
        "sequence.strategy to per_turn"
    )


def _install(kind: Kind, mixer: type, module: ModuleType) -> None:
    for seam in kind.seams:
        function = getattr(module, seam.name)
        if not hasattr(function, "mtr_original"):
            setattr(module, seam.name, _following(function, seam.over_tree))
    forward: Function = mixer.forward  # type: ignore[attr-defined]
    if kind.forward is not None and not hasattr(forward, "mtr_original"):
        mixer.forward = _following(forward, kind.forward)  # type: ignore[attr-defined]


def _following(original: Function, over_tree: Callable[[Function, Arguments, TreeAttention], Any]) -> Function:
    signature = inspect.signature(inspect.unwrap(original))

    @functools.wraps(original)
    def call(*arguments: Any, tree: TreeHandle | None = None, **options: Any) -> Any:
        if tree is None:
            return original(*arguments, **options)
        return follow(tree, arguments, options)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def follow(tree: TreeHandle, arguments: tuple[Any, ...], options: Arguments) -> Any:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        with _without_autocast(arguments):
            return over_tree(original, bound.arguments, tree.entered())

    call.mtr_original = original  # type: ignore[attr-defined]
    return call


def _without_autocast(arguments: Iterable[Any]) -> AbstractContextManager[Any]:
    """States are sums of many terms: what is computed with them stays in the type it was given in or a wider one."""
    kind = next((x.device.type for x in arguments if isinstance(x, torch.Tensor)), "cpu")
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
