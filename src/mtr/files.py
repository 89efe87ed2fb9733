"""Strict JSON, files that are replaced atomically, and checksums."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STEERING = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls that JSON leaves as they are, marks that reorder text, and halves of surrogate pairs."""


def write_json(path: Path | None, value: Any) -> str:
    """Strict JSON, to a file (indented) or as one line: numbers that are not finite become null, and characters that
    would steer a terminal are escaped.
    """
    text = json.dumps(_finite(value), indent=None if path is None else 2, ensure_ascii=False, allow_nan=False)
    text = _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    if path is not None:
        with written_whole(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    return text


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write in place of another one, which it replaces at the end; if anything fails, nothing is changed.

    Of a link the file that it names is replaced, and keeps its permissions. The folder is made if need be.

    Yields:
        A path with the same suffix, beside the file.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem[:40]}-{os.getpid()}.partial{path.suffix}")
    partial.unlink(missing_ok=True)  # it may be a link
    try:
        yield partial
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_file(path: Path, text: str) -> None:
    """Replace a file atomically: readers, and a killed process, leave the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:  # a full disk
        partial.unlink(missing_ok=True)
        raise


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of(text: str) -> str:
    """The checksum that a file with this text will have."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
