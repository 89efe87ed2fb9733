"""The files of a tokenizer beside the weights that were trained with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtr.files import replace_file


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """What `AutoTokenizer` loads, with the original chat template.

    transformers writes `tokenizer.json` with a line for every part of every merge, which takes more than twice the
    bytes: the same content is written on one line.
    """
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer.json"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and path.is_file():
        replace_file(path, backend.to_str(pretty=False))
