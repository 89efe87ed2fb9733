"""How large the model of a recipe is, and what else its config says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """What its config says."""

    config: Any = None
    parameters: int = 0
    trainable: int = 0
    layers: int = 0
    routed: bool = False
    """To experts."""
    reason: str | None = None
    """Why it is trained per turn; None if it is not, or if the recipe says so."""
    inexact: str | None = None
    """Why one pass would not be exact, where the recipe says that turns are trained one by one."""
    missing: str | None = None
    """Why FLOPs, memory and time are not known."""
