"""What proves that a folder is a run of mtr, and which files in it mtr wrote.

    mtr-run.json   {"mtr": version, "format": 1, "run": id, "replaced": [ids], "files": {name: [SHA-256, ...]}}

The marker is the first file of a run. A file that grows (metrics.jsonl) is listed without sums. The others are listed
with the sums of all contents that were written under their names, before they are moved into place: whatever else is
found under such a name is the user's. Checkpoints name the run that they belong to in their manifests.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mtr import __version__
from mtr.errors import UserError, one_line
from mtr.files import checksum, replace_file

NAME = "mtr-run.json"
_FORMAT = 1
LOGS = ("recipe.yaml", "environment.json", "metrics.jsonl", "rejects.jsonl", "generations.jsonl")
"""Written when a run begins and while it goes on."""
RESULTS = ("README.md", "config.json", "adapter_config.json", "adapter_model.safetensors", "model.safetensors")
"""The main files of a result. A run that finds one of them that is not its own does not begin; whatever else turns out
to be in the way of its result is kept under another name."""


@dataclass(frozen=True)
class Marker:
    """Immutable; `write` puts it into the folder."""

    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    replaced: tuple[str, ...] = ()
    """Runs that were in the folder before, and were overwritten."""
    files: Mapping[str, list[str]] = field(default_factory=dict)
    """The SHA-256 sums that mtr wrote under a name; none for files that grow."""
    mtr: str = __version__
    format: int = _FORMAT

    def write(self, folder: Path) -> None:
        """Complete or not at all."""
        replace_file(folder / NAME, json.dumps(asdict(self), indent=2) + "\n")

    def with_files(self, sums: Mapping[str, str | None]) -> Marker:
        """With the sums of contents that are about to be moved into place; None for files that grow."""
        files = {name: list(known) for name, known in self.files.items()}
        for name, found in sums.items():
            files.setdefault(name, [])
            if found is not None and found not in files[name]:
                files[name].append(found)
        return replace(self, files=files)

    def successor(self) -> Marker:
        """Of the run that overwrites this one: it knows what to remove."""
        return Marker(replaced=(*self.replaced, self.run), files=self.files)

    def wrote(self, folder: Path, name: str) -> bool:
        """Whether mtr wrote the file of this name, and it has not been changed since."""
        path = folder / name
        if name not in self.files or path.is_symlink() or not path.is_file():
            return False
        sums = self.files[name]
        return not sums or checksum(path) in sums

    def foreign(self, folder: Path, names: Iterable[str]) -> list[str]:
        """Those of these names that are taken by something that mtr did not write."""
        return [name for name in names if os.path.lexists(folder / name) and not self.wrote(folder, name)]


def read_marker(folder: Path) -> Marker | None:
    """None if the folder has no marker, so that nothing shows it to be a run.

    Raises:
        UserError: the marker cannot be understood.
    """
    path = folder / NAME
    if path.is_symlink() or not path.exists():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        marker = Marker(raw["run"], tuple(raw["replaced"]), dict(raw["files"]), raw["mtr"], raw["format"])
        _check(marker)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not readable as the marker of a run ({one_line(error) or type(error).__name__}); restore it, or "
            "name another folder in training.output_dir"
        ) from None
    if marker.format > _FORMAT:
        raise UserError(f"{path}: made by mtr {marker.mtr}, which is newer than {__version__}; use that version")
    return marker


def _check(marker: Marker) -> None:
    texts: list[Any] = [marker.run, marker.mtr, *marker.replaced, *marker.files]
    sums = list(marker.files.values())
    if not all(isinstance(text, str) and text for text in texts) or not isinstance(marker.format, int):
        raise ValueError("its values are not those of a marker")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in marker.files):
        raise ValueError("it names files outside the folder")
    if not all(isinstance(known, list) and all(isinstance(one, str) for one in known) for known in sums):
        raise ValueError("its sums are not lists of texts")
