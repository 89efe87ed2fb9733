"""JSON text to values, without what Python's parser passes over: keys given twice, and nesting that later code cannot
follow.
"""

from __future__ import annotations

import hashlib
import json
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

MOST_NESTING = 200
"""Lists and objects inside each other; rendering and copying recurse, and Python allows about 1,000 calls."""
MOST_ROW = 1 << 26
"""Bytes of one row's text; a longer one is not read, so that a row takes bounded memory and time."""

MOST_BRACKETS = 2_000_000
"""Brackets and braces of one row's text, each of which may become an object of 64 bytes."""


class NestedTooDeeplyError(ValueError):
    """More than MOST_NESTING lists and objects inside each other."""

    def __init__(self) -> None:
        super().__init__("nested too deeply")


class RepeatedKeys(dict[str, Any]):
    """An object in whose text a key is given twice, in it or inside it; the last one counts."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    An object in which a key is given twice, anywhere inside, is RepeatedKeys; so are such objects in a list.

    Raises:
        ValueError: not JSON.
        NestedTooDeeplyError: more than MOST_NESTING levels.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    try:
        value = _strict.decode(text)
    except _RepeatedKeyError:
        value = _marked(_lenient.decode(text))
    except RecursionError:
        raise NestedTooDeeplyError from None
    if text.count("{") + text.count("[") > MOST_NESTING and is_deep(value):
        raise NestedTooDeeplyError
    return value


def hash_value(value: Any) -> str:
    """SHA-256 of a row, of any format: equal rows have the same, whatever the order of their keys."""
    try:
        text = json.dumps(value, sort_keys=True, default=_spelled)
    except (TypeError, RecursionError):  # keys that cannot be sorted, or too deep
        text = str(value)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _spelled(value: Any) -> str:
    """Values of typed formats, without the address in memory that others may show."""
    return str(value) if isinstance(value, (bytes, date, time, timedelta, Decimal)) else type(value).__name__


def is_deep(value: Any) -> bool:
    """Whether more than MOST_NESTING lists and objects are inside each other."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MOST_NESTING):
        level = [child for parent in level for child in _children(parent) if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


class _RepeatedKeyError(Exception):
    """Raised out of the parser where it would forget a value."""


def _refuse(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        raise _RepeatedKeyError
    return parsed


def _mark(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    return parsed if len(parsed) == len(pairs) else RepeatedKeys(parsed)


_strict = json.JSONDecoder(object_pairs_hook=_refuse)
_lenient = json.JSONDecoder(object_pairs_hook=_mark)


def _marked(value: Any) -> Any:
    """The value, or each object of a list, marked if it has a marked object inside."""
    if isinstance(value, list):
        return [_marked(item) if isinstance(item, dict) else item for item in value]
    level = [value]
    while level:
        if any(isinstance(item, RepeatedKeys) for item in level):
            return RepeatedKeys(value)
        level = [child for parent in level for child in _children(parent) if isinstance(child, (dict, list))]
    return value
