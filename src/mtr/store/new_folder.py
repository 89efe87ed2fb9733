"""A new folder that appears complete or not at all: it is written under a hidden name beside its place, then renamed.

.NAME.partial/.mtr-lock   held by whoever is writing; what a process left that was killed is known by it
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from mtr.errors import SaveError, UserError
from mtr.store import lock
from mtr.store.checkpoints import sync
from mtr.store.problems import is_write_error, save_problem


@contextlib.contextmanager
def new_folder(output: Path, key: str) -> Iterator[Path]:
    """A hidden folder to write into. It becomes `output` when the block ends, and is removed when it fails.

    Args:
        output: does not exist yet, or is an empty folder.
        key: the option or key that names it, for messages.

    Raises:
        UserError: `output` is taken, or another process is writing it.
        SaveError: it cannot be written.
    """
    output = output.resolve()
    check_free(output, key)
    partial = output.with_name(f".{output.name}.partial")
    _check_own(partial, key)
    held = lock.RunLock(partial, f"{key}: another process is writing {output}")
    try:
        held.take()
        _empty(partial)
        try:
            yield partial
            for path in sorted(partial.rglob("*")):
                sync(path)
            check_free(output, key)
            partial.rename(output)
            (output / lock.NAME).unlink(missing_ok=True)
            sync(output.parent)
        except Exception as error:
            if not is_write_error(error):
                raise
            raise SaveError(f"{key}: {output} cannot be written: {save_problem(error, output.parent)}") from None
        finally:
            if partial.exists():
                _empty(partial)
    finally:
        held.release()
        with contextlib.suppress(OSError):
            partial.rmdir()


def check_free(output: Path, key: str) -> None:
    """
    Raises:
        UserError: there is something at this path already, or nothing can be renamed to it.
    """
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UserError(f"{key}: {output} is not empty; remove it, or name another folder")
    if output.is_mount():
        raise UserError(f"{key}: {output} is a mount point, where no folder can be put as a whole; name a folder in it")


def _check_own(partial: Path, key: str) -> None:
    """
    Raises:
        UserError: what has the hidden name was not left by an earlier try.
    """
    known = partial.is_dir() and not partial.is_symlink()
    known = known and ((partial / lock.NAME).is_file() or not any(partial.iterdir()))
    if (partial.exists() or partial.is_symlink()) and not known:
        raise UserError(f"{key}: {partial} is in the way, and mtr did not write it; rename it, or name another folder")


def _empty(partial: Path) -> None:
    """Remove what is in it, but for the lock."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != lock.NAME:
            path.unlink(missing_ok=True)
