"""Files of a checkpoint's processor, which makes images and text ready for a model: they lie beside the tokenizer's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

_TEMPLATES = ("chat_template.json", "processor_config.json")
_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")


def processor_template(name: str, revision: str | None) -> str | None:
    """The chat template of a processor, for a tokenizer that has none.

    Args:
        name: of the model, a folder or a Hub id.
    """
    for file in _TEMPLATES:
        if (path := _find(name, revision, file)) is None:
            continue
        try:
            template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if isinstance(template, str) and template:
            return template
    return None


def copy_processor(name: str, revision: str | None, folder: Path) -> None:
    """Beside weights that were made from a model's, so that images can still be made ready for them."""
    for file in _FILES:
        if (path := _find(name, revision, file)) is not None and not (folder / file).exists():
            shutil.copyfile(path, folder / file)


def _find(name: str, revision: str | None, file: str) -> Path | None:
    from transformers.utils import cached_file

    if Path(name).is_dir():
        return path if (path := Path(name) / file).is_file() else None
    try:
        found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return Path(found) if found else None
