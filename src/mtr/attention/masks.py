"""What attention layers are handed of a pack: its tree, and masks or plans made from it on demand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mtr.tree.mask import Span, Tree


class TreeAttention:
    """The masks and plans of one pack for all layers, each made at most once."""

    def __init__(self, tree: Tree, spans: Sequence[Span], backend: str) -> None:
        self.tree = tree
        self.spans = distinct(spans)
        self.backend = backend
        self.calls = 0
        """Of layers that follow the tree so far."""
        self._made: dict[tuple[Any, ...], Any] = {}

    def make(self, build: Callable[..., Any], *arguments: Any) -> Any:
        key = (build, *arguments)
        if key not in self._made:
            self._made[key] = build(self.tree, *arguments)
        return self._made[key]


def distinct(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The spans of a model's layers, each once: a layer knows its own by the index in here."""
    return tuple(dict.fromkeys(spans))


class TreeHandle:
    """Names a `TreeAttention` by a tensor, which a compiled graph takes as an input and keeps for its backward.

    The pack lives as long as the tensor does, wherever it is kept: nothing of a pack is a constant of a graph.
    """

    def __init__(self, attention: TreeAttention) -> None:
        number = next(_numbers)
        self.tensor = torch.tensor(number)
        self.tensor.__dict__["attention"] = _alive[number] = attention
        self.backend = attention.backend

    def entered(self) -> TreeAttention:
        """The pack, for a layer that follows its tree, which is counted."""
        found = self.attention(self.tensor)
        found.calls += 1
        return found

    @staticmethod
    def attention(tensor: Tensor) -> TreeAttention:
        """
        Raises:
            RuntimeError: the pack is gone.
        """
        found = _alive.get(int(tensor.item()))
        if found is None:
            raise RuntimeError("attention is asked for a pack that no longer exists")
        return found


_numbers = itertools.count(1)
_alive: WeakValueDictionary[int, TreeAttention] = WeakValueDictionary()
