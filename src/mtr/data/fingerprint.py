"""What the data of a run is, short enough for a checkpoint, so that a resumed run can tell whether it is the same.

    fingerprint(data) -> plain JSON, saved          differences(saved, fingerprint(data)) -> lines of text

Of what is read wholly, the whole content counts: the rows of JSON lines, the bytes of other files. Of what is mapped
into memory (Arrow folders, Hub data sets), the sizes, the number of rows, the fingerprint that `datasets` keeps, and a
sample of rows; of a stream, its first row. Neither the place of a file nor its time of modification counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtr.data.json_text import hash_value
from mtr.data.lines import CompressedLines, JsonLines
from mtr.data.mixture import Mixture, Opened, read_row
from mtr.data.stream import Stream
from mtr.data.tables import without_none
from mtr.errors import RowError

SAMPLED_ROWS = 256
"""Rows of a mapped table that are hashed, evenly spaced, the first and the last among them."""
_CONTENT = ("rows", "content", "sample", "own", "first")
"""What decides whether two sources are the same."""


def fingerprint(data: Mixture | Stream) -> dict[str, Any]:
    """What the data is, as plain JSON: a list of sources, in the order in which their rows are numbered.

    Takes no time for files, whose content is hashed when they are opened; of streams, the first row is read.
    """
    if isinstance(data, Stream):
        return {"sources": [_of_stream(stream, name) for stream, name, _ in data.sources]}
    return {"sources": [_of_source(source) for source in data.sources]}


def _of_stream(stream: Any, name: str) -> dict[str, Any]:
    first = next(iter(stream), None)
    return {"name": name, "first": hash_value(without_none(first))}


def _of_source(source: Opened) -> dict[str, Any]:
    """
    Keys: name; bytes and modified (ns since 1970) of its files; rows; and what is known of the content:
        content: SHA-256 of the checksums of its lines, or of the file's bytes.
        any_order: SHA-256 of the sorted checksums.
        sample, own: of a mapped table, SHA-256 of sampled rows, and the fingerprint of `datasets`.
    """
    rows = source.rows
    known = {"name": source.name, "bytes": rows.origin.bytes, "modified": rows.origin.modified, "rows": len(rows)}
    if isinstance(rows, (JsonLines, CompressedLines)):
        checksums = rows.lines.checksums.astype("<u4")
        return {**known, "content": _hash(checksums.tobytes()), "any_order": _hash(np.sort(checksums).tobytes())}
    if rows.origin.sha256 is not None:
        return {**known, "content": rows.origin.sha256}
    places = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED_ROWS)).astype(np.int64)).tolist()
    sampled = (read_row(rows, place) for place in places)
    sample = [hash_value(row.reason if isinstance(row, RowError) else row) for row in sampled]
    return {**known, "sample": _hash("".join(sample).encode()), "own": rows.origin.own}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def differences(saved: Any, now: Any) -> list[str]:
    """What changed between two fingerprints, one text for each changed source; none if the rows are the same.

    Args:
        saved: as a checkpoint holds it, damaged perhaps.
        now: from `fingerprint`.
    """
    before, after = _sources(saved), _sources(now)
    if before is None or after is None:
        return ["the record of the data in the checkpoint is damaged, so it cannot be told whether the data changed"]
    was, now_is = [_content(source) for source in before], [_content(source) for source in after]
    if was == now_is:
        return []
    return list(_changes(before, after))


def _sources(saved: Any) -> list[dict[str, Any]] | None:
    """The sources of a fingerprint; None if it is damaged."""
    listed = saved.get("sources") if isinstance(saved, dict) else None
    if not isinstance(listed, list) or not listed:
        return None
    whole = all(isinstance(s, dict) and isinstance(s.get("name"), str) and len(s) > 1 for s in listed)
    return listed if whole else None


def _content(source: dict[str, Any]) -> str:
    size = source.get("bytes") if "sample" in source else None
    return repr([size, *(source.get(key) for key in _CONTENT)])


def _changes(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[str]:
    """Sources are matched by name, then by content (renamed ones), then by file name (those of a moved folder)."""
    left = list(before)
    matched: dict[int, dict[str, Any]] = {}
    for matches in (_same_name, _same_content, _same_file_name):
        for number, source in enumerate(after):
            found = next((old for old in left if number not in matched and matches(old, source)), None)
            if found is not None:
                matched[number] = found
                left.remove(found)
    texts = []
    for number, source in enumerate(after):
        if number not in matched:
            texts.append(f"{source['name']}: new")
        elif not _same_content(matched[number], source):
            texts.append(f"{source['name']}: {_change(matched[number], source)}")
    texts += [f"{source['name']}: no longer there" for source in left]
    return texts or ["the same files, read in another order"]


def _same_name(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["name"] == other["name"])


def _same_file_name(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return Path(one["name"]).name == Path(other["name"]).name


def _same_content(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return _content(one) == _content(other)


def _change(old: dict[str, Any], new: dict[str, Any]) -> str:
    rows, were = new.get("rows"), old.get("rows")
    if isinstance(rows, int) and isinstance(were, int) and rows != were:
        more = rows - were
        unit = "row" if abs(more) == 1 else "rows"
        return f"{abs(more)} {unit} {'more' if more > 0 else 'fewer'} ({rows}, were {were})"
    if "first" in new:
        return "another first row"
    if "any_order" in new and "any_order" in old:
        reordered = new["any_order"] == old["any_order"]
        return "the same rows in another order" if reordered else "same number of rows, other content (edited)"
    if "sample" in new and all(new[key] == old.get(key) for key in ("sample", "bytes")):
        return "saved anew, with the same rows as far as a sample of them shows"
    return "same number of rows, other content (edited or reordered)"
