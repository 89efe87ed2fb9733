"""manifest.json of a checkpoint: the run and the step that it belongs to, and size and SHA-256 of every file in it.

It tells whether a checkpoint is what was written, and that mtr wrote it: only then may mtr remove it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtr import __version__
from mtr.files import checksum

_NAME = "manifest.json"
_NEEDED = ("training_state.json", "training_state.safetensors")


def write_manifest(folder: Path, run: str, step: int) -> None:
    """Of all files that are in the folder now."""
    files = {name: _measure(folder / name) for name in _files(folder) if name != _NAME}
    manifest = {"mtr": __version__, "run": run, "step": step, "files": files}
    (folder / _NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def find_damage(folder: Path, step: int, run: str) -> str | None:
    """What differs from the manifest; None for a good checkpoint.

    Args:
        step: by the folder's name.
        run: that the checkpoint has to belong to.
    """
    manifest = _read(folder)
    if manifest is None:
        return f"it has no readable {_NAME}"
    if folder.is_symlink():
        return "it is a symbolic link, which mtr does not write"
    if manifest["run"] != run:
        return "it belongs to another run"
    if manifest["step"] != step:
        return f"it is checkpoint-{manifest['step']} under another name"
    if unlisted := [name for name in _NEEDED if name not in manifest["files"]]:
        return f"its {_NAME} does not list {unlisted[0]}"
    for name, wanted in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, not {wanted['bytes']:,}"
        if _measure(path) != wanted:
            return f"the content of {name} has changed"
    return None


def not_ours(folder: Path, runs: tuple[str, ...]) -> str | None:
    """Why mtr must not remove this folder; None if it is a checkpoint of one of these runs and holds nothing else."""
    manifest = _read(folder)
    if folder.is_symlink():
        return "is a symbolic link"
    if manifest is None or manifest["run"] not in runs:
        return f"has no {_NAME} of this run"
    added = sorted(set(_files(folder)) - {*manifest["files"], _NAME})
    return f"holds {added[0]}, which mtr did not write" if added else None


def _read(folder: Path) -> dict[str, Any] | None:
    """None if it is not a manifest."""
    try:
        manifest = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        files = manifest["files"]
        known = isinstance(manifest["run"], str) and isinstance(manifest["step"], int) and files
        complete = known and all(isinstance(f["bytes"], int) and isinstance(f["sha256"], str) for f in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if complete else None


def _files(folder: Path) -> list[str]:
    """Every file below the folder, by its path in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _measure(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": checksum(path)}
