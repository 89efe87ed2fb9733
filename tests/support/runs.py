"""What a run left in its folder."""

from __future__ import annotations

import json
from pathlib import Path

from mtr.store.checkpoints import find_checkpoint, step_of
from mtr.store.manifest import find_damage, write_manifest
from mtr.store.marker import Marker, read_marker


def marker_of(output_dir: Path) -> Marker:
    marker = read_marker(output_dir)
    assert marker is not None
    return marker


def good_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint of the run, and what is wrong with newer ones."""
    return find_checkpoint(output_dir, marker_of(output_dir))


def damage_of(checkpoint: Path) -> str | None:
    return find_damage(checkpoint, step_of(checkpoint), marker_of(checkpoint.parent).run)


def sign_again(checkpoint: Path) -> None:
    """Make a changed checkpoint one that its manifest calls good."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    write_manifest(checkpoint, manifest["run"], manifest["step"])
