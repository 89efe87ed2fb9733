"""The files that rows come from, as they were when they were opened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Origin:
    """What is known of a source's files without reading them again."""

    bytes: int = 0
    """Of all files."""
    modified: int = 0
    """Of the file that was modified last, in nanoseconds since 1970."""
    sha256: str | None = None
    """Of the file's bytes, where it is read wholly into memory."""
    own: str | None = None
    """The fingerprint that `datasets` stored with the rows."""
    mapped: tuple[tuple[str, int, int, int], ...] = ()
    """Files that stay mapped into memory: path, inode, bytes, and time of modification in nanoseconds."""

    @classmethod
    def of_file(cls, path: Path, sha256: str | None = None) -> Origin:
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, sha256)

    @classmethod
    def of_mapped(cls, paths: Iterable[str], own: str | None) -> Origin:
        mapped = tuple((path, *_status(path)) for path in paths)
        return cls(sum(m[2] for m in mapped), max((m[3] for m in mapped), default=0), own=own, mapped=mapped)

    def find_change(self) -> str | None:
        """A mapped file whose content was written over; one that was replaced or deleted stays mapped as it was."""
        for path, inode, *status in self.mapped:
            try:
                now = _status(path)
            except OSError:
                continue
            if now[0] == inode and list(now[1:]) != status:
                return path
        return None


def _status(path: str) -> tuple[int, int, int]:
    status = Path(path).stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
