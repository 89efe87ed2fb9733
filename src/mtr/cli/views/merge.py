"""The result of `mtr merge` in words."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from mtr.console import labelled


def show_merge(result: dict[str, Any], out: Console) -> None:
    """Print what `mtr.training.merge.merge` returned."""
    out.print(
        f"merged logits equal the adapter's within {result['difference']:.1e} of the largest logit in float32 "
        f"(tolerance {result['tolerance']:.0e}); as {result['dtype']} within {result['after_rounding']:.1e}"
    )
    out.print(labelled("merged", result["output"]))
