"""Rich consoles, set up once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from rich.console import Console

if TYPE_CHECKING:
    pass


def console(file: TextIO | None = None) -> Console:
    """On standard error, if no file is given."""
    return Console(file=file or sys.stderr, soft_wrap=True, highlight=False)
