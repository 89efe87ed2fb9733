"""Why something could not be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError

from mtr.errors import one_line


def is_write_error(error: Exception) -> bool:
    """Whether it comes from the file system. safetensors and tokenizers, written in Rust, raise types of their own."""
    return isinstance(error, (OSError, SafetensorError)) or "os error" in str(error)


def save_problem(error: Exception, folder: Path) -> str:
    """Why something could not be written, with the free space that is left."""
    text = (getattr(error, "strerror", None) or one_line(error))[:200]
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return text
    return f"{text}; {free / 2**20:,.0f} MiB free in {folder}"
