"""Weights known by what is in their files, without reading them whole.

Of each safetensors file: its size, its header (names, dtypes, shapes, places) and bytes from all over each tensor.
Another model with the same shapes differs in nearly every value, so it is noticed; one changed number may not be.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtr.errors import UserError, one_line

_SAMPLES = 8
"""Places in a tensor at which bytes are read, evenly spaced, the first and the last among them."""
_BYTES = 32
"""Read at each of them."""
_MOST_HEADER = 100_000_000
"""Bytes; the format allows no more."""


def fingerprint_weights(files: Sequence[Path]) -> dict[str, Any]:
    """By name of the file: `bytes`, and the SHA-256 of its `header` and of its `samples`.

    Raises:
        UserError: a file is not safetensors.
    """
    return {path.name: _fingerprint(path) for path in files}


def differing_weights(saved: Any, now: dict[str, Any]) -> list[str]:
    """What differs, one text for each file; a file that only one side has is one of them."""
    if not isinstance(saved, dict):
        return ["nothing readable is saved of the weights"]
    if saved.keys() != now.keys():
        return [f"their files are {', '.join(now) or 'none'}, and were {', '.join(map(str, saved)) or 'none'}"]
    words = {"bytes": "size", "header": "names or shapes of tensors", "samples": "values"}
    changed = []
    for name, found in now.items():
        was = saved[name] if isinstance(saved[name], dict) else {}
        kinds = [word for key, word in words.items() if was.get(key) != found[key]]
        if kinds:
            changed.append(f"{name} has other {' and '.join(kinds)}")
    return changed


def _fingerprint(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, _MOST_HEADER))
            header = json.loads(text)
            samples, start, size = hashlib.sha256(), 8 + length, os.fstat(file.fileno()).st_size
            for name in sorted(header.keys() - {"__metadata__"}):
                first, end = header[name]["data_offsets"]
                for at in _places(first, end):
                    file.seek(start + at)
                    samples.update(file.read(min(_BYTES, end - at)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors file that can be read: {one_line(error)}") from None
    return {"bytes": size, "header": hashlib.sha256(text).hexdigest(), "samples": samples.hexdigest()}


def _places(first: int, end: int) -> list[int]:
    """Where to read in a tensor: all of a small one, else at evenly spaced places."""
    last = max(first, end - _BYTES)
    if end - first <= _SAMPLES * _BYTES:
        return list(range(first, end, _BYTES))
    return [first + (last - first) * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
