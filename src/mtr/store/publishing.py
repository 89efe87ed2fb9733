"""How the result of a run gets into its folder: written beside it, then moved into place file by file.

The marker knows the sums of all files before the first one is moved, so a run that is killed in between still knows
which of them are its own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mtr.files import checksum
from mtr.store.checkpoints import partial_of, set_aside, sync
from mtr.store.marker import read_marker


def publish(output_dir: Path, write: Callable[[Path], None]) -> list[str]:
    """Put files into the folder of a run, over those of an earlier result.

    Args:
        write: writes them into an empty folder that it is given.

    Returns:
        What was in the way and was not mtr's: it is kept under another name.

    Raises:
        OSError: they cannot be written. What was there before still is, file by file.
    """
    partial = partial_of(output_dir, "export")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        names = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
        marker = read_marker(output_dir)
        assert marker is not None
        foreign = marker.foreign(output_dir, names)
        marker.with_files({name: checksum(partial / name) for name in names}).write(output_dir)
        kept = [f"{name} was not written by mtr; it is kept as {set_aside(output_dir / name).name}" for name in foreign]
        for name in names:
            sync(partial / name)
            (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / name, output_dir / name)
        sync(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return kept
