"""The checkpoints of a run as folders: which is the newest good one, how one is put in place, and what may be removed.

A checkpoint is written under a hidden name and renamed, and renamed again before it is removed, so a folder with its
final name was complete once. A folder is removed only if its manifest shows that this run wrote all that is in it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from mtr.errors import UserError
from mtr.store.manifest import find_damage, not_ours
from mtr.store.marker import LOGS, NAME, RESULTS, Marker

_NAME = re.compile(r"checkpoint-(\d+)$")
_HIDDEN = re.compile(r"\.(checkpoint-\d+|checkpoint-\d+\.removed|export)\.partial$")

NOT_OURS = "was not written by mtr, or has been changed since"


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was made."""
    match = _NAME.search(folder.name)
    assert match is not None
    return int(match[1])


def steps_in(output_dir: Path) -> list[int]:
    """Of the folders that are named as checkpoints, whatever is in them; the newest is the last."""
    return [step for step, _ in _checkpoints(output_dir)]


def partial_of(output_dir: Path, name: str) -> Path:
    """Where something is written before it gets its name."""
    return output_dir / f".{name}.partial"


def find_checkpoint(output_dir: Path, marker: Marker) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint, and what is wrong with each newer one.

    Args:
        marker: of the run. What is left of runs that it overwrote is not looked at.

    Raises:
        UserError: there are checkpoints, and none is good.
    """
    notes: list[str] = []
    for step, folder in _checkpoints(output_dir)[::-1]:
        if not not_ours(folder, marker.replaced):
            continue
        damage = find_damage(folder, step, marker.run)
        if damage is None:
            return folder, notes
        notes.append(f"{folder.name} is damaged ({damage})")
    if notes:
        raise UserError(
            f"{output_dir}: no good checkpoint: {'; '.join(notes)}. Restore one of them, or start over with --overwrite"
        )
    return None, []


def newest(output_dir: Path, run: str) -> Path | None:
    """The newest good checkpoint of a run, if there is one."""
    good = (folder for step, folder in _checkpoints(output_dir)[::-1] if find_damage(folder, step, run) is None)
    return next(good, None)


def place(partial: Path, final: Path, run: str) -> None:
    """Give a complete checkpoint its name. What has the name already is kept under another, if it is not this run's."""
    if final.is_symlink() or final.exists():
        if not_ours(final, (run,)):
            set_aside(final)
        else:
            _remove(final)
    partial.rename(final)
    sync(final.parent)


def rotate(output_dir: Path, step: int, keep: int | None, best: int | None, run: str) -> None:
    """Remove the oldest checkpoints beyond `keep`, but not those that are newer than `step`, which are damaged.

    Args:
        best: step of a checkpoint that is kept besides the newest ones.
    """
    if keep is None:
        return
    older = [found for found in _checkpoints(output_dir) if found[0] <= step]
    for number, old in older[:-keep]:
        if number != best and not not_ours(old, (run,)):
            _remove(old)


def remove_partial(output_dir: Path) -> None:
    """Remove what a killed run left half written or half deleted."""
    for folder in _partial(output_dir):
        shutil.rmtree(folder, ignore_errors=True)


def protected(output_dir: Path, marker: Marker) -> list[str]:
    """What `remove_run` would leave because mtr did not write it, although the new run needs its name."""
    found = marker.foreign(output_dir, [*LOGS, *RESULTS, *marker.files])
    problems = [f"{name} {NOT_OURS}" for name in dict.fromkeys(found)]
    runs = (*marker.replaced, marker.run)
    checkpoints = ((folder, not_ours(folder, runs)) for _, folder in _checkpoints(output_dir))
    return problems + [f"{folder.name} {problem}" for folder, problem in checkpoints if problem]


def remove_run(output_dir: Path, marker: Marker, names: Iterable[str]) -> None:
    """Remove the checkpoints of the runs that this marker knows, and files of theirs.

    Args:
        names: of the files. One that mtr did not write, or that has been changed since, stays.
    """
    runs = (*marker.replaced, marker.run)
    for _, folder in _checkpoints(output_dir)[::-1]:
        if not not_ours(folder, runs):
            _remove(folder)
    remove_partial(output_dir)
    for name in names:
        if marker.wrote(output_dir, name):
            (output_dir / name).unlink()


def set_aside(path: Path) -> Path:
    """Give something that is not mtr's another name, and return that."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.kept-{number}")):
        number += 1
    return path.rename(aside)


def is_unused(output_dir: Path) -> bool:
    """Whether the folder holds nothing but what a run leaves that was killed before its first file."""
    own = (f".{NAME}.partial", ".mtr-lock")
    return not output_dir.is_dir() or all(path.name.startswith(own) for path in output_dir.iterdir())


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    return sorted((int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := _NAME.search(p.name)) and p.is_dir())


def _partial(output_dir: Path) -> Iterator[Path]:
    return (path for path in output_dir.glob(".*.partial") if _HIDDEN.search(path.name) and not path.is_symlink())


def _remove(folder: Path) -> None:
    """Renamed first: an incomplete checkpoint must not have the name of a complete one."""
    renamed = partial_of(folder.parent, f"{folder.name}.removed")
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    shutil.rmtree(renamed)
