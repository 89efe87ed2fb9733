"""One thing that `mtr doctor` found out."""

from __future__ import annotations

from dataclasses import dataclass
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
