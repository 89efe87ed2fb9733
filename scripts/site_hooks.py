"""Hooks of MkDocs: links that leave docs/ lead into the repository, which the site is not; there they become text."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page without the links that lead above docs/."""
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
