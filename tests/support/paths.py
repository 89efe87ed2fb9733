"""Where things lie, beside the tests and beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


QUICKSTART = ROOT / "recipes" / "quickstart"


SHARED = ROOT.parent / "shared"
"""Real tokenizers and conversations, where this checkout has them beside it."""


needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared with tokenizers and data")
