"""One thing that `mtr doctor` found out."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    section: str
    """Under which heading it is shown."""
    name: str
    state: Literal["ok", "none", "problem"]
    """none: it is not there, and training works without it; problem: training does not work as long as it is so."""
    text: str
    """What there is, or what is wrong and how to mend it."""
    value: Any = None
    """For `--json`."""


def shareable(text: str) -> str:
    """What other libraries say, as it may be shown to strangers: without home and working folder, and without the name
    and password that a URL may hold.
    """
    for folder, sign in ((home(), "~"), (_working_folder(), ".")):
        if folder is not None and folder != Path("/"):
            text = re.sub(rf"{re.escape(str(folder))}(?![\w.-])", sign, text)
    return re.sub(r"//[^/@\s]+@", "//", text)


def home() -> Path | None:
    """The home folder; None for a user without one, as in many containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def _working_folder() -> Path | None:
    try:
        return Path(os.getcwd())
    except OSError:  # it was removed
        return None
