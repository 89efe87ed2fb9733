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
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import nn

from mtr.attention.autocast import without_autocast
from mtr.attention.masks import TreeAttention, TreeHandle
from mtr.attention.model_parts import decoder
from mtr.errors import UserError
from mtr.recurrence.carried import carried_tree, sends_tree

Function = Callable[..., Any]
Arguments = dict[str, Any]
"""Of one call by their names, defaults included."""
OverTree = Callable[[Function, Arguments, TreeAttention], Any]
"""(the function that was there, its arguments, the pack) -> what the function returns"""


class Seam(NamedTuple):
    """A function of a modelling module, and what is computed in its place over a tree."""

    name: str
    over_tree: OverTree
    needs: tuple[str, ...] = ()
    """Parameters without which it is another function of the same name."""
    optional: bool = False
    """Whether there are modules without it."""


class Kind(NamedTuple):
    """A kind of recurrent mixer."""

    name: str
    mixers: tuple[str, ...]
    """How names of its classes end."""
    seams: tuple[Seam, ...]
    """Functions of the module that the class is in."""
    forward: OverTree | None = None
    """In place of the mixer's forward, where its recurrence is no function of its own."""
    around: Callable[[Function], Function] | None = None
    """Around the mixer's forward, where `forward` would replace too much."""
    carried: bool = False
    """Whether the tree comes in the place of a mask, because models do not hand keyword arguments on to the seams."""

    def covers(self, mixer: type) -> bool:
        """By its name; whether it has the seams is another question."""
        return mixer.__name__.endswith(self.mixers)


def is_of(mixer: type, kind: Kind) -> bool:
    """Whether a class is a mixer of a kind, with all that the kind needs."""
    module = sys.modules.get(mixer.__module__)
    return kind.covers(mixer) and module is not None and not _missing(kind, mixer, module)


def follow_tree(model: nn.Module, kinds: Iterable[Kind]) -> None:
    """Let the recurrent layers of a model follow the tree that the decoder is handed. Once or more than once.

    Raises:
        UserError: this release of transformers has moved what a mixer calls.
    """
    kinds = tuple(kinds)
    for mixer in {type(module) for module in model.modules()}:
        known = [kind for kind in kinds if kind.covers(mixer)]
        module = sys.modules.get(mixer.__module__)
        if not known or module is None:
            continue
        missing = {kind.name: _missing(kind, mixer, module) for kind in known}
        if all(missing.values()):
            raise UserError(_moved(mixer, missing))
        for kind in known:
            if not missing[kind.name]:
                _install(kind, mixer, module)
                _followed.add(mixer)
                if kind.carried:
                    _wrap(type(decoder(model)), sends_tree)


_followed: WeakSet[type] = WeakSet()


def follows_tree(module: nn.Module) -> bool:
    """Whether a module is a mixer of a class that was switched."""
    return type(module) in _followed


def _missing(kind: Kind, mixer: type, module: ModuleType) -> list[str]:
    """What a kind needs and a mixer does not have."""
    return [
        f"{seam.name}({', '.join(seam.needs)})" if hasattr(module, seam.name) else seam.name
        for seam in kind.seams
        if not (hasattr(module, seam.name) or seam.optional)
        or not set(seam.needs) <= set(_parameters(getattr(module, seam.name, None)))
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
        function = getattr(module, seam.name, None)
        if function is not None and not hasattr(function, "mtr_original"):
            setattr(module, seam.name, _following(on_any_device(function), _in_own_dtype(seam.over_tree)))
    if kind.forward is not None:
        _wrap(mixer, functools.partial(_following, over_tree=kind.forward))
    if kind.around is not None:
        _wrap(mixer, kind.around)


def _wrap(module: type, wrapper: Callable[[Function], Function]) -> None:
    """The forward of a class of modules, once."""
    forward: Function = module.forward  # type: ignore[attr-defined]
    if not hasattr(forward, "mtr_original"):
        wrapped: Any = wrapper(forward)
        wrapped.mtr_original = forward
        module.forward = wrapped  # type: ignore[attr-defined]


def on_any_device(function: Function) -> Function:
    """Where a package with CUDA kernels is installed, transformers calls these on a CPU, too, where none runs."""
    plain = inspect.unwrap(function)

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        given = (x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor))
        return (plain if all(x.device.type == "cpu" for x in given) else function)(*arguments, **options)

    return call


def _following(original: Function, over_tree: OverTree) -> Function:
    signature = inspect.signature(inspect.unwrap(original))

    @functools.wraps(original)
    def call(*arguments: Any, tree: TreeHandle | None = None, **options: Any) -> Any:
        tree = carried_tree() if tree is None else tree
        if tree is None:
            return original(*arguments, **options)
        return follow(tree, arguments, options)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def follow(tree: TreeHandle, arguments: tuple[Any, ...], options: Arguments) -> Any:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        return over_tree(original, bound.arguments, tree.entered())

    call.mtr_original = original  # type: ignore[attr-defined]
    return call


def _in_own_dtype(over_tree: OverTree) -> OverTree:
    """States are sums of many terms: what is computed with them stays in the type it was given in, or a wider one."""

    def run(original: Function, given: Arguments, pack: TreeAttention) -> Any:
        with without_autocast(next(x for x in given.values() if isinstance(x, torch.Tensor))):
            return over_tree(original, given, pack)

    return run
