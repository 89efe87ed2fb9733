"""The masks of one pack, each made once and only if asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from mtr.tree.mask import Span, Tree

Backend = Literal["flex", "varlen", "segment", "sdpa", "eager"]


BACKENDS: tuple[Backend, ...] = get_args(Backend)


class TreeAttention:
    """The masks of one pack for all layers, each made once and only if asked for."""

    def __init__(self, tree: Tree, spans: list[Span], backend: Backend) -> None:
        self.tree = tree
        self.spans = spans
        self.backend = backend
        self.calls = 0
        self._made: dict[tuple[Any, ...], Any] = {}

    def make(self, build: Callable[..., Any], *arguments: Any) -> Any:
        key = (build, *arguments)
        if key not in self._made:
            self._made[key] = build(self.tree, *arguments)
        return self._made[key]
