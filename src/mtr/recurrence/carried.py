"""The tree for mixers that are handed no keyword arguments: it comes in the place of the mask of padding.

    decoder(tree=...)  ->  layer(attention_mask=tree)  ->  mixer(attention_mask=tree)  ->  scan(...)
      puts it there          as it is                       takes it out                     looks it up meanwhile

Every layer is handed that mask and hands it on, and a pack has none. An argument is there again when checkpointing runs
a layer a second time, in the backward and on another thread; what the decoder leaves anywhere else is not.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from mtr.attention.masks import TreeHandle
from mtr.errors import UserError

RECURRENT = "linear_attention"
"""What transformers calls layers with a state, where masks are made by the type of a layer."""


class _Running(threading.local):
    tree: TreeHandle | None = None
    """Of the mixer that runs on this thread."""
    count = 0
    """Of mixers that ran with a tree."""


_running = _Running()


def carried_tree() -> TreeHandle | None:
    """For functions that a mixer calls: the tree that came to it in the place of a mask."""
    return _running.tree


def sends_tree(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a decoder, which hands its tree to its layers as their mask.

    Raises:
        UserError: when called: no mixer has been handed it.
    """

    @functools.wraps(forward)
    def call(self: Any, *arguments: Any, tree: TreeHandle | None = None, **options: Any) -> Any:
        if tree is None:
            return forward(self, *arguments, **options)
        assert options.get("attention_mask") is None, "a pack has no mask of padding"
        options["attention_mask"] = _as_mask(tree, self.config)
        before = _running.count
        out = forward(self, *arguments, tree=tree, **options)
        if _running.count == before and any(hasattr(type(part).forward, "takes_tree") for part in self.modules()):
            raise UserError(_lost(type(self).__name__))
        return out

    return call


def _lost(decoder: str) -> str:
    import transformers

    return (
        f"{decoder} of transformers {transformers.__version__} does not hand its attention_mask on to its recurrent "
        "layers, by which they would be told the tree; use another version of transformers, or set sequence.strategy "
        "to per_turn"
    )


def _as_mask(tree: TreeHandle, config: Any) -> Any:
    """As a decoder takes masks that are made already: by type, unless all layers are of one."""
    types = set(config.layer_types)
    return tree if types == {RECURRENT} else {"full_attention": None} | dict.fromkeys(types) | {RECURRENT: tree}


def takes_tree(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a mixer, during which the functions that it calls find the tree."""

    @functools.wraps(forward)
    def call(self: Any, *arguments: Any, tree: TreeHandle | None = None, **options: Any) -> Any:
        if isinstance(mask := options.get("attention_mask"), TreeHandle):
            options["attention_mask"], tree = None, mask
        return run(tree, self, *arguments, **options) if tree is not None else forward(self, *arguments, **options)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(tree: TreeHandle, *arguments: Any, **options: Any) -> Any:
        before, _running.tree = _running.tree, tree
        _running.count += 1
        try:
            return forward(*arguments, tree=tree, **options)
        finally:
            _running.tree = before

    call.takes_tree = True  # type: ignore[attr-defined]
    return call
