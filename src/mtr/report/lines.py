"""The lines of a file of a run, as they are: the last one may be cut where a run is at work or was killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mtr.errors import UserError


def lines_of(path: Path, mend: str) -> Iterator[bytes]:
    """None of a file that is not there.

    Args:
        mend: what to do about something else of that name.

    Raises:
        UserError: it cannot be read.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{path}: not a file; {mend}")
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
