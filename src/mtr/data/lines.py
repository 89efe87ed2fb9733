"""JSON lines, plain or compressed: where each line begins, and what it said when the file was opened.

Of a line 12 bytes are kept in memory, whatever its length: its offset, and the checksum of its text.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mtr.data.json_text import MOST_BRACKETS, MOST_ROW, NestedTooDeeplyError, parse_json
from mtr.data.origin import Origin
from mtr.errors import RowError, UserError

Ints = NDArray[np.int64]
Checksums = NDArray[np.uint32]
CHUNK = 1 << 22
"""Bytes read at a time when looking for lines."""
MOST_LEFT_OUT = 1 << 28
"""Bytes after which the end of a line that is too long is not looked for any more."""
BLOCK = 1 << 18
"""Bytes of text that are compressed together, and decompressed to read one row."""


@dataclass(frozen=True)
class Lines:
    """The lines of a text that are not blank."""

    offsets: Ints
    """Of each line, the byte at which it begins."""
    checksums: Checksums
    """Of each line, CRC-32 of its text without the line break."""
    numbers: Ints | None
    """Of each line, its number counted from 0; None if no line is blank."""

    def __len__(self) -> int:
        return len(self.offsets)

    def number(self, index: int) -> int:
        """Of the line in the file, counted from 1."""
        return 1 + int(index if self.numbers is None else self.numbers[index])


class LineFinder:
    """Makes Lines of pieces of text, in one pass."""

    def __init__(self) -> None:
        self._offsets: list[Ints] = [np.empty(0, np.int64)]
        self._checksums: list[Checksums] = [np.empty(0, np.uint32)]
        self._numbers: list[Ints] = [np.empty(0, np.int64)]
        self._at = 0
        self._number = 0

    def add(self, text: bytes, left_out: int = 0) -> None:
        """
        Args:
            text: whole lines; the last one of a file need not end in a line break.
            left_out: bytes of the one line that it is, where that is longer than MOST_ROW.
        """
        lines = text.removesuffix(b"\n").split(b"\n")
        sizes = np.fromiter(map(len, lines), np.int64, len(lines))
        starts = np.cumsum(sizes + 1) - sizes - 1
        blank = [] if left_out else _find_blank(text, lines, starts)
        if len(blank) < len(lines):
            if sizes.max() > MOST_ROW:
                lines = [line[: MOST_ROW + 1] for line in lines]
            checksums = np.fromiter(map(zlib.crc32, lines), np.uint32, len(lines))
            self._offsets.append(self._at + np.delete(starts, blank))
            self._checksums.append(np.delete(checksums, blank))
            self._numbers.append(self._number + np.delete(np.arange(len(lines)), blank))
        self._number += len(lines)
        self._at += len(text) + left_out

    def lines(self) -> Lines:
        """All lines that were added."""
        numbers = np.concatenate(self._numbers)
        blank = self._number > len(numbers)
        return Lines(np.concatenate(self._offsets), np.concatenate(self._checksums), numbers if blank else None)


def _find_blank(text: bytes, lines: list[bytes], starts: Ints) -> list[int]:
    """Which lines are blank; only those whose first byte can be white space are looked at."""
    firsts = np.frombuffer(text + b"\n", np.uint8)[starts]
    return [i for i in np.flatnonzero(firsts <= ord(" ")).tolist() if not lines[i].strip()]


def whole_lines(path: Path, file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """The text in pieces of about `size` bytes that end at the end of a line, each with 0.

    Of a line longer than MOST_ROW only the beginning is held: it is a piece of its own, with the number of bytes that
    are left out.

    Raises:
        UserError: a line is so long that this is no file of lines.
    """
    rest: list[bytes] = []  # the beginning of a line that goes on
    held = left_out = 0
    while chunk := file.read(size):
        if held > MOST_ROW:
            over, newline, chunk = chunk.partition(b"\n")
            left_out += len(over) + len(newline)
            if left_out > MOST_LEFT_OUT:
                raise UserError(
                    f"{path}: a line is longer than {MOST_LEFT_OUT >> 20} MiB; JSON lines have one row a line"
                )
            if not newline:
                continue
            yield b"".join(rest), left_out
            rest, held, left_out = [], 0, 0
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            yield b"".join([*rest, head, newline]), 0
            rest, held = [], 0
        rest.append(tail)
        held += len(tail)
    if last := b"".join(rest):
        yield last, left_out


class JsonLines:
    """A JSON-lines file, read by byte offsets. Every row has exactly the fields that its line has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.origin = Origin.of_file(path)
        finder = LineFinder()
        with path.open("rb") as file:
            for text, left_out in whole_lines(path, file, CHUNK):
                finder.add(text, left_out)
        self.lines = finder.lines()

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> Any:
        """
        Raises:
            RowError: the line is not JSON, or too long.
            UserError: the line is no longer what it was when the file was opened.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(int(self.lines.offsets[index]))
                line = file.readline(MOST_ROW + 1)
        except OSError as error:
            raise self._changed(f"it cannot be read any more ({error.strerror or error})") from None
        text = line.removesuffix(b"\n")
        if zlib.crc32(text) != self.lines.checksums[index]:
            raise self._changed(f"line {self.lines.number(index)} is another one")
        return parse_line(text, self.where(index))

    def _changed(self, how: str) -> UserError:
        return UserError(
            f"{self._path} was changed while it was used: {how}; put it back as it was, and a run can continue with "
            "--resume; or start over with the new data"
        )

    def where(self, index: int) -> str:
        return f"{self._path}, line {self.lines.number(index)}"


class CompressedLines:
    """A compressed JSON-lines file, held in blocks of lines that are compressed again, for random access."""

    def __init__(self, path: Path, file: Any) -> None:
        """
        Args:
            file: gives the decompressed text.
        """
        import pyarrow

        self._path = path
        self.origin = Origin.of_file(path)
        self._blocks: list[tuple[bytes, int]] = []
        starts: list[int] = []
        finder, at = LineFinder(), 0
        for text, left_out in whole_lines(path, file, BLOCK):
            finder.add(text, left_out)
            starts.append(at)
            at += len(text) + left_out
            self._blocks.append((pyarrow.compress(text, codec="zstd", asbytes=True), len(text)))
        self.lines = finder.lines()
        self._starts = np.array(starts, np.int64)

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> Any:
        """
        Raises:
            RowError: the line is not JSON, or too long.
        """
        import pyarrow

        offset = self.lines.offsets[index]
        block = int(np.searchsorted(self._starts, offset, side="right")) - 1
        text = io.BytesIO(pyarrow.decompress(*self._blocks[block], codec="zstd", asbytes=True))
        text.seek(int(offset - self._starts[block]))
        return parse_line(text.readline().removesuffix(b"\n"), self.where(index))

    def where(self, index: int) -> str:
        return f"{self._path}, line {self.lines.number(index)}"


def parse_line(text: bytes, where: str) -> Any:
    """The row that a line spells.

    Raises:
        RowError: not JSON, or too large; its `sha256` is that of the text.
    """
    try:
        if len(text) > MOST_ROW:
            bad = RowError(where, f"longer than {MOST_ROW >> 20} MiB", "; split or remove the row")
        elif text.count(b"{") + text.count(b"[") > MOST_BRACKETS:
            bad = RowError(where, f"more than {MOST_BRACKETS:,} lists and objects", "; split or remove the row")
        else:
            return parse_json(text)
    except NestedTooDeeplyError as error:
        bad = RowError(where, str(error))
    except ValueError as error:
        bad = RowError(where, "not valid JSON", f": {error}")
    bad.sha256 = hashlib.sha256(text).hexdigest()
    raise bad
