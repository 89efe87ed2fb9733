"""What attention layers are handed of a pack: its tree, and masks or plans made from it on demand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mtr.recipe.sections import Backend
from mtr.tree.mask import Span, Tree


class TreeAttention:
    """The masks and plans of one pack for all layers, each made at most once."""

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
