"""YAML as plain data, in bounded time and memory: text, numbers, booleans, null, lists and mappings.

What is refused can only be a mistake or an attack: deep nesting, aliases that multiply or contain themselves, tags,
duplicate keys, integers of many digits. Dates (2026-01-31) and sexagesimal numbers (1:30) stay text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from mtr.errors import one_line

MOST_BYTES = 1 << 19
"""Of a file, and of what it stands for once every alias is written out."""
MOST_DEPTH = 50
_OVERHEAD = 32
"""Bytes that a value counts for besides its text."""
_MOST_DIGITS = 40
_TAG = "tag:yaml.org,2002:"
_MENDS = {
    r"found character '\\t'": "indent with spaces, which YAML takes alone",
    r"found character '[@`%]'": "put the value in quotes",
    r"double-quoted scalar.*escape": "in double quotes a backslash begins an escape; use single quotes",
    r"mapping values are not allowed": "the line is indented otherwise than those before it, or a text with ': ' needs "
    "quotes",
}
"""What to do about problems of YAML, in PyYAML's words."""


class _Loader(yaml.SafeLoader):
    """Measures each node as it is composed, before anything is built from it."""

    def __init__(self, text: str, factor: int) -> None:
        super().__init__(text)
        self._most_bytes, self._most_depth = factor * MOST_BYTES, factor * MOST_DEPTH
        self._depth = 0
        self._bytes = 0
        self._measures: dict[Node, tuple[int, int]] = {}
        """Bytes and depth of each complete node, its aliases written out."""

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        is_alias, mark = self.check_event(yaml.AliasEvent), self.get_mark()
        self._depth += 1
        if self._depth > self._most_depth:
            raise _refused(f"nested more than {self._most_depth} deep", mark)
        node = super().compose_node(parent, index)
        assert node is not None  # there was an event
        if is_alias and node not in self._measures:
            raise _refused("an alias inside the value that it stands for", mark)
        if not is_alias:
            self._measures[node] = self._measure(node)
        bytes_of_node, depth = self._measures[node]
        self._depth -= 1
        if self._depth + depth > self._most_depth:
            raise _refused(f"nested more than {self._most_depth} deep", mark)
        self._bytes += bytes_of_node if is_alias else _own_bytes(node)
        if self._bytes > self._most_bytes:
            raise _refused(f"more than {self._most_bytes:,} bytes with every alias written out", mark)
        return node

    def _measure(self, node: Node) -> tuple[int, int]:
        inner = [] if isinstance(node, ScalarNode) else node.value
        if isinstance(node, MappingNode):
            inner = [item for pair in inner for item in pair]
        measures = [self._measures[item] for item in inner]
        size = _own_bytes(node) + sum(size for size, _ in measures)
        return size, 1 + max((depth for _, depth in measures), default=0)


def _refused(problem: str, mark: yaml.Mark) -> ConstructorError:
    return ConstructorError(None, None, problem, mark)


def _own_bytes(node: Node) -> int:
    return _OVERHEAD + (len(node.value) if isinstance(node, ScalarNode) else 0)


def _mapping(loader: _Loader, node: Node) -> dict[Any, Any]:
    if not isinstance(node, MappingNode):
        raise _refused("not a mapping", node.start_mark)
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            raise _refused("a key must be plain text", key.start_mark)
        if key.value in lines:
            raise _refused(f"duplicate key {key.value!r}, which is on line {lines[key.value]} too", key.start_mark)
        lines[key.value] = key.start_mark.line + 1
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


def _number(loader: _Loader, node: ScalarNode) -> Any:
    text = node.value
    if ":" in text:
        return text
    if node.tag != f"{_TAG}int":
        return loader.construct_yaml_float(node)
    if len(text) > _MOST_DIGITS:
        raise _refused(f"an integer of {len(text):,} digits", node.start_mark)
    if re.fullmatch(r"[-+]?0[0-7_]+", text):
        raise _refused(
            f"{text} is octal in YAML 1.1 and decimal in 1.2; leave out the leading 0, or quote it", node.start_mark
        )
    return loader.construct_yaml_int(node)


def _text(loader: _Loader, node: ScalarNode) -> str:
    text: str = loader.construct_yaml_str(node)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refused("half of a surrogate pair, which no text may hold", node.start_mark) from None
    return text


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {
    tag: yaml.SafeLoader.yaml_constructors[tag]
    for tag in (*(f"{_TAG}{name}" for name in ("null", "bool", "seq")), None)
}
_Loader.add_constructor(f"{_TAG}map", _mapping)
_Loader.add_constructor(f"{_TAG}str", _text)
_Loader.add_constructor(f"{_TAG}int", _number)
_Loader.add_constructor(f"{_TAG}float", _number)


class NotPlainError(ValueError):
    """What a text says is not plain YAML, in one short line."""

    def __init__(self, problem: str, line: int, column: int) -> None:
        """
        Args:
            line, column: of the problem, counted from 1.
        """
        super().__init__(f"{problem}, at line {line}, column {column}")
        self.problem, self.line, self.column = problem, line, column


def parse_yaml(text: str, factor: int = 1) -> Any:
    """
    Args:
        factor: by which the limits are raised.

    Raises:
        ValueError: the text is not plain YAML; the message is one short line.
    """
    return compose(text, factor)[0]


def compose(text: str, factor: int = 1) -> tuple[Any, Node | None]:
    """The value of a text, and the node that it was built from, which knows its lines and columns.

    Raises:
        ValueError: as `parse_yaml`.
    """
    if len(text) > factor * MOST_BYTES:
        raise ValueError(f"more than {factor * MOST_BYTES:,} bytes")
    try:
        loader = _Loader(text, factor)
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except yaml.YAMLError as error:
        raise _problem(error, text) from None
    except (ValueError, LookupError):
        raise ValueError("a value does not fit its tag, such as `!!int x`") from None


def _problem(error: yaml.YAMLError, text: str) -> ValueError:
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark or error.context_mark):
        said = one_line(ValueError(", ".join(part for part in (error.context, error.problem) if part)))
        mends = [f"; {mend}" for words, mend in _MENDS.items() if re.search(words, said)]
        return NotPlainError(said + "".join(mends[:1]), mark.line + 1, mark.column + 1)
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        said = f"the character U+{int(error.character):04X} is not allowed"
        return NotPlainError(said, before.count("\n") + 1, len(before) - before.rfind("\n"))
    return ValueError(one_line(error))


def read_yaml(path: Path, factor: int = 1) -> Any:
    """The value of a file.

    Args:
        factor: by which the limits are raised.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text, or not plain YAML.
    """
    return compose_file(path, factor)[0]


def compose_file(path: Path, factor: int = 1) -> tuple[Any, Node | None]:
    """The value of a file, and the node that it was built from.

    Args:
        factor: by which the limits are raised.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text, or not plain YAML.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # reading a pipe or a device may never end
        raise OSError("not a regular file; save it as one")
    with path.open("rb") as file:
        content = file.read(factor * MOST_BYTES + 1)
    if len(content) > factor * MOST_BYTES:
        raise ValueError(f"more than {factor * MOST_BYTES:,} bytes")
    return compose(content.decode("utf-8-sig"), factor)
