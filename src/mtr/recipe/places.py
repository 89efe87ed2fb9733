"""Where a key of a recipe stands in its file, so that an error names what an editor can jump to.

    recipe.yaml:12:3: unknown key 'training.learnin_rate', did you mean 'learning_rate'?

Lines and columns are counted from 1. What an override says stands nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mtr.errors import UserError
from mtr.recipe.plain_yaml import compose_file

Keys = Sequence[str]
_WRITTEN_AS: dict[tuple[str, ...], Keys] = {("data", "eval_fraction"): ("data", "eval")}
"""A key whose value may be given under another one."""
_KEY = re.compile(r"[a-z_]+(\.\w+)*(?=[: ])")


@dataclass(frozen=True)
class Place:
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.line}:{self.column}"


@dataclass(frozen=True)
class Places:
    """Of what a file and overrides say."""

    root: Node | None = None
    """Of the file; None: there is none."""
    overridden: Sequence[Keys] = ()
    _children: dict[int, dict[str, tuple[Node, Node]]] = field(default_factory=dict)
    """Node of the key and of the value by key, for each node that was looked into."""

    def of_key(self, keys: Keys) -> Place | None:
        """Of a key, or of the nearest section around it that is there; None if an override says it."""
        return self._of(keys, value=False)

    def of_value(self, keys: Keys) -> Place | None:
        """As `of_key`, but of the value where that is a plain one."""
        return self._of(keys, value=True)

    def names(self, keys: Keys) -> bool:
        """Whether these begin with a key that the file or an override has."""
        return bool(self._find(keys)[0]) or self._is_overridden(keys, 0)

    def _of(self, keys: Keys, value: bool) -> Place | None:
        depth, key_node, value_node = self._find(keys)
        if self._is_overridden(keys, depth):
            return None
        if depth < len(keys) and tuple(keys) in _WRITTEN_AS:
            return self._of(_WRITTEN_AS[tuple(keys)], value)
        is_written = isinstance(value_node, ScalarNode) and (value_node.value or value_node.style)
        node = value_node if value and is_written else key_node
        return Place(node.start_mark.line + 1, node.start_mark.column + 1) if node else Place(1, 1)

    def _is_overridden(self, keys: Keys, depth: int) -> bool:
        """Whether an override says this key, one around it, or all that is below it.

        Args:
            depth: of these keys, how many the file has.
        """
        keys = list(keys)
        for override in map(list, self.overridden):
            if keys[: len(override)] == override or (depth < len(keys) and override[: len(keys)] == keys):
                return True
        return False

    def _find(self, keys: Keys) -> tuple[int, Node | None, Node | None]:
        """How many of the keys there are, and the nodes of the last one of them."""
        depth, key_node, value_node = 0, self.root, self.root
        for key in keys:
            found = self._below(value_node).get(key) if value_node else None
            if found is None and (key != "0" or isinstance(value_node, SequenceNode)):
                break  # else the short form of a list of one
            key_node, value_node = found or (key_node, value_node)
            depth += 1
        return depth, key_node, value_node

    def _below(self, node: Node) -> dict[str, tuple[Node, Node]]:
        if id(node) not in self._children:
            below: dict[str, tuple[Node, Node]] = {}
            if isinstance(node, MappingNode):
                below = {key.value: (key, value) for key, value in node.value if isinstance(key, ScalarNode)}
            elif isinstance(node, SequenceNode):
                below = {str(i): (item, item) for i, item in enumerate(node.value)}
            self._children[id(node)] = below
        return self._children[id(node)]


def leading_keys(text: str) -> list[str]:
    """The key that a text begins with, in its parts."""
    found = _KEY.match(text)
    return found[0].split(".") if found else []


def overridden_keys(overrides: Sequence[str]) -> list[list[str]]:
    return [override.partition("=")[0].split(".") for override in overrides]


OVERRIDE = "override"
"""What stands for the place of what an override says."""


def at(name: object, place: Place | None) -> str:
    """`recipe.yaml:12:3`, or that an override of the recipe says it."""
    return f"{name}:{place}" if place else f"{name}: {OVERRIDE}"


@contextmanager
def located(file: Path, overrides: Sequence[str] | None) -> Iterator[None]:
    """A UserError about a key of a recipe that was read says where the key stands: `recipe.yaml:4:10: ...`."""
    try:
        yield
    except UserError as error:
        keys = error.key.split(".") if error.key else leading_keys(str(error))
        if type(error) is not UserError:
            raise
        try:
            places = Places(compose_file(file)[1], overridden_keys(overrides or []))
        except (OSError, ValueError):  # it was read, and is gone now
            raise error from None
        if not places.names(keys):
            raise
        raise UserError(f"{at(file, places.of_value(keys))}: {error}") from None
