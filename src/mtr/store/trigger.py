"""A file in output_dir that asks a run for a checkpoint: `touch RUN/save-now`. It is removed when that is done."""

from __future__ import annotations

import contextlib
from pathlib import Path

from mtr.store.marker import NAME as MARKER

NAME = "save-now"


def ask_for_checkpoint(output_dir: Path) -> None:
    """Make the file, where a run has begun."""
    if (output_dir / MARKER).is_file():
        with contextlib.suppress(OSError):
            (output_dir / NAME).touch()


class Trigger:
    """Of one run. A folder of this name asks for nothing, and nothing but the file itself is ever removed."""

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / NAME
        self._is_stuck = False
        """It cannot be removed, so it would ask after every step."""

    def is_there(self) -> bool:
        try:
            return not self._is_stuck and (self._path.is_symlink() or self._path.is_file())
        except OSError:
            return False

    def remove(self) -> None:
        try:
            if self._path.is_symlink() or self._path.is_file():
                self._path.unlink()
        except OSError:
            self._is_stuck = True
