"""Small runs, and what a run left in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mtr.recipe.loading import load_recipe
from mtr.store.checkpoints import find_checkpoint, step_of
from mtr.store.manifest import find_damage, write_manifest
from mtr.store.marker import Marker, read_marker
from mtr.training.loop import train
from support.paths import QUICKSTART


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


def trained_run(folder: Path, **sections: Any) -> Path:
    """A run of three steps from the quickstart's base, which answers otherwise than the base; `sections` change it."""
    raw: dict[str, Any] = {
        "model": {"name_or_path": str(QUICKSTART / "base"), "dtype": "float32"},
        "data": {"train": str(QUICKSTART / "train.jsonl")},
        "lora": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "sequence": {"strategy": "single_pass"},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 3,
            "conversations_per_step": 8,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
        },
    }
    for name, keys in sections.items():
        raw[name] = {**(raw.get(name) or {}), **keys} if isinstance(keys, dict) else keys
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    train(load_recipe(folder / "recipe.yaml"))
    return folder / "run"
